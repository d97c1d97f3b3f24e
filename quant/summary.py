"""What a recipe did, in as many lines as a person reads: weights alike in name and storage together."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from quant.scheme import STORED
from runtime.bundle import FloatWeight, Manifest, Quantization, QuantizedWeight

# Types of tensors that no quantization has been through.
PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class Line:
    """`count` weights whose names differ in numbers only, all stored in one way."""

    graph: str
    names: str  # numbers of layers and codebooks are *
    count: int
    parameters: int
    stored: str
    bits_per_weight: float  # their mean, scales and zeros counted

    @property
    def nbytes(self) -> int:
        return round(self.parameters * self.bits_per_weight / 8)


def summary(quantization: Quantization) -> tuple[Line, ...]:
    """One line for each kind of weight, first those that were quantized, in the order of the bundle."""
    kinds: dict[tuple[str, str, str], list[QuantizedWeight | FloatWeight]] = {}
    for weight in (*quantization.quantized, *quantization.kept):
        names = re.sub(r"(?<=\.)\d+(?=\.)", "*", weight.name)
        kinds.setdefault((weight.graph, names, _stored(weight)), []).append(weight)
    return tuple(_line(*kind, weights) for kind, weights in kinds.items())


def _line(graph: str, names: str, stored: str, weights: list[QuantizedWeight | FloatWeight]) -> Line:
    parameters = sum(weight.parameters for weight in weights)
    bits = sum(weight.parameters * weight.bits_per_weight for weight in weights)
    return Line(graph, names, len(weights), parameters, stored, bits / parameters)


def _stored(weight: QuantizedWeight | FloatWeight) -> str:
    if isinstance(weight, FloatWeight):
        return f"float: {weight.reason}"
    zeros = "" if weight.symmetric else " with zeros"
    exact = "" if weight.activations == "int8" else ", float activations"
    return f"int{weight.bits} by {weight.group_size}{zeros}, {weight.method}{exact}"


def second_hand(manifest: Manifest) -> Iterator[str]:
    """What became of weights that their checkpoint had quantized, one sentence for each of its types."""
    kinds: dict[tuple[str, bool], list[QuantizedWeight]] = {}
    weights = manifest.quantization.quantized if manifest.quantization else ()
    types = [dtype for dtype in manifest.source.stored_dtypes if dtype not in PLAIN]
    if types and weights and not any(weight.stored_as for weight in weights):
        yield f"weights were {', '.join(types)} before, and rounding them again lost some; export --recipe measures it"
    for weight in weights:
        if weight.stored_as is not None:
            kinds.setdefault((weight.stored_as, weight.method == STORED), []).append(weight)
    for (stored_as, taken_over), weights in kinds.items():
        count = f"{len(weights)} weight{'' if len(weights) == 1 else 's'} of {stored_as}"
        if taken_over:
            yield f"{count} taken over bit by bit, without loss"
        else:
            yield f"{count} rounded again, which loses: {_lost(weights)}"


def _lost(weights: list[QuantizedWeight]) -> str:
    known = sorted((weight.sqnr_db, weight.name) for weight in weights if weight.sqnr_db is not None)
    if not known:
        return "nothing, as it happens"
    (worst, name), middle = known[0], known[len(known) // 2][0]
    return f"signal to noise {middle:.1f} dB in the median, {worst:.1f} dB at worst ({name})"
