"""The detectors behind one interface: what they hear in a recording, in silence, and when they are given nonsense."""

import builtins
from collections.abc import Iterator

import numpy as np
import pytest

from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.live import vad
from runtime.live.vad import (
    HOP,
    BundleDetector,
    Detector,
    EnergyDetector,
    SileroDetector,
    Wave,
    open_detector,
    silero_file,
)
from tests import tiny_llama
from tests.recording import beckett

PAUSE = np.zeros(32 * HOP, np.float32)


@pytest.fixture(scope="module")
def engine() -> Engine:
    from apps.embedded import embedded_bundle

    return Engine(embedded_bundle())


@pytest.fixture(params=["silero", "bundle", "energy"])
def detector(request: pytest.FixtureRequest, engine: Engine) -> Iterator[Detector]:
    yield open_detector(request.param, engine)


def hops(wave: Wave) -> Wave:
    return wave[: len(wave) // HOP * HOP].reshape(-1, HOP)


def listen(detector: Detector, wave: Wave) -> np.ndarray:
    return np.array([detector.probability(hop) for hop in hops(wave)])


def test_a_recording_of_a_person_is_found_and_the_pauses_around_it_are_not(detector: Detector) -> None:
    found = listen(detector, np.concatenate([PAUSE, beckett(16000), PAUSE])) > 0.5
    assert found[32:-32].mean() > 0.35  # he pauses a lot
    assert not found[:32].any()
    assert not found[-12:].any()


def test_silence_never_passes(detector: Detector) -> None:
    assert listen(detector, np.zeros(200 * HOP, np.float32)).max() < 0.5


def test_a_reset_detector_remembers_nothing(detector: Detector) -> None:
    speech = beckett(16000)[: 60 * HOP]
    first = listen(detector, speech)
    detector.reset()
    assert np.array_equal(listen(detector, speech), first)
    assert not np.array_equal(listen(detector, speech)[:3], first[:3])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_hop_with_nan_counts_as_silence(detector: Detector, broken: float) -> None:
    hop = np.zeros(HOP, np.float32)
    hop[100] = broken
    given = listen(detector, np.tile(hop, 5))
    detector.reset()
    assert np.array_equal(given, listen(detector, np.zeros(5 * HOP, np.float32)))


@pytest.mark.parametrize("length", [0, 160, 511, 513, 1024])
def test_another_length_is_refused(detector: Detector, length: int) -> None:
    with pytest.raises(EdgeOmniError, match=rf"\[{length}\], expected \[512\]"):
        detector.probability(np.zeros(length, np.float32))


def test_silero_hop_after_hop_equals_one_pass_with_the_context_laid_out_by_hand() -> None:
    """Each hop behind the 64 samples before it, the state handed on: as Silero's own package runs it."""
    import onnxruntime as ort

    speech = beckett(16000)[: 80 * HOP]
    padded = np.concatenate([np.zeros(64, np.float32), speech])
    session, state = ort.InferenceSession(str(silero_file())), np.zeros((2, 1, 128), np.float32)
    expected = []
    for at in range(0, len(speech), HOP):
        feeds = {"input": padded[None, at : at + 64 + HOP], "state": state, "sr": np.array(16000)}
        probability, state = session.run(None, feeds)
        expected.append(np.asarray(probability).item())
    np.testing.assert_allclose(listen(SileroDetector(), speech), expected, atol=1e-6)


def test_loading_silero_runs_none_of_the_code_of_the_package_that_carries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def watched(name: str, *arguments: object, **named: object) -> object:
        assert name.split(".")[0] not in vad.SILERO
        return imported(name, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", watched)
    assert SileroDetector().probability(np.zeros(HOP, np.float32)) < 0.1


def test_auto_is_silero_where_it_is_installed_and_the_bundle_s_own_where_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_detector("auto", engine), SileroDetector)
    monkeypatch.setattr(vad, "SILERO", {"no_such_package": "data"})
    assert isinstance(open_detector("auto", engine), BundleDetector)
    with pytest.raises(EdgeOmniError, match=r"pip install 'edgeomni\[talk\]'"):
        open_detector("silero", engine)


def test_a_bundle_without_a_detector_and_an_unknown_name_are_said_clearly(engine: Engine) -> None:
    without = Engine(tiny_llama.bundle())
    with pytest.raises(EdgeOmniError, match=r"has no graph 'vad'.*--vad silero"):
        open_detector("bundle", without)
    with pytest.raises(EdgeOmniError, match="no detector 'ear'; expected auto, silero, bundle or energy"):
        open_detector("ear", engine)


def test_a_cancelled_engine_still_hears(engine: Engine) -> None:
    detector = BundleDetector(engine)
    engine.cancel()
    try:
        assert detector.probability(np.zeros(HOP, np.float32)) < 0.5
    finally:
        engine.rearm()


def test_the_energy_rule_takes_loud_noise_for_speech_which_silero_does_not() -> None:
    quiet = 0.001 * np.random.default_rng(0).standard_normal(60 * HOP, np.float32)
    loud = quiet.copy()
    loud[30 * HOP :] *= 100
    assert listen(EnergyDetector(), loud)[30:].mean() > 0.9
    assert listen(SileroDetector(), loud).max() < 0.5
