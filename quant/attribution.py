"""Which graph loses what: the reference with one graph of the candidate at a time, along the reference's answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quant.defects import log_mel_distance
from quant.observe import Observed
from quant.record import Recorded, Reference
from quant.stretch import Stretch, by_name, stretches_of


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


class Attribution:
    """Collects what each swap costs, turn by turn."""

    def __init__(self, reference: Reference, candidate: Observed, turns: int):
        self.reference, self.turns = reference, turns
        self.swapped = swaps_of(reference.engine, candidate) if turns else {}
        self._stretches: dict[str, list[dict[str, Stretch]]] = {name: [] for name in self.swapped}
        self._distances: dict[str, list[float]] = {name: [] for name in self.swapped}

    def add(self, index: int, recorded: Recorded) -> None:
        """Swap every graph that has a part in turn number `index`, if it is one of the first `turns`."""
        original = self.reference.engine
        if original is None or index >= self.turns:
            return
        turn, steps = self.reference.turns[index], recorded.answer.steps
        for name in self.swapped.keys() & original.opened().keys():
            engine = self.swapped[name]
            followed = engine.follow(engine.prompt(turn), steps)
            self._stretches[name].append(by_name(stretches_of(recorded, followed)))
            speech = engine.manifest.speech
            if speech is not None and len(recorded.answer.wave):
                sound = engine.sound(steps)
                self._distances[name].append(log_mel_distance(recorded.answer.wave, sound, speech.sampling_rate))

    def swaps(self) -> tuple[Swap, ...]:
        """One for each graph that had a part in a turn, the costliest first."""
        found = [summed(name, turns, self._distances[name]) for name, turns in self._stretches.items() if turns]
        return tuple(sorted(found, key=lambda swap: swap.weight, reverse=True))


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


def summed(name: str, turns: Sequence[dict[str, Stretch]], distances: Sequence[float]) -> Swap:
    """Means over all choices of all turns."""
    text = [s.kl for turn in turns for stream, s in turn.items() if stream == "text"]
    codes = [s.kl for turn in turns for stream, s in turn.items() if stream != "text"]
    return Swap(name, _mean(text), _mean(codes), float(np.mean(distances)) if distances else None)


def _mean(parts: Sequence[np.ndarray]) -> float | None:
    """Mean of all values; infinite if one is NaN, so that a graph which breaks arithmetic comes first."""
    every = np.concatenate([np.empty(0), *parts])
    if not len(every):
        return None
    return float(every.mean()) if np.isfinite(every).all() else float("inf")
