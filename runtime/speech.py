"""The codes of a reply to its waveform, streamed: segment by segment, piece by piece, with seams between segments."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from runtime.audio import crossfade
from runtime.bundle import Manifest, SpeechLayout
from runtime.errors import EdgeOmniError
from runtime.events import AudioChunk
from runtime.mel_stream import Array, Codes, MelStream, OpenGraph
from runtime.vocoder import WaveStream

# exact: a segment is decoded when it is complete, as the official code does. prefix: a chunk is decoded as soon as it
# is known, with the statistics of the frames so far: sooner, and an approximation that `prefix_error` measures.
Mode = Literal["exact", "prefix"]
EMPTY = np.empty(0, np.float32)


@dataclass(frozen=True)
class Pieces:
    """After how many codes a segment is decoded: `first`, twice that and so on up to `chunk`, then its multiples.

    Doubling keeps more sound in hand than the next piece takes to make. Never more than `longest`.
    """

    first: int
    chunk: int
    longest: int  # what the position table allows

    @classmethod
    def of(cls, layout: SpeechLayout, mode: Mode, chunk_codes: int | None, first_codes: int | None) -> "Pieces":
        longest = layout.max_frames // layout.frames_per_code
        if mode == "exact":
            return cls(longest, longest, longest)
        chunk = max(1, layout.chunk_frames // layout.frames_per_code) if chunk_codes is None else chunk_codes
        first = chunk if first_codes is None else first_codes
        if min(first, chunk) < 1:
            raise EdgeOmniError(
                f"prefix mode was given pieces of {first} and {chunk} codes, expected at least 1 of each"
            )
        return cls(first, chunk, longest)

    def next(self, done: int) -> int:
        """Codes of the piece that follows `done` of them."""
        end = self.first if done < self.first else (done // self.chunk + 1) * self.chunk
        if self.first <= done < self.chunk:
            end = min(2 * done, self.chunk)
        return min(end, self.longest) - done


class SegmentStream:
    """One segment's codes -> samples. Any way of cutting the codes into pushes gives the same samples.

    In prefix mode a piece (by default one chunk of the flow's attention) is decoded when one more code is known, since
    the last code of a segment gives fewer frames. A segment that is longer than the position table goes on as a new
    one, for all but the vocoder.
    """

    def __init__(
        self,
        graph: OpenGraph,
        layout: SpeechLayout,
        rng: np.random.Generator | None = None,
        mode: Mode = "exact",
        chunk_codes: int | None = None,
        first_codes: int | None = None,
    ):
        self.graph, self.layout, self.pieces = graph, layout, Pieces.of(layout, mode, chunk_codes, first_codes)
        self._noise, wave_noise = (None, None) if rng is None else rng.spawn(2)
        self._mel = MelStream(graph, layout, self._noise)
        self._wave = WaveStream(graph("vocoder_f0"), graph("vocoder"), layout, wave_noise)
        self._wave_frames = layout.chunk_frames // (1 if mode == "exact" else 2)  # what the vocoder makes at once
        self._waiting: list[Codes] = []  # rows that are not decoded yet
        self._done = 0  # rows that are, since the start or since the position table ran out
        self._ended = False

    def push(self, codes: np.ndarray) -> Iterator[Array]:
        """Take codes [n, codebooks], at once; yields the samples [m] that became certain. Exhaust it before the next.

        The row with the end code and what follows it are dropped. Raises EdgeOmniError for codes that no codebook has.
        """
        return only_sound(self.work(codes))

    def work(self, codes: np.ndarray) -> Iterator[Array]:
        """As `push`, with no samples (m = 0) after a piece of work that gave none: time for something else."""
        if not self._ended:
            rows, self._ended = spoken_rows(codes, self.layout)
            self._waiting += list(rows)
        return self._decode(ends=False)

    def finish(self) -> Iterator[Array]:
        """Yields the rest of the samples; none for a segment without codes. The segment is over then."""
        return only_sound(self.work_to_end())

    def work_to_end(self) -> Iterator[Array]:
        """As `finish`, with no samples after a piece of work that gave none."""
        self._ended = True
        return self._decode(ends=True)

    def _decode(self, ends: bool) -> Iterator[Array]:
        while len(self._waiting) > self.pieces.next(self._done) or (ends and self._waiting):
            size = self.pieces.next(self._done)
            codes, self._waiting = np.stack(self._waiting[:size]), self._waiting[size:]
            yield from self._sound(codes, last=ends and not self._waiting)
        if ends and (samples := self._wave.finish()).size:
            yield samples

    def _sound(self, codes: Codes, last: bool) -> Iterator[Array]:
        self._done += len(codes)
        full = self._done == self.pieces.longest
        for mel in self._mel.mel(self._mel.hidden(codes, last), last or full):
            for part in np.split(mel, range(self._wave_frames, mel.shape[2], self._wave_frames), axis=2):
                yield self._wave.push(part)
        if full:
            self._mel, self._done = MelStream(self.graph, self.layout, self._noise), 0


def only_sound(waves: Iterator[Array]) -> Iterator[Array]:
    return (wave for wave in waves if wave.size)


def spoken_rows(codes: np.ndarray, layout: SpeechLayout) -> tuple[Codes, bool]:
    """The rows of codes [n, codebooks] before the end code, and whether there was one; EdgeOmniError for others."""
    sizes = np.array(layout.codebook_sizes)
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not np.issubdtype(codes.dtype, np.integer):
        raise EdgeOmniError(
            f"codes are {codes.dtype}{list(codes.shape)}, expected integers [n, {len(sizes)}]: one row a frame"
        )
    ends = np.flatnonzero(codes[:, 0] >= sizes[0])
    rows = codes[: ends[0]] if len(ends) else codes
    wrong = np.argwhere((rows < 0) | (rows >= sizes))
    if len(wrong):
        found = ", ".join(f"{rows[i, j]} in row {i} (codebook {j}: 0 to {sizes[j] - 1})" for i, j in wrong[:5])
        raise EdgeOmniError(f"{len(wrong)} codes are in no codebook of this bundle: {found}; were they made with it?")
    return rows.astype(np.int64), bool(len(ends))


class Seams:
    """Joins segments as `runtime.audio.join` does, while they arrive: their ends wait for the next one's beginning."""

    def __init__(self, overlap: int, official: bool = False):
        self.overlap, self.official = overlap, official
        self._tail: Array | None = None  # the end of the segment before, if it is long enough to be cross-faded
        self._held = EMPTY  # samples of this segment that were not passed on
        self._length = 0  # of this segment so far

    def push(self, samples: Array) -> Array:
        """Samples [n] of the segment -> those of the joined wave that are now certain."""
        self._length += len(samples)
        self._held = np.concatenate([self._held, samples])
        if self._tail is not None:
            return self._cross() if self._length > self.overlap else EMPTY
        return self._pass_on()

    def _cross(self) -> Array:
        assert self._tail is not None
        seam, self._tail = crossfade(self._tail, self._held[: self.overlap]), None
        if self.official:
            return np.concatenate([seam, self._pass_on()])
        self._held = np.concatenate([seam, self._held[self.overlap :]])
        return self._pass_on()

    def _pass_on(self) -> Array:
        certain = max(0, len(self._held) - self.overlap)
        passed, self._held = self._held[:certain], self._held[certain:]
        return passed

    def end_segment(self) -> Array:
        """What is certain now that the segment is over; its end may still wait."""
        before, held, self._held = self._tail, self._held, EMPTY
        long, self._length = self._length > self.overlap, 0
        if before is not None:  # too short to be cross-faded with what came before it, or with what follows
            self._tail = None
            return held if self.official else np.concatenate([before, held])
        self._tail = held if long else None
        return held if self.official or not long else EMPTY

    def finish(self) -> Array:
        """The end of the last segment."""
        rest = np.concatenate([self.end_segment(), EMPTY if self._tail is None or self.official else self._tail])
        self._tail = None
        return rest


class SpeechDecoder:
    """The codes of one reply -> audio: segments one after the other, cross-faded.

    `graph` opens a bundle's graph by name. `official` inserts the cross-fade between two whole segments instead of
    laying them over each other. EdgeOmniError where the bundle cannot speak.
    """

    def __init__(
        self,
        graph: OpenGraph,
        manifest: Manifest,
        rng: np.random.Generator,
        mode: Mode = "exact",
        zero_noise: bool = False,
        official: bool = False,
        first_codes: int | None = None,
    ):
        if manifest.speech is None:
            raise EdgeOmniError(f"{manifest.family} does not speak: the bundle has no graphs from codes to a waveform")
        self.graph, self.layout = graph, manifest.speech
        self.mode: Mode = mode
        self.first_codes = first_codes  # of the first piece of the reply, in prefix mode; None: as all others
        self.rng = None if zero_noise else rng
        self.seams = Seams(self.layout.overlap_samples, official)
        self._segment: SegmentStream | None = None

    def segment(self, chunk_codes: int | None = None, first_codes: int | None = None) -> SegmentStream:
        """A new segment by itself, without seams."""
        rng = None if self.rng is None else self.rng.spawn(1)[0]
        return SegmentStream(self.graph, self.layout, rng, self.mode, chunk_codes, first_codes)

    def push(self, codes: np.ndarray) -> Iterator[AudioChunk]:
        """Take codes [n, codebooks] of the segment, now; yields the audio that became certain."""
        return only_audio(self.work(codes))

    def work(self, codes: np.ndarray) -> Iterator[AudioChunk | None]:
        """As `push`, with None after each piece of work that gave no audio."""
        self._segment = self._segment or self._begin()
        return self._joined(self._segment.work(codes))

    def _begin(self) -> SegmentStream:
        """The reply's next segment; only its first one is waited for."""
        first, self.first_codes = self.first_codes, None
        return self.segment(first_codes=first)

    def end_segment(self) -> Iterator[AudioChunk]:
        """Yields the rest of the segment but its end, which waits for the next one or for `finish`."""
        return only_audio(self.work_to_end())

    def work_to_end(self) -> Iterator[AudioChunk | None]:
        """As `end_segment`, with None after each piece of work that gave no audio."""
        segment, self._segment = self._segment or self._begin(), None
        yield from self._joined(segment.work_to_end())
        yield from self._chunk(self.seams.end_segment())

    def finish(self) -> Iterator[AudioChunk]:
        """Yields the end of the last segment. The reply is over then."""
        if self._segment is not None:
            yield from self.end_segment()
        yield from self._chunk(self.seams.finish())

    def _joined(self, waves: Iterator[Array]) -> Iterator[AudioChunk | None]:
        for wave in waves:
            if (samples := self.seams.push(wave)).size:
                yield from self._chunk(samples)
            else:
                yield None

    def _chunk(self, samples: Array) -> Iterator[AudioChunk]:
        if samples.size:
            yield AudioChunk(samples, self.layout.sampling_rate)

    def prefix_error(
        self, codes: np.ndarray, chunk_codes: int | None = None, first_codes: int | None = None
    ) -> "PrefixError":
        """Decode codes [n, codebooks] of one segment in both modes, without noise, and compare states and mel.

        Codes beyond the position table are left out. EdgeOmniError for codes without a frame, or in no codebook.
        """
        rows, _ = spoken_rows(codes, self.layout)
        if not len(rows):
            raise EdgeOmniError("the error of prefix mode was asked of a segment without frames; give one with codes")
        exact = self._states_and_mel(rows, Pieces.of(self.layout, "exact", None, None))
        prefix = self._states_and_mel(rows, Pieces.of(self.layout, "prefix", chunk_codes, first_codes))
        return PrefixError(*(relative_rms(ours, theirs) for ours, theirs in zip(prefix, exact, strict=True)))

    def _states_and_mel(self, codes: Codes, pieces: Pieces) -> tuple[Array, Array]:
        """[1, T, d] and [1, mel_bins, T] of one segment, decoded piece by piece."""
        stream, codes = MelStream(self.graph, self.layout), codes[: pieces.longest]
        states: list[Array] = []
        mels: list[Array] = []
        done = 0
        while done < len(codes):
            piece = codes[done : done + pieces.next(done)]
            done += len(piece)
            states.append(stream.hidden(piece, done == len(codes)))
            mels += stream.mel(states[-1], done == len(codes))
        return np.concatenate(states, axis=1), np.concatenate(mels, axis=2)


def only_audio(items: Iterator[AudioChunk | None]) -> Iterator[AudioChunk]:
    return (item for item in items if item is not None)


@dataclass(frozen=True)
class PrefixError:
    """What prefix mode loses on one segment: root-mean-square errors relative to the exact values."""

    hidden: float
    mel: float


def relative_rms(ours: Array, exact: Array) -> float:
    """Root-mean-square difference, as a share of the exact values' root mean square."""
    return float(np.sqrt(np.square(ours - exact).mean() / np.square(exact).mean()))
