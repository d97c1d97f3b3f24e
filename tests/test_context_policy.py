"""What a long conversation forgets: the system prompt stays, pictures go first, then whole turns, oldest first."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.context import Context
from runtime.context_policy import KEPT_SHARE, Plan, Said, plan
from runtime.engine import Engine
from runtime.live.branches import Branches
from runtime.live.heard import ReplyLog, Segment
from runtime.prompt import Audio, Image, Text
from tests.live_work import done
from tests.tiny import omni_bundle

TURN, PICTURE = 12, 6  # tokens of a turn without its picture, and of a picture with its tags


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(omni_bundle())


def conversation(engine: Engine, pictured: list[bool], pinned: int = 5, most: int = 200) -> tuple[Context, list[int]]:
    """Ids of turns of equal length, the pictured ones with a picture behind their first token."""
    context, starts, tokens = engine.context(), [], engine.manifest.tokens
    context.ids = [1] * pinned
    for seen in pictured:
        starts.append(len(context.ids))
        picture = [tokens.img_start, *[tokens.img_pad] * (PICTURE - 2), tokens.img_end]
        context.ids += [2, *(picture if seen else []), *[3] * (TURN - 1)]  # type: ignore[list-item]
    context.cache.layout = replace(context.cache.layout, max_positions=most)
    return context, starts


def forgetting(context: Context, starts: list[int], reserve: int, remember: int | None = None) -> Plan | None:
    """The plan for turns behind a system prompt of 5 tokens."""
    manifest = replace(context.manifest, cache=context.cache.layout)
    return plan(Said(context.ids, 5, starts), manifest, reserve, remember)


def kept_ids(context: Context, spans: tuple[tuple[int, int], ...]) -> list[int]:
    return [token for start, end in spans for token in context.ids[start:end]]


def test_nothing_is_forgotten_while_there_is_room(engine: Engine) -> None:
    context, starts = conversation(engine, [True] * 5)
    assert forgetting(context, starts, reserve=200 - len(context.ids)) is None


def test_the_oldest_pictures_go_before_any_turn_and_the_system_prompt_stays(engine: Engine) -> None:
    context, starts = conversation(engine, [True, True, True], most=110)
    found = forgetting(context, starts, reserve=110 - len(context.ids) + 1)
    assert found is not None and (found.pictures, found.turns) == (1, 0)
    assert kept_ids(context, found.kept)[:5] == [1] * 5
    assert found.positions == len(context.ids) - PICTURE
    assert found.kept[0] == (0, 6), "it is the oldest picture that goes, behind the first token of its turn"


def test_then_the_oldest_whole_turns_go_and_the_newest_stays_with_its_picture(engine: Engine) -> None:
    context, starts = conversation(engine, [True] * 10, most=190)
    found = forgetting(context, starts, reserve=20)
    assert found is not None and found.pictures == 9 and found.turns > 0
    assert found.positions <= KEPT_SHARE * 190
    assert found.kept[-1][1] == len(context.ids)
    assert kept_ids(context, found.kept).count(2) == 10 - found.turns
    assert found.kept[-1][0] <= starts[-1], "the newest turn is not whole"


def test_the_line_says_what_went(engine: Engine) -> None:
    context, starts = conversation(engine, [True] * 10, most=190)
    found = forgetting(context, starts, reserve=20)
    assert str(found.forgotten) == f"forgot the oldest 9 pictures and the oldest {found.turns} turns: " + (  # type: ignore[union-attr]
        f"185 positions were used, {found.positions} are kept"  # type: ignore[union-attr]
    )


def test_a_limit_of_turns_forgets_the_older_ones_whole(engine: Engine) -> None:
    context, starts = conversation(engine, [True, False, True, False], most=1000)
    assert forgetting(context, starts, reserve=20, remember=4) is None
    found = forgetting(context, starts, reserve=20, remember=2)
    assert found is not None and not found.full and (found.pictures, found.turns) == (0, 2)
    assert found.kept == ((0, 5), (starts[2], len(context.ids)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(10, 150), st.none() | st.integers(0, 4))
def test_whatever_is_forgotten_the_rest_is_in_order_and_small_enough(
    engine: Engine, pictured: list[bool], reserve: int, remember: int | None
) -> None:
    context, starts = conversation(engine, pictured, most=160)
    found = forgetting(context, starts, reserve, remember)
    if found is None:
        assert len(context.ids) + reserve <= 160 and (remember is None or len(starts) <= remember)
        return
    flat = [edge for span in found.kept for edge in span]
    assert flat == sorted(set(flat)) and found.kept[0][0] == 0 and found.kept[0][1] >= 5
    assert found.positions <= max(5, 160 - reserve) or not found.full
    left = kept_ids(context, found.kept)
    assert left.count(2) == len(pictured) - found.turns
    assert remember is None or left.count(2) <= remember


def test_what_is_kept_is_read_as_if_nothing_else_had_ever_been_said(engine: Engine) -> None:
    branches = filled(engine, turns=4)
    before = branches.speak.context
    starts = list(branches.speak.starts)
    line = done(branches.compact(reserve=branches.speak.context.room + 1))
    assert line is not None and "picture" in line
    after = branches.speak.context
    assert after is not before and len(after.ids) < len(before.ids)
    fresh = engine.context()
    fresh.append(before.prompt(0, branches.pinned))
    assert branches.speak.starts[0] == branches.pinned
    fresh.append(after.prompt(branches.pinned, len(after.ids)))
    assert fresh.ids == after.ids and len(branches.speak.starts) == len(starts)
    for context in (after, fresh):
        context.append(engine.format.user_turn([Text("so?")], spoken=False))
    np.testing.assert_allclose(after.hidden(), fresh.hidden(), atol=2e-4)
    branches.check()


def test_forgetting_that_is_cancelled_has_not_happened(engine: Engine) -> None:
    branches = filled(engine, turns=4)
    before, ids = branches.speak.context, list(branches.speak.context.ids)
    work = branches.compact(reserve=before.room + 1)
    next(work)
    work.close()
    assert branches.speak.context is before and before.ids == ids
    branches.check()
    done(branches.read("and now?"))
    branches.accept()
    assert branches.speak.context.ids[: len(ids)] == ids


def filled(engine: Engine, turns: int) -> Branches:
    """A conversation with a picture and an answer in each turn."""
    branches, rng = Branches(engine, seed=0), np.random.default_rng(0)
    for _ in range(turns):
        branches.fork(None)
        picture = Image(rng.standard_normal((40, engine.manifest.hidden_size)).astype(np.float32))
        branches.listen.append(engine.format.show(picture))
        branches.listen.kept = len(branches.listen)
        done(branches.read("and this?"))
        branches.accept()
        answer = engine.format.close_assistant([Text("a door. ")], spoken=False)
        branches.speak.append(answer)
        branches.speak.answer = None
    return branches


def layout(engine: Engine):
    assert engine.manifest.speech is not None
    return engine.manifest.speech


def two_segments(engine: Engine) -> ReplyLog:
    """Ten frames that say "one two three" from position 20, and ten that say " four five six" from position 40."""
    log = ReplyLog(layout(engine), text="one two three four five six")
    log.segments = [Segment(20, 13, 10, True), Segment(40, 27, 10, True)]
    return log


@pytest.mark.parametrize(
    ("ms", "position", "text"),
    [
        (0.0, None, ""),
        (0.1, 21, ""),
        (80.0, 21, ""),
        (80.1, 22, "one"),
        (400.0, 25, "one "),
        (770.0, 30, "one two three"),
        (860.0, 42, "one two three "),
        (1200.0, 46, "one two three four"),
        (9999.0, 50, "one two three four five six"),
    ],
)
def test_what_was_heard_ends_with_a_frame_and_with_a_word(
    engine: Engine, ms: float, position: int | None, text: str
) -> None:
    log = two_segments(engine)
    assert log.position(ms) == position
    assert log.heard_text(ms).strip() == text.strip()


def test_a_second_segment_begins_where_the_first_is_faded_out(engine: Engine) -> None:
    log, speech = two_segments(engine), layout(engine)
    first = (10 * speech.frames_per_code - speech.frames_short) * speech.samples_per_frame - speech.overlap_samples
    begins = 1000 * first / speech.sampling_rate
    assert (log.position(begins), log.position(begins + 0.1)) == (30, 41)


def test_a_segment_whose_sound_is_not_complete_is_not_taken_for_wholly_heard(engine: Engine) -> None:
    log = ReplyLog(layout(engine), text="sentences whose sound has only begun")
    log.frame(7)
    assert log.heard_text(80.0) == ""
    assert log.position(80.0) == 8


def test_codes_rows_and_text_of_a_part_can_be_read_once_more(engine: Engine) -> None:
    rng, context = np.random.default_rng(0), engine.context()
    image = Image(rng.standard_normal((5, engine.manifest.hidden_size)).astype(np.float32))
    audio = Audio(rng.integers(0, 16, (7, len(engine.format.codebook_sizes))))
    context.append(engine.format.user_turn([image, audio, Text("what?")], spoken=False))
    again = context.prompt(0, len(context.ids))
    np.testing.assert_array_equal(engine.context().embed(again), np.stack(context.tail))
