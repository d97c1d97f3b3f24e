"""The chat command as a hobbyist keeps it open: settings, loops, long conversations, reading, commands, history."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps import chat_settings, terminal
from apps.interrupt import interruptible
from runtime.bundle import Sampling
from runtime.context import Context
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import EdgeOmniError, PromptError
from runtime.events import Event, Forgotten, Reading, ReplyDone, StepDone
from runtime.prompt import Audio, Image, Text
from runtime.repetition import ENDLESS, JUDGED, loops
from runtime.sampling import SamplingOptions
from tests.test_cli import Run, Terminal, edgeomni, omni, one_message
from tests.tiny import omni_bundle

__all__ = ["edgeomni"]  # a fixture


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(omni_bundle())


def done(events: Iterator[Event]) -> ReplyDone:
    *_, last = events
    assert isinstance(last, ReplyDone)
    return last


# Sampling


def test_a_setting_changes_the_answer_in_python_and_greedy_overrules_it(engine: Engine) -> None:
    def said(choices: Choices) -> str:
        return done(Conversation.open(engine, seed=3).reply([Text("hello")], choices)).text

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


# Loops


def saying(engine: Engine, monkeypatch: pytest.MonkeyPatch, ids: Iterator[int]) -> None:
    """Let the model's scores be those of a script."""
    vocabulary = engine.manifest.vocab_size
    scores = ({"logits": np.eye(1, vocabulary, k, dtype=np.float32)} for k in ids)
    monkeypatch.setattr(engine.session("lm_head"), "run", lambda **_: next(scores))


def test_an_answer_that_goes_round_is_ended_while_it_does_and_the_conversation_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation.open(engine)
    rain = engine.tokenizer.encode("a gentle rain, ", special=False).tolist()
    opening = engine.tokenizer.encode("It begins to fall: ", special=False).tolist()
    with monkeypatch.context() as patch:
        saying(engine, patch, chain(opening, cycle(rain)))
        ended = done(conversation.reply([Text("hello")], Choices(greedy=True, max_new=1024)))
    assert ended.finish == "repeats"
    repeated = ended.timings.text_tokens - len(opening)
    assert ENDLESS.shortest <= repeated <= ENDLESS.shortest + ENDLESS.times * len(rain)
    assert done(conversation.reply([Text("and now?")], Choices(max_new=3))).timings.text_tokens <= 3
    with monkeypatch.context() as patch:
        saying(engine, patch, cycle(rain))
        whole = done(conversation.reply([Text("hello")], Choices(greedy=True, max_new=150, stop_loops=False)))
    assert (whole.finish, whole.timings.text_tokens) == ("length", 150)


def test_a_loop_over_the_pieces_of_a_spoken_answer_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(omni_bundle())
    steps = engine.manifest.generation
    assert steps.first_text and steps.later_text and steps.audio
    first, later = (replace(step, max_new=20) for step in (steps.first_text, steps.later_text))
    short = replace(steps, first_text=first, later_text=later, audio=replace(steps.audio, max_new=2))
    engine.manifest = replace(engine.manifest, generation=short)
    rain = engine.tokenizer.encode("rain, ", special=False).tolist()
    saying(engine, monkeypatch, cycle(rain))
    events = list(Conversation.open(engine, seed=0).reply([Text("hello")], Choices(spoken=True, greedy=True)))
    assert done(iter(events)).finish == "repeats"
    assert sum(isinstance(event, StepDone) and event.kind == "text" for event in events) > 1


def test_the_terminal_says_that_an_answer_was_ended_for_its_loop(
    capsys: pytest.CaptureFixture[str], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying(engine, monkeypatch, cycle(engine.tokenizer.encode("a gentle rain, ", special=False).tolist()))
    terminal.Chat(engine, Choices(greedy=True)).answer("hello")
    assert "it went round in a loop and was ended" in capsys.readouterr().err


def by_definition(items: Sequence[int]) -> bool:
    """A loop by its definition: a period of 1 to 16, four times or more, over 12 items and half of them all."""
    for period in range(1, 17):
        for length in range(max(4 * period, 12), len(items) + 1):
            tail = items[len(items) - length :]
            if 2 * length >= len(items) and all(tail[i] == tail[i - period] for i in range(period, length)):
                return True
    return False


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=5), st.integers(0, 12))
def test_the_detector_finds_what_its_definition_says(before: list[int], again: list[int], times: int) -> None:
    items = [*before, *again * times]
    assert loops(items, JUDGED) == by_definition(items)


def test_a_table_and_a_refrain_are_no_loop_while_an_answer_is_made() -> None:
    assert not loops([9, 8, *[1, 2] * 20], ENDLESS)
    assert loops([9, 8, *[1, 2] * 24], ENDLESS)
    assert not loops([*range(60)] * 3, ENDLESS)
    assert loops([*range(500), *[1, 2] * 24], ENDLESS)


# Long conversations


def small(most: int) -> Engine:
    """The golden bundle with a context of so many positions."""
    engine = Engine(omni_bundle())
    engine.manifest = replace(engine.manifest, cache=replace(engine.manifest.cache, max_positions=most))
    return engine


def logits_behind(conversation: Conversation, context: Context) -> np.ndarray:
    """What the model expects behind a question more, in this context."""
    engine = conversation.engine
    context.append(engine.format.user_turn([Text("so?")], spoken=False))
    return engine.session("lm_head").run(hidden=context.hidden())["logits"]


@pytest.mark.parametrize("system", [None, "", "be brief"])
def test_a_conversation_is_never_ended_by_its_context_and_says_what_it_forgot(system: str | None) -> None:
    engine = small(300)
    conversation, forgotten, text = Conversation.open(engine, system, seed=0), [], ""
    opening = engine.format.open_conversation(system).ids.tolist()
    for number in range(12):
        question = f"number {number}: why, and how?"
        events = list(conversation.reply([Text(question)], Choices(max_new=20)))
        forgotten += [event for event in events if isinstance(event, Forgotten)]
        assert done(iter(events)).finish in ("end", "length")
        ids = conversation.context.ids
        assert ids[: len(opening)] == opening
        text = engine.tokenizer.decode(ids, skip_special=False)
        assert question in text and len(ids) <= 300
    assert len(forgotten) > 1 and all(event.turns and event.kept <= 150 for event in forgotten)
    assert "number 0" not in text and "number 10" in text
    assert str(forgotten[0]).startswith("forgot the oldest ")


def test_what_a_conversation_keeps_is_read_as_if_nothing_else_had_been_said() -> None:
    engine = small(400)
    conversation, rng = Conversation.open(engine, seed=0), np.random.default_rng(0)
    assert engine.manifest.audio is not None
    sizes = engine.manifest.audio.codebook_sizes
    forgotten: list[Forgotten] = []
    for number in range(8):
        heard = Audio(rng.integers(0, min(sizes), (5, len(sizes))))
        picture = Image(rng.standard_normal((30, engine.manifest.hidden_size)).astype(np.float32))
        spoken = Choices(spoken=True, greedy=True, zero_noise=True)
        reply = conversation.reply([heard, picture, Text(f"and {number}?")], spoken)
        forgotten += [event for event in islice(reply, 12) if isinstance(event, Forgotten)]
        reply.close()
    assert any(event.pictures for event in forgotten) and any(event.turns for event in forgotten)
    context, fresh = conversation.context, engine.context()
    fresh.append(context.prompt(0, len(context.ids)))
    assert fresh.ids == context.ids
    np.testing.assert_allclose(logits_behind(conversation, context), logits_behind(conversation, fresh), atol=2e-4)


def test_a_turn_that_no_forgetting_makes_room_for_is_refused_and_nothing_is_forgotten() -> None:
    engine = small(300)
    conversation, undisturbed = (Conversation.open(engine, seed=0) for _ in range(2))
    for each in (conversation, undisturbed):
        for number in range(4):
            done(each.reply([Text(f"number {number}: why, and how?")], Choices(greedy=True, max_new=12)))
    with pytest.raises(PromptError, match=r"this turn needs .* the model's context has 300; shorten it"):
        list(conversation.reply([Text("a?" * 300)], Choices()))
    last = [
        done(each.reply([Text("hm?")], Choices(greedy=True, max_new=12))).text for each in (conversation, undisturbed)
    ]
    assert last[0] == last[1]


def test_forgetting_for_an_answer_that_fails_has_not_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small(300)
    conversation, undisturbed = (Conversation.open(engine, seed=0) for _ in range(2))
    longest = Choices(greedy=True, max_new=12)
    for each in (conversation, undisturbed):
        while each.context.room > 100:
            done(each.reply([Text("why, and how?")], longest))
    with monkeypatch.context() as patch:
        patch.setattr(conversation.context, "hidden", lambda: np.full((1, engine.manifest.hidden_size), np.nan, "f4"))
        with pytest.raises(EdgeOmniError, match="nan"):
            list(conversation.reply([Text("a?" * 60)], longest))
    said = [list(each.reply([Text("a?" * 60)], longest)) for each in (conversation, undisturbed)]
    assert said[0][0] == said[1][0] and isinstance(said[0][0], Forgotten)
    assert done(iter(said[0])).text == done(iter(said[1])).text
    assert conversation.context.ids == undisturbed.context.ids and conversation.starts == undisturbed.starts


def test_the_terminal_says_what_was_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    chat = terminal.Chat(small(300), Choices(max_new=20), seed=0)
    for _ in range(10):
        chat.answer("why, and how?")
    assert "; /reset begins anew" in capsys.readouterr().err


# Reading


def test_reading_is_told_piece_by_piece_and_a_short_turn_is_just_read(engine: Engine) -> None:
    conversation = Conversation.open(engine, seed=0)
    short = list(conversation.reply([Text("hello")], Choices(max_new=2)))
    assert not any(isinstance(event, Reading) for event in short)
    events = list(conversation.reply([Text("why? " * 150)], Choices(max_new=2)))
    told = [event for event in events if isinstance(event, Reading)]
    assert told == events[: len(told)] and len(told) > 2
    total = done(iter(events)).timings.prompt_positions
    assert [event.done for event in told] == list(range(0, total - 1, 128))
    assert all(event.total == total for event in told)


@pytest.mark.parametrize("fills", [False, True])
def test_a_turn_whose_reading_is_cancelled_has_not_been_said(fills: bool) -> None:
    engine = small(700)
    conversation, undisturbed = (Conversation.open(engine, seed=0) for _ in range(2))
    longest = Choices(greedy=True, max_new=12)
    for each in (conversation, undisturbed):
        while (fills and each.context.room > 250) or not each.context.ids:
            done(each.reply([Text("why, and how?")], longest))
    cancelled = 0
    for event in (reply := conversation.reply([Text("why? " * 60)], longest)):
        if isinstance(event, Reading) and event.done:
            cancelled += 1
            reply.close()
    assert cancelled == 1
    said = [list(each.reply([Text("hm?" * 80)], longest)) for each in (conversation, undisturbed)]
    assert isinstance(said[0][0], Forgotten) == fills
    assert done(iter(said[0])).text == done(iter(said[1])).text
    assert conversation.context.ids == undisturbed.context.ids


def test_the_first_ctrl_c_takes_back_a_turn_that_is_being_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, pressed = terminal.Chat(engine, Choices(max_new=3), seed=0), []
    read = chat.conversation.context.read

    def pressing(**options: int) -> Iterator[np.ndarray]:
        for hidden in read(**options):
            if not pressed:
                pressed.append(signal.raise_signal(signal.SIGINT))
            yield hidden

    monkeypatch.setattr(chat.conversation.context, "read", pressing)
    with interruptible(engine) as stop, pytest.raises(EdgeOmniError):
        chat.turn("why? " * 150, stop)
    assert stop() and not chat.conversation.context.ids
    chat.turn("Hello")
    assert len(chat.conversation.context.ids) < 150


def test_reading_is_seen_at_a_terminal_and_gives_way_to_the_answer(tmp_path: Path) -> None:
    person = Terminal("chat", omni(), "--seed", 1, "--max-new", 3, cache=tmp_path)
    person.expect("> ")
    person.type("why, and how? " * 60)
    assert "reading 0 of " in person.expect("reading 128 of ")
    person.expect(" positions")
    person.type("/quit")
    assert person.leave() == 0
