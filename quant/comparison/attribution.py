"""Which graph loses what: the reference with one graph of the candidate at a time, along the reference's answers."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from quant.comparison.defects import log_mel_distance
from quant.comparison.record import Recorded
from quant.comparison.stretch import Stretch, by_name, stretches_of
from quant.observe import Observed
from quant.turn import Turn


@dataclass(frozen=True)
class Swap:
    """The reference with one graph of the candidate in its place; None where nothing of that kind was measured."""

    graph: str
    text_kl: float | None
    codes_kl: float | None
    log_mel: float | None

    @property
    def weight(self) -> tuple[float, float]:
        """By what swaps are ordered: distributions first, sound among those that leave them alone."""
        return max(self.text_kl or 0.0, self.codes_kl or 0.0), self.log_mel or 0.0


@dataclass(frozen=True, eq=False)
class Trial:
    """One turn with one graph swapped; the distance of the sounds is NaN where nothing is heard."""

    stretches: dict[str, Stretch]
    log_mel: float


Swaps = dict[str, Trial]  # by graph


@dataclass(frozen=True)
class Swapped:
    """The reference with one graph of the candidate in its place, for each that differs."""

    engines: dict[str, Observed]

    def swaps(self, turn: Turn, recorded: Recorded, used: AbstractSet[str]) -> Swaps:
        """Swap every graph that has a part in the turn: those in `used`."""
        return {name: trial(engine, turn, recorded) for name, engine in self.engines.items() if name in used}


def trial(engine: Observed, turn: Turn, recorded: Recorded) -> Trial:
    steps, wave, speech = recorded.answer.steps, recorded.answer.wave, engine.manifest.speech
    followed = engine.follow(engine.prompt(turn), steps)
    stretches = by_name(stretches_of(recorded, followed))
    if speech is None or not len(wave):
        return Trial(stretches, float("nan"))
    return Trial(stretches, log_mel_distance(wave, engine.sound(steps), speech.sampling_rate))


def swaps_of(reference: Observed | None, candidate: Observed) -> dict[str, Observed]:
    """The reference with each graph of the candidate that differs and has the same ports, by the graph's name."""
    if reference is None:
        return {}
    ours, theirs = ({file.path: file.sha256 for file in engine.whole.files} for engine in (reference, candidate))
    found = {}
    for name, graph in candidate.manifest.graphs.items():
        other = reference.manifest.graphs.get(name)
        if other is None or (graph.inputs, graph.outputs) != (other.inputs, other.outputs):
            continue
        if {theirs[path] for path in (graph.file, *graph.weights)} != {ours[p] for p in (other.file, *other.weights)}:
            found[name] = reference.with_graphs(candidate, [name])
    return found


def summed(turns: Sequence[Swaps]) -> tuple[Swap, ...]:
    """One for each graph that had a part in a turn, the costliest first."""
    names = dict.fromkeys(name for swaps in turns for name in swaps)
    found = [_swap(name, [swaps[name] for swaps in turns if name in swaps]) for name in names]
    return tuple(sorted(found, key=lambda swap: swap.weight, reverse=True))


def _swap(name: str, trials: Sequence[Trial]) -> Swap:
    """Means over all choices of all turns."""
    text = [s.kl for trial in trials for stream, s in trial.stretches.items() if stream == "text"]
    codes = [s.kl for trial in trials for stream, s in trial.stretches.items() if stream != "text"]
    heard = [trial.log_mel for trial in trials if not np.isnan(trial.log_mel)]
    return Swap(name, _mean(text), _mean(codes), float(np.mean(heard)) if heard else None)


def _mean(parts: Sequence[np.ndarray]) -> float | None:
    """Mean of all values; infinite if one is NaN, so that a graph which breaks arithmetic comes first."""
    every = np.concatenate([np.empty(0), *parts])
    if not len(every):
        return None
    return float(every.mean()) if np.isfinite(every).all() else float("inf")
