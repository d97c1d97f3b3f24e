"""Conversations over HTTP with the stock SDK: what it gets is what the engine says, whole or in pieces."""

import io
import logging
import threading
import time
from base64 import b64encode
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from apps.server.settings import Limits, ServerSettings
from runtime.conversation import Conversation
from runtime.events import ReplyDone
from runtime.prompt import Text
from tests.serving import NAME, Running, nano, running, talker


@pytest.fixture(scope="module")
def up():
    with running() as server:
        yield server


def said(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def here(*questions: str) -> list[ReplyDone]:
    """What the engine itself answers, one turn after the other."""
    conversation = Conversation.open(nano(), seed=0)
    done = [list(conversation.reply([Text(question)]))[-1] for question in questions]
    return [one for one in done if isinstance(one, ReplyDone)]


def test_the_one_model_is_listed_and_found_by_its_name(up: Running):
    client = up.client()
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == (NAME, "model", "edgeomni")
    assert client.models.retrieve(NAME) == listed


def test_an_answer_is_the_engines_own_with_its_counts(up: Running):
    answer = up.client().chat.completions.create(model=NAME, messages=said("what is two plus three"))
    (choice,) = answer.choices
    (done,) = here("what is two plus three")
    assert choice.message.content == done.text == " two plus three is five"
    assert (choice.finish_reason, choice.message.role, answer.object) == ("stop", "assistant", "chat.completion")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == done.timings.prompt_positions
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens == len(nano().tokenizer.encode(done.text, special=False))


def test_a_streamed_answer_joined_is_the_whole_answer(up: Running):
    stream = up.client().chat.completions.create(
        model=NAME, messages=said("what is two plus three"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == " two plus three is five"
    assert sum(1 for c in chunks if c.choices and c.choices[0].delta.content) >= 4
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({c.id for c in chunks}) == 1
    usage = chunks[-1].usage
    assert not chunks[-1].choices and usage is not None and usage.total_tokens > usage.prompt_tokens > 0


def test_the_history_is_read(up: Running):
    first, second = here("set a timer for ten minutes", "make it twenty")
    history = [*said("set a timer for ten minutes"), {"role": "assistant", "content": first.text}]
    answer = up.client().chat.completions.create(model=NAME, messages=[*history, *said("make it twenty")])
    assert answer.choices[0].message.content == second.text == " timer set for twenty minutes"


def test_two_user_messages_in_a_row_are_one_turn(up: Running):
    asked = [*said("hello"), *said("what is two plus three")]
    (done,) = here("hello\nwhat is two plus three")
    assert up.client().chat.completions.create(model=NAME, messages=asked).choices[0].message.content == done.text


def test_an_answer_stops_before_a_stop_string_whole_and_streamed(up: Running):
    ask: dict[str, Any] = {"model": NAME, "messages": said("what is two plus three"), "stop": [" is five", "never"]}
    whole = up.client().chat.completions.create(**ask)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (" two plus three", "stop")
    chunks = up.client().chat.completions.create(**ask, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == " two plus three"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_is_no_longer_than_asked_and_says_so(up: Running, name: str):
    asked: dict[str, Any] = {name: 2}
    answer = up.client().chat.completions.create(model=NAME, messages=said("what is two plus three"), **asked)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 2


def test_a_seed_repeats_a_drawn_answer_and_other_seeds_draw_others(up: Running):
    def drawn(seed: int) -> str | None:
        answer = up.client().chat.completions.create(
            model=NAME, messages=said("tell me something"), temperature=2, seed=seed, max_tokens=12
        )
        return answer.choices[0].message.content

    answers = [drawn(seed) for seed in (1, 2, 3, -4)]
    assert [drawn(seed) for seed in (1, 2, 3, -4)] == answers
    assert len(set(answers)) > 1


def test_a_tiny_top_p_leaves_the_likeliest_token_only(up: Running):
    answer = up.client().chat.completions.create(
        model=NAME, messages=said("what is two plus three"), temperature=2, top_p=1e-9
    )
    assert answer.choices[0].message.content == " two plus three is five"


def test_a_picture_in_a_data_url_is_seen(up: Running):
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[16:48, 16:48] = (255, 0, 0)
    asked = [picture_part(picture), {"type": "text", "text": "what colour is it"}]
    answer = up.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": asked}])
    done = list(Conversation.open(nano(), seed=0).reply([nano().look_at(picture), Text("what colour is it")]))[-1]
    assert isinstance(done, ReplyDone)
    assert answer.choices[0].message.content == done.text and "red" in done.text


def picture_part(picture: np.ndarray) -> Any:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    url = f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def sounding(data: bytes) -> list[Any]:
    part = {"type": "input_audio", "input_audio": {"data": b64encode(data).decode(), "format": "wav"}}
    return [{"role": "user", "content": [part]}]


def image(url: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": " "}]}, None, "empty"),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "messages", "last message must be the user's"),
        ({"messages": [*said("a"), {"role": "system", "content": "b"}, *said("c")]}, "messages[1]", "beginning"),
        ({"messages": said("hello " * 3000)}, "messages", "context has 2048"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 2}, "n", "should be 1"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "at most 0"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"modalities": ["text", "audio"]}, "audio", "how the speech shall be sent"),
        ({"modalities": ["audio"], "audio": {"voice": "a", "format": "aac"}}, "audio.format", "'wav'"),
        ({"modalities": ["audio"], "audio": {"voice": "a", "format": "wav"}, "stop": "a"}, "stop", "cannot be cut"),
        (
            {"messages": [*said("a"), {"role": "assistant", "audio": {"id": "x"}}, *said("b")]},
            "messages[1].audio.id",
            "remembered",
        ),
        ({"messages": sounding(b"RIFF")}, "messages", "the audio cannot be decoded"),
        ({"messages": sounding(b"")}, "messages[0].content[0].input_audio.data", "empty"),
        ({"extra_body": {"top_kk": 5}}, "top_kk", "not permitted"),
        ({"messages": image("http://10.0.0.1/a.png")}, "messages[0].content[0].image_url.url", "not fetched"),
        ({"messages": image("file:///etc/passwd")}, "messages[0].content[0].image_url.url", "no file"),
        ({"messages": image("/etc/passwd")}, "messages[0].content[0].image_url.url", "data URL"),
        ({"messages": image("data:image/png;base64,AAAA*")}, "messages[0].content[0].image_url.url", "no base64"),
        ({"messages": image("data:image/png;base64,AAAA")}, "messages", "a picture is no picture"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_place_and_a_reason(up: Running, given, param, words):
    for stream in (False, True):
        if stream and "audio" in given:
            return  # another format is asked for there
        with pytest.raises(openai.BadRequestError) as caught:
            up.client().chat.completions.create(**{"model": NAME, "messages": said("hello"), "stream": stream, **given})
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["type"] == "invalid_request_error"
        assert caught.value.param == param and words in caught.value.body["message"]


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(up: Running):
    with running(ServerSettings(NAME, port=0, limits=Limits(pixels=4095))) as small:
        part = picture_part(np.zeros((64, 64, 3), np.uint8))
        with pytest.raises(openai.BadRequestError, match="4096 pixels, at most 4095"):
            small.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": [part]}])


def test_another_models_name_is_not_found(up: Running):
    with pytest.raises(openai.NotFoundError) as caught:
        up.client().chat.completions.create(model="gpt-4o", messages=said("hello"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model") and NAME in str(caught.value)


def long_answer(client: openai.OpenAI):
    return client.chat.completions.create(model=NAME, messages=said("hello"), stream=True)


def until(condition) -> bool:
    """Whether something becomes so, long before the talker comes to its end."""
    seconds = 2.0
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_who_comes_when_all_places_are_taken_is_told_so_and_served_when_one_is_free():
    with running(ServerSettings(NAME, port=0, sessions=1), talker()) as up, long_answer(up.client()) as taken:
        next(iter(taken))
        with pytest.raises(openai.RateLimitError) as caught:
            up.client().chat.completions.create(model=NAME, messages=said("hello"), max_tokens=1)
        assert caught.value.response.headers["retry-after"] == "1" and caught.value.type == "rate_limit_error"
        taken.close()
        answer = up.client(retries=3).chat.completions.create(model=NAME, messages=said("hello"), max_tokens=1)
        assert answer.choices[0].finish_reason == "length"


def test_a_client_that_leaves_ends_its_answer():
    with running(engine=talker()) as up:
        stream = long_answer(up.client())
        next(iter(stream))
        assert up.served.worker.active == 1
        stream.close()
        assert until(lambda: up.served.worker.active == 0)
        with pytest.raises(openai.APITimeoutError):  # the same of a client that waits for the whole answer
            up.client().chat.completions.create(model=NAME, messages=said("hello"), timeout=0.1)
        assert until(lambda: up.served.worker.active == 0)


def test_a_short_answer_does_not_wait_for_the_end_of_a_long_one():
    with running(engine=talker()) as up, long_answer(up.client()) as long:
        chunks = iter(long)
        next(chunks)
        short = up.client().chat.completions.create(model=NAME, messages=said("hello"), max_tokens=3)
        assert short.usage is not None and short.usage.completion_tokens == 3
        assert until(lambda: up.served.worker.active == 1)  # the long one goes on
        assert next(chunks).choices[0].delta.content


def test_answers_that_are_made_at_once_are_those_that_are_made_alone(up: Running):
    questions = ["what is two plus three", "set a timer for ten minutes", "hello", "what is four plus four"]
    expected = [here(question)[0].text for question in questions]
    found: dict[str, str | None] = {}

    def ask(question: str) -> None:
        answer = up.client().chat.completions.create(model=NAME, messages=said(question))
        found[question] = answer.choices[0].message.content

    threads = [threading.Thread(target=ask, args=[question]) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[question] for question in questions] == expected


def test_a_server_that_is_stopped_ends_its_answers_with_an_error_and_is_gone():
    with running(engine=talker()) as up:
        chunks = iter(long_answer(up.client()))
        next(chunks)
        up.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in chunks:
                pass
        with pytest.raises(openai.APIConnectionError):
            up.client().models.list()


def test_an_answer_that_goes_round_in_a_loop_ends_as_one_that_is_cut():
    with running(engine=talker()) as up:
        answer = up.client().chat.completions.create(model=NAME, messages=said("hello"), temperature=0)
        assert answer.choices[0].finish_reason == "length" and answer.usage is not None
        assert answer.usage.completion_tokens < talker().manifest.cache.max_positions / 4


def test_log_lines_hold_nothing_of_what_was_said(up: Running, caplog):
    with caplog.at_level(logging.DEBUG, "edgeomni.server"):
        up.client().chat.completions.create(model=NAME, messages=said("what is two plus three"))
        with pytest.raises(openai.APIStatusError):
            up.client().get("/secret/path?with=words", cast_to=object)
        assert until(lambda: len(caplog.records) == 2)  # a line is written when its answer has gone
    lines = [record.getMessage() for record in caplog.records]
    assert [line.rsplit(" ", 2)[0] for line in lines] == ["POST /v1/chat/completions 200", "GET (unknown) 404"]
