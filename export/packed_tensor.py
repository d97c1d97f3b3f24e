"""GPTQ's and AWQ's linear layers: a matrix that lies transposed in 32-bit words, with zeros and scales beside it.

Both state value = (code - zero) * scale with one scale and zero for each group of input columns. Names and layouts are
those of AutoGPTQ's QuantLinear (versions 1 and 2 of GPTQModel's formats) and of AutoAWQ's WQLinear_GEMM.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from export.lazy_tensor import LazyTensor
from export.problems import gathering, refuse
from runtime.errors import CheckpointError
from runtime.integers import Form, Quantized, even_groups, middle

WORD = 32  # bits
SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Packing:
    """How codes lie in words. `along`: which axis of qweight [columns, rows] a word spans; qzeros' words span rows.

    `fields`: which code of a word's stretch lies in its lowest bits, its next, ... `stored_less`: what was taken off
    each zero before it was stored.
    """

    name: str
    bits: int
    along: Literal["columns", "rows"]
    fields: tuple[int, ...]
    stored_less: Literal[0, 1] = 0

    def unpacked(self, words: NDArray[np.int32]) -> NDArray[np.uint8]:
        """int32 [..., n] -> codes [..., n, codes of a word], in the order of the matrix."""
        octets = np.ascontiguousarray(words).view(np.uint8)
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        codes = (octets[..., None] >> shifts) & np.uint8(2**self.bits - 1)
        return codes.reshape(*words.shape, self.per_word)[..., np.argsort(self.fields)]

    @property
    def per_word(self) -> int:
        return WORD // self.bits


def gptq(bits: int, version: Literal[1, 2]) -> Packing:
    """Version 1 stores each zero less 1, version 2 as it is."""
    return Packing("GPTQ", bits, "columns", tuple(range(WORD // bits)), stored_less=1 if version == 1 else 0)


AWQ = Packing("AWQ", 4, "rows", (0, 2, 4, 6, 1, 3, 5, 7))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor(LazyTensor):
    """A matrix [rows, columns] of one such layer; `nbytes` counts all of its parts.

    qweight int32 [columns, rows], shorter where words span; qzeros int32 [groups, rows / codes of a word]; scales
    [groups, rows]; g_idx int32 [columns], the group of each column, or None: `group_size` columns in a row.
    """

    packing: Packing
    group_size: int
    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor
    g_idx: LazyTensor | None = None

    def raw(self) -> NDArray[np.uint8]:
        """The stored bytes of all parts, one after another."""
        parts = [self.qweight, self.qzeros, self.scales, *([] if self.g_idx is None else [self.g_idx])]
        return np.concatenate([part.raw() for part in parts])

    def read(self) -> NDArray[np.float32]:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop`, float32 [stop - start, columns]: (code - zero) * scale."""
        group_of = self.group_of()
        less_zero = self._codes(start, stop) - self._zeros(start, stop).astype(np.float32)[:, group_of]
        return less_zero * self._scales(start, stop)[:, group_of]

    def form(self) -> Form | None:
        """None where too few columns in a row, also when reordered, share a group."""
        group_of = self.group_of()
        order = _order(group_of)
        size = even_groups(np.sort(group_of), self.packing.bits)
        if size is None:
            return None
        symmetric = bool((self._zeros(0, self.shape[0]) == middle(self.packing.bits)).all())
        scale_bits = 16 if self.scales.dtype == "F16" else 32
        return Form(self.packing.bits, size, symmetric, scale_bits, None if order is None else tuple(order.tolist()))

    def integers(self, start: int, stop: int) -> Quantized:
        form = self.form()
        if form is None:
            raise ValueError(f"{self.key!r} has groups that no operator knows")
        order = np.arange(self.shape[1]) if form.order is None else np.array(form.order)
        group_of = self.group_of()[order][:: form.group_size]
        zeros = None if form.symmetric else self._zeros(start, stop)[:, group_of]
        codes, scales = self._codes(start, stop)[:, order], self._scales(start, stop)[:, group_of]
        return Quantized(codes, scales, zeros, self.packing.bits)

    def group_of(self) -> NDArray[np.int32]:
        """The group of each column, [columns]. CheckpointError if g_idx names groups that there are not."""
        if self.g_idx is None:
            return np.arange(self.shape[1], dtype=np.int32) // np.int32(self.group_size)
        group_of, groups = self.g_idx.read(), self.scales.shape[0]
        if group_of.min() < 0 or group_of.max() >= groups:
            raise CheckpointError(
                f"{self.g_idx.key!r} names the groups {group_of.min()} to {group_of.max()}, "
                f"but there are scales for 0 to {groups - 1}"
            )
        return group_of

    def _codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """[stop - start, columns]."""
        if self.packing.along == "rows":
            return self._spanning_rows(self.qweight, start, stop)
        words = self.packing.unpacked(self.qweight.columns(start, stop))
        return words.transpose(1, 0, 2).reshape(stop - start, self.shape[1])

    def _zeros(self, start: int, stop: int) -> NDArray[np.uint8]:
        """[stop - start, groups]."""
        return self._spanning_rows(self.qzeros, start, stop, self.packing.stored_less)

    def _scales(self, start: int, stop: int) -> NDArray[np.float32]:
        """[stop - start, groups]."""
        return self.scales.columns(start, stop).astype(np.float32).T

    def _spanning_rows(self, tensor: LazyTensor, start: int, stop: int, add: int = 0) -> NDArray[np.uint8]:
        """Codes [stop - start, n] of words [n, rows / codes of a word], `add` added to each.

        It is added to whole words, carries and all: GPTQModel takes it off so, and where a zero was 0 that is the
        only way back. (AutoGPTQ's own writer loses the zeros behind such a one in its word; there is no way back.)
        """
        per_word = self.packing.per_word
        first = start // per_word
        words = tensor.columns(first, -(-stop // per_word))
        ones = np.uint32(add * sum(1 << at for at in range(0, WORD, self.packing.bits)))
        codes = self.packing.unpacked((words.view(np.uint32) + ones).view(np.int32))
        return codes.reshape(len(words), words.shape[1] * per_word)[:, start - first * per_word :][:, : stop - start].T


def packed_tensor(stem: str, parts: dict[str, LazyTensor], packing: Packing, group_size: int | None) -> PackedTensor:
    """The matrix STEM.weight of the tensors STEM.qweight, ...; `group_size` None: one group for all columns.

    CheckpointError says everything that does not fit: parts that are missing, their types and their shapes.
    """
    problems: list[str] = []
    missing = [name for name in ("qweight", "qzeros", "scales") if name not in parts]
    refuse(repr(stem), [f"{', '.join(missing)} missing, which {packing.name} needs"] if missing else [])
    for name, part in parts.items():
        with gathering(problems):
            _check_type(name, part)
    refuse(repr(stem), problems)
    qweight, scales = parts["qweight"], parts["scales"]
    spans = (packing.per_word, 1) if packing.along == "columns" else (1, packing.per_word)
    columns, rows = (size * span for size, span in zip(qweight.shape, spans, strict=True))
    refuse(repr(stem), [] if columns and rows else [f"qweight is {list(qweight.shape)}, which holds nothing"])
    group_size = group_size or columns
    refuse(repr(stem), list(_misshapen(parts, rows, columns, group_size, packing)))
    return PackedTensor(
        key=f"{stem}.weight",
        dtype=packing.name,
        shape=(rows, columns),
        file=qweight.file,
        offset=qweight.offset,
        nbytes=sum(part.nbytes for part in parts.values()),
        packing=packing,
        group_size=group_size,
        qweight=qweight,
        qzeros=parts["qzeros"],
        scales=scales,
        g_idx=parts.get("g_idx"),
    )


def _check_type(name: str, part: LazyTensor) -> None:
    expected, dims = (SCALES, 2) if name == "scales" else (("I32",), 1 if name == "g_idx" else 2)
    if part.dtype not in expected or len(part.shape) != dims:
        found = f"{part.dtype}{list(part.shape)}"
        raise CheckpointError(f"{name} is {found}, expected {' or '.join(expected)} of {dims} dimensions")


def _misshapen(parts: dict[str, LazyTensor], rows: int, columns: int, group_size: int, packing: Packing):
    groups = -(-columns // group_size)
    expected = {"qzeros": (groups, rows // packing.per_word), "scales": (groups, rows), "g_idx": (columns,)}
    if rows % packing.per_word:
        yield f"its {rows} rows are not a multiple of the {packing.per_word} zeros in a word"
    for name, shape in expected.items():
        if name in parts and parts[name].shape != shape:
            stated = f"{packing.bits} bits in groups of {group_size}"
            yield f"{name} is {list(parts[name].shape)}, but qweight and {stated} make it {list(shape)}"


def _order(group_of: NDArray[np.int32]) -> NDArray[np.intp] | None:
    """The columns by their groups, as they come within each; None if they lie so already."""
    return None if (group_of[1:] >= group_of[:-1]).all() else np.argsort(group_of, kind="stable")
