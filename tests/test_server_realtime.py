"""Conversations over /v1/realtime with the stock SDK, every event of the server checked against the SDK's own types."""

import json
import time
from base64 import b64decode, b64encode
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed, InvalidStatus

from apps.server.realtime_ear import Ear
from apps.server.realtime_items import Item
from apps.server.settings import Limits, ServerSettings
from runtime.audio import load_mono, pcm16, resample
from runtime.live.vad import EnergyDetector
from runtime.prompt import Spoken
from tests.serving import NAME, Running, nano, running, talker

SAMPLE = Path("export/nano/samples/espeak-000.flac")  # "please set a timer for twenty eight minutes", more or less
EVENTS: TypeAdapter[RealtimeServerEvent] = TypeAdapter(RealtimeServerEvent)
MANUAL = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
TEXT = {"type": "realtime", "output_modalities": ["text"], "audio": {"input": {"turn_detection": None}}}


@pytest.fixture(scope="module")
def up():
    with running() as server:
        yield server


class Talk:
    """A client that keeps all that it is told."""

    def __init__(self, connection: Any):
        self.connection = connection
        self.told: list[dict[str, Any]] = []

    def send(self, kind: str, **more: Any) -> None:
        self.connection.send({"type": kind, **more})

    def next(self) -> dict[str, Any]:
        event = json.loads(self.connection._connection.recv(timeout=60))  # the SDK's own waits for ever
        EVENTS.validate_python(event)
        assert event["event_id"] not in {one["event_id"] for one in self.told}
        self.told.append(event)
        return event

    def until(self, kind: str) -> dict[str, Any]:
        while (event := self.next())["type"] != kind:
            assert event["type"] != "error" or kind == "error", event
        return event

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.told if event["type"] == kind]

    def say(self, text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        self.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})

    def speak(self, wave: np.ndarray) -> None:
        """A wave at 24 kHz, in pieces of 100 ms."""
        for start in range(0, len(wave), 2400):
            piece = pcm16(wave[start : start + 2400]).astype("<i2").tobytes()
            self.send("input_audio_buffer.append", audio=b64encode(piece).decode())


@contextmanager
def talking(up: Running, session: dict[str, Any] | None = None, key: str = "none"):
    with up.client(key).realtime.connect(model="any") as connection:
        talk = Talk(connection)
        talk.until("session.created")
        if session is not None:
            talk.send("session.update", session=session)
            talk.until("session.updated")
        yield talk


def recorded() -> np.ndarray:
    return load_mono(SAMPLE, 24_000)


def test_a_typed_question_is_answered_in_text_with_all_events_in_their_order(up: Running):
    with talking(up, TEXT) as talk:
        talk.say("what is two plus three")
        talk.until("conversation.item.done")
        talk.send("response.create")
        done = talk.until("response.done")["response"]
        assert done["status"] == "completed" and done["output"][0]["content"] == [
            {"type": "output_text", "text": " two plus three is five"}
        ]
        assert "".join(one["delta"] for one in talk.of("response.output_text.delta")) == " two plus three is five"
        assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"] > 0
        order = [event["type"] for event in talk.told[4:] if event["type"] != "response.output_text.delta"]
        assert order == [
            "response.created", "response.output_item.added", "conversation.item.added", "response.content_part.added",
            "response.output_text.done", "response.content_part.done", "response.output_item.done",
            "conversation.item.done", "response.done",
        ]  # fmt: skip


def test_what_was_said_before_is_known_until_it_is_deleted(up: Running):
    with talking(up, TEXT) as talk:
        talk.say("set a timer for ten minutes")
        talk.send("response.create")
        first = talk.until("response.done")["response"]["output"][0]
        talk.say("make it twenty")
        asked = talk.until("conversation.item.done")["item"]
        talk.send("response.create")
        second = talk.until("response.done")["response"]["output"][0]
        assert second["content"][0]["text"] == " timer set for twenty minutes"
        talk.send("conversation.item.retrieve", item_id=asked["id"])
        assert talk.until("conversation.item.retrieved")["item"] == asked
        for item in (first, asked, second):
            talk.send("conversation.item.delete", item_id=item["id"])
            assert talk.until("conversation.item.deleted")["item_id"] == item["id"]
        talk.send("conversation.item.retrieve", item_id=first["id"])
        assert talk.until("error")["error"]["code"] == "item_not_found"


def test_a_question_in_speech_that_is_committed_is_answered_in_speech_with_the_words_of_both(up: Running):
    session = {"type": "realtime", "audio": {"input": {"turn_detection": None, "transcription": {"model": "any"}}}}
    with talking(up, session) as talk:
        talk.speak(recorded())
        talk.send("input_audio_buffer.commit")
        item = talk.until("input_audio_buffer.committed")["item_id"]
        heard = talk.until("conversation.item.input_audio_transcription.completed")
        assert heard["item_id"] == item and "timer for twenty" in heard["transcript"]
        talk.send("response.create")
        done = talk.until("response.done")["response"]
        assert done["status"] == "completed" and "timer" in done["output"][0]["content"][0]["transcript"]
        said = "".join(one["delta"] for one in talk.of("response.output_audio_transcript.delta"))
        assert said == done["output"][0]["content"][0]["transcript"]
        sound = b"".join(b64decode(one["delta"]) for one in talk.of("response.output_audio.delta"))
        samples = np.frombuffer(sound, "<i2") / 32768
        assert 0.8 < len(samples) / 24_000 < 8 and 0.01 < float(np.sqrt(np.mean(samples**2))) < 0.5


def test_whoever_falls_silent_is_answered_without_being_asked_to_commit(up: Running):
    with talking(up, {"type": "realtime", "output_modalities": ["text"]}) as talk:
        talk.speak(np.concatenate([np.zeros(12_000, np.float32), recorded(), np.zeros(36_000, np.float32)]))
        started, stopped = (talk.until(f"input_audio_buffer.speech_{what}") for what in ("started", "stopped"))
        committed = talk.until("input_audio_buffer.committed")
        assert started["item_id"] == stopped["item_id"] == committed["item_id"]
        length = 1000 * len(recorded()) / 24_000
        assert 0 <= started["audio_start_ms"] < 800 and 400 < stopped["audio_end_ms"] < 500 + length + 800
        done = talk.until("response.done")["response"]
        assert done["status"] == "completed" and "timer" in done["output"][0]["content"][0]["text"]


def test_an_answer_that_was_cut_is_remembered_as_far_as_it_was_heard(up: Running):
    with talking(up, MANUAL) as talk:
        talk.say("what is two plus three")
        talk.send("response.create")
        item = talk.until("response.done")["response"]["output"][0]
        whole = item["content"][0]["transcript"]
        talk.send("conversation.item.truncate", item_id=item["id"], content_index=0, audio_end_ms=500)
        told = talk.until("conversation.item.truncated")
        assert (told["item_id"], told["audio_end_ms"]) == (item["id"], 500)
        talk.send("conversation.item.retrieve", item_id=item["id"])
        rest = talk.until("conversation.item.retrieved")["item"]["content"][0]["transcript"]
        assert whole.startswith(rest) and 0 < len(rest) < len(whole)
        before = _input_tokens(talk)
        talk.send("conversation.item.truncate", item_id=item["id"], content_index=0, audio_end_ms=0)
        talk.until("conversation.item.truncated")
        assert _input_tokens(talk) < before


def _input_tokens(talk: Talk) -> int:
    """Positions that the conversation takes, with a question behind it that is taken back."""
    talk.say("hello")
    name = talk.until("conversation.item.done")["item"]["id"]
    talk.send("response.create", response={"conversation": "none", "output_modalities": ["text"]})
    tokens = talk.until("response.done")["response"]["usage"]["input_tokens"]
    talk.send("conversation.item.delete", item_id=name)
    talk.until("conversation.item.deleted")
    return tokens


def test_an_item_is_cut_to_the_codes_and_words_of_what_was_heard():
    layout = nano().manifest.speech
    assert layout is not None
    code_ms = 1000 * layout.frames_per_code * layout.samples_per_frame / layout.sampling_rate
    codes = np.arange(20 * 8).reshape(20, 8)
    item = Item("assistant", [], pieces=(Spoken(" one two,", codes), Spoken(" three four", codes)), spoken=True)
    item.truncate(25 * code_ms, layout)
    first, second = item.pieces
    assert isinstance(first, Spoken) and isinstance(second, Spoken)
    assert np.array_equal(first.codes, codes) and 0 < len(second.codes) < 10 and second.text == " three four"
    assert item.content[0]["transcript"].startswith(" one two,")
    item.truncate(0, layout)
    assert item.pieces == () and item.content[0]["transcript"] == ""


def test_a_response_that_is_cancelled_ends_at_once_and_the_next_one_is_made():
    with running(engine=talker()) as up, talking(up, TEXT) as talk:
        talk.say("hello")
        talk.send("response.create")
        talk.until("response.output_text.delta")
        talk.send("response.create")
        assert talk.until("error")["error"]["code"] == "conversation_already_has_active_response"
        talk.send("response.cancel")
        done = talk.until("response.done")["response"]
        assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
        assert done["output"][0]["status"] == "incomplete" and done["output"][0]["content"][0]["text"]
        talk.send("response.cancel")
        assert talk.until("error")["error"]["code"] == "response_cancel_not_active"
        talk.say("hello")
        talk.send("response.create", response={"max_output_tokens": 3})
        done = talk.until("response.done")["response"]
        assert (done["status"], done["status_details"]["reason"]) == ("incomplete", "max_output_tokens")


def test_whoever_begins_to_speak_interrupts_the_answer():
    with running(engine=talker()) as up, talking(up, {"type": "realtime", "output_modalities": ["text"]}) as talk:
        talk.say("hello")
        talk.send("response.create")
        talk.until("response.output_text.delta")
        talk.speak(recorded()[:36_000])
        talk.until("input_audio_buffer.speech_started")
        done = talk.until("response.done")["response"]
        assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "turn_detected")


@pytest.mark.parametrize(
    ("kind", "more", "code", "words"),
    [
        ("session.update", {"session": {"type": "realtime", "tools": [{"type": "function"}]}}, None, "at most 0"),
        ("session.update", {"session": {"audio": {"output": {"format": {"type": "audio/pcmu"}}}}}, None, "audio/pcm"),
        ("input_audio_buffer.append", {"audio": "*"}, "invalid_base64", "no base64"),
        ("input_audio_buffer.append", {"audio": "AAAA"}, "invalid_audio", "16 bits"),
        ("input_audio_buffer.commit", {}, "buffer_too_small", "at least 100"),
        ("response.create", {}, "nothing_to_answer", "nothing to answer"),
        ("conversation.item.delete", {"item_id": "x"}, "item_not_found", "no item"),
        ("make.coffee", {}, None, "make.coffee"),
        (
            "conversation.item.create",
            {
                "item": {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "http://a/b"}],
                }
            },
            "invalid_image_url",
            "not fetched",
        ),
    ],
)
def test_what_cannot_be_done_is_an_error_that_names_its_event(up: Running, kind, more, code, words):
    with talking(up, TEXT) as talk:
        talk.send(kind, event_id="mine", **more)
        error = talk.until("error")["error"]
        assert error["event_id"] == "mine" and words in error["message"] and code in (None, error["code"])
        talk.say("hello")  # the conversation goes on
        talk.until("conversation.item.done")


def test_an_update_changes_what_it_names_and_tells_all(up: Running):
    with talking(up) as talk:
        first = talk.told[0]["session"]
        talk.send("session.update", session={"type": "realtime", "instructions": "be brief"})
        assert talk.until("session.updated")["session"] == {**first, "instructions": "be brief"}
        talk.send("session.update", session={"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}})
        session = talk.until("session.updated")["session"]
        assert session["instructions"] == "be brief"
        assert session["audio"]["input"]["turn_detection"] == {"type": "semantic_vad"}
        assert session["audio"]["input"]["format"] == first["audio"]["input"]["format"]


def test_the_door_is_guarded_as_all_others_are_and_a_full_house_says_so():
    with running(ServerSettings(NAME, port=0, token="secret", sessions=1)) as up:
        with pytest.raises(InvalidStatus) as caught, up.client("wrong").realtime.connect(model="any"):
            pass
        assert caught.value.response.status_code == 401
        with (
            pytest.raises(InvalidStatus) as caught,
            up.client("secret").realtime.connect(model="any", extra_headers={"Origin": "https://evil.example"}),
        ):
            pass
        assert caught.value.response.status_code == 403
        with talking(up, key="secret"), up.client("secret").realtime.connect(model="any") as second:
            with pytest.raises(ConnectionClosed) as closed:
                second.recv_bytes()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013


def test_a_client_that_says_nothing_for_long_is_sent_away_and_one_that_leaves_is_forgotten():
    with running(ServerSettings(NAME, port=0, limits=Limits(idle_seconds=0.3))) as up:
        with up.client().realtime.connect(model="any") as connection, pytest.raises(ConnectionClosed) as closed:
            while True:
                connection.recv_bytes()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000
        until = time.monotonic() + 10
        while up.served.conversations and time.monotonic() < until:
            time.sleep(0.02)
        assert up.served.conversations == 0


@pytest.mark.parametrize("piece", [1_000, 777, 24_000])
def test_sound_in_any_pieces_is_heard_as_the_whole(piece: int):
    wave = recorded()[:48_123]
    ear = Ear(EnergyDetector())
    for start in range(0, len(wave), piece):
        assert not list(ear.push(wave[start : start + piece]))
    heard, expected = ear.take(), resample(wave, 24_000, 16_000)
    assert abs(len(heard) - len(expected)) <= 1
    assert np.allclose(heard[: len(expected)], expected[: len(heard)], atol=1e-5)
    assert len(ear.take()) == 0
