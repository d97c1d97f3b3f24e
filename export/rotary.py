"""Rotary frequencies: how fast each pair of a head's values turns, and how checkpoints stretch that for longer texts.

The base is that of RoFormer (Su et al. 2021): pair i of a head of width d turns by theta^(-2i / d) a position. Scaling:
"linear" slows every pair by a factor (Chen et al. 2023); "llama3" slows those that turn less than once in the context
of the first training, by degrees (Llama 3.1's reference code); "yarn" does so by how often a pair turns and lengthens
queries and keys (Peng et al. 2023); "dynamic" begins where the context ends, so that it changes nothing here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from export.config import READ, Count, parse
from runtime.errors import CheckpointError

Factor = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False, strict=True)]
Scale = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False, strict=True)]
KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True, config=READ)
class RotaryScaling:
    """What a checkpoint says of scaling, spelled as config.json spells it."""

    rope_type: str = "default"
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Count | None = None  # where nothing is said: max_position_embeddings
    attention_factor: Factor | None = None
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    mscale: Scale | None = None
    mscale_all_dim: Scale | None = None
    truncate: Annotated[bool, Field(strict=True)] = True


@plain_dataclass(frozen=True)
class Rotation:
    """`frequencies` radians a position, one for each pair; `length`: what cosines and sines are multiplied by."""

    frequencies: NDArray[np.float32]  # [head_dim / 2]
    length: float = 1.0


def read_scaling(stated: Mapping[str, Any], positions: int, where: str) -> RotaryScaling:
    """`stated` as a RotaryScaling of a model of `positions`; CheckpointError for what is missing or not built."""
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in KINDS:
        expected = ", ".join(map(repr, KINDS))
        raise CheckpointError(f"{where}: rotary scaling of the type {kind!r} is not built, expected {expected}")
    known = {"original_max_position_embeddings": positions} | {k: v for k, v in stated.items() if v is not None}
    scaling = parse(RotaryScaling, known | {"rope_type": kind}, where)
    missing = [name for name in REQUIRED.get(kind, ()) if getattr(scaling, name) is None]
    if missing:
        raise CheckpointError(f"{where}: rotary scaling of the type {kind!r} needs {', '.join(missing)}")
    if kind == "llama3" and scaling.low_freq_factor == scaling.high_freq_factor:
        raise CheckpointError(f"{where}: low_freq_factor and high_freq_factor are both {scaling.low_freq_factor}")
    return scaling


def base_frequencies(theta: float, head_dim: int) -> NDArray[np.float32]:
    """theta^(-2i / head_dim) for each pair i, [head_dim / 2]; in fp32, as the official tables are."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.float32(theta) ** exponent


def scaled(frequencies: NDArray[np.float32], scaling: RotaryScaling, theta: float) -> Rotation:
    """The rotation that `scaling` makes of the base's frequencies [pairs]."""
    match scaling.rope_type:
        case "linear":
            return Rotation(frequencies / np.float32(_given(scaling.factor)))
        case "llama3":
            return Rotation(_llama3(frequencies, scaling))
        case "yarn":
            return Rotation(_yarn(frequencies, scaling, theta), _yarn_length(scaling))
    return Rotation(frequencies)


def _llama3(frequencies: NDArray[np.float32], scaling: RotaryScaling) -> NDArray[np.float32]:
    """Pairs that turn often in the first context stay, seldom ones are slowed by `factor`, between them both count."""
    context = np.float32(_given(scaling.original_max_position_embeddings))
    low, high = (np.float32(_given(value)) for value in (scaling.low_freq_factor, scaling.high_freq_factor))
    turns = context / (np.float32(2 * math.pi) / frequencies)
    slowed = frequencies / np.float32(_given(scaling.factor))
    kept = (turns - low) / (high - low)
    between = (1 - kept) * slowed + kept * frequencies
    return np.where(turns < low, slowed, np.where(turns > high, frequencies, between)).astype(np.float32)


def _yarn(frequencies: NDArray[np.float32], scaling: RotaryScaling, theta: float) -> NDArray[np.float32]:
    """As `_llama3`, with a ramp over the pairs' numbers between those that turn beta_fast and beta_slow times."""
    pairs, context = len(frequencies), _given(scaling.original_max_position_embeddings)
    fast, slow = (
        2 * pairs * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast or 32.0, scaling.beta_slow or 1.0)
    )
    if scaling.truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    first, last = max(fast, 0), min(slow, 2 * pairs - 1)
    width = last - first if last != first else 0.001
    ramp = np.clip((np.arange(pairs, dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
    slowed = frequencies / np.float32(_given(scaling.factor))
    return (slowed * ramp + frequencies * (1 - ramp)).astype(np.float32)


def _yarn_length(scaling: RotaryScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _lengthened(scaling, scaling.mscale) / _lengthened(scaling, scaling.mscale_all_dim)
    return _lengthened(scaling, 1.0)


def _lengthened(scaling: RotaryScaling, mscale: float) -> float:
    factor = _given(scaling.factor)
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _given(value: float | None) -> float:
    assert value is not None  # read_scaling has seen to it
    return value
