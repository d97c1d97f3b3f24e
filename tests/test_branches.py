"""Two contexts on one set of weights: what is heard is what is remembered, and what is rejected was never there."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apps.embedded import CHECKPOINT, embedded_bundle
from quant.synthetic import picture, voice
from runtime.audio import Wave, read_audio
from runtime.bundle import Gate
from runtime.context import Context
from runtime.engine import Engine
from runtime.errors import EdgeOmniError, MediaError, PromptError
from runtime.events import AudioChunk, TextDelta
from runtime.live.branches import Branches
from runtime.live.pace import LIMIT_MS, SIZES, Pace
from runtime.prompt import Audio, Prompt, concat
from tests.live_work import done, listed
from tests.tiny import omni_bundle

SAMPLES = CHECKPOINT.parent / "samples"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(omni_bundle())


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Engine(embedded_bundle())


@pytest.fixture
def branches(engine: Engine) -> Branches:
    return Branches(engine, seed=0, greedy=True)


def wave(seconds: float = 1.0, seed: int = 1) -> Wave:
    return voice(seconds, 16000, seed).astype(np.float32)


def frame(seed: int) -> bytes:
    return picture(56, 56, seed)


def sample(name: str) -> Wave:
    return read_audio(SAMPLES / name)[0][0]


def turn(branches: Branches, said: Wave, heard_ms: float | None = None) -> None:
    """A spoken turn that is accepted."""
    branches.fork(heard_ms)
    done(branches.hear(said, last=True))
    branches.accept()


def until(branches: Branches, ms: float) -> tuple[Iterator[object], str]:
    """The reply in progress, up to so much sound, and the text until then."""
    reply, samples, text = branches.reply(spoken=True), 0, ""
    for item in reply:
        if isinstance(item, TextDelta):
            text += item.text
        if isinstance(item, AudioChunk):
            samples += len(item.samples)
            if 1000 * samples >= ms * branches.rate:
                return reply, text
    raise AssertionError(f"the reply has only {samples} samples")


def logits(engine: Engine, context: Context) -> np.ndarray:
    return engine.session("lm_head").run(hidden=context.hidden())["logits"][0]


def fresh(engine: Engine, *pieces: Prompt) -> Context:
    """A context that reads all of it at once."""
    context = engine.context()
    context.append(concat([engine.format.open_conversation(), *pieces]))
    context.hidden()
    return context


def test_pictures_and_audio_read_as_they_come_give_the_logits_of_reading_all_at_the_end(
    engine: Engine, branches: Branches
) -> None:
    branches.fork(None)
    for seed in (1, 2):
        done(branches.see(frame(seed)))
    first, second = wave(1.5, 3), wave(0.8, 4)
    done(branches.hear(first, last=False))
    done(branches.hear(second, last=True))
    codes = np.concatenate([engine.hear(first).codes, engine.hear(second).codes])
    parts = [engine.look(frame(1)), engine.look(frame(2)), Audio(codes)]
    whole = fresh(engine, engine.format.user_turn(parts, spoken=True))
    assert branches.listen.context.ids == whole.ids
    np.testing.assert_allclose(logits(engine, branches.listen.context), logits(engine, whole), atol=2e-4)


def test_hearing_counts_the_codes_and_the_tags_that_it_read(engine: Engine, branches: Branches) -> None:
    branches.fork(None)
    closing = len(engine.format.close_user(spoken=True))
    assert done(branches.hear(wave(), last=True)) == len(engine.hear(wave()).codes) + 2 + closing


def test_a_fork_copies_and_a_rejected_turn_was_never_there(engine: Engine, branches: Branches) -> None:
    turn(branches, wave())
    listed(branches.reply(spoken=True))
    branches.commit(None)
    before, bits = list(branches.speak.context.ids), snapshot(branches.speak.context)
    branches.fork(None)
    done(branches.hear(wave(seed=7), last=True))
    branches.check()
    branches.reject()
    branches.check()
    assert branches.speak.context.ids == before and snapshot(branches.speak.context) == bits
    assert len(branches.listen) <= len(before)


def snapshot(context: Context) -> bytes:
    return b"".join(buffer[:, :, : context.cache.length].tobytes() for buffer in context.cache.buffers.values())


def test_accepting_swaps_the_branches_and_copies_nothing(branches: Branches) -> None:
    speak, listen = branches.speak, branches.listen
    branches.fork(None)
    done(branches.hear(wave(), last=True))
    branches.accept()
    assert branches.speak is listen and branches.listen is speak
    branches.check()


def sounds(items: list[object]) -> tuple[str, bytes]:
    text = "".join(item.text for item in items if isinstance(item, TextDelta))
    return text, b"".join(item.samples.tobytes() for item in items if isinstance(item, AudioChunk))


@pytest.mark.parametrize("greedy", [True, False])
def test_a_reply_is_bit_for_bit_the_same_while_something_else_is_heard_and_rejected(
    engine: Engine, greedy: bool
) -> None:
    undisturbed, disturbed = (Branches(engine, seed=3, greedy=greedy) for _ in range(2))
    for each in (undisturbed, disturbed):
        turn(each, wave())
    expected = listed(undisturbed.reply(spoken=True))[0]
    items, reply = [], disturbed.reply(spoken=True)
    for at, item in enumerate(reply):
        items.append(item)
        if at in (8, 30):
            disturbed.fork(50.0)
            done(disturbed.hear(wave(0.6, seed=at), last=True))
            disturbed.check()
            disturbed.reject()
    assert sounds(items) == sounds(expected) and sounds(items)[1]
    assert disturbed.speak.context.ids == undisturbed.speak.context.ids
    assert snapshot(disturbed.speak.context) == snapshot(undisturbed.speak.context)


def test_after_a_barge_in_the_memory_is_that_of_what_was_heard(engine: Engine, branches: Branches) -> None:
    first, second = wave(seed=1), wave(1.2, seed=2)
    turn(branches, first)
    reply, _ = until(branches, 300.0)
    answer, log = branches.speak.answer, branches.speak.log
    assert answer is not None
    branches.fork(200.0)
    end = log.position(200.0)
    assert end is not None and answer < end < len(branches.speak)
    done(branches.hear(second, last=True))
    heard = branches.speak.context.prompt(answer, end)
    reply.close()  # type: ignore[attr-defined]
    branches.accept()
    close = engine.format.close_assistant(spoken=True, within_audio=True)
    turns = [engine.format.user_turn([engine.hear(said)], spoken=True) for said in (first, second)]
    whole = fresh(engine, turns[0], heard, close, turns[1])
    assert branches.speak.context.ids == whole.ids
    np.testing.assert_allclose(logits(engine, branches.speak.context), logits(engine, whole), atol=2e-4)
    assert listed(branches.reply(spoken=True))[1] in ("end", "length")


def test_a_committed_answer_ends_with_what_was_heard(engine: Engine, branches: Branches) -> None:
    turn(branches, wave())
    reply, text = until(branches, 300.0)
    reply.close()  # type: ignore[attr-defined]
    end = branches.speak.log.position(100.0)
    assert end is not None and text.startswith(branches.heard_text(100.0))
    branches.commit(100.0)
    assert branches.speak.context.ids[end:] == [engine.manifest.tokens.audiogen_end]
    branches.check()


def test_a_turn_before_any_sound_leaves_two_user_turns_and_no_empty_answer(engine: Engine, branches: Branches) -> None:
    first, second = wave(seed=1), wave(seed=2)
    turn(branches, first)
    reply = branches.reply(spoken=True)
    for item in reply:
        if isinstance(item, TextDelta):
            break
    branches.fork(0.0)
    done(branches.hear(second, last=True))
    reply.close()
    branches.accept()
    form, codes = engine.format, [engine.hear(said).codes for said in (first, second)]
    pieces = [[form.open_user(), form.sound(each, opens=True, closes=True)] for each in codes]
    whole = fresh(engine, *pieces[0], *pieces[1], form.close_user(spoken=True))
    assert branches.speak.context.ids == whole.ids
    np.testing.assert_allclose(logits(engine, branches.speak.context), logits(engine, whole), atol=2e-4)


def test_an_answer_cancelled_before_any_sound_is_forgotten_by_the_next_turn(engine: Engine, branches: Branches) -> None:
    turn(branches, wave())
    user_end = branches.speak.user_end
    reply = branches.reply(spoken=True)
    next(reply)
    reply.close()
    branches.commit(0.0)
    assert len(branches.speak) == user_end
    branches.fork(None)
    assert branches.listen.context.ids[user_end:] == engine.format.open_user().ids.tolist()


def test_unhearing_keeps_pictures_and_earlier_segments_and_the_same_audio_gives_the_same_again(
    engine: Engine, branches: Branches
) -> None:
    branches.fork(None)
    done(branches.see(frame(1)))
    done(branches.hear(wave(), last=False))
    kept = list(branches.listen.context.ids)
    done(branches.hear(wave(0.7, 2), last=True))
    first, ids = logits(engine, branches.listen.context).copy(), list(branches.listen.context.ids)
    listed(branches.reply(spoken=True))  # speculation
    branches.unhear()
    assert branches.listen.context.ids == kept
    done(branches.hear(wave(0.7, 2), last=True))
    assert branches.listen.context.ids == ids
    np.testing.assert_allclose(logits(engine, branches.listen.context), first, atol=2e-4)


def test_a_speculative_reply_is_the_one_that_is_given_after_the_verdict(engine: Engine) -> None:
    replies = []
    for accept_at in (0, 12):
        branches = Branches(engine, seed=5)
        branches.fork(None)
        done(branches.hear(wave(), last=True))
        reply, items = branches.reply(spoken=True), []
        if accept_at == 0:
            branches.accept()
        for at, item in enumerate(reply, start=1):
            items.append(item)
            if at == accept_at:
                branches.accept()
        assert branches.speak.log.text == sounds(items)[0]
        replies.append(sounds(items))
    assert replies[0] == replies[1]


def test_a_segment_that_is_cancelled_is_not_in_the_memory(branches: Branches) -> None:
    branches.fork(None)
    before = list(branches.listen.context.ids)
    work = branches.hear(wave(3.0), last=True)
    for _ in range(2):
        next(work)
    work.close()
    assert branches.listen.context.ids == before
    branches.check()


def test_a_reply_ends_where_its_branch_is_cut(branches: Branches) -> None:
    branches.fork(None)
    done(branches.hear(wave(), last=True))
    reply = branches.reply(spoken=True)
    for _ in range(6):
        next(reply)
    branches.unhear()
    length = len(branches.listen)
    assert listed(reply)[1] == "length" and len(branches.listen) == length


def test_a_picture_after_the_audio_of_its_turn_is_refused_with_what_to_do(branches: Branches) -> None:
    branches.fork(None)
    done(branches.hear(wave(), last=False))
    with pytest.raises(PromptError, match="next turn"):
        done(branches.see(frame(1)))


def test_audio_too_short_is_refused_but_may_end_longer_audio(branches: Branches) -> None:
    branches.fork(None)
    before = len(branches.listen)
    with pytest.raises(MediaError, match="too short"):
        done(branches.hear(np.zeros(100, np.float32), last=True))
    assert len(branches.listen) == before
    done(branches.hear(wave(), last=False))
    done(branches.hear(np.zeros(100, np.float32), last=True))
    assert branches.listen.context.ids.count(branches.engine.manifest.tokens.audio_end or -1) == 1


def test_broken_audio_is_refused_and_the_turn_stands_as_before(branches: Branches) -> None:
    branches.fork(None)
    done(branches.hear(wave(), last=False))
    before = list(branches.listen.context.ids)
    with pytest.raises(MediaError, match="NaN"):
        done(branches.hear(np.full(4000, np.nan, np.float32), last=True))
    assert branches.listen.context.ids == before


def test_a_typed_turn_is_answered_in_text_and_anew_in_text_on_request(branches: Branches) -> None:
    done(branches.read("hello"))
    branches.accept()
    ids = list(branches.speak.context.ids)
    items, _ = listed(branches.reply(spoken=True))
    assert sounds(items)[1]
    again, _ = listed(branches.reply_in_text())
    assert not sounds(again)[1] and len(branches.speak) > len(ids) - 2
    assert branches.heard_text(0.0) == branches.speak.log.text == sounds(again)[0]


def test_a_blank_turn_and_an_answer_to_nothing_are_refused(branches: Branches) -> None:
    with pytest.raises(PromptError, match="empty"):
        done(branches.read("  "))
    with pytest.raises(PromptError, match="no turn to answer"):
        done(branches.reply(spoken=True))


def test_after_a_reset_only_the_system_prompt_is_left(branches: Branches) -> None:
    turn(branches, wave())
    listed(branches.reply(spoken=True))
    branches.reset()
    assert branches.lengths() == (branches.pinned, branches.pinned) and branches.pinned > 0
    branches.check()


def test_a_model_without_a_marker_of_its_own_takes_every_turn_for_a_question(branches: Branches) -> None:
    branches.fork(None)
    done(branches.hear(wave(), last=True))
    assert done(branches.judge(speaking=True)) == ("QUERY", 1.0)


def test_two_branches_cost_the_second_cache_and_no_second_set_of_weights(engine: Engine, branches: Branches) -> None:
    one = engine.context()
    turn(branches, wave())
    assert branches.speak.context.decoder.session is branches.listen.context.decoder.session
    both = branches.speak.context.cache.nbytes + branches.listen.context.cache.nbytes
    assert both == 2 * one.cache.nbytes


def test_a_cache_that_grows_between_turns_is_read_from_its_new_place(engine: Engine) -> None:
    branches, rng = Branches(engine, seed=0), np.random.default_rng(0)
    codes = [rng.integers(0, 16, (700, len(engine.format.codebook_sizes))) for _ in range(2)]
    whole = []
    for each in codes:
        branches.fork(None)
        branches.listen.hear(each, last=True)
        branches.listen.ask(spoken=False)
        for _ in branches.pace.read(branches.listen.context):
            pass
        branches.accept()
        whole += [engine.format.user_turn([Audio(each)], spoken=False)]
        found = logits(engine, branches.speak.context)
        np.testing.assert_allclose(found, logits(engine, fresh(engine, *whole)), atol=2e-4)
        branches.speak.answer = None  # nobody answers in words; the next turn follows the answer's beginning


def test_pieces_shrink_until_one_takes_no_longer_than_it_may() -> None:
    pace = Pace()
    assert pace.piece in SIZES
    for cost in (0.1, 1.0, 10.0):
        for _ in range(40):
            pace.note(pace.piece, cost * pace.piece)
        assert pace.piece == max((n for n in SIZES if n * cost <= LIMIT_MS), default=SIZES[0])
    pace.note(1, 1e9)
    assert pace.piece == SIZES[0] and pace.cost is not None and pace.cost < 11


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, the rows that are shared are equal and nothing is lost."""

    @initialize(seed=st.integers(0, 9))
    def begin(self, seed: int) -> None:
        self.branches, self.reply = Branches(ENGINE[0], seed=seed), None
        self.shown = 0

    def _open(self) -> bool:
        return self.branches.listen.is_open

    @rule(heard=st.none() | st.sampled_from([0.0, 60.0, 300.0, 5000.0]))
    def fork(self, heard: float | None) -> None:
        self.branches.fork(heard)

    @rule(seed=st.integers(0, 3))
    def see(self, seed: int) -> None:
        try:
            done(self.branches.see(frame(seed)))
        except PromptError:
            assert self.branches.listen.within_audio or self.branches.listen.answer is not None

    @rule(seed=st.integers(0, 3), last=st.booleans(), pieces=st.integers(0, 4))
    def hear(self, seed: int, last: bool, pieces: int) -> None:
        work = self.branches.hear(wave(0.5, seed), last)
        if pieces < 4:
            for _ in zip(range(pieces), work, strict=False):
                pass
            work.close()
        else:
            done(work)

    @rule()
    def unhear(self) -> None:
        self.branches.unhear()

    @rule()
    def reject(self) -> None:
        self.branches.reject()

    @precondition(lambda self: self.branches.listen.is_open and self.branches.listen.answer is not None)
    @rule()
    def accept(self) -> None:
        self.branches.accept()

    @precondition(lambda self: self.reply is None)
    @rule(spoken=st.booleans())
    def begin_reply(self, spoken: bool) -> None:
        try:
            self.reply = self.branches.reply(spoken)
        except PromptError:
            assert not self.branches.listen.is_open or self.branches.listen.answer is None

    @precondition(lambda self: self.reply is not None)
    @rule(steps=st.integers(1, 30))
    def go_on(self, steps: int) -> None:
        try:
            for _ in range(steps):
                next(self.reply)  # type: ignore[arg-type]
        except (StopIteration, EdgeOmniError):
            self.reply = None

    @precondition(lambda self: self.reply is not None)
    @rule()
    def stop(self) -> None:
        self.reply.close()  # type: ignore[union-attr]
        self.reply = None

    @rule(heard=st.none() | st.sampled_from([0.0, 100.0, 900.0]))
    def commit(self, heard: float | None) -> None:
        if self.reply is not None:
            self.reply.close()
            self.reply = None
        self.branches.commit(heard)

    @rule(reserve=st.sampled_from([64, 8100]))
    def compact(self, reserve: int) -> None:
        if self.reply is None:
            done(self.branches.compact(reserve))

    @invariant()
    def shared_rows_are_equal(self) -> None:
        if hasattr(self, "branches"):
            self.branches.check()
            for branch in (self.branches.speak, self.branches.listen):
                assert branch.starts == sorted(set(branch.starts)) and len(branch) >= self.branches.pinned


ENGINE: list[Engine] = []


@pytest.fixture(scope="module", autouse=True)
def _shared_engine(engine: Engine) -> None:
    ENGINE[:] = [engine]


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_nano_answers_a_question_over_its_own_answer(nano: Engine) -> None:
    branches = Branches(nano, seed=0)
    turn(branches, sample("espeak-004.flac"))
    reply, _ = until(branches, 300.0)
    branches.fork(200.0)
    done(branches.hear(sample("espeak-003.flac"), last=True))
    verdict, sure = done(branches.judge(speaking=True))
    assert verdict == "QUERY" and sure >= 0.6
    reply.close()  # type: ignore[attr-defined]
    branches.accept()
    text, speech = sounds(listed(branches.reply(spoken=True))[0])
    assert text.strip().startswith("the bathroom light is") and len(speech) > 4 * branches.rate // 2


def test_a_model_that_remembers_nothing_answers_a_question_over_its_answer_as_if_it_were_the_first(
    nano: Engine,
) -> None:
    forgetful, alone = (Branches(nano, seed=0, greedy=True, remember=0) for _ in range(2))
    turn(forgetful, sample("espeak-002.flac"))
    until(forgetful, 300)
    turn(forgetful, sample("espeak-004.flac"), heard_ms=300)
    turn(alone, sample("espeak-004.flac"))
    assert forgetful.speak.context.ids == alone.speak.context.ids
    forgetful.check()


def test_nano_does_not_take_noise_for_a_question_and_goes_on(nano: Engine) -> None:
    branches, rng = Branches(nano, seed=0), np.random.default_rng(0)
    branches.fork(None)
    done(branches.hear(0.1 * rng.standard_normal(24000).astype(np.float32), last=True))
    verdict, sure = done(branches.judge(speaking=False))
    assert verdict == "NOISE" and sure >= 0.5
    branches.reject()
    assert branches.lengths()[0] == branches.pinned


def test_a_turn_is_meant_for_the_assistant_from_the_probability_on_that_the_manifest_says(nano: Engine) -> None:
    branches = Branches(nano, seed=0)
    branches.fork(None)
    done(branches.hear(sample("espeak-003.flac"), last=True))
    said, sure = done(branches.judge(speaking=True))
    assert (said, sure) == done(branches.judge(speaking=False)) and said == "QUERY" and sure < 1
    given = nano.manifest
    try:
        nano.manifest = replace(given, gate=Gate(in_silence=sure, over_answer=(1 + sure) / 2))
        assert done(branches.judge(speaking=False)) == ("QUERY", sure)
        assert done(branches.judge(speaking=True)) == ("NOISE", 1 - sure)
    finally:
        nano.manifest = given
    branches.reject()


def test_nano_writes_down_what_was_said(nano: Engine) -> None:
    branches = Branches(nano)
    assert done(branches.caption(sample("espeak-002.flac"))) == "what is sixty minus fifty three"
    assert branches.lengths() == (branches.pinned, branches.pinned)


def test_nano_still_answers_after_a_context_full_of_turns_was_forgotten(nano: Engine) -> None:
    branches, lines = Branches(nano, seed=0), []
    said = sample("espeak-004.flac")
    for _ in range(12):
        turn(branches, np.concatenate([said] * 6))
        answer = done(branches.reply(spoken=False))
        assert answer != "context"
        branches.commit(None)
        lines.append(done(branches.compact(reserve=1400)))
        branches.check()
    assert sum(line is not None for line in lines) >= 2
    forget_all(branches)
    done(branches.read("what is seven plus five"))
    branches.accept()
    text, _ = sounds(listed(branches.reply(spoken=False))[0])
    assert text.strip() == "seven plus five is twelve"


def forget_all(branches: Branches) -> None:
    """Nano was trained on one turn and its follow-up: an unrelated turn before is more than it can bear."""
    branches.remember = 0
    done(branches.compact(reserve=0))
    assert len(branches.speak) == branches.pinned


def test_the_samples_that_these_tests_hear_are_there() -> None:
    assert all((Path(SAMPLES) / f"espeak-00{i}.flac").is_file() for i in (2, 3, 4))
