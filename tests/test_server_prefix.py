"""A request that repeats an earlier conversation continues from what was read, and is answered as if it had not."""

import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps import one_pass
from apps.embedded import CHECKPOINT
from apps.server.answering import Answerer, Done, Started, Told
from apps.server.dialogue import Answered, Asked, Dialogue, Given, Heard, How, Said, Shown
from apps.server.kept import behind
from apps.server.metrics import Metrics
from apps.server.settings import Limits
from export import convert
from runtime.context import placed
from runtime.engine import Engine
from runtime.events import TextDelta
from runtime.sampling import SamplingOptions
from tests.serving import NAME, endless, nano, running, talker
from tests.test_server_chat import picture_part

SAMPLE = Path("export/nano/samples/espeak-000.flac").read_bytes()
OTHER = Path("export/nano/samples/espeak-001.flac").read_bytes()
DRAWN = How(max_new=8, sampling=SamplingOptions(temperature=1.5), seed=3)  # a small difference draws other words


def answerer(limits: Limits | None = None) -> Answerer:
    return Answerer(talker(), limits or Limits(), Metrics())


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The talker in floats. Activations of 8 bits round otherwise when positions are read in other pieces, with or
    without this server; of floats, a difference of a millionth draws no other word."""
    folder = tmp_path_factory.mktemp("floats") / "nano"
    planned, _ = one_pass.plan(CHECKPOINT, "cpu", None, random=False)
    convert.write(planned, folder)
    return endless(folder)


def answered(made_by: Answerer, dialogue: Dialogue, how: How = DRAWN) -> tuple[str, int, list[Told]]:
    """The text of an answer, how many positions of its prompt were reused, and all that was told."""
    told = [one for one in made_by.answer(dialogue, how) if one is not None]
    assert isinstance(told[0], Started) and isinstance(told[-1], Done)
    return "".join(one.text for one in told if isinstance(one, TextDelta)), told[0].cached, told


def png(red: int) -> bytes:
    url = picture_part(np.full((32, 32, 3), red, np.uint8))["image_url"]["url"]
    return b64decode(url.split(",")[1])


def test_conversations_in_a_row_are_answered_as_each_by_itself(floats: Engine):
    red, blue, one, two = Shown(png(200)), Shown(png(9)), Heard(SAMPLE), Heard(OTHER)
    conversations: list[tuple[str | None, list[tuple[Given, ...]]]] = [
        (None, [(Said("hello"),), (red, Said("what is it")), (one,)]),  # goes on, twice
        (None, [(Said("hello"),), (blue, Said("what is it"))]),  # another picture in its midst
        ("be brief", [(Said("hello"),)]),
        (None, [(one,), (Said("hello"),)]),
        (None, [(two,)]),  # another recording at its beginning
    ]
    warm, reused = Answerer(floats, Limits(), Metrics()), 0
    for system, asked in conversations:
        history: list[Asked | Answered] = []
        for parts in asked:
            history.append(Asked(parts))
            dialogue = Dialogue(system, tuple(history))
            text, cached, _ = answered(warm, dialogue)
            assert text == answered(Answerer(floats, Limits(), Metrics()), dialogue)[0]
            reused += cached > 8
            history.append(Answered(text))
    assert reused >= 4


def test_a_conversation_that_goes_on_is_not_read_again():
    warm, first = answerer(), Dialogue(None, (Asked((Said("what is two plus three"),)),))
    text, cached, told = answered(warm, first)
    assert cached == 0 and isinstance(told[0], Started)
    again = Dialogue(None, (*first.turns, Answered(text), Asked((Said("hello"),))))
    _, cached, told_again = answered(warm, again)
    assert isinstance(told_again[0], Started) and told[0].prompt <= cached < told_again[0].prompt
    assert answered(warm, first)[1] == told[0].prompt - 1  # asked once more, all but the last position


@pytest.mark.parametrize("pair", [(Shown(png(9)), Shown(png(200))), (Heard(SAMPLE), Heard(OTHER))])
def test_another_picture_or_sound_is_not_taken_for_the_one_that_was_read(pair: tuple[Given, Given]):
    warm = answerer()
    one, other = (Dialogue(None, (Asked((media, Said("hello"))),)) for media in pair)
    answered(warm, one)
    _, cached, _ = answered(warm, other)
    prompt = warm._prompt(other, spoken=False)
    assert 0 < cached <= min(at for at, _ in placed(prompt, nano().manifest))
    assert answered(warm, one)[1] == len(warm._prompt(one, spoken=False)) - 1  # it was copied, and is still there


def test_an_answer_in_speech_is_not_read_again():
    warm = Answerer(nano(), Limits(), Metrics())
    first = Dialogue(None, (Asked((Said("set a timer for ten minutes"),)),))
    aloud = How(seed=1, spoken=True)
    text, _, told = answered(warm, first, aloud)
    before, done = told[0], told[-1]
    assert isinstance(before, Started) and isinstance(done, Done) and done.aloud
    again = Dialogue(None, (*first.turns, Answered("", done.aloud), Asked((Said("make it twenty"),))))
    said_warm, cached, told_again = answered(warm, again, aloud)
    started = told_again[0]
    assert isinstance(started, Started)
    assert cached >= before.prompt + done.completion - 1 and cached < started.prompt
    assert (
        said_warm == answered(Answerer(nano(), Limits(), Metrics()), again, aloud)[0] == " timer set for twenty minutes"
    )
    assert text == " timer set for ten minutes"


def test_an_answer_that_its_client_left_is_not_read_again():
    warm, dialogue = answerer(), Dialogue(None, (Asked((Said("hello"),)),))
    work = warm.answer(dialogue, How())
    for _ in range(8):
        next(work)
    work.close()
    greedy = How(max_new=8, sampling=SamplingOptions(temperature=0))
    text, cached, _ = answered(warm, dialogue, greedy)
    assert cached > 0 and text == answered(answerer(), dialogue, greedy)[0]


def test_no_more_memory_is_kept_than_allowed_but_that_of_the_newest_conversation():
    warm = answerer(Limits(kept_bytes=1))
    for word in ("hello", "what is two plus three", "set a timer for ten minutes"):
        answered(warm, Dialogue(None, (Asked((Said(word),)),)))
    assert len(warm.kept) == 1 and warm.kept.nbytes == nano().context().cache.nbytes


def test_a_prompt_without_its_beginning_has_the_media_of_its_rest():
    warm = answerer()
    dialogue = Dialogue(None, (Asked((Shown(png(9)), Heard(SAMPLE), Said("and"), Shown(png(200)), Heard(OTHER))),))
    prompt, manifest = warm._prompt(dialogue, spoken=False), nano().manifest
    media = list(placed(prompt, manifest))
    for start in range(len(prompt)):
        rest = behind(prompt, start, manifest)
        expected = [(at - start, value) for at, value in media if at >= start]
        found = list(placed(rest, manifest))
        assert [at for at, _ in found] == [at for at, _ in expected]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_the_sdk_is_told_what_was_reused_and_prometheus_how_much_was_saved():
    with running() as up:
        client = up.client()
        asked: list[Any] = [{"role": "user", "content": "set a timer for ten minutes"}]
        first = client.chat.completions.create(model=NAME, messages=asked)
        asked += [{"role": "assistant", "content": first.choices[0].message.content}]
        asked += [{"role": "user", "content": "make it twenty"}]
        second = client.chat.completions.create(model=NAME, messages=asked)
        assert second.choices[0].message.content == " timer set for twenty minutes"
        assert first.usage and second.usage and second.usage.prompt_tokens_details
        cached = second.usage.prompt_tokens_details.cached_tokens
        assert cached and cached >= first.usage.total_tokens
        page = client.get(f"{up.address}/metrics", cast_to=str)
        values = dict(re.findall(r"^(edgeomni_\w+(?:\{[^}]*\})?) ([\d.e+-]+)$", page, re.MULTILINE))
        assert float(values["edgeomni_prefix_lookups_total"]) == 2
        assert float(values["edgeomni_prefix_hits_total"]) == 1
        assert float(values["edgeomni_prefix_reused_tokens_total"]) == cached
        assert 0 < float(values["edgeomni_prefix_saved_seconds_total"]) < 10
        assert values['edgeomni_requests_total{route="/v1/chat/completions",status="200"}'] == "2.0"
        assert "timer" not in page
