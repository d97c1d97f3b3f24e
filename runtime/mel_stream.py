"""Codes in, mel frames out: audio decoder, prenet and Euler steps of the flow, chunk by chunk with carried state."""

from collections.abc import Callable, Generator, Iterator
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Port, SpeechLayout
from runtime.session import Carried, Session

OpenGraph = Callable[[str], Session]
Codes = NDArray[np.int64]
Array = NDArray[np.float32]

CARRY_BYTES = 1 << 30  # of keys and values that the Euler steps may carry from chunk to chunk


class Draws(Protocol):
    """What is asked of a numpy Generator."""

    def standard_normal(self, size: tuple[int, ...], dtype: type[np.float32], /) -> np.ndarray: ...


class MelStream:
    """Codes of one segment -> mel. State: running norm, keys and values of all stages, and those of each Euler step.

    The steps' state always ends where a chunk of their attention ends: an open chunk is run again when it has grown.
    """

    def __init__(
        self, graph: OpenGraph, layout: SpeechLayout, rng: Draws | None = None, carry_bytes: int = CARRY_BYTES
    ):
        self.layout, self.rng = layout, rng
        self.decoder, self.prenet = Carried(graph("audio_decoder")), Carried(graph("flow_prenet"))
        self.steps = [Carried(graph("flow_estimator")) for _ in layout.time_steps[1:]]
        self._caches = [port for port in graph("flow_estimator").graph.inputs if _grows(port)]
        frame_bytes = len(self.steps) * sum(_bytes_per_frame(port) for port in self._caches)
        self._limit = max(layout.chunk_frames, carry_bytes // frame_bytes)  # frames that may be carried
        self._carried = 0  # frames that are
        self._open_mu = np.empty((1, 0, layout.mel_bins), np.float32)  # of the chunk that has not ended, whose mel
        self._open_noise = np.empty((1, layout.mel_bins, 0), np.float32)  # was returned before its end was known

    def hidden(self, codes: Codes, last: bool) -> Array:
        """codes [L, codebooks] -> states [1, T, d]; `last` where these codes end the segment."""
        frames = self.layout.frames_per_code * len(codes) - (self.layout.frames_short if last else 0)
        return self.decoder.run(codes=codes, frames=np.array(frames))["hidden"]

    def mel(self, hidden: Array, last: bool) -> Iterator[Array]:
        """States [1, T, d] of the next frames -> their mel [1, mel_bins, t], in pieces of at most one chunk.

        An empty piece comes after each Euler step, so that the caller may do something else in between.
        Exact, given the states, where T ends a chunk or the segment. Noise is drawn frame by frame, so that grouping
        does not change it. Where all frames are known but more state would have to be carried than is allowed, each
        Euler step takes all that is left in one go. Where more frames are to come, the oldest chunks are forgotten.
        """
        pieces = self._pieces(hidden)
        while pieces:
            fits = self._carried + self.layout.chunk_frames <= self._limit or not last
            group, pieces = (pieces[:1], pieces[1:]) if fits else (pieces, [])
            yield from (yield from self._flow(group, last and not pieces))
            self._forget(self._carried - self._limit)
        if last:
            self._release()

    def _pieces(self, hidden: Array) -> list[Array]:
        """Cut where chunks end."""
        chunk = self.layout.chunk_frames
        return np.split(hidden, list(range(chunk - self._open_mu.shape[1], hidden.shape[1], chunk)), axis=1)

    def _flow(self, group: list[Array], ends: bool) -> Generator[Array, None, list[Array]]:
        """States of a chunk's next frames, or of all chunks that are left -> mel of those frames."""
        mus = [self.prenet.run(hidden=hidden)["mu"] for hidden in group]
        noises = [self._noise(mu.shape[1]) for mu in mus]
        sent = self._open_mu.shape[1]
        mus[0] = np.concatenate([self._open_mu, mus[0]], axis=1)
        noises[0] = np.concatenate([self._open_noise, noises[0]], axis=2)
        is_open = not ends and mus[-1].shape[1] < self.layout.chunk_frames
        mels = yield from self._integrate(noises, mus, keep=not ends and not is_open)
        self._open_mu = mus[-1] if is_open else mus[-1][:, :0]
        self._open_noise = noises[-1] if is_open else noises[-1][:, :, :0]
        return [mels[0][:, :, sent:], *mels[1:]]

    def _integrate(self, noises: list[Array], mus: list[Array], keep: bool) -> Generator[Array, None, list[Array]]:
        """All Euler steps over consecutive chunks; without `keep` the steps' state stays as it was."""
        xs = noises
        for index, step in enumerate(self.steps):
            before = step.state
            at = np.array(index)
            xs = [step.run(x=x, mu=mu, step=at)["x_next"] for x, mu in zip(xs, mus, strict=True)]
            if not keep:
                step.state = before
            yield xs[0][:, :, :0]
        if keep:
            self._carried += sum(mu.shape[1] for mu in mus)
        return xs

    def _noise(self, frames: int) -> Array:
        """Where the flow starts: standard normal [1, mel_bins, frames], or zeros without a generator."""
        shape = (frames, self.layout.mel_bins)
        drawn = np.zeros(shape, np.float32) if self.rng is None else self.rng.standard_normal(shape, np.float32)
        return np.ascontiguousarray(drawn.T[None])

    def _release(self) -> None:
        for step in self.steps:
            step.reset()
        self._carried = 0

    def _forget(self, excess: int) -> None:
        """Drop whole chunks from the front of what is carried: the attention has no positions but its chunks."""
        drop = max(0, -(-excess // self.layout.chunk_frames) * self.layout.chunk_frames)
        if drop:
            self._carried -= drop
            for step in self.steps:
                for port in self._caches:
                    step.state[port.name] = np.ascontiguousarray(step.state[port.name][:, :, drop:])


def _grows(port: Port) -> bool:
    return port.name.startswith("past.") and any(isinstance(dim, str) for dim in port.shape)


def _bytes_per_frame(port: Port) -> int:
    return prod(dim for dim in port.shape if isinstance(dim, int)) * np.dtype(port.dtype).itemsize
