"""Limits that a candidate must keep: a TOML file of floors and ceilings of the figures that a comparison gives.

[max]
"text.kl" = 0.03
"cost.bits_per_weight" = 5
[min]
"text.top1" = 0.94
"""

import fnmatch
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quant.comparison.figures import KNOWN, Figure
from runtime.errors import EdgeOmniError

SIDES: tuple[Literal["max", "min"], ...] = ("max", "min")


@dataclass(frozen=True)
class Gate:
    """A figure's ceiling or floor."""

    figure: str
    side: Literal["max", "min"]
    limit: float


@dataclass(frozen=True)
class Judged:
    """A gate and the figure that it was held against; None where the comparison did not measure it."""

    gate: Gate
    found: float | None

    @property
    def passed(self) -> bool:
        """What was not measured, or is not a number, has not passed."""
        if self.found is None or math.isnan(self.found):
            return False
        return self.found <= self.gate.limit if self.gate.side == "max" else self.found >= self.gate.limit


def read_gates(path: Path) -> tuple[Gate, ...]:
    """The gates of a TOML file; EdgeOmniError says everything that is wrong with it."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise EdgeOmniError(f"the gates {path} cannot be read: {error}") from None
    problems = [f"[{key}]: unknown; expected [max] or [min]" for key in document if key not in SIDES]
    gates = []
    for side in SIDES:
        for figure, limit in _flat(document.get(side, {}), side, problems):
            if problem := _problem(figure, limit):
                problems.append(f"[{side}] {figure}: {problem}")
            else:
                gates.append(Gate(figure, side, float(limit)))
    if not gates and not problems:
        problems.append('no gate in it; expected lines like "text.kl" = 0.03 under [max]')
    if problems:
        raise EdgeOmniError(f"the gates {path} cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
    return tuple(gates)


def _flat(table: object, name: str, problems: list[str]) -> Iterable[tuple[str, Any]]:
    """Entries of a table and of those in it: text.kl may be written with or without quotes."""
    if not isinstance(table, Mapping):
        problems.append(f"{name}: expected a table, found {table!r}")
        return
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", found) for inner, found in value.items())
        else:
            yield key, value


def _problem(figure: str, limit: object) -> str | None:
    if not any(fnmatch.fnmatchcase(figure, pattern) for pattern in KNOWN):
        return f"no such figure; there are {', '.join(KNOWN)}"
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
        return f"expected a number, found {limit!r}"
    return None


def judge(gates: Iterable[Gate], figures: Iterable[Figure]) -> tuple[Judged, ...]:
    """Hold every gate against its figure."""
    found = {figure.name: figure.value for figure in figures}
    return tuple(Judged(gate, found.get(gate.figure)) for gate in gates)
