"""What answers cost each side in time and memory: how soon, how fast, and how much of the machine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.answer import Answer
from quant.comparison.figures import Figure, TurnResult, known, over_turns
from quant.comparison.memory import Memory
from quant.comparison.record import Machine
from runtime.events import Timings

Measure = Callable[[Timings], float | None]

MEASURES: dict[str, Measure] = {
    "first_token": lambda t: t.first_token,
    "first_audio": lambda t: t.first_audio,
    "real_time_factor": lambda t: t.real_time_factor,
    "tokens_per_second": lambda t: t.tokens_per_second,
}
RATES = {"tokens_per_second"}  # of which more is better: their bad end is the 5th percentile


@dataclass(frozen=True)
class Percentiles:
    """The middle of n turns, and the value that 95 of 100 of them do not exceed (of a rate: fall short of)."""

    p50: float
    p95: float
    n: int


@dataclass(frozen=True)
class Cost:
    """One side's answers. Times count from before media are encoded; `machine` is where they were taken.

    They are those of an engine that is watched, which is a little slower than one in use.
    """

    machine: Machine | None
    memory: Memory | None  # None where it was not measured
    first_token: Percentiles | None  # seconds
    first_audio: Percentiles | None  # seconds; speech is decoded when a piece of it is complete
    real_time_factor: Percentiles | None  # seconds a second of speech, after the prefill
    tokens_per_second: Percentiles | None  # text tokens, the prefill left out


def cost(answers: Sequence[Answer], machine: Machine | None, memory: Memory | None) -> Cost:
    """Over answers that did not fail."""
    found = {name: percentiles(times(answers, name), name in RATES) for name in MEASURES}
    return Cost(machine, memory, **found)


def times(answers: Sequence[Answer], name: str) -> list[float]:
    """What one measure says of each answer that has it."""
    found = (MEASURES[name](answer.timings) for answer in answers if not answer.failure)
    return [value for value in found if value is not None]


def percentiles(values: Sequence[float], rate: bool) -> Percentiles | None:
    if not values:
        return None
    p50, bad = np.percentile(values, [50, 5 if rate else 95])
    return Percentiles(float(p50), float(bad), len(values))


def cost_figures(results: Sequence[TurnResult], memory: Memory | None, seed: int) -> Iterator[Figure]:
    """Of the candidate, here; its bytes and bits are figures of their own."""
    for name in MEASURES:
        values = times([result.candidate for result in results], name)
        found = percentiles(values, name in RATES)
        if found is not None:
            yield over_turns(f"cost.{name}_p50", _median, (values,), found.n, seed)
            yield known(f"cost.{name}_p95", found.p95, found.n)
    if memory is not None:
        yield known("cost.peak_memory", memory.peak, 1)
        yield known("cost.private_memory", memory.private, 1)


def _median(values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return np.median(values, axis=axis)
