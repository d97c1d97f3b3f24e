"""The chat command as a hobbyist keeps it open: settings, loops, long conversations, reading, commands, history."""

from dataclasses import replace

import pytest

from apps import chat_settings
from runtime.bundle import Sampling
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.events import ReplyDone
from runtime.prompt import Text
from runtime.sampling import SamplingOptions
from tests.test_cli import Run, edgeomni, omni, one_message
from tests.tiny import omni_bundle

__all__ = ["edgeomni"]  # a fixture


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(omni_bundle())


# Sampling


def test_a_setting_changes_the_answer_in_python_and_greedy_overrules_it(engine: Engine) -> None:
    def said(choices: Choices) -> str:
        *_, done = Conversation.open(engine, seed=3).reply([Text("hello")], choices)
        assert isinstance(done, ReplyDone)
        return done.text

    short = Choices(max_new=20)
    cold = replace(short, sampling=SamplingOptions(temperature=0))
    assert said(short) == said(replace(short, sampling=SamplingOptions()))
    assert said(short) != said(replace(short, sampling=SamplingOptions(temperature=5.0, top_p=1, top_k=0)))
    assert said(cold) == said(replace(short, greedy=True))
    assert said(replace(short, greedy=True, sampling=SamplingOptions(temperature=5.0))) == said(cold)


def test_the_options_of_chat_and_its_set_command_are_the_same_settings(edgeomni: Run) -> None:
    given = ("--temperature", 2, "--top-p", 0.9, "--top-k", 50, "--repeat-penalty", 1.5, "--min-p", 0.01)
    lines = "/set temperature 2\n/set top-p 0.9\n/set --top_k=50\n/set repeat-penalty 1.5\n/set min-p 0.01\nHello\n"
    by_option = edgeomni("chat", omni(), "Hello", *given, "--seed", 1, "--max-new", 20)
    by_command = edgeomni("chat", omni(), "--seed", 1, "--max-new", 20, stdin=lines)
    assert by_option.code == by_command.code == 0
    assert by_option.out == by_command.out
    assert by_option.out != edgeomni("chat", omni(), "Hello", "--seed", 1, "--max-new", 20).out
    assert "temperature 2 · top-p 0.9 · top-k 50 · repeat-penalty 1.5 · min-p 0.01" in by_command.err


def test_settings_out_of_bounds_are_one_message_before_anything_is_opened(edgeomni: Run) -> None:
    message = one_message(edgeomni("chat", "/nowhere", "Hi", "--temperature", -1, "--top-p", 2))
    assert "temperature is -1" in message and "top-p is 2" in message
    assert "--greedy draws nothing" in one_message(edgeomni("chat", "/nowhere", "Hi", "--greedy", "--min-p", 0.1))


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("temperature", "/set takes a name and a value"),
        ("temperature warm", "temperature is 'warm', expected a number or default"),
        ("top-k 1.5", "top-k is '1.5', expected a whole number"),
        ("top_p 2", "top-p is 2, expected more than 0"),
        ("heat 2", "there is no setting heat; there are temperature, top-p"),
    ],
)
def test_a_setting_that_is_none_is_one_message(argument: str, found: str) -> None:
    with pytest.raises(EdgeOmniError, match=found):
        chat_settings.changed(Choices(), argument)


def test_a_setting_goes_back_to_the_bundles_and_ends_greedy_where_it_draws() -> None:
    bundled = Sampling(temperature=0.8, top_k=20)
    warm = chat_settings.changed(Choices(greedy=True), "temperature 1.5")
    assert (warm.greedy, warm.sampling.temperature) == (False, 1.5)
    assert chat_settings.changed(Choices(greedy=True), "repeat-penalty 1.5").greedy
    assert chat_settings.described(warm, bundled).startswith("temperature 1.5 · ")
    back = chat_settings.changed(warm, "temperature default")
    assert chat_settings.described(back, bundled).startswith("temperature 0.8 · ")
    assert "always the likeliest" in chat_settings.described(chat_settings.changed(warm, "temperature 0"), bundled)
