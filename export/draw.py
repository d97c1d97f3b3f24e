"""One code from its logits inside a graph: repetition penalty, temperature, top-k, top-p, and an argmax with noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from export.graph import INT64, constant, ints, scalar, tap


def scores_tap(depth: int) -> str:
    return f"audio_head.scores.{depth}"


class Draw:
    """How a code is chosen from its codebook's logits: as runtime.sampling does, with the chance given as noise.

    Order and ties follow Hugging Face's logits processors, but for one case: of scores that equal the least one that
    top-p keeps, all are kept. The code is the argmax of score + noise among those that are left (Gumbel 1954).
    """

    def __init__(self, op: Any, sizes: Sequence[int], ports: Mapping[str, ir.Value]):
        """`sizes` of the codebooks' score vectors, which lie one behind the other in noise and seen."""
        self.op, self.sizes = op, sizes
        self.zero, self.nowhere = scalar(op, 0, INT64), scalar(op, -np.inf)
        factor = op.Where(ports["seen"], ports["repetition_penalty"], scalar(op, 1.0))
        self.noise = self._split(ports["noise"])
        self.slope = self._split(op.Mul(factor, factor))
        self.divisor = self._split(op.Mul(factor, ports["temperature"]))
        every = np.array(sizes, np.int64)
        top_k = op.Where(op.Greater(ports["top_k"], self.zero), ports["top_k"], scalar(op, max(sizes), INT64))
        self.top_k = self._each(op.Min(top_k, constant(op, every, "draw.sizes")))
        # a running sum may round to 1 before its end, so "off" must be more than 1
        self.top_p = op.Where(op.Less(ports["top_p"], scalar(op, 1.0)), ports["top_p"], scalar(op, 2.0))
        self.forced = self._each(ports["forced"])
        self.is_forced = self._each(op.GreaterOrEqual(ports["forced"], self.zero))

    def code(self, logits: ir.Value, depth: int) -> ir.Value:
        """Raw logits fp32 [1, 1, size or more] -> code int64 [1, 1]."""
        op = self.op
        scores = self._scores(logits, depth)
        least = self._least_kept(scores, self.top_k[depth])
        noisy = op.Where(op.GreaterOrEqual(scores, least), op.Add(scores, self.noise[depth]), self.nowhere)
        chosen = op.ArgMax(noisy, axis=-1, keepdims=0)
        return op.Where(self.is_forced[depth], self.forced[depth], chosen)

    def _scores(self, logits: ir.Value, depth: int) -> ir.Value:
        """After repetition penalty and temperature: a seen score s becomes s * p if it is negative, else s / p.

        PRelu multiplies a negative s by p^2 beforehand, so that one division by p serves both.
        """
        op = self.op
        cut = op.Slice(logits, ints(op, 0), ints(op, self.sizes[depth]), ints(op, -1))
        return tap(op.Div(op.PRelu(cut, self.slope[depth]), self.divisor[depth]), scores_tap(depth))

    def _least_kept(self, scores: ir.Value, k: ir.Value) -> ir.Value:
        """The least score [1, 1, 1] that passes top-k and top-p.

        A score is dropped by top-p if those from the least one up to it add up to a probability of 1 - p or less:
        if those above it have p or more.
        """
        op = self.op
        top, ids = op.TopK(scores, k, axis=-1, _outputs=2)
        kth = op.Gather(top, ints(op, -1), axis=-1)
        probs = op.Softmax(op.Where(op.GreaterOrEqual(scores, kth), scores, self.nowhere), axis=-1)
        above = op.CumSum(op.GatherElements(probs, ids, axis=-1), scalar(op, -1, INT64), exclusive=1)
        kept = op.Where(op.Less(above, self.top_p), top, scalar(op, np.inf))
        return op.ReduceMin(kept, ints(op, -1), keepdims=1)

    def _split(self, vector: ir.Value) -> tuple[ir.Value, ...]:
        """Each codebook's part of a vector over all scores."""
        return _pieces(self.op.Split(vector, ints(self.op, *self.sizes), axis=0, _outputs=len(self.sizes)))

    def _each(self, vector: ir.Value) -> tuple[ir.Value, ...]:
        """Each codebook's entry of a vector with one for each."""
        count = len(self.sizes)
        return _pieces(self.op.Split(vector, axis=0, num_outputs=count, _outputs=count))


def _pieces(split: Any) -> tuple[ir.Value, ...]:
    """What Split returned, also where it is one piece."""
    return (split,) if isinstance(split, ir.Value) else tuple(split)
