"""A recording of read speech: the front end and the encoder take it at any length, rate, layout and format."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from runtime.audio import lengths, load_mono, resample, segments
from runtime.engine import Engine
from runtime.errors import MediaError
from tests.recording import beckett
from tests.tiny import omni_bundle


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(omni_bundle())


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return beckett(16000)


def lasting(speech: np.ndarray, seconds: float) -> np.ndarray:
    return np.resize(speech, round(16000 * seconds))


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1, 2.99, 11.99, 12, 12.01, 30, 31.7, 95])
def test_a_recording_of_any_length_gives_the_codes_that_its_segments_promise(
    engine: Engine, speech: np.ndarray, seconds: float
) -> None:
    front = engine.manifest.audio
    assert front is not None
    wave = lasting(speech, seconds)
    codes = engine.hear(wave).codes
    window = front.max_audio_seconds * front.sampling_rate
    pieces = [len(wave[i : i + window]) for i in range(0, len(wave), window)]
    promised = sum(max(0, lengths(n, front).codes) for n in pieces if n >= front.n_fft)
    assert codes.shape == (promised, len(front.codebook_sizes))
    assert ((codes >= 0) & (codes < front.codebook_sizes)).all()
    per_second = front.sampling_rate / front.hop_length / front.stride / front.avg_pooler
    assert abs(promised - seconds * per_second) <= 2 * len(pieces)


def test_the_same_recording_gives_the_same_codes(engine: Engine, speech: np.ndarray) -> None:
    wave = lasting(speech, 5)
    np.testing.assert_array_equal(engine.hear(wave).codes, engine.hear(wave).codes)


def test_log_mels_of_real_speech_are_finite_and_within_their_range(engine: Engine, speech: np.ndarray) -> None:
    assert engine.manifest.audio is not None
    for mel, _ in segments(lasting(speech, 30), engine.manifest.audio):
        assert np.isfinite(mel).all()
        assert mel.max() - mel.min() <= 2.0 + 1e-6  # log10 power is cut 8 below its maximum, then divided by 4


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_file_of_any_rate_layout_and_format_is_heard_as_the_same_speech(
    engine: Engine, speech: np.ndarray, tmp_path: Path, kind: str, rate: int, channels: int
) -> None:
    original = lasting(speech, 3)
    path = tmp_path / f"speech.{kind}"
    soundfile.write(path, np.stack([resample(original, 16000, rate)] * channels, axis=1), rate)
    wave = load_mono(path, 16000)
    codes = engine.hear(path).codes
    assert abs(len(codes) - len(engine.hear(original).codes)) <= 1
    n = min(len(wave), len(original))
    kept = resample(resample(original, 16000, 8000), 8000, 16000) if rate == 8000 else original
    correlation = np.corrcoef(aligned(wave[:n], kept[:n]), kept[:n])[0, 1]
    assert correlation > 0.95


def aligned(wave: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The wave moved to where it fits best: mp3 encoders put a delay in front."""
    length = 2 * len(wave)
    product = np.fft.irfft(np.fft.rfft(reference, length) * np.conj(np.fft.rfft(wave, length)), length)
    return np.roll(wave, int(np.argmax(product)))


def test_a_click_too_short_for_one_code_says_how_much_is_needed(engine: Engine, speech: np.ndarray) -> None:
    with pytest.raises(MediaError, match="ms"):
        engine.hear(speech[:900])
