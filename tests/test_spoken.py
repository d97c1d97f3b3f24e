"""Speech measured: real speech against itself, shifted, cut, clicked, looped, noisy and silent versions of itself."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from quant.answer import Answer, Taken
from quant.comparison import defects
from quant.comparison.figures import Figure, TurnResult
from quant.comparison.speech_figures import speech_figures
from quant.comparison.speech_verdict import speech_sentences
from quant.comparison.spoken import heard, spoken
from quant.turn import Turn
from runtime.audio import resample
from runtime.errors import EdgeOmniError
from tests.recording import BECKETT, beckett, whisper

RATE = 24000
NOTHING = np.empty(0)


class Parrot:
    """Writes down the same whatever it hears, or fails; counts how often it was asked."""

    name = "parrot"

    def __init__(self, text: str):
        self.text, self.asked = text, 0

    def hear(self, wave: np.ndarray, rate: int, language: str) -> str:
        self.asked += 1
        if not self.text:
            raise EdgeOmniError("the parrot is asleep")
        return self.text


def answer(wave: np.ndarray, text: str = BECKETT, frames: Sequence[int] = range(40), **how) -> Answer:
    codes = np.array([[code, code] for code in frames], np.int64).reshape(-1, 2)
    return Answer(text, (Taken("audio", np.empty(0, np.int64), codes),), wave.astype(np.float32), **how)


def result(reference: Answer, candidate: Answer, same: np.ndarray | None = None, **more) -> TurnResult:
    """A turn of which nothing but its sound was measured."""
    wave = candidate.wave if same is None else same.astype(np.float32)
    return TurnResult(
        Turn("Read it.", spoken=True), reference, candidate, {}, NOTHING.astype(bool), NOTHING, wave,
        (1.0, 1.0), (1.0, 1.0), RATE, **more,
    )  # fmt: skip


def figures(*results: TurnResult) -> dict[str, Figure]:
    return {figure.name: figure for figure in speech_figures(results, 0)}


def test_speech_against_itself_has_no_error_of_any_kind() -> None:
    said = answer(beckett(RATE))
    found = figures(result(said, said, streamed=0.0))
    assert found.pop("speech.duration_ratio").value == 1
    assert {figure.value for figure in found.values()} == {0}
    assert {"speech.f0_cents", "speech.voicing", "speech.streamed", "speech.log_spectral"} <= found.keys()


def test_speech_two_semitones_higher_is_two_hundred_cents_off_and_another_sound() -> None:
    """A tone for a voice: to shift a recording without moving it in time is an art of its own."""
    time = np.arange(2 * RATE) / RATE
    low, high = (
        0.1 * sum(np.sin(2 * np.pi * 120 * up * partial * time) / partial for partial in range(1, 12))
        for up in (1, 2 ** (2 / 12))
    )
    found = figures(result(answer(np.asarray(low)), answer(np.asarray(low)), np.asarray(high)))
    assert found["speech.f0_cents"].value == pytest.approx(200, abs=2)
    assert found["speech.log_spectral"].value > 5


def test_speech_played_a_tenth_slower_is_a_tenth_longer() -> None:
    speech = beckett(RATE)
    found = figures(result(answer(speech), answer(resample(speech, 20000, 22000)), speech))
    assert found["speech.duration_ratio"].value == pytest.approx(1.1, abs=1e-3)


def test_noise_moves_the_spectrum_the_more_the_louder_it_is() -> None:
    speech, rng = beckett(RATE), np.random.default_rng(0)
    noise = rng.normal(0, 1, len(speech)).astype(np.float32)
    measured = [
        spoken(answer(speech), answer(speech), speech + level * noise, RATE, 0.0)
        for level in (np.float32(1e-3), np.float32(1e-2))
    ]
    for name in ("log_spectral", "log_mel", "voicing"):
        faint, loud = (getattr(one, name) for one in measured)
        assert 0 < faint < loud


def test_a_click_in_real_speech_is_counted_and_real_speech_has_none() -> None:
    speech = beckett(RATE) / np.abs(beckett(RATE)).max()
    clicked = speech.copy()
    clicked[[50_000, 90_000, 90_010]] += 0.2  # the last two are one click
    assert defects.clicks(speech) == 0
    assert defects.clicks(clicked) == 2
    found = figures(result(answer(speech), answer(clicked)))
    assert found["speech.clicks_added"].value == pytest.approx(2 * 60 / (len(speech) / RATE))


def test_a_loop_of_codes_is_repetition_and_a_defect_and_a_pause_is_silence() -> None:
    speech, looping = beckett(RATE), answer(beckett(RATE), frames=[1, 2, 3, *[7, 8] * 20])
    paused = answer(np.concatenate([speech, np.zeros(len(speech))]), frames=range(80))
    one = result(answer(speech), looping)
    assert one.defects[1] == ("speech loops",)
    assert figures(one)["speech.repetition_added"].value > 0.8
    silent = spoken(answer(speech), paused, speech, RATE, 0.0).silence
    assert silent[1] == pytest.approx(0.5 + silent[0] / 2, abs=0.01)


def test_speech_that_a_limit_ended_is_told_and_is_degenerate_where_the_reference_ended_long_before() -> None:
    speech = beckett(RATE)
    cut = answer(speech[:RATE], frames=range(100), ending="limit", cut=True)
    one = result(answer(speech), cut)
    assert figures(one)["speech.cut_added"].value == figures(one)["answers.truncated_added"].value == 1
    assert one.defects == ((), ("truncated: a limit ended it after 100 steps, the reference took 40",))
    assert result(cut, cut).defects == ((), ())  # the reference does not end either


def test_another_language_and_broken_sound_are_defects() -> None:
    speech = beckett(RATE)
    broken = np.where(np.arange(len(speech)) == 5, np.nan, speech)
    foreign = answer(broken, text="不断尝试，不断失败。")
    assert result(answer(speech), foreign).defects[1] == ("waveform is not finite", "wrong language: Han for Latin")


def test_what_is_heard_is_held_against_each_ones_own_text() -> None:
    speech = beckett(RATE)
    ours, theirs = answer(speech), answer(speech, text="Ever tried. Never mind.")
    found = heard(whisper(), ours, theirs, RATE)
    assert found.errors[0].rate < 0.15
    assert found.errors[1].total >= found.errors[1].count
    got = figures(result(ours, theirs, recognised=found), result(ours, ours, recognised=replace(found)))
    added = got["speech.wer"].value - got["speech.wer_reference"].value
    assert got["speech.wer_added"].value == pytest.approx(added)
    assert got["speech.wer"].count == 2


def test_nobody_is_asked_to_listen_to_silence_and_its_words_are_all_lost() -> None:
    parrot, silent = Parrot("you"), answer(np.zeros(RATE))
    found = heard(parrot, answer(beckett(RATE)), silent, RATE)
    assert parrot.asked == 1
    assert found.candidate == ""
    assert found.errors[1].rate == 1


def test_where_the_recogniser_failed_or_the_reference_was_cut_no_errors_are_counted() -> None:
    speech = beckett(RATE)
    failed = heard(Parrot(""), answer(speech), answer(speech), RATE)
    assert failed.problem == "the parrot is asleep"
    cut = answer(speech, cut=True, ending="limit")
    fine = heard(Parrot("Ever tried"), answer(speech), answer(speech), RATE)
    found = figures(
        result(answer(speech), answer(speech), recognised=failed), result(cut, cut, recognised=fine),
        result(answer(speech), answer(speech), recognised=fine),
    )  # fmt: skip
    assert found["speech.wer"].count == 1


def told(one: TurnResult, added: tuple[float | None, float | None], listener: str = "an ear") -> list[str]:
    """What is said where the difference of errors has this interval."""
    known = {name: Figure(f"speech.{name}", "", 0.1, 9) for name in ("wer_reference", "wer", "streamed")}
    known["wer_added"] = Figure("speech.wer_added", "", 0.0, 9, *added)
    known["streamed"] = replace(known["streamed"], value=one.streamed)
    return [*speech_sentences(lambda name: known.get(name.removeprefix("speech.")), [one], listener, False)]


def test_speech_is_called_worse_only_where_chance_does_not_explain_it() -> None:
    said = answer(beckett(RATE))
    one = result(said, said, streamed=0.0)
    for added, wanted in (
        ((0.01, 0.1), "Regression of the speech: an ear misheard 10.0% of the reference's words"),
        ((-0.1, -0.01), "Improvement of the speech"),
        ((-0.1, 0.1), "No change of the speech is shown"),
        ((None, None), "Cannot say that the speech is as clear as before"),
    ):
        (sentence,) = told(one, added)
        assert sentence.startswith(wanted)


def test_it_is_said_where_nobody_listened_and_where_streamed_speech_is_another() -> None:
    said = answer(beckett(RATE))
    nobody, streamed = told(result(said, said, streamed=0.2), (0, 0), listener="")
    assert nobody.startswith("Nobody listened to 1 spoken answer")
    assert streamed.startswith("Regression: speech that is streamed differs") and "0.2" in streamed
    written = replace(result(said, said), rate=0)
    assert told(written, (0, 0)) == []
