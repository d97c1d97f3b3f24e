"""Sound over HTTP with the stock SDK: questions in speech, answers in speech, writing down and reading aloud."""

import io
import wave
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.server.failures import ApiError
from apps.server.remembered import Remembered
from apps.server.settings import Limits
from apps.server.sound import Encoder, Format, whole
from runtime.audio import load_mono, pcm16
from runtime.conversation import Choices, Conversation, read_aloud, transcribe
from runtime.events import AudioChunk, Event, ReplyDone
from runtime.prompt import Text
from tests.serving import NAME, Running, nano, running

SAMPLE = Path("export/nano/samples/espeak-000.flac")  # "set a timer for twenty two minutes", more or less
RATE = 24_000


@pytest.fixture(scope="module")
def up():
    with running() as server:
        yield server


def said(question: str) -> Any:
    return {"role": "user", "content": question}


def heard(data: bytes) -> Any:
    sound = {"data": b64encode(data).decode(), "format": "wav"}
    return {"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}


def joined(events: list[Event]) -> np.ndarray:
    return np.concatenate([event.samples for event in events if isinstance(event, AudioChunk)])


def text_of(events: list[Event]) -> str:
    (done,) = (event for event in events if isinstance(event, ReplyDone))
    return done.text


def test_a_question_in_speech_is_answered_in_text(up: Running):
    answer = up.client().chat.completions.create(model=NAME, messages=[heard(SAMPLE.read_bytes())])
    conversation = Conversation.open(nano(), seed=0)
    assert answer.choices[0].message.content == text_of(list(conversation.reply([nano().hear(SAMPLE)])))
    assert "timer" in (answer.choices[0].message.content or "")


def spoken(up: Running, messages: list[Any], **more: Any) -> Any:
    return up.client().chat.completions.create(
        model=NAME,
        messages=messages,
        modalities=["text", "audio"],
        audio={"voice": "any", "format": "wav"},
        seed=1,
        **more,
    )


def test_an_answer_in_speech_is_the_engines_own_and_its_history_is_read_by_its_id(up: Running):
    conversation = Conversation.open(nano(), seed=1)
    first = list(conversation.reply([Text("set a timer for ten minutes")], Choices(spoken=True)))
    answer = spoken(up, [said("set a timer for ten minutes")])
    message = answer.choices[0].message
    assert message.content is None and message.audio is not None
    assert message.audio.transcript == text_of(first) and answer.choices[0].finish_reason == "stop"
    with wave.open(io.BytesIO(b64decode(message.audio.data))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert np.array_equal(samples, pcm16(joined(first)))

    again = {"role": "assistant", "audio": {"id": message.audio.id}}
    asked = [said("set a timer for ten minutes"), again, said("make it twenty")]
    answer = spoken(up, asked)
    assert answer.choices[0].message.audio.transcript == " timer set for twenty minutes"
    plain = up.client().chat.completions.create(model=NAME, messages=asked)  # a written answer behind a spoken one
    assert plain.choices[0].message.content == " timer set for twenty minutes"


def test_an_answer_in_speech_streams_as_it_is_made(up: Running):
    stream = up.client().chat.completions.create(
        model=NAME, messages=[said("what is two plus three")], modalities=["text", "audio"],
        audio={"voice": "any", "format": "pcm16"}, stream=True, seed=1, stream_options={"include_usage": True},
    )  # fmt: skip
    parts = [audio for chunk in stream if chunk.choices and (audio := chunk.choices[0].delta.audio)]
    samples = b"".join(b64decode(part.data) for part in parts if part.data)
    expected = list(Conversation.open(nano(), seed=1).reply([Text("what is two plus three")], Choices(spoken=True)))
    assert "".join(part.transcript or "" for part in parts) == text_of(expected) == " two plus three is five"
    assert samples == pcm16(joined(expected)).tobytes()
    assert len({part.id for part in parts}) == 1 and (parts[-1].expires_at or 0) > 0


def test_an_answer_in_speech_ends_behind_the_clause_that_is_too_long(up: Running):
    answer = spoken(up, [said("what is two plus three")], max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.audio.transcript == " two plus three is five"


def test_a_recording_is_written_down_in_every_format(up: Running):
    client, ask = up.client(), {"model": NAME, "file": ("a.flac", SAMPLE.read_bytes())}
    words = text_of(list(transcribe(nano(), nano().hear(SAMPLE)))).strip()
    assert "timer for twenty" in words
    told = client.audio.transcriptions.create(**ask)
    assert told.text == words
    assert client.audio.transcriptions.create(**ask, response_format="text").strip() == words
    verbose = client.audio.transcriptions.create(**ask, response_format="verbose_json", language="en")
    assert (verbose.text, verbose.language) == (words, "en")
    assert verbose.duration == pytest.approx(len(load_mono(SAMPLE, 16_000)) / 16_000, abs=0.001)
    events = list(client.audio.transcriptions.create(**ask, stream=True))
    assert [event.type for event in events[-1:]] == ["transcript.text.done"] and len(events) > 4
    assert events[-1].text == words
    assert "".join(event.delta for event in events[:-1]).strip() == words


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"file": ("a.wav", b"no sound at all")}, None, "cannot be decoded"),
        ({"file": ("../../etc/passwd", b"root:x:0:0")}, None, "the audio cannot be decoded"),
        ({"file": ("a.wav", b"")}, "file", "empty"),
        ({"response_format": "srt"}, "response_format", "verbose_json"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities[0]", "segment"),
        ({"temperature": 3}, "temperature", "2"),
        ({"prompt": "names"}, "prompt", "''"),
    ],
)
def test_a_recording_that_cannot_be_written_down_is_refused_with_a_reason(up: Running, given, param, words):
    ask: dict[str, Any] = {"model": NAME, "file": ("a.flac", SAMPLE.read_bytes()), **given}
    with pytest.raises(openai.BadRequestError) as caught:
        up.client().audio.transcriptions.create(**ask)
    assert caught.value.param == param and words in str(caught.value)


def test_hours_of_silence_in_a_small_file_are_not_decoded(up: Running):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16_000 * 3600, np.int16), 16_000, format="FLAC")
    assert len(file.getvalue()) < 1_000_000
    with pytest.raises(openai.BadRequestError, match="lasts longer"):
        up.client().audio.transcriptions.create(model=NAME, file=("a.flac", file.getvalue()))


def test_a_text_is_read_aloud_in_every_format_as_it_is_made(up: Running):
    expected = joined(list(read_aloud(nano(), "the kitchen light is on", Choices(spoken=True), seed=0)))
    lengths: dict[str, int] = {}
    for kind in ("pcm", "wav", "flac", "opus", "mp3"):
        with up.client().audio.speech.with_streaming_response.create(
            model=NAME, input="the kitchen light is on", voice="any", response_format=kind
        ) as answer:
            content = b"".join(answer.iter_bytes())
            assert answer.headers["content-type"].startswith("audio/")
        samples = decoded(content, "pcm16" if kind == "pcm" else kind) / 32768
        lengths[kind] = len(samples)
        assert 0.01 < float(np.sqrt(np.mean(samples**2))) < 0.5
    # The voice's codes are drawn, so that it is not the same twice, but about as long.
    assert all(0.4 < length / len(expected) < 2.5 for length in lengths.values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input": ""}, "at least 1"),
        ({"input": "  "}, "no text to read aloud"),
        ({"input": "a" * 4097}, "at most 4096"),
        ({"response_format": "aac"}, "'mp3'"),
        ({"speed": 2.0}, "less than or equal to 1"),
        ({"instructions": "whisper"}, "''"),
    ],
)
def test_what_cannot_be_read_aloud_is_refused_with_a_reason(up: Running, given, words):
    with pytest.raises(openai.BadRequestError, match=words):
        up.client().audio.speech.create(**{"model": NAME, "voice": "any", "input": "hello", **given})


def tone(samples: int) -> np.ndarray:
    return (0.4 * np.sin(np.arange(samples) * 2 * np.pi * 440 / RATE)).astype(np.float32)


@pytest.mark.parametrize("kind", ["wav", "pcm16", "flac"])
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 9_000), max_size=6))
def test_sound_that_is_streamed_in_any_pieces_is_the_whole_sound(kind: Format, cuts: list[int]):
    samples, encoder = tone(9_000), Encoder(kind, RATE)
    pieces = np.split(samples, sorted(cuts))
    content = b"".join(encoder.push(piece) for piece in pieces) + encoder.finish()
    assert np.array_equal(decoded(content, kind), pcm16(samples))
    assert np.array_equal(decoded(whole(samples, RATE, kind), kind), pcm16(samples))


@pytest.mark.parametrize("kind", ["opus", "mp3"])
def test_sound_that_loses_some_is_as_long_and_as_loud_streamed_and_whole(kind: Literal["opus", "mp3"]):
    samples, encoder = tone(RATE), Encoder(kind, RATE)
    content = b"".join(encoder.push(piece) for piece in np.split(samples, 10)) + encoder.finish()
    for found in (decoded(content, kind) / 32768, decoded(whole(samples, RATE, kind), kind) / 32768):
        assert len(samples) <= len(found) <= len(samples) + 0.25 * RATE
        assert np.std(found[2_000:20_000]) == pytest.approx(np.std(samples), rel=0.05)


def decoded(content: bytes, kind: str) -> np.ndarray:
    """int16 samples; a streamed FLAC file states no length, which soundfile by itself does not take."""
    if kind == "pcm16":
        return np.frombuffer(content, "<i2")
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        assert file.samplerate == RATE
        if kind == "flac":
            return (load_mono(content, RATE) * 32768).astype(np.int16)
        return file.read(dtype="int16")


def test_spoken_answers_are_remembered_for_a_time_and_no_more_than_allowed():
    now = [1_000.0]
    remembered = Remembered(Limits(remembered=2, remembered_seconds=60), clock=lambda: now[0])
    ids = []
    for word in ("one", "two", "three"):
        name, expires = remembered.new()
        remembered.keep(name, expires, (Text(word),))
        ids.append(name)
    assert remembered.find(ids[2], "p") == (Text("three"),) and remembered.find(ids[1], "p") == (Text("two"),)
    with pytest.raises(ApiError, match="no spoken answer"):
        remembered.find(ids[0], "p")
    now[0] += 61
    with pytest.raises(ApiError, match="no spoken answer"):
        remembered.find(ids[2], "p")
