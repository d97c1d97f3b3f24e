"""Samples from the device's callback to the loop: one writes, one reads, and neither waits for the other."""

import threading
from collections import deque

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.float32]

MARKS = 4096  # time stamps that are kept: one a block, 40 s of blocks of 10 ms


class Ring:
    """The newest `capacity` samples of `channels` channels; what is not read in time is dropped, oldest first.

    A position counts samples from the start, those that were dropped included. One thread calls `write`, one other
    calls `read` and `wait`; there is no lock, so a slow reader never delays the device.
    """

    def __init__(self, capacity: int, rate: int, channels: int = 1):
        self.rate = rate
        self.dropped = 0  # samples that the reader never saw
        self._samples = np.zeros((capacity, channels), np.float32)
        self._marks: deque[tuple[int, float]] = deque(maxlen=MARKS)  # position, when its sample was heard
        self._claimed = 0  # the writer may be changing everything older than capacity before here
        self._written = 0
        self._read = 0
        self._wanted = 1  # position at which the reader wants to be woken
        self._came = threading.Event()

    def write(self, block: Block, stamp: float) -> None:
        """Append block [n, channels], whose first sample was heard at `stamp` ms."""
        capacity, start = len(self._samples), self._written
        self._claimed = end = start + len(block)
        kept = block[-capacity:]
        first = (end - len(kept)) % capacity
        head = min(len(kept), capacity - first)
        self._samples[first : first + head] = kept[:head]
        self._samples[: len(kept) - head] = kept[head:]
        self._marks.append((start, stamp))
        self._written = end
        if end >= self._wanted:
            self._came.set()

    def read(self) -> tuple[Block, int] | None:
        """Everything that was not read [n, channels] and the position of its first sample; None where nothing came."""
        while True:
            self._skip(self._claimed - len(self._samples))
            start, end = self._read, self._written
            if end <= start:
                return None
            taken = self._copy(start, end)
            if self._claimed - len(self._samples) <= start:  # nothing was overwritten meanwhile
                self._read = end
                return taken, start

    def heard_at(self, position: int) -> float:
        """When the sample at a position was heard, in ms, by the newest stamp at or before it."""
        while len(self._marks) > 1 and self._marks[1][0] <= position:
            self._marks.popleft()
        marked, stamp = self._marks[0]
        return stamp + 1000 * (position - marked) / self.rate

    def wait(self, timeout: float, count: int = 1) -> None:
        """Until `count` samples can be read, `wake` is called or the timeout, in seconds, is over."""
        self._came.clear()
        self._wanted = self._read + count
        if self._written < self._wanted:
            self._came.wait(timeout)

    def wake(self) -> None:
        self._came.set()

    def _skip(self, oldest: int) -> None:
        if oldest > self._read:
            self.dropped += oldest - self._read
            self._read = oldest

    def _copy(self, start: int, end: int) -> Block:
        capacity = len(self._samples)
        first, count = start % capacity, end - start
        head = min(count, capacity - first)
        return np.concatenate([self._samples[first : first + head], self._samples[: count - head]])
