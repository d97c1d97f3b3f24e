"""Turn-taking scenes, how they are scored, and the plain rule, on synthetic sounds and logs."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from random import Random
from typing import Any

import numpy as np
import pytest

from apps.bench import live
from apps.bench.baseline import THINKS_MS, PlainRule
from apps.bench.live import How, Party, Quality, bench_live, record, run_scene
from apps.bench.live_show import show_live
from apps.bench.scene_sounds import Sound, Sounds, recorded_questions, tidy
from apps.bench.scenes import (
    HOP,
    IN_SILENCE,
    KINDS,
    MS,
    RATE,
    WHILE_SPEAKING,
    Echo,
    Microphone,
    Part,
    Scene,
    Span,
    Thirds,
    draw_scenes,
    spread_kinds,
    with_pause,
)
from apps.bench.score import Heard, figures, judge, right_answers, share
from apps.embedded import embedded_bundle
from runtime.audio import Wave
from runtime.errors import EdgeOmniError
from runtime.live.events import LiveEvent, ReplyEnded, State, Transition
from runtime.live.player import Player
from runtime.live.settings import HOP_MS
from tests import tiny_llama


@pytest.fixture(scope="module")
def sounds() -> Sounds:
    """Those that are there on every machine."""
    return Sounds(synthesize=False)


def tone(ms: float, level: float = 0.5) -> Wave:
    return (level * np.sin(2 * np.pi * 440 * np.arange(int(ms * MS)) / RATE)).astype(np.float32)


def part(kind: str, ms: float, start: float, during_answer: bool = False) -> Part:
    return Part(kind, "answer" if kind == "question" else "nothing", tone(ms), start, during_answer, kind, "yes")


def scene(*parts: Part, kind: str = "question", echo: Echo | None = None) -> Scene:
    return Scene("000", kind, parts, floor_db=-90, seed=1, echo=echo)


class Loud:
    """A detector for tests: speech is what is loud."""

    def probability(self, chunk: Wave) -> float:
        return float(np.abs(chunk).max() > 0.05)

    def reset(self) -> None: ...


class Ruled:
    def __init__(self, answer: Wave):
        self.player = Player()
        self.rule = PlainRule(Loud(), self.player, [answer])

    @property
    def state(self) -> State:
        return self.rule.state

    def hop(self, microphone: Wave, played: Wave, now: float) -> Iterator[LiveEvent]:
        return self.rule.step(microphone, now)


def ruled(seconds: float = 2.0) -> Party:
    return Ruled(np.full(int(24000 * seconds), 0.3, np.float32))


# Scenes


def test_the_same_seed_draws_the_same_scenes_and_another_others(sounds: Sounds) -> None:
    first, again, other = (list(draw_scenes(20, seed, sounds)) for seed in (3, 3, 4))
    for one, same in zip(first, again, strict=True):
        assert (one.name, one.seed, one.floor_db) == (same.name, same.seed, same.floor_db)
        assert all(np.array_equal(a.wave, b.wave) for a, b in zip(one.parts, same.parts, strict=True))
    assert [one.seed for one in first] != [one.seed for one in other]


def test_a_scene_does_not_depend_on_how_many_are_drawn(sounds: Sounds) -> None:
    few, many = list(draw_scenes(3, 0, sounds)), list(draw_scenes(12, 0, sounds))
    assert [one.seed for one in few] == [one.seed for one in many[:3]]


def test_kinds_come_in_their_shares_and_every_stretch_has_several() -> None:
    kinds = spread_kinds()
    assert Counter(kinds) == KINDS
    assert len(set(kinds[:14])) >= 12


def test_questions_pauses_noises_echo_and_barge_ins_need_nothing_that_must_be_installed(sounds: Sounds) -> None:
    kinds = {one.kind for one in draw_scenes(60, 0, sounds)}
    alone = {"question", "question with a pause", "barge-in", "double talk", "echo", "cough", "noise"}
    assert alone | {"cough while speaking", "noise while speaking"} <= kinds
    assert not any("talk" in kind.split() and kind != "double talk" for kind in kinds)
    assert sounds.lacks is not None and "apt-get install espeak-ng" in sounds.lacks


def test_while_speaking_a_question_comes_first_and_the_rest_waits_for_its_answer(sounds: Sounds) -> None:
    for one in draw_scenes(40, 1, sounds):
        if one.kind in WHILE_SPEAKING:
            assert one.parts[0].must == "answer" and not one.parts[0].during_answer
            assert all(later.during_answer for later in one.parts[1:])
            assert len(one.parts) == (1 if one.kind == "echo" else 2)
        else:
            assert one.kind in IN_SILENCE and len(one.parts) == 1 and not one.parts[0].during_answer
        if one.kind in ("echo", "double talk"):
            assert one.echo is not None and -25 <= one.echo.level_db <= -10 and 50 <= one.echo.delay_ms <= 250


def test_a_pause_is_as_long_as_asked_and_loses_no_speech() -> None:
    spoken = Sound(np.concatenate([tone(600), np.zeros(100 * MS, np.float32), tone(600)]), "two words", "yes")
    paused = with_pause(spoken, 450)
    assert len(paused.wave) - len(spoken.wave) == pytest.approx(350 * MS, abs=40 * MS)
    silent = np.abs(paused.wave) < 1e-6
    edges = np.flatnonzero(np.diff(silent.astype(int), prepend=0, append=0))
    longest = int((edges[1::2] - edges[::2]).max())
    assert longest == pytest.approx(450 * MS, abs=40 * MS)
    assert np.square(paused.wave).sum() == pytest.approx(np.square(spoken.wave).sum(), rel=0.02)


def test_the_recordings_are_questions_with_answers_and_begin_and_end_with_sound() -> None:
    found = recorded_questions()
    assert len(found) >= 40 and all(sound.answer for sound in found)
    for sound in found:
        assert np.abs(sound.wave).max() == pytest.approx(0.7, abs=1e-3)
        assert np.abs(sound.wave[0]) > 0.006 and np.abs(sound.wave[-1]) > 0.006


def test_tidying_cuts_silence_before_and_after() -> None:
    wave = np.concatenate([np.zeros(500, np.float32), tone(100, 0.1), np.zeros(700, np.float32)])
    assert abs(len(tidy(wave, RATE)) - 100 * MS) <= 2


# The microphone


def test_an_echo_comes_after_its_delay_at_its_level() -> None:
    path = np.zeros(10, np.float32)
    path[0] = 10 ** (-12 / 20)
    microphone = Microphone(scene(kind="echo", echo=Echo(-12, 100, path)))
    played = [tone(32, 0.5) if hop == 0 else np.zeros(HOP, np.float32) for hop in range(8)]
    heard = np.concatenate([microphone.hear(hop) for hop in played])
    assert np.allclose(heard[100 * MS : 132 * MS], played[0] * path[0], atol=1e-3)
    assert np.abs(heard[: 100 * MS]).max() < 1e-3 > np.abs(heard[132 * MS :]).max()


def test_what_waits_for_an_answer_begins_so_long_after_its_first_sample() -> None:
    microphone = Microphone(scene(part("question", 96, 0), part("cough", 64, 200, during_answer=True)))
    silence = np.zeros(HOP, np.float32)
    for _ in range(10):
        microphone.hear(silence)
    assert microphone.waiting
    sound = silence.copy()
    sound[160:] = 0.1  # 10 ms into the hop that begins at 320 ms
    microphone.hear(sound)
    assert not microphone.waiting
    assert microphone.spans[1].start == pytest.approx(530) and microphone.spans[1].end == pytest.approx(594)
    rest = np.concatenate([microphone.hear(silence) for _ in range(10)])  # from 352 ms on
    assert np.abs(rest[: 177 * MS]).max() < 1e-3 < np.abs(rest[178 * MS : 242 * MS]).max()


def test_two_thirds_of_the_samples_keep_a_tone_and_lose_what_would_fold() -> None:
    def level(hertz: float) -> float:
        wave = np.sin(2 * np.pi * hertz * np.arange(24000) / 24000).astype(np.float32)
        thirds = Thirds()
        made = [thirds(wave[at : at + 768]) for at in range(0, 23808, 768)]
        assert {len(hop) for hop in made} == {HOP}
        return float(np.abs(np.concatenate(made)[HOP:]).max())

    assert level(1000) == pytest.approx(1, abs=0.02)
    assert level(10000) < 0.01


# Scoring


def heard_of(kind: str, spans: list[tuple[Part, float, float]], **what: Any) -> Heard:
    parts = tuple(one for one, _, _ in spans)
    what = {"begun": [start + 100 for _, start, _ in spans]} | what
    return Heard(scene(*parts, kind=kind), [Span(*one) for one in spans], **what)


QUESTION, SECOND = part("question", 1000, 0), part("question", 1000, 0, True)
COUGH = part("cough", 300, 0, True)


def ended(t: float, interrupted: bool, text: str = "yes") -> ReplyEnded:
    return ReplyEnded(t, text, text, 500, interrupted, "end")


@pytest.mark.parametrize(
    ("taken", "sounding", "expected"),
    [
        ([2700.0], [2900.0], "answered"),
        ([2700.0], [], "unanswered"),
        ([], [], "unanswered"),
        ([1500.0], [2900.0], "cut off"),
        ([1500.0, 2700.0], [2900.0], "cut off"),
        ([9000.0], [9100.0], "unanswered"),
    ],
)
def test_a_question_is_answered_only_if_taken_whole_and_heard(
    taken: list[float], sounding: list[float], expected: str
) -> None:
    spans = [(QUESTION, 1000.0, 2000.0)]
    (found,) = judge(heard_of("question", spans, taken=taken, sounding=sounding, begun=[1100.0]))
    assert found.outcome == expected
    assert found.wrong is (expected != "answered")


def test_a_question_over_an_answer_that_is_noticed_after_a_second_is_missed() -> None:
    spans = [(QUESTION, 1000.0, 2000.0), (SECOND, 3500.0, 5000.0)]
    usual = {"taken": [2700.0, 5600.0], "sounding": [2900.0, 5700.0]}
    found = judge(heard_of("barge-in", spans, begun=[1100.0, 4600.0], **usual))
    assert [one.outcome for one in found] == ["answered", "noticed late"]
    assert figures(found)["missed barge-ins"].count == 1


def test_a_cough_may_duck_an_answer_but_not_end_it() -> None:
    spans = [(QUESTION, 1000.0, 2000.0), (COUGH, 3500.0, 3800.0)]
    usual = {"taken": [2700.0], "sounding": [2900.0, 3500.0], "begun": [1100.0, 3700.0]}
    kept = judge(heard_of("cough while speaking", spans, replies=[ended(5000, False)], **usual))
    assert [one.outcome for one in kept] == ["answered", "ignored"]
    lost = judge(heard_of("cough while speaking", spans, replies=[ended(4500, True)], **usual))
    assert [one.outcome for one in lost] == ["answered", "interrupted"]
    usual["taken"] = [2700.0, 4500.0]
    asked = judge(heard_of("cough while speaking", spans, replies=[ended(4000, False)], **usual))
    assert [one.outcome for one in asked] == ["answered", "taken"]


def test_a_sound_that_never_came_counts_for_nothing() -> None:
    heard = heard_of("cough while speaking", [(QUESTION, 1000, 2000)])
    heard.scene = replace(heard.scene, parts=(QUESTION, COUGH))
    found = judge(heard)
    assert [one.outcome for one in found] == ["unanswered", "void"]
    assert figures(found)["errors"].n == 1
    assert figures(found)["false interruptions by noises and echoes"].n == 0


def test_an_echo_is_wrong_where_the_answer_interrupts_itself() -> None:
    usual = {"taken": [2700.0], "sounding": [3000.0, 5000.0]}
    spans = [(QUESTION, 1000.0, 2000.0)]
    assert judge(heard_of("echo", spans, replies=[ended(5000, False)], **usual))[1].outcome == "ignored"
    assert judge(heard_of("echo", spans, replies=[ended(4000, True)], **usual))[1].outcome == "interrupted"


def test_a_missed_barge_in_is_the_second_question_not_the_first() -> None:
    spans = [(QUESTION, 1000.0, 2000.0), (SECOND, 3500.0, 4500.0)]
    found = judge(heard_of("barge-in", spans, taken=[2700.0], sounding=[2900.0, 3500.0]))
    assert [one.outcome for one in found] == ["answered", "unanswered"]
    shares = figures(found)
    assert (shares["missed barge-ins"].count, shares["missed barge-ins"].n) == (1, 1)
    assert (shares["answered questions"].count, shares["answered questions"].n) == (1, 2)


def test_the_text_of_an_answer_is_the_one_that_ended_after_its_question_was_taken() -> None:
    spans = [(QUESTION, 1000.0, 2000.0), (SECOND, 3500.0, 4500.0)]
    replies = [ended(3800, True, "no"), ended(7000, False, " Yes")]
    found = judge(heard_of("barge-in", spans, taken=[2700.0, 5100.0], sounding=[2900.0, 5300.0], replies=replies))
    assert [one.said for one in found] == ["no", " Yes"]
    assert [one.right for one in found] == [False, True]
    rights = right_answers(found)
    assert {kind: (one.count, one.n) for kind, one in rights.items()} == {"barge-in": (1, 1), "question": (0, 1)}


def test_times_count_from_the_beginning_of_the_scene() -> None:
    heard = heard_of("question", [(QUESTION, 1000, 2000)])
    heard.note(Transition(12_700, "GATE", "G(QUERY)", "THINK", 12, 0, 0, 1), start=10_000)
    heard.note(Transition(12_800, "THINK", "A_RDY", "SPEAK", 17, 0, 0, 1), start=10_000)
    assert heard.taken == [2700]


def test_a_share_has_wilsons_interval() -> None:
    found = share([True] * 98 + [False] * 2)
    assert (found.count, found.n, found.share) == (98, 100, 0.98)
    assert (found.low, found.high) == (pytest.approx(0.9300, abs=1e-3), pytest.approx(0.9945, abs=1e-3))


# The plain rule, and the runner


def test_the_rule_answers_after_seven_tenths_of_a_second_of_silence() -> None:
    heard = run_scene(scene(part("question", 1000, 500)), ruled())
    assert [one.outcome for one in judge(heard)] == ["answered"]
    assert heard.taken == [pytest.approx(1500 + 700, abs=2 * HOP_MS)]
    assert heard.sounding[0] == pytest.approx(heard.taken[0] + THINKS_MS, abs=3 * HOP_MS)
    assert heard.sounding[-1] - heard.sounding[0] == pytest.approx(2000, abs=2 * HOP_MS)


def test_the_rule_lets_a_short_noise_pass_and_takes_a_long_one() -> None:
    outcomes = [judge(run_scene(scene(part("noise", ms, 500), kind="noise"), ruled()))[0].outcome for ms in (150, 500)]
    assert outcomes == ["ignored", "taken"]


def test_the_rule_is_interrupted_by_whatever_is_long_enough() -> None:
    noise = scene(part("question", 1000, 0), part("noise", 600, 300, True), kind="noise while speaking")
    heard = run_scene(noise, ruled())
    assert [one.outcome for one in judge(heard)] == ["answered", "interrupted"]
    assert heard.spans[1].start == pytest.approx(heard.sounding[0] + 300, abs=2 * HOP_MS)


def test_the_rule_cuts_off_a_question_with_a_long_pause() -> None:
    wave = np.concatenate([tone(500), np.zeros(1000 * MS, np.float32), tone(500)])
    question = replace(part("question", 0, 300), wave=wave)
    assert judge(run_scene(scene(question), ruled()))[0].outcome == "cut off"


def test_scenes_can_follow_each_other_in_one_conversation() -> None:
    party, t = ruled(), 0.0
    for _ in range(3):
        heard = run_scene(scene(part("question", 800, 500)), party, t)
        assert [one.outcome for one in judge(heard, t)] == ["answered"]
        t += 1000 * heard.seconds


def test_drawn_scenes_make_json(sounds: Sounds) -> None:
    judged = [one for drawn in draw_scenes(3, 0, sounds) for one in judge(run_scene(drawn, ruled()))]
    found = json.loads(json.dumps(asdict(Quality(figures(judged), tuple(judged))), allow_nan=False))
    assert len(found["sounds"]) == len(judged) >= 3
    assert found["shares"]["errors"]["n"] == len([one for one in judged if one.outcome != "void"])


def test_a_noise_of_every_kind_can_be_drawn(sounds: Sounds) -> None:
    drawn = {sounds.noise(Random(seed)).about for seed in range(60)}
    assert len(drawn) == 9
    assert sounds.cough(Random(0)).about == "cough"


# The whole bench


def test_a_bundle_that_cannot_both_listen_and_speak_is_refused_in_one_line() -> None:
    with pytest.raises(EdgeOmniError, match="cannot both listen and speak"):
        bench_live(tiny_llama.bundle())


@pytest.mark.slow
def test_a_few_scenes_give_every_figure_as_a_table_and_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "IDLE_SECONDS", 2)
    monkeypatch.setattr(live, "TURNS", 2)
    result = bench_live(embedded_bundle(), How(scenes=3, questions=2))
    found = json.loads(json.dumps(record(result), allow_nan=False))
    assert set(found["rules"]) == {"energy", "detector", "detector behind the canceller"}
    assert found["ours"]["shares"]["answered questions"]["n"] >= 3
    assert found["latency"]["questions"] == 2 and found["talk"]["turns"] == 2
    assert found["memory"]["two"] > found["memory"]["one"] > found["memory"]["cache"] > 0
    show_live(result)
    said = capsys.readouterr().out
    for name in ("answered questions", "rule by energy", "after the last sound", "underruns", "of a core"):
        assert name in said
