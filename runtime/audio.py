"""Files to waveforms, waveforms to log-mel segments with the lengths of their codes, and waves joined and written."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from runtime.bundle import AudioFrontEnd
from runtime.errors import BundleError, MediaError
from runtime.files import is_file
from runtime.sound_header import READ, Source, conversion, unread_kind, whole_sound

Wave = NDArray[np.float32]

READ_FRAMES = 1 << 20  # read in blocks: a header may promise more samples than the file has
RATES = range(1_000, 384_001)  # Hz; outside, a header is broken rather than unusual
SINC_ZEROS = 128  # zero crossings of the resampling filter on each side
ROLLOFF = 0.99  # its cutoff as a share of the lower Nyquist frequency
MATMUL_VALUES = 1 << 22  # input samples of one matrix product: bounds the memory beside input and output
MEL_FLOOR = 1e-10  # power; -10 on the log scale
SILENT_AMPLITUDE = 1e-6
PCM_LIMIT = 0.99  # of full scale


@dataclass(frozen=True)
class Lengths:
    """What one segment is long at each stage."""

    frames: int  # log-mel
    encoder: int
    codes: int  # positions in the language model


def load_mono(path: str | Path | bytes, rate: int, seconds: float | None = None) -> Wave:
    """An audio file, or its content, at `rate` Hz, channels averaged: float32 [n].

    Raises MediaError as read_audio does, and where it lasts longer than `seconds`, of which no more is decoded: a small
    file may hold hours of silence.

    The official code resamples each channel and averages then; both are linear, so averaging first gives the same
    for half of the work.
    """
    file_rate, blocks = _open_blocks(path)
    parts, found = [], 0
    for part in _resampled(_mono(blocks, _name(path)), file_rate, rate):
        parts.append(part)
        found += len(part)
        if seconds is not None and found > seconds * rate:
            raise MediaError(
                f"{_name(path)} lasts longer than {seconds:.0f} s, which is all that this model's context holds; cut it"
            )
    return np.concatenate(parts)


def read_audio(path: str | Path) -> tuple[Wave, int]:
    """An audio file's samples, float32 [channels, n] (int16 / 32768), and its rate in Hz.

    Raises MediaError: no such file, not decodable, more than 2 channels, an impossible rate, no samples, NaN or inf.
    """
    rate, blocks = _open_blocks(path)
    samples = np.concatenate(list(blocks)).T
    _check_samples(samples.size, _broken(samples), str(path))
    return samples, rate


def _open_blocks(path: str | Path | bytes) -> tuple[int, Iterator[Wave]]:
    """The rate of a file in Hz, and its samples, float32 [n, channels], a block at a time."""
    name = _name(path)
    if not isinstance(path, bytes) and not is_file(path):
        raise MediaError(f"{name} is not a file; expected a {READ} file")
    with _readable(path):
        source = BytesIO(path) if isinstance(path, bytes) else Path(path)
        kind = unread_kind(source)
        if kind is not None:
            raise MediaError(f"{name} is {kind}, which is not read; expected {READ}: {_convert(path)}")
        parts = whole_sound(source)
        kinds = {_kind(part, name) for part in parts}
    if len(kinds) > 1:
        found = " and ".join(f"{channels} channels at {rate} Hz" for channels, rate in sorted(kinds))
        raise MediaError(f"{name} is joined of parts of {found}; expected one kind: {_convert(path)}")
    return kinds.pop()[1], _read_blocks(parts, path)


def _name(path: str | Path | bytes) -> str:
    return "the audio" if isinstance(path, bytes) else str(path)


def _convert(path: str | Path | bytes) -> str:
    return "convert it to WAV" if isinstance(path, bytes) else f"convert it, {conversion(path)}"


@contextmanager
def _readable(path: str | Path | bytes) -> Iterator[None]:
    """What cannot be opened or decoded is a MediaError."""
    try:
        yield
    except OSError as error:
        raise MediaError(f"{_name(path)} cannot be read ({error.strerror or error}); check its permissions") from None
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        # TypeError: a name that ends in .raw; libsndfile says of most files only that they are none of its own
        raise MediaError(f"{_name(path)} cannot be decoded; expected {READ}: {_convert(path)}") from error


def _kind(source: Source, name: str) -> tuple[int, int]:
    """Channels and rate."""
    with soundfile.SoundFile(source) as file:
        _check_header(file, name)
        kind = file.channels, file.samplerate
    if isinstance(source, BytesIO):
        source.seek(0)
    return kind


def _read_blocks(parts: Sequence[Source], path: str | Path | bytes) -> Iterator[Wave]:
    with _readable(path):
        for part in parts:
            with soundfile.SoundFile(part) as file:
                whole = False
                while not whole:
                    block = np.asarray(file.read(READ_FRAMES, dtype="float32", always_2d=True), np.float32)
                    yield block
                    whole = len(block) < READ_FRAMES


def _mono(blocks: Iterator[Wave], name: str) -> Iterator[Wave]:
    """Channels averaged [n]; MediaError behind the last block as `_check_samples` has it."""
    size = broken = 0
    for block in blocks:
        size += block.size
        broken += _broken(block)
        yield block.mean(axis=1, dtype=np.float32)
    _check_samples(size, broken, name)


def _check_header(file: soundfile.SoundFile, name: str) -> None:
    problems: list[str] = []
    if file.channels > 2:
        problems.append(f"{file.channels} channels, expected 1 or 2: mix it down")
    if file.samplerate not in RATES:
        problems.append(f"a rate of {file.samplerate} Hz, expected {RATES.start} to {RATES.stop - 1}")
    if problems:
        raise MediaError(f"{name} has " + " and ".join(problems))


def _broken(samples: Wave) -> int:
    """How many are NaN or infinite."""
    return samples.size - int(np.count_nonzero(np.isfinite(samples)))


def _check_samples(size: int, broken: int, name: str) -> None:
    if size == 0:
        raise MediaError(f"{name} holds no samples; record or export it again")
    if broken:
        raise MediaError(f"{name} holds {broken} samples that are NaN or infinite; expected numbers in [-1, 1]")


def resample(wave: Wave, from_rate: int, to_rate: int) -> Wave:
    """Windowed-sinc resampling, torchaudio's with lowpass_filter_width=128: float32 [n] -> [ceil(n * to / from)].

    With a / b the ratio of the rates in lowest terms, output m lies at input m * a / b. Blocks of outputs whose
    inputs advance by about the filter's half width are one matrix product each, whatever the ratio.
    """
    if from_rate == to_rate:
        return wave
    divisor = math.gcd(from_rate, to_rate)
    a, b = from_rate // divisor, to_rate // divisor
    half = _half_width(a, b)
    block = max(1, round(half * b / a))
    repeats = max(1, block // b)  # periods of b phases in a row of the result
    hop, phases = a * repeats, b * repeats
    n_out = -(-b * len(wave) // a)
    rows = -(-n_out // phases)
    padded = np.zeros(rows * hop + 2 * half + 1, np.float32)
    padded[half : half + len(wave)] = wave
    out = np.empty((rows, phases), np.float32)
    for first in range(0, min(phases, n_out), block):
        last = min(first + block, phases)
        taps = _sinc_taps(a, b, first, last)  # [span, last - first]
        windows = np.lib.stride_tricks.sliding_window_view(padded[first * a // b :], len(taps))[::hop]
        _filter_rows(windows[:rows], taps, out[:, first:last])
    return out.reshape(-1)[:n_out]


def _resampled(waves: Iterator[Wave], from_rate: int, to_rate: int) -> Iterator[Wave]:
    """`resample` of the joined waves, piece by piece, with as much of the neighbours as the filter reaches."""
    if from_rate == to_rate:
        yield from waves
        return
    divisor = math.gcd(from_rate, to_rate)
    a, b = from_rate // divisor, to_rate // divisor
    margin = -(-_half_width(a, b) // a) * a  # whole periods: a inputs, b outputs
    behind, waiting = 0, np.zeros(0, np.float32)  # inputs that are kept of what is done; these, and what is to be done
    for wave in waves:
        waiting = np.concatenate([waiting, wave])
        ready = (len(waiting) - margin) // a * a
        if ready - behind >= READ_FRAMES // 2:
            yield resample(waiting[: ready + margin], from_rate, to_rate)[behind // a * b : ready // a * b]
            waiting, behind = waiting[max(0, ready - margin) :], min(ready, margin)
    yield resample(waiting, from_rate, to_rate)[behind // a * b :]


def _filter_rows(windows: Wave, taps: Wave, out: Wave) -> None:
    """out = windows @ taps, some rows at a time: windows overlap in memory and are copied apart for the product."""
    rows = max(1, MATMUL_VALUES // len(taps))
    for top in range(0, len(out), rows):
        out[top : top + rows] = np.ascontiguousarray(windows[top : top + rows]) @ taps


def _cutoff(a: int, b: int) -> float:
    return ROLLOFF * min(a, b)


def _half_width(a: int, b: int) -> int:
    """Input samples on each side of an output sample that the filter reaches."""
    return math.ceil(SINC_ZEROS * a / _cutoff(a, b))


def _sinc_taps(a: int, b: int, first: int, last: int) -> NDArray[np.float32]:
    """A column of taps for each phase first..last-1, over inputs from first * a // b - half on: [span, last - first].

    A sinc at the cutoff under a squared-cosine (Hann) window; zero where the window ends.
    """
    half, cutoff = _half_width(a, b), _cutoff(a, b)
    start = first * a // b - half
    stop = -(-(last - 1) * a // b) + half + 1
    inputs, phases = np.arange(start, stop)[:, None], np.arange(first, last)
    t = np.clip(cutoff * (inputs / a - phases / b), -SINC_ZEROS, SINC_ZEROS)
    return (np.sinc(t) * np.cos(np.pi * t / (2 * SINC_ZEROS)) ** 2 * cutoff / a).astype(np.float32)


def split(n_samples: int, front: AudioFrontEnd) -> list[tuple[int, int]]:
    """Sample ranges of the segments: blocks of max_audio_seconds, starting split_overlap before the last one ends.

    Audio of one block is never split, nor is any with a negative overlap. A tail shorter than one STFT window is lost.
    """
    window, overlap = _window(front), int(front.sampling_rate * front.split_overlap)
    if n_samples <= window or front.split_overlap < 0:
        return [(0, n_samples)]
    if overlap >= window:
        raise BundleError(
            f"the bundle's split_overlap ({front.split_overlap} s) must be below its max_audio_seconds "
            f"({front.max_audio_seconds} s); export it again from a corrected config.json"
        )
    starts = range(0, n_samples - overlap, window - overlap)  # what lies in the overlap has been heard
    ranges = ((start, min(start + window, n_samples)) for start in starts)
    return [(start, end) for start, end in ranges if end - start >= front.n_fft]


def _window(front: AudioFrontEnd) -> int:
    """Samples of the longest segment."""
    return front.max_audio_seconds * front.sampling_rate


def lengths(n_samples: int, front: AudioFrontEnd) -> Lengths:
    """Lengths of a segment of n_samples: the encoder's strided convolution rounds up, the pooling to codes down."""
    frames = min(_window(front) // front.hop_length, n_samples // front.hop_length + 1)
    encoder = (frames - 1) // front.stride + 1
    return Lengths(frames, encoder, encoder // front.avg_pooler)


def segments(wave: Wave, front: AudioFrontEnd) -> Iterator[tuple[NDArray[np.float32], Lengths]]:
    """Log-mel [num_mel_bins, frames] and lengths of each segment of a mono wave [n] that gives at least one code.

    Raises MediaError at once where no segment does, or where the wave has NaN or infinite samples.
    """
    _check_samples(wave.size, _broken(wave), "the audio")
    kept = [(start, end) for start, end in split(len(wave), front) if _gives_codes(end - start, front)]
    if not kept:
        found, needed = (1000 * n / front.sampling_rate for n in (len(wave), _shortest(front)))
        raise MediaError(f"the audio is too short: {found:.1f} ms, at least {needed:.1f} ms are needed")
    return ((log_mel(wave[start:end], front), lengths(end - start, front)) for start, end in kept)


def _gives_codes(n_samples: int, front: AudioFrontEnd) -> bool:
    return n_samples >= front.n_fft and lengths(n_samples, front).codes > 0


def _shortest(front: AudioFrontEnd) -> int:
    """Samples of the shortest segment that gives a code."""
    return max(front.n_fft, (front.avg_pooler - 1) * front.stride * front.hop_length)


def log_mel(segment: Wave, front: AudioFrontEnd) -> NDArray[np.float32]:
    """Whisper's log-mel of one segment [n], cut to its valid frames: float32 [num_mel_bins, frames].

    Defined on the segment padded with silence to max_audio_seconds. The 8 decades of range count from the loudest
    frame of that window, so frames past the valid ones matter if they still touch the signal; the silent rest lies
    on the floor and is not computed.
    """
    decades = _log_power(segment, front)  # [frames that touch the signal, num_mel_bins]
    decades = np.maximum(decades, decades.max() - 8.0)
    valid = decades[: lengths(len(segment), front).frames]
    return np.ascontiguousarray(((valid + 4.0) / 4.0).T, dtype=np.float32)


def _log_power(segment: Wave, front: AudioFrontEnd) -> NDArray[np.float64]:
    """log10 of the mel powers of every frame that touches the signal: [frames, num_mel_bins]."""
    window, half = _window(front), front.n_fft // 2
    heard = segment[:window]
    touching = -(-(len(heard) + half) // front.hop_length)
    frames = min(window // front.hop_length, touching)
    silence = min(window - len(heard), front.n_fft + half)  # more than any of these frames reaches
    centred = np.pad(np.pad(heard.astype(np.float64), (0, silence)), half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(centred, front.n_fft)[:: front.hop_length][:frames]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(front.n_fft) / front.n_fft)
    power = np.abs(np.fft.rfft(windows * hann)) ** 2  # [frames, n_fft / 2 + 1]
    mel = power @ mel_filters(front.sampling_rate, front.n_fft, front.num_mel_bins)
    return np.log10(np.maximum(mel, MEL_FLOOR))


@cache
def mel_filters(sampling_rate: int, n_fft: int, num_mel_bins: int) -> NDArray[np.float64]:
    """Triangles of equal area, even on Slaney's mel scale from 0 Hz to Nyquist: [n_fft // 2 + 1, num_mel_bins].

    Slaney, Auditory Toolbox (1998); the same as Whisper's.
    """
    hertz = np.linspace(0, sampling_rate / 2, n_fft // 2 + 1)[:, None]
    edges = _mel_to_hertz(np.linspace(0, _hertz_to_mel(sampling_rate / 2), num_mel_bins + 2))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre))
    filters = np.maximum(triangles, 0) * 2 / (high - low)
    filters.flags.writeable = False
    return filters


# Slaney's scale: 200 / 3 Hz a mel up to 1 kHz (15 mel), logarithmic with 27 steps a factor of 6.4 above.


def _hertz_to_mel(hertz: float) -> float:
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _mel_to_hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))


def join(waves: Sequence[Wave], overlap: int, *, official: bool = False) -> Wave:
    """Waves [n] one after the other, neighbours cross-faded linearly over `overlap` samples where both are longer.

    The official code keeps both waves whole and inserts the cross-fade of their ends between them, so that the tail
    and the head are each heard twice and the result grows by `overlap` a seam; official=True reproduces that.
    """
    pieces: list[Wave] = []
    for wave in waves:
        if pieces and min(len(pieces[-1]), len(wave)) > overlap > 0:
            before = pieces[-1]
            seam = crossfade(before[-overlap:], wave[:overlap])
            if official:
                pieces.append(seam)
            else:
                pieces[-1] = before[:-overlap]
                wave = np.concatenate([seam, wave[overlap:]])
        pieces.append(wave)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def crossfade(tail: Wave, head: Wave) -> Wave:
    """tail [n] fading out linearly under head [n] fading in."""
    rise = np.linspace(0, 1, len(head))
    return (tail * rise[::-1] + head * rise).astype(np.float32)


def decibels(amplitude: float) -> float:
    """Of full scale; silence is -120."""
    return 20 * math.log10(max(amplitude, SILENT_AMPLITUDE))


def level_db(wave: Wave) -> float:
    """Root mean square of a wave, in decibels of full scale."""
    return decibels(math.sqrt(float(np.mean(np.square(wave, dtype=np.float64)))))


def pcm16(wave: Wave) -> NDArray[np.int16]:
    """int16 samples of a wave, limited to 0.99 of full scale and truncated toward zero, as the official player does."""
    return (np.clip(wave, -PCM_LIMIT, PCM_LIMIT) * 32768).astype(np.int16)


def write_wav(path: str | Path, wave: Wave, rate: int) -> None:
    """Write a mono wave [n] as a 16-bit WAV file. Raises MediaError where that is not possible."""
    try:
        soundfile.write(path, pcm16(wave), rate, subtype="PCM_16", format="WAV")
    except (soundfile.SoundFileError, OSError) as error:
        raise MediaError(f"{path} cannot be written ({error}); check that its folder exists") from None
