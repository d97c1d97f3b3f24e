"""Conversations with the golden omni model: one memory, interruption, harmless errors, and speech as it comes."""

from collections.abc import Iterator

import numpy as np
import pytest

from runtime.audio import join
from runtime.context import Context
from runtime.conversation import Choices, Conversation, read_aloud, transcribe
from runtime.engine import Engine
from runtime.errors import EdgeOmniError, PromptError
from runtime.events import AudioChunk, Event, ReplyDone, StepDone, TextDelta
from runtime.prompt import Audio, Part, Text, split_for_speech
from tests.tiny import GOLDEN, omni_bundle

SPOKEN = Choices(spoken=True, greedy=True, zero_noise=True)
WRITTEN = Choices(greedy=True, max_new=12)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(omni_bundle())


@pytest.fixture(scope="module")
def heard(engine: Engine) -> Audio:
    return engine.hear(GOLDEN.input("inputs/w0.wav"))


def done(events: Iterator[Event]) -> ReplyDone:
    *_, last = events
    assert isinstance(last, ReplyDone)
    return last


def next_logits(engine: Engine, context: Context) -> np.ndarray:
    return engine.session("lm_head").run(hidden=context.hidden())["logits"]


def test_the_text_that_streamed_is_the_whole_text(engine: Engine, heard: Audio) -> None:
    events = list(Conversation.open(engine, seed=1).reply([heard], Choices(max_new=40)))
    streamed = "".join(event.text for event in events if isinstance(event, TextDelta))
    step = next(event for event in events if isinstance(event, StepDone))
    assert streamed == done(iter(events)).text == engine.tokenizer.decode(step.ids[len(step.inputs) :])


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(engine: Engine, heard: Audio) -> None:
    texts = [done(Conversation.open(engine, seed=s).reply([heard], Choices(max_new=30))).text for s in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("choices", [WRITTEN, SPOKEN], ids=["written", "spoken"])
def test_three_turns_leave_the_memory_that_reading_all_of_it_anew_gives(
    engine: Engine, heard: Audio, choices: Choices
) -> None:
    conversation, codes = Conversation.open(engine), []
    picture = engine.look(GOLDEN.input("inputs/i0.png"))
    turns: list[list[Part]] = [[heard], [picture, Text("and this?")], [Text("why?")]]
    for turn in turns:
        for event in conversation.reply(turn, choices):
            if isinstance(event, StepDone) and event.kind == "audio":
                codes.append(event.codes)
    fresh = engine.context()
    fresh.tail = list(_all_rows(engine, conversation, heard, picture.rows, codes))
    fresh.ids = list(conversation.context.ids)
    for context in (conversation.context, fresh):
        context.append(engine.format.user_turn([Text("so?")], spoken=False))
    np.testing.assert_allclose(next_logits(engine, conversation.context), next_logits(engine, fresh), atol=2e-4)


def _all_rows(
    engine: Engine, conversation: Conversation, heard: Audio, picture: np.ndarray, codes: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Rows of every position of a conversation, embedded one by one from what stands there."""
    tokens = engine.manifest.tokens
    embed_audio, embed_tokens = engine.session("embed_audio"), engine.session("embed_tokens")
    assert engine.manifest.speech is not None
    frames = [code for segment in codes for code in segment if code[0] < engine.manifest.speech.codebook_sizes[0]]
    audio, pictures = iter([*heard.codes, *frames]), iter(picture)
    for token in conversation.context.ids:
        if token == tokens.audio_pad:
            yield embed_audio.run(codes=next(audio)[None])["rows"][0]
        elif token == tokens.img_pad:
            yield next(pictures)
        else:
            yield embed_tokens.run(ids=np.array([token]))["rows"][0]


def test_an_interrupted_answer_stays_in_the_memory_and_the_next_turn_follows_it(engine: Engine, heard: Audio) -> None:
    conversation = Conversation.open(engine)
    reply = conversation.reply([heard], SPOKEN)
    for event in reply:
        if isinstance(event, AudioChunk):
            break
    reply.close()
    before = list(conversation.context.ids)
    assert done(conversation.reply([Text("go on")], WRITTEN)).timings.text_tokens > 0
    after = conversation.context.ids
    assert after[: len(before)] == before
    end = engine.manifest.tokens.audiogen_end
    starts = before.count(engine.manifest.tokens.audiogen_start or -1)
    assert after.count(end or -1) == starts, "an audio segment that was cut short was not closed"


def test_a_prompt_longer_than_the_context_is_refused_and_changes_nothing(engine: Engine) -> None:
    conversation, undisturbed = Conversation.open(engine), Conversation.open(engine)
    room = engine.manifest.cache.max_positions
    with pytest.raises(PromptError, match=str(room)):
        list(conversation.reply([Text("a?" * room)], WRITTEN))
    texts = [done(c.reply([Text("hello")], WRITTEN)).text for c in (conversation, undisturbed)]
    assert texts[0] == texts[1]


def test_broken_arithmetic_ends_the_reply_and_the_conversation_stands_as_before(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, undisturbed = Conversation.open(engine), Conversation.open(engine)
    with monkeypatch.context() as patch:
        patch.setattr(conversation.context, "hidden", lambda: np.full((1, engine.manifest.hidden_size), np.nan, "f4"))
        with pytest.raises(EdgeOmniError, match="nan"):
            list(conversation.reply([Text("hello")], WRITTEN))
    texts = [done(c.reply([Text("hello")], WRITTEN)).text for c in (conversation, undisturbed)]
    assert texts[0] == texts[1]


def test_an_answer_stops_where_the_context_is_full(engine: Engine) -> None:
    conversation = Conversation.open(engine, system="")
    room = engine.manifest.cache.max_positions
    filler = "a?" * ((room - 40) // 2)
    last = done(conversation.reply([Text(filler)], Choices(max_new=100)))
    assert last.finish == "context"
    assert len(conversation.context.ids) == room


def test_a_text_is_answered_as_a_text_and_not_letter_by_letter(engine: Engine, heard: Audio) -> None:
    answers = []
    for said in ("and this?", [Text("and this?")]):
        conversation = Conversation.open(engine)
        answers.append(done(conversation.reply(said, WRITTEN)).text)
        answers.append(done(conversation.reply([heard, *([said] if isinstance(said, str) else said)], WRITTEN)).text)
    assert answers[:2] == answers[2:]


def test_what_is_no_turn_leaves_the_conversation_as_it_was(engine: Engine) -> None:
    conversation = Conversation.open(engine)
    pending = conversation._pending
    with pytest.raises(PromptError, match="a turn holds dict"):
        list(conversation.reply({"role": "user", "content": "hello"}, WRITTEN))  # type: ignore[arg-type]
    assert conversation._pending is pending and not conversation.context.ids


def test_an_empty_turn_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptError, match="empty"):
        list(Conversation.open(engine).reply([Text("  ")], WRITTEN))


def test_the_audio_that_streamed_is_the_segments_joined(engine: Engine, heard: Audio) -> None:
    events = list(Conversation.open(engine).reply([heard], SPOKEN))
    streamed = np.concatenate([event.samples for event in events if isinstance(event, AudioChunk)])
    waves = []
    for event in events:
        if isinstance(event, StepDone) and event.kind == "audio":
            segment = engine.speech(np.random.default_rng(0), "exact", zero_noise=True).segment()
            waves.append(np.concatenate([*segment.push(event.codes), *segment.finish()]))
    assert engine.manifest.speech is not None
    np.testing.assert_allclose(streamed, join(waves, engine.manifest.speech.overlap_samples), atol=1e-5)
    assert len(waves) > 1


def test_the_punctuation_that_the_official_loop_overwrites_stays_in_the_context(heard: Audio) -> None:
    right, official = (Conversation.open(Engine(omni_bundle(), compat=compat)) for compat in ("right", "official"))
    steps = [[e for e in c.reply([heard], SPOKEN) if isinstance(e, StepDone)] for c in (right, official)]
    (first, ours, *_), (same, theirs, *_) = ([step for step in found if step.kind == "audio"] for found in steps)
    assert first.inputs == same.inputs, "the model itself chose to begin the first segment"
    assert ours.inputs[:-2] == theirs.inputs[:-1]
    assert ours.inputs[-1] == theirs.inputs[-1] == right.engine.manifest.tokens.audiogen_start
    assert right.engine.tokenizer.decode([ours.inputs[-2]]) == "，"


def test_an_audio_can_be_transcribed_and_a_text_read_aloud(engine: Engine, heard: Audio) -> None:
    assert done(transcribe(engine, heard)).timings.text_tokens > 0
    text = "hello world, how are you? fine."
    spoken = list(read_aloud(engine, text, Choices(greedy=True)))
    assert any(isinstance(event, AudioChunk) for event in spoken)
    assert sum(isinstance(event, StepDone) for event in spoken) == len(split_for_speech(text)) == 3


def test_timings_count_what_was_made(engine: Engine, heard: Audio) -> None:
    events = list(Conversation.open(engine).reply([heard], SPOKEN))
    timings = done(iter(events)).timings
    assert timings.samples == sum(len(event.samples) for event in events if isinstance(event, AudioChunk))
    assert timings.audio_frames == sum(len(e.codes) for e in events if isinstance(e, StepDone) and e.kind == "audio")
    assert 0 < timings.prefill < timings.first_token < timings.first_audio <= timings.total  # type: ignore[operator]
