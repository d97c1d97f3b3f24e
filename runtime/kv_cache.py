"""Keys and values of the positions that the decoder has read: allocated once, rewound by forgetting the end."""

import numpy as np

from runtime.bundle import CacheLayout
from runtime.errors import PromptError

FIRST_CAPACITY = 1024  # positions; doubled when they are full


class KVCache:
    """Buffers [1, kv_heads, capacity, head_dim] named as the decoder's ports, of which `length` positions are read.

    They hold floats, or int8 whose scales the decoder's graph knows. The decoder writes new positions in place behind
    `length` and never looks beyond it, so that truncating is exact and costs nothing.
    """

    def __init__(self, layout: CacheLayout, capacity: int = FIRST_CAPACITY):
        self.layout, self.length = layout, 0
        self.moves = 0  # how often the buffers have moved, so that who has bound them sees it
        self.buffers: dict[str, np.ndarray] = {}
        self._allocate(min(capacity, layout.max_positions))

    @property
    def capacity(self) -> int:
        return next(iter(self.buffers.values())).shape[2]

    @property
    def room(self) -> int:
        """Positions that can still be read before the model's context is full."""
        return self.layout.max_positions - self.length

    def reserve(self, more: int) -> bool:
        """Make place for `more` positions; True if the buffers moved. PromptError if the context cannot hold them."""
        wanted = self.length + more
        if wanted > self.layout.max_positions:
            raise PromptError(
                f"this needs {wanted} positions ({self.length} used, {more} more), the model's context has "
                f"{self.layout.max_positions}; shorten the prompt or start a new conversation"
            )
        if wanted <= self.capacity:
            return False
        capacity = self.capacity
        while capacity < wanted:
            capacity *= 2
        self._allocate(min(capacity, self.layout.max_positions))
        self.moves += 1
        return True

    def append(self, count: int) -> None:
        """Count positions that the decoder has just written."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length

    def copy_from(self, other: "KVCache") -> None:
        """Take over the positions of another cache of the same layout."""
        self.copy_rows(other, 0, other.length)

    def copy_rows(self, other: "KVCache", start: int, end: int) -> None:
        """Keep the first `start` positions, take over those up to `end` from a cache of the same layout, forget others.

        ValueError where this one has fewer than `start`, or the other fewer than `end`.
        """
        if not 0 <= start <= min(end, self.length) or end > other.length:
            raise ValueError(f"cannot take positions {start} to {end} of {other.length} behind {self.length}")
        self.length = start
        self.reserve(end - start)
        for name, buffer in self.buffers.items():
            buffer[:, :, start:end] = other.buffers[name][:, :, start:end]
        self.length = end

    def equals(self, other: "KVCache", end: int) -> bool:
        """Whether both caches hold the same first `end` positions, bit for bit."""
        if end > min(self.length, other.length):
            return False
        pairs = ((buffer[:, :, :end], other.buffers[name][:, :, :end]) for name, buffer in self.buffers.items())
        return all(np.array_equal(ours, theirs) for ours, theirs in pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def _allocate(self, capacity: int) -> None:
        shape = (1, self.layout.kv_heads, capacity, self.layout.head_dim)
        old = self.buffers
        names = [f"{layer}.{side}" for layer in range(self.layout.layers) for side in ("key", "value")]
        self.buffers = {name: np.zeros(shape, self.layout.dtype) for name in names}
        for name, buffer in old.items():
            self.buffers[name][:, :, : self.length] = buffer[:, :, : self.length]
