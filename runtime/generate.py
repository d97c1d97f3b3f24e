"""The decoder at work on one cache: rows in, the last hidden state out; prefill in pieces, one step at a time."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Manifest
from runtime.kv_cache import KVCache
from runtime.session import Bound, Session

PIECE = 128  # positions of a prefill that run at once (of 64 to 512 the quickest); between pieces the caller may stop


class Decoder:
    """The decoder's session bound to one cache. Two of them may share a session, even from two threads.

    Buffers are bound once and changed in place: a step costs no look-up of ports and no copy of the cache.
    """

    def __init__(self, session: Session, manifest: Manifest, cache: KVCache):
        self.session, self.cache = session, cache
        self.width = manifest.hidden_size
        self.dtype = np.dtype(session.graph.inputs[0].dtype)
        self._seqlens_k = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._bound: dict[int, tuple[Bound, np.ndarray, np.ndarray]] = {}
        self._moves = cache.moves  # of the buffers that are bound

    def prefill(self, rows: NDArray[np.floating], piece: int = PIECE) -> Iterator[NDArray[np.floating]]:
        """Read rows [n, hidden], `piece` at a time; yields the last hidden state [1, hidden] after each piece.

        PromptError before the first piece if the context cannot hold all of them.
        """
        self.cache.reserve(len(rows))
        for start in range(0, len(rows), piece):
            yield self._run(rows[start : start + piece])[-1:]

    def decode_step(self, row: NDArray[np.floating]) -> NDArray[np.floating]:
        """Read one row [1, hidden] and return its hidden state [1, hidden], valid until the next run."""
        self.cache.reserve(1)
        return self._run(row)

    def _run(self, rows: NDArray[np.floating]) -> NDArray[np.floating]:
        bound, embeds, hidden = self._buffers(len(rows))
        embeds[0] = rows
        total = self.cache.length + len(rows)
        self._total[...] = total
        self._seqlens_k[0] = total - 1
        bound.run()
        self.cache.append(len(rows))
        return hidden[0]

    def _buffers(self, count: int) -> tuple[Bound, np.ndarray, np.ndarray]:
        """Bindings by number of rows: the single step's for good, and those of the last piece of a prefill."""
        if self._moves != self.cache.moves:  # whoever made the cache grow
            self._bound.clear()
            self._moves = self.cache.moves
        if count not in self._bound:
            for other in [other for other in self._bound if other not in (1, PIECE)]:
                del self._bound[other]
            embeds = np.zeros((1, count, self.width), self.dtype)
            hidden = np.zeros((1, count, self.width), self.dtype)
            ports = {"inputs_embeds": embeds, "seqlens_k": self._seqlens_k, "total_sequence_length": self._total}
            for name, buffer in self.cache.buffers.items():
                ports[f"past.{name}"] = ports[f"present.{name}"] = buffer
            self._bound[count] = (self.session.bind({**ports, "hidden": hidden}), embeds, hidden)
        return self._bound[count]
