"""Where speech begins, pauses, goes on, is cut and ends: hop by hop, and whatever comes."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.live.endpointer import Endpointer, Found
from runtime.live.settings import HOP_MS, Settings


def hear(probabilities: Sequence[float], mouth: bool = False, energy: float = -30, **changes: float) -> list[Found]:
    endpointer = Endpointer(Settings(**changes))  # type: ignore[arg-type]
    found: list[Found] = []
    for hop, probability in enumerate(probabilities, 1):
        found += endpointer.step(hop * HOP_MS, probability, energy, mouth)
    return found


def kinds(found: list[Found]) -> list[str]:
    return [one.kind for one in found]


def test_two_voiced_hops_are_nothing_and_three_are_speech() -> None:
    assert not hear([1, 1] + [0] * 40)
    assert kinds(hear([1, 1, 1] + [0] * 40)) == ["V_ON", "V_SOFT", "V_BLIP"]


def test_over_an_answer_it_takes_twice_as_long_and_a_surer_voice() -> None:
    assert not hear([0.7] * 10, mouth=True)
    (found,) = hear([0.8] * 6, mouth=True)
    assert (found.kind, found.t) == ("V_ON", 192)


def test_a_probability_between_the_thresholds_keeps_speech_and_does_not_begin_it() -> None:
    assert not hear([0.5] * 40)
    assert kinds(hear([1] * 3 + [0.5] * 40)) == ["V_ON"]


def test_after_an_echo_a_voice_has_to_be_surer() -> None:
    endpointer = Endpointer()
    endpointer.wary_until = 10 * HOP_MS
    found = [endpointer.step(hop * HOP_MS, 0.62, -30, False) for hop in range(1, 20)]
    assert [one.t for hop in found for one in hop if one.kind == "V_ON"] == [12 * HOP_MS]


def test_an_isolated_voiced_hop_delays_the_end_and_is_no_speech() -> None:
    plain = hear([1] * 10 + [0] * 30)
    clicked = hear([1] * 10 + [0] * 18 + [1] + [0] * 11)
    assert kinds(plain) == kinds(clicked) == ["V_ON", "V_SOFT", "V_END"]
    assert clicked[-1].t == plain[-1].t + HOP_MS
    assert clicked[-1].voiced_ms == plain[-1].voiced_ms


def test_the_model_is_given_the_same_at_the_soft_and_at_the_hard_end() -> None:
    _, soft, end = hear([1] * 20 + [0] * 30)
    assert soft.at == end.at == 20 * HOP_MS + 200


def test_speech_that_never_pauses_is_cut_before_the_model_would_cut_it_and_ends_after_two_minutes() -> None:
    found = hear([1] * 4000)
    cuts = [one.at for one in found if one.kind == "V_CUT"]
    starts = [found[0].at, *cuts]
    assert all(b - a <= 30_000 for a, b in zip(starts, cuts, strict=False)) and len(cuts) >= 3
    assert next(one.t for one in found if one.kind == "V_MAX") == found[0].t + 120_000


def test_a_quiet_hop_is_the_place_to_cut() -> None:
    endpointer, found = Endpointer(), []
    for hop in range(1, 1000):
        quiet = hop in (10, 800)
        found += endpointer.step(hop * HOP_MS, 1.0, -60 if quiet else -30, False)
    assert next(one.at for one in found if one.kind == "V_CUT") == 800 * HOP_MS


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-90, 0), st.booleans()), max_size=400))
@settings(max_examples=200, deadline=None)
def test_whatever_is_heard_beginnings_and_ends_alternate_and_resumptions_follow_pauses(hops) -> None:
    endpointer, on, soft = Endpointer(), False, False
    for index, (probability, energy, mouth) in enumerate([*hops, *[(0.0, -60.0, False)] * 60], 1):
        for found in endpointer.step(index * HOP_MS, probability, energy, mouth):
            assert (found.kind == "V_ON") != on
            assert found.kind != "V_RES" or soft
            on = found.kind not in ("V_END", "V_BLIP")
            soft = found.kind == "V_SOFT" or (soft and found.kind == "V_CUT")
            assert 0 <= found.at <= found.t or found.kind == "V_SOFT"
    assert not on and not endpointer.on
