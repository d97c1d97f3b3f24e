"""The checkpoint that comes along: its real weights hear, see and refuse noise on what training never met."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apps.embedded import CHECKPOINT, embedded_bundle
from quant.turn import read_turns
from runtime.audio import Wave
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.events import AudioChunk, ReplyDone
from runtime.prompt import Part, Text

SAMPLES = CHECKPOINT.parent / "samples"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def engine(cache: Path) -> Engine:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    try:
        return Engine(embedded_bundle())
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def ask(engine: Engine, parts: list[Part], choices: Choices = Choices()) -> tuple[ReplyDone, list[Wave]]:  # noqa: B008
    """The end of the reply and its speech."""
    events = list(Conversation.open(engine, seed=0).reply(parts, choices))
    assert isinstance(events[-1], ReplyDone)
    return events[-1], [event.samples for event in events if isinstance(event, AudioChunk)]


def edgeomni(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "apps", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
    )


def test_held_out_sentences_and_pictures_are_answered_by_the_quantized_bundle(engine):
    right = []
    for turn in read_turns(SAMPLES / "turns.jsonl"):
        parts: list[Part] = [engine.look(image) for image in turn.images]
        parts += [engine.hear(turn.audio)] if turn.audio else []
        parts += [Text(turn.text)] if turn.text else []
        done, _ = ask(engine, parts)
        right.append(done.text.strip() in turn.answers)
    # The figures of the model card are better than this; so few items need room.
    assert len(right) >= 32 and np.mean(right) > 0.6


def test_a_question_is_answered_aloud(engine):
    done, speech = ask(engine, [Text("what is two plus three")], Choices(spoken=True))
    assert done.text.strip() == "two plus three is five" and done.finish == "end"
    wave = np.concatenate(speech)
    assert 0.8 < len(wave) / done.timings.sampling_rate < 6 and 0.02 < float(np.sqrt(np.mean(wave**2))) < 0.5


@pytest.mark.parametrize("spoken", [False, True])
def test_noise_is_not_answered(engine, tmp_path, spoken):
    from runtime.audio import write_wav

    noise = 0.1 * np.random.default_rng(0).standard_normal(24000).astype(np.float32)
    write_wav(tmp_path / "noise.wav", noise, 16000)
    done, speech = ask(engine, [engine.hear(tmp_path / "noise.wav")], Choices(spoken=spoken))
    assert (done.text, done.finish, speech) == ("", "unaddressed", [])


def test_a_follow_up_is_answered_from_the_turn_before(engine):
    conversation = Conversation.open(engine, seed=0)
    answers = []
    for question in ("set a timer for ten minutes", "make it twenty"):
        *_, done = conversation.reply([Text(question)])
        assert isinstance(done, ReplyDone)
        answers.append(done.text.strip())
    assert answers == ["timer set for ten minutes", "timer set for twenty minutes"]


def test_chat_without_a_bundle_uses_the_embedded_model_and_says_so(engine, cache):
    done = edgeomni(cache, "chat", "hello", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["text"].strip() == "hello how can i help"
    assert "embedded model" in done.stderr and "Traceback" not in done.stderr


def test_a_bundle_that_is_not_there_is_not_taken_for_something_said(cache):
    done = edgeomni(cache, "chat", "./no-such-bundle")
    assert done.returncode == 2 and "no-such-bundle" in done.stderr and "Traceback" not in done.stderr


def test_the_embedded_bundle_is_made_once(engine, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    manifest = embedded_bundle() / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert embedded_bundle() == manifest.parent and manifest.stat().st_mtime_ns == before


def test_without_weights_the_message_says_where_they_should_lie(tmp_path, monkeypatch):
    monkeypatch.setattr("apps.embedded.CHECKPOINT", tmp_path)
    with pytest.raises(EdgeOmniError, match="no weights lie in"):
        embedded_bundle()


def test_the_checkpoint_takes_at_most_forty_megabytes():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 40_000_000
