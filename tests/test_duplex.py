"""The live loop on a given clock, with a model that follows a cost table: the scenarios, to the millisecond."""

import numpy as np
import pytest

from runtime.errors import EdgeOmniError
from runtime.live.duplex import Duplex
from runtime.live.events import Caption, Notice, Transition, TurnTimes
from runtime.live.settings import HOP, Settings
from tests.simulated import CODE_MS, Ran, Script, begin, codes_of, run

QUESTION = (1024.0, 3072.0)
LONG = Script(clauses=[12, 2])


def of(ran: Ran, kind: type) -> list:
    return [event for event in ran.events if isinstance(event, kind)]


def interrupted(*verdicts: str) -> Script:
    return Script(verdicts=["QUERY", *verdicts], clauses=[12, 2])  # type: ignore[list-item]


def test_a_question_is_answered_with_the_times_of_the_cost_table() -> None:
    ran = run(9000, [QUESTION])
    assert ran.log() == [
        (1120.0, "IDLE", "V_ON", "HEAR"),
        (3328.0, "HEAR", "V_SOFT", "HEAR"),
        (3680.0, "HEAR", "V_END", "GATE"),
        (3680.0, "GATE", "G(QUERY)", "THINK"),
        (3926.5, "THINK", "A_RDY", "SPEAK"),
        (5888.0, "SPEAK", "P_DONE", "IDLE"),
    ]
    assert ran.model.waves == [2568 * 16]
    assert ran.model.prefilled == [32 + 4]
    assert ran.model.speak[-1] == "close"
    (times,) = of(ran, TurnTimes)
    assert times.verdict_ms == pytest.approx(3406.544)
    assert times.after_speech_ms == pytest.approx(854.5, abs=0.1)


def test_without_speculation_the_same_question_waits_for_the_end() -> None:
    ran = run(9000, [QUESTION], settings=Settings(speculations=0))
    assert ran.times("A_RDY") == [pytest.approx(3680 + 78.5 + 8 * 20 + 12 * 30, abs=0.1)]


def test_a_voice_that_goes_on_after_a_pause_makes_one_turn_of_both_parts() -> None:
    ran = run(12000, [QUESTION, (3456, 4480)])
    assert ran.times("V_RES") == [3520]
    assert (ran.times("V_SOFT"), ran.times("V_END")) == ([3328, 4736], [5088])
    assert not ran.loud(0, 5088)
    assert len(ran.times("G(QUERY)")) == len(ran.ended()) == 1
    assert ran.model.waves[-1] == (4480 + 200 - 704) * 16
    assert ran.model.speak.count("heard") == ran.model.prefilled[-1], "the first part alone is still in the memory"


def test_a_voice_just_before_the_end_withholds_the_end() -> None:
    ran = run(12000, [QUESTION, (3648, 4480)])
    assert ran.times("V_RES") == [3712]
    assert ran.times("V_END") == [5088]


def test_a_question_over_an_answer_ducks_pauses_and_then_replaces_it() -> None:
    ran = run(30000, [QUESTION, (10016, 11520)], LONG)
    assert ran.log()[5:10] == [
        (10208.0, "SPEAK", "V_ON", "R_HEAR"),
        (10720.0, "R_HEAR", "PAUSE", "R_HEAR"),
        (11776.0, "R_HEAR", "V_SOFT", "R_HEAR"),
        (12128.0, "R_HEAR", "V_END", "R_GATE"),
        (12128.0, "R_GATE", "G(QUERY)", "THINK"),
    ]
    before, during = ran.played[10000 * 24 : 10200 * 24], ran.played[10300 * 24 : 10700 * 24]
    assert np.abs(during).max() == pytest.approx(np.abs(before).max() * 10 ** (-12 / 20), rel=1e-3)
    assert not ran.loud(10760, 12128)
    first, second = ran.ended()
    assert first.interrupted and not second.interrupted
    codes = [row for row in ran.model.speak if row.startswith("code 0")]
    assert len(codes) * CODE_MS <= first.heard_ms + CODE_MS
    assert ran.player.stale == 0


def test_the_loudspeaker_is_silent_within_200_ms_of_a_confirmed_barge_in() -> None:
    ran = run(14000, [QUESTION, (10016, 11520)], LONG)
    (paused,) = ran.times("PAUSE")
    assert not ran.loud(paused + 32, 12128)


def test_a_listening_noise_ducks_and_then_the_answer_goes_on_as_if_nothing_had_been() -> None:
    script = Script(clauses=[12], captions=[None, "mm-hm"])
    ran, alone = run(30000, [QUESTION, (10016, 10336)], script), run(30000, [QUESTION], Script(clauses=[12]))
    assert [(t, e) for t, _, e, _ in ran.log()[5:9]] == [
        (10208.0, "V_ON"),
        (10592.0, "V_SOFT"),
        (10944.0, "V_END"),
        (10944.0, "G(BACKCHANNEL)"),
    ]
    assert ran.model.speak == alone.model.speak
    assert ran.times("P_DONE") == alone.times("P_DONE")


@pytest.mark.parametrize("length", [700.0, 3000.0], ids=["ducked", "paused"])
def test_noise_over_an_answer_leaves_its_tokens_as_they_are(length: float) -> None:
    ran = run(40000, [QUESTION, (10016, 10016 + length)], interrupted("NOISE"))
    alone = run(40000, [QUESTION], Script(clauses=[12]))
    assert ran.times("G(NOISE)")
    assert ran.model.generated == alone.model.generated
    assert ran.model.speak == alone.model.speak
    assert [end.text for end in ran.ended()] == [end.text for end in alone.ended()]


def test_a_paused_answer_is_resumed_a_little_before_where_it_was() -> None:
    ran = run(40000, [QUESTION, (10016, 13000)], interrupted("NOISE"))
    alone = run(40000, [QUESTION], Script(clauses=[12]))
    sound = lambda r: int(np.count_nonzero(r.played))  # noqa: E731
    assert sound(ran) - sound(alone) == 24 * 100


def test_noise_while_nobody_answers_leaves_no_trace() -> None:
    ran = run(9000, [QUESTION], Script(verdicts=["NOISE"]))
    assert ran.log()[-1][1:] == ("GATE", "G(NOISE)", "IDLE")
    assert (ran.model.speak, ran.model.listen) == (["system"], [])
    assert not ran.loud(0, 9000)


def test_the_own_echo_never_interrupts_and_often_heard_ends_listening_while_speaking() -> None:
    spans = [(start, start + 400.0) for start in (6016.0, 8000.0, 10016.0, 12000.0)]
    ran = run(20000, [QUESTION], Script(clauses=[12]), echo=spans)
    assert ran.model.forks == [None]
    assert len([1 for event in ran.events if isinstance(event, Transition) and event.row == 20]) >= 4
    assert [notice.kind for notice in of(ran, Notice)] == ["half_duplex"]
    assert ran.duplex.half_duplex


def test_half_duplex_hears_nothing_while_it_speaks_and_all_when_it_is_silent() -> None:
    ran = run(26000, [QUESTION, (6016, 7000), (20000, 21504)], Script(clauses=[4]), Settings(half_duplex=True))
    assert ran.model.forks == [None, None]
    assert len(ran.times("G(QUERY)")) == 2


def test_a_monologue_is_cut_for_the_model_and_is_one_question() -> None:
    ran = run(80000, [(1024, 71040)])
    assert len(ran.times("V_CUT")) == 2
    assert max(ran.model.waves) <= 30_000 * 16
    assert sum(ran.model.waves) == (71040 + 200 - 704) * 16
    assert sum(map(codes_of, ran.model.waves)) == sum(ran.model.prefilled) - 4 * len(ran.model.waves)
    assert len(ran.times("G(QUERY)")) == len(ran.ended()) == 1


def test_a_question_behind_a_noise_over_an_answer_gets_its_verdict_at_once() -> None:
    ran = run(40000, [QUESTION, (8000, 9024), (11008, 13056)], interrupted("NOISE", "QUERY"))
    ended = ran.times("V_END")[-1]
    assert ran.times("G(QUERY)")[-1] <= ended + 100


def test_frames_stand_before_the_audio_and_a_late_one_goes_to_the_next_turn() -> None:
    ran = run(
        30000,
        [(1024, 5024), (9024, 10528)],
        frames=[500.0, 1500.0, 2500.0, 3500.0, 4500.0, 5400.0],
        script=Script(clauses=[1]),
    )
    first = ran.model.speak[: ran.model.speak.index("answer")]
    frames = [row for row in first if row.startswith("frame")]
    assert 0 < len(frames) <= 4
    assert first.index(frames[-1]) < first.index("heard")
    assert "frame 5400.0" not in first


def test_a_picture_that_came_just_before_speech_is_seen_first() -> None:
    ran = run(9000, [QUESTION], frames=[900.0])
    assert ran.model.speak[2] == "frame 900.0"


def test_a_camera_that_stopped_leaves_no_stale_picture() -> None:
    ran = run(9000, [(3008, 5056)], frames=[1500.0])
    assert not any(row.startswith("frame") for row in ran.model.speak)


@pytest.mark.parametrize("at", [2000.0, 3700.0, 3850.0, 6000.0, 10400.0, 12000.0], ids=str)
def test_a_reset_is_silent_at_once_and_forgets_everything(at: float) -> None:
    ran = run(20000, [QUESTION, (10016, 11520)], LONG, acts=[(at, Duplex.reset)])
    (acknowledged,) = ran.times("RST")
    assert ran.duplex.detector.resets == 1  # type: ignore[attr-defined]
    assert acknowledged - at <= 200
    later = [t for t in ran.times("A_RDY") if t > at]
    assert not ran.loud(acknowledged + 64, later[0] if later else 20000)


@pytest.mark.parametrize(("speech", "answered"), [(QUESTION, True), ((1024.0, 1728.0), False)], ids=["long", "short"])
def test_a_gate_that_hangs_is_decided_by_how_much_was_said(speech: tuple[float, float], answered: bool) -> None:
    ran = run(12000, [speech], Script(verdicts=[None]))
    (ended,), (timed_out,) = ran.times("V_END"), ran.times("G_TO")
    assert timed_out == ended + 1500
    assert bool(ran.ended()) == answered
    assert ran.duplex.state == "IDLE"


def test_a_vocoder_that_fails_gives_text_and_the_next_turn_speaks_again() -> None:
    ran = run(20000, [QUESTION, (9024, 10528)], Script(broken_speech=[0, 1]))
    first, second = ran.ended()
    assert first.text and first.heard_ms == 0 and second.heard_ms > 0
    assert "no_audio" in [notice.kind for notice in of(ran, Notice)]


def test_a_hearing_that_fails_once_is_tried_again_and_one_that_fails_twice_is_told() -> None:
    once, twice = (run(12000, [QUESTION], Script(broken_hearing=times)) for times in (1, 2))
    assert len(once.ended()) == 1 and not of(once, Notice)
    assert not twice.ended() and [notice.kind for notice in of(twice, Notice)] == ["heard_failed"]
    assert twice.duplex.state == "IDLE"


def test_silence_starts_no_work_and_closes_the_conversation_in_the_end() -> None:
    ran = run(610_000)
    assert ran.duplex.state == "CLOSED"
    assert ran.times("T_SESSION") == [600_000]
    assert ran.duplex.clock.now() == 600_000


def test_a_voice_before_any_sound_of_the_answer_makes_one_answer_to_both() -> None:
    ran = run(20000, [QUESTION, (3712, 5216)], Script(verdicts=["QUERY"], clauses=[2]), Settings(t_end=416))
    assert ran.times("G(QUERY)") and len([end for end in ran.ended() if end.heard_ms]) == 1
    rows = ran.model.speak
    assert rows.count("answer") == 1 and rows.count("heard") > 36


def test_stop_ends_an_answer_and_asks_for_none() -> None:
    ran = run(20000, [QUESTION, (8000, 8416)], Script(clauses=[12], captions=[None, "stop"]))
    assert ran.log()[-1][1:] == ("R_GATE", "G(STOP)", "IDLE")
    (end,) = ran.ended()
    assert end.interrupted and len(ran.model.generated) == 1
    assert not ran.loud(9100, 20000)


def test_a_conversation_never_ends_for_want_of_context() -> None:
    speech = [(start, start + 1504.0) for start in np.arange(1024.0, 120_000.0, 6400.0)]
    ran = run(126_000, speech, Script(clauses=[2]), Settings(context_reserve=300), context=700)
    assert len(ran.ended()) == len(speech)
    assert len(ran.model.speak) < 700
    assert "context" in [notice.kind for notice in of(ran, Notice)]


def test_a_typed_turn_is_answered_also_over_an_answer() -> None:
    ran = run(30000, [QUESTION], LONG, acts=[(8000, lambda duplex: duplex.say("and now?"))])
    first, second = ran.ended()
    assert first.interrupted and not second.interrupted
    assert "typed" in ran.model.speak
    assert not ran.loud(8064, 8128)


def test_an_answer_can_be_stopped_by_a_key() -> None:
    ran = run(20000, [QUESTION], LONG, acts=[(8000, Duplex.interrupt)])
    assert [end.interrupted for end in ran.ended()] == [True]
    assert "compact" in ran.duplex.scheduler.costs
    assert not ran.loud(8064, 20000)


def test_a_lost_microphone_and_a_lost_loudspeaker_leave_a_conversation_in_text() -> None:
    acts = [
        (100.0, lambda duplex: duplex.fail("capture")),
        (200.0, lambda duplex: duplex.fail("playback")),
        (300.0, lambda duplex: duplex.say("hello")),
    ]
    ran = run(9000, [QUESTION], acts=acts)
    assert [notice.kind for notice in of(ran, Notice)] == ["capture", "playback"]
    (end,) = ran.ended()
    assert end.text and end.heard_ms == 0
    assert "V_ON" not in [event for _, _, event, _ in ran.log()]


def test_a_hung_device_that_comes_back_after_a_second_ends_the_turn_and_nothing_more() -> None:
    duplex, _, _ = begin()
    for hop in range(1, 80):
        list(duplex.step(np.full(HOP, 0.1, np.float32), None, hop * 32.0))
    events = list(duplex.step(np.zeros(HOP, np.float32), None, 80 * 32.0 + 5000))
    assert next(event.event for event in events if isinstance(event, Transition)) == "V_END"


def test_nan_is_silence_and_a_chunk_of_another_length_is_refused() -> None:
    duplex, _, _ = begin()
    for hop in range(1, 20):
        assert not list(duplex.step(np.full(HOP, np.nan, np.float32), None, hop * 32.0))
    with pytest.raises(EdgeOmniError, match=r"\[480\].*\[512\]"):
        list(duplex.step(np.zeros(480, np.float32), None, 20 * 32.0))


def test_captions_of_the_person_come_when_the_bundle_can_write_them() -> None:
    ran = run(9000, [QUESTION], Script(captions=["what is two plus two"]))
    assert Caption("user", "what is two plus two") in ran.events


def test_five_frames_during_speech_cost_nothing_after_it() -> None:
    frames = [1000.0 * second + 500 for second in range(1, 6)]
    ran = run(14000, [(1024, 6048)], frames=frames)
    (times,) = of(ran, TurnTimes)
    assert times.soft_ms is not None and times.verdict_ms - times.soft_ms <= 200


def test_a_slow_voice_is_played_when_enough_is_in_hand_so_that_it_never_runs_dry() -> None:
    """The second piece of sound takes longer than the first one lasts; from the second answer on that is known."""
    ran = run(40000, [QUESTION, (12000, 14048), (24000, 26048)], Script(slow_second=900.0))
    assert ran.player.underruns == 1
    _first, second, third = ran.times("A_RDY")
    waits = [ready - verdict for ready, verdict in zip((second, third), ran.times("G(QUERY)")[1:], strict=True)]
    assert all(246 < wait <= 246 + 600 for wait in waits)


def test_a_voice_that_goes_on_while_the_verdict_is_awaited_is_joined_with_a_short_gap() -> None:
    ran = run(12000, [QUESTION, (3840, 4864)], Script(verdicts=[None, None, "QUERY"]))
    assert (3936.0, "GATE", "V_ON", "HEAR") in ran.log()
    assert ran.model.waves[-1] == (3072 - 704 + 300 + (4864 - 3840) + 200) * 16
    assert len(ran.ended()) == 1 and ran.model.speak.count("user") == 1


def test_an_answer_whose_sound_does_not_come_is_given_as_text() -> None:
    ran = run(20000, [QUESTION], Script(slow_first=9000.0))
    (timed_out,) = ran.times("T_FIRST")
    assert timed_out == ran.times("G(QUERY)")[0] + 8000
    (end,) = ran.ended()
    assert end.text and end.heard_ms == 0
    assert "no_audio" in [notice.kind for notice in of(ran, Notice)]


SCARCE = Settings(buffer_low=1e6, frame_stale=5000)  # sound is never plentiful, but while it is paused


def test_a_picture_never_makes_an_answer_run_dry_and_does_not_hold_up_the_verdict() -> None:
    speech, script = [QUESTION, (10016.0, 10592.0)], Script(clauses=[30, 2])
    ran, without = (run(30000, speech, script, SCARCE, frames=frames) for frames in ([10250.0], []))
    assert ran.times("FRM")
    assert not any(row.startswith("frame") for row in ran.model.speak)
    assert len(ran.times("G(QUERY)")) == 2 and ran.times("G(QUERY)") == without.times("G(QUERY)")


def test_a_picture_that_was_not_looked_at_in_time_is_seen_with_the_next_turn() -> None:
    speech = [QUESTION, (10016.0, 10592.0), (12096.0, 13120.0)]
    script = Script(verdicts=["QUERY", "NOISE", "QUERY"], clauses=[30, 2])
    ran = run(30000, speech, script, SCARCE, frames=[10250.0])
    assert ran.times("G(NOISE)") and len(ran.times("G(QUERY)")) == 2
    assert ran.model.speak.count("frame 10250.0") == 1


def test_words_that_the_loudspeaker_just_said_are_its_echo_and_make_the_ear_wary() -> None:
    ran = run(30000, [QUESTION, (10016, 10592)], Script(clauses=[12], captions=[None, "token 0 1"]))
    (judged,) = ran.times("G(ECHO)")
    assert ran.duplex.endpointer.wary_until == judged + 30_000
    assert not ran.ended()[0].interrupted


def test_who_was_incomplete_twice_gets_more_time() -> None:
    speech = [(start, start + 1024.0) for start in (1024.0, 12000.0, 24000.0)]
    ran = run(40000, speech, Script(verdicts=["INCOMPLETE", "INCOMPLETE", "QUERY"], clauses=[1]))
    waits = [ended - stop for ended, (_, stop) in zip(ran.times("V_END"), speech, strict=True)]
    assert waits == [pytest.approx(608, abs=32), pytest.approx(608, abs=32), pytest.approx(608 + 160, abs=32)]


def test_a_gate_that_hung_once_does_not_hang_the_next_turn() -> None:
    ran = run(20000, [QUESTION], Script(verdicts=[None]), acts=[(5300, lambda duplex: duplex.say("and now?"))])
    assert ran.times("G_TO") == [5180] and len(ran.ended()) == 2
    assert ran.duplex.state == "IDLE"
