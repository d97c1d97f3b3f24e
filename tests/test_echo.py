"""Our own voice in a simulated room: cancelled, told from a person's, and a person left alone."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from apps.bench.rooms import room
from export.nano import noises
from runtime.audio import Wave, level_db, load_mono
from runtime.errors import EdgeOmniError
from runtime.live.echo import EchoCanceller, EchoTest
from runtime.live.settings import HOP, RATE
from tests.recording import beckett

SECONDS = 8
SAMPLES = Path(noises.__file__).parent / "samples"


@cache
def speech() -> Wave:
    """A person's voice at -20 dBFS."""
    wave = beckett(RATE)[: SECONDS * RATE // HOP * HOP]
    return (wave * 10 ** ((-20 - level_db(wave)) / 20)).astype(np.float32)


@cache
def in_room(delay_ms: int, echo_db: float) -> Wave:
    """What a microphone hears of it: late, through a room, at that level under it, and a little noise."""
    path = room(seconds=0.25)
    size = 1 << 18
    wave = np.fft.irfft(np.fft.rfft(speech(), size) * np.fft.rfft(path, size), size)[: len(speech())]
    late = np.concatenate([np.zeros(delay_ms * RATE // 1000), wave])[: len(speech())].astype(np.float32)
    noise = 10 ** (-70 / 20) * np.random.default_rng(0).standard_normal(len(late))
    return (late * 10 ** ((-20 + echo_db - level_db(late)) / 20) + noise).astype(np.float32)


@cache
def other() -> Wave:
    """Other voices: questions that come along with Nano, one after another, as loud."""
    clips = [load_mono(path, RATE) for path in sorted(SAMPLES.glob("kokoro-*.flac"))]
    wave = np.resize(np.concatenate(clips), len(speech()))
    return (wave * 10 ** ((-20 - level_db(wave)) / 20)).astype(np.float32)


def hops(wave: Wave) -> Wave:
    return wave.reshape(-1, HOP)


def cancelled(mic: Wave, reference: Wave) -> Wave:
    canceller = EchoCanceller()
    return np.concatenate([canceller.process(*both) for both in zip(hops(mic), hops(reference), strict=True)])


def suspected(mic: Wave, reference: Wave, cleaned: Wave | None = None) -> np.ndarray:
    test, found = EchoTest(), []
    for number, (said, played) in enumerate(zip(hops(mic), hops(reference), strict=True)):
        test.note_reference(played)
        found.append(test.suspicious(said, None if cleaned is None else hops(cleaned)[number]))
    return np.array(found)


def voiced(wave: Wave) -> np.ndarray:
    """Hops within 20 dB of the loudest."""
    levels = np.array([level_db(hop) for hop in hops(wave)])
    return levels > levels.max() - 20


@pytest.mark.parametrize(("delay_ms", "echo_db"), [(50, -10), (250, -10), (100, -25)])
def test_echo_alone_is_suppressed_by_20_db_after_a_second(delay_ms: int, echo_db: float) -> None:
    mic = in_room(delay_ms, echo_db)
    left = cancelled(mic, speech())
    assert level_db(mic[RATE:]) - level_db(left[RATE:]) > 20


def test_a_person_alone_passes_late_by_the_delay_that_is_stated_and_at_the_same_level() -> None:
    said, late = speech(), EchoCanceller.delay_samples
    passed = cancelled(said, np.zeros_like(said))
    spectrum = np.fft.rfft(passed, 1 << 18) * np.fft.rfft(said, 1 << 18).conj()
    assert int(np.argmax(np.fft.irfft(spectrum)[:4000])) == late
    assert abs(level_db(passed[late:]) - level_db(said)) < 1


@pytest.mark.parametrize(("mic", "reference"), [(511, 512), (512, 160), (0, 512), (513, 513)])
def test_a_wrong_length_is_refused_before_the_native_library_sees_it(mic: int, reference: int) -> None:
    with pytest.raises(EdgeOmniError, match=r"expected \[512\]"):
        EchoCanceller().process(np.zeros(mic, np.float32), np.zeros(reference, np.float32))
    test = EchoTest()
    with pytest.raises(EdgeOmniError, match=r"expected \[512\]"):
        test.note_reference(np.zeros(100, np.float32))
    with pytest.raises(EdgeOmniError, match=r"expected \[512\]"):
        test.suspicious(np.zeros(100, np.float32))


@pytest.mark.parametrize("delay_ms", [-1, 501])
def test_a_delay_that_the_library_refuses_is_refused_with_its_range(delay_ms: int) -> None:
    with pytest.raises(EdgeOmniError, match="expected 0 to 500"):
        EchoCanceller(delay_ms)


def test_nan_in_the_microphone_is_silence_and_does_not_stay() -> None:
    canceller, broken = EchoCanceller(), np.full(HOP, np.nan, np.float32)
    canceller.process(broken, broken)
    assert all(np.isfinite(canceller.process(hop, np.zeros(HOP, np.float32))).all() for hop in hops(speech())[:20])


@pytest.mark.parametrize("delay_ms", [0, 120, 400])
def test_our_own_output_is_suspicious_at_minus_10_db_whatever_its_delay(delay_ms: int) -> None:
    mic = in_room(delay_ms, -10)
    found, loud = suspected(mic, speech()), voiced(mic)
    later = np.arange(len(loud)) > 62  # from the third second on
    assert found[loud & later].mean() > 0.9


def test_another_voice_is_not_suspicious_while_something_plays() -> None:
    said = (other() * 10 ** (-10 / 20)).astype(np.float32)
    assert suspected(said, speech())[voiced(said)].mean() < 0.1


def test_a_person_6_db_over_the_echo_is_mostly_told_from_it() -> None:
    said = (other() * 10 ** ((-10 + 6) / 20)).astype(np.float32)
    mic = in_room(120, -10) + said
    assert suspected(mic, speech())[voiced(said)].mean() < 0.35


def test_nothing_is_suspicious_while_nothing_plays() -> None:
    assert not suspected(speech(), np.zeros_like(speech())).any()


def test_what_the_canceller_took_away_is_suspicious_once_there_is_an_echo() -> None:
    """The end of a room's echo follows nothing that is being played; that it was taken away tells what it is."""
    mic = in_room(250, -10)
    without, both = suspected(mic, speech()), suspected(mic, speech(), cancelled(mic, speech()))
    assert both.sum() > without.sum() and not (without & ~both).any()


def test_a_person_whom_a_canceller_hides_is_not_suspicious_while_there_is_no_echo() -> None:
    assert not suspected(other(), speech(), np.zeros_like(other())).any()


def test_a_reset_test_knows_no_delay() -> None:
    test = EchoTest()
    for said, played in zip(hops(in_room(120, -10)), hops(speech()), strict=True):
        test.note_reference(played)
        test.suspicious(said)
    assert test.delay is not None and abs(test.delay - 120 * RATE // 1000 - 19) < 40
    test.reset()
    assert test.delay is None
