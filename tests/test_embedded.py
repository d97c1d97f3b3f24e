"""The checkpoint that comes along: its real weights hear, see and refuse noise on what training never met."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apps import embedded
from apps.embedded import CHECKPOINT, TRY, embedded_bundle
from quant.turn import read_turns
from runtime import vouched
from runtime.audio import Wave
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.events import AudioChunk, ReplyDone
from runtime.prompt import Part, Text
from tests.command_line import run
from tests.test_cli import Terminal

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
    done = edgeomni(cache, "chat", "hello!", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["text"].strip() == "hello how can i help"
    assert "so Nano answers, which is built in" in done.stderr and "Traceback" not in done.stderr


def test_a_bundle_that_is_not_there_is_not_taken_for_something_said(cache):
    done = edgeomni(cache, "chat", "./no-such-bundle")
    assert done.returncode == 2 and "no-such-bundle" in done.stderr and "Traceback" not in done.stderr


def test_the_embedded_bundle_is_made_once(engine, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    manifest = embedded_bundle() / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert embedded_bundle() == manifest.parent and manifest.stat().st_mtime_ns == before


def test_a_second_start_hashes_nothing_and_still_notices_a_changed_checkpoint(engine, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(vouched, "_known", {})  # as in a process of its own, which knows nothing by another cache
    bundle = embedded_bundle()
    monkeypatch.setattr(vouched, "_known", {})  # as in another one after it
    read: list[Path] = []
    inner = vouched.sha256_of
    monkeypatch.setattr(vouched, "sha256_of", lambda path: read.append(path) or inner(path))
    assert embedded_bundle() == bundle and not read
    changed = tmp_path / "checkpoint"
    changed.mkdir()
    for name, content in (("model.safetensors", b"weights"), ("config.json", b"{}")):
        (changed / name).write_bytes(content)
        os.utime(changed / name, (1e9, 1e9))
    monkeypatch.setattr("apps.embedded.CHECKPOINT", changed)
    monkeypatch.setattr(vouched, "SETTLED_NS", -1)  # as if it lay there for long
    names = [embedded._name()]
    assert embedded._name() == names[0] and len(read) == 2
    with (changed / "model.safetensors").open("r+b") as file:
        file.write(b"others!")
    os.utime(changed / "model.safetensors", (1e9, 1e9))  # of the same size and time
    names.append(embedded._name())
    assert len(set(names)) == 2 and read[2:] == [changed / "model.safetensors"]


def test_what_the_greeting_says_to_try_is_answered_rightly(engine):
    answers = [ask(engine, [Text(question)], Choices(greedy=True))[0].text.strip() for question in TRY]
    assert answers == [
        "seven plus five is twelve",
        "timer set for ten minutes",
        "the kitchen light is red",
        "the capital of japan is tokyo",
        "my name is nano",
    ]


def test_at_a_terminal_the_embedded_model_is_introduced_with_what_to_try(engine, cache):
    person = Terminal("chat", "nano", cache=cache)
    seen = person.expect("/help for commands")
    assert "Nano (built in)" in seen and "Try:" in seen and all(question in seen for question in TRY)
    person.expect("> ")
    person.type("/quit")
    assert person.leave() == 0


def test_nano_is_a_name_wherever_a_bundle_is_named(engine, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(engine.folder.parents[1]))
    question, written = SAMPLES / "question.flac", engine.folder.parent / "written.wav"
    manifest = json.loads(run(capsys, monkeypatch, "inspect", "nano", "--json").out)
    assert manifest["bundle"] == str(engine.folder)
    heard = {run(capsys, monkeypatch, "transcribe", *bundle, question).out for bundle in ((), ("nano",))}
    assert len(heard) == 1 and len(heard.pop().split()) > 3
    said = [
        run(capsys, monkeypatch, "say", *bundle, "hello there", written, "--seed", 0, "--json").out
        for bundle in ((), ("nano",))
    ]
    assert [json.loads(record)["speech"] for record in said] == 2 * [str(written)]
    record = json.loads(run(capsys, monkeypatch, "chat", "nano", "hello", "--json").out)
    assert record["text"].strip() == "hello how can i help"
    listed = json.loads(run(capsys, monkeypatch, "list", "--json").out)["bundles"]
    assert [bundle["precision"].split(",")[0] for bundle in listed if bundle["path"] == "nano"] == ["int8"]


def test_without_weights_the_message_says_where_they_should_lie(tmp_path, monkeypatch):
    monkeypatch.setattr("apps.embedded.CHECKPOINT", tmp_path)
    with pytest.raises(EdgeOmniError, match="no weights lie in"):
        embedded_bundle()


def test_the_checkpoint_takes_at_most_forty_megabytes():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 40_000_000
