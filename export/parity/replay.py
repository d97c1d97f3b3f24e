"""Replays a golden set through a bundle: every recorded array that a bundle can produce, compared; the others named."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.parity import audio_head, audio_in, llm, loop, speech_out, vision, vocoder
from export.parity.golden import Golden, Replayed
from export.parity.graphs import Graphs
from runtime.bundle import Manifest, read_bundle
from runtime.errors import EdgeOmniError

Replay = Callable[[Golden, Graphs, Manifest], Iterator[Replayed]]
STAGES = (audio_in, vision, llm, audio_head, speech_out, vocoder, loop)
REPLAYS: tuple[Replay, ...] = tuple(stage.replay for stage in STAGES)
UNCOVERED: Mapping[str, str] = {name: why for stage in STAGES for name, why in stage.UNCOVERED.items()}


@dataclass(frozen=True)
class Verdict:
    """One recorded array against ours. Errors are in the array's unit and relative to its largest value."""

    name: str
    worst: float
    relative: float
    tolerance: float
    passed: bool
    problem: str = ""


@dataclass(frozen=True)
class Parity:
    verdicts: tuple[Verdict, ...]
    uncovered: Mapping[str, str]  # array -> reason
    unexplained: tuple[str, ...]  # recorded arrays that were neither replayed nor excused

    @property
    def passed(self) -> bool:
        return bool(self.verdicts) and not self.unexplained and all(verdict.passed for verdict in self.verdicts)

    def stages(self) -> dict[str, list[Verdict]]:
        """Verdicts by group."""
        grouped: dict[str, list[Verdict]] = {}
        for verdict in self.verdicts:
            grouped.setdefault(verdict.name.split("/")[0], []).append(verdict)
        return grouped


def parity(bundle: Path, golden: Golden) -> Parity:
    """Replay every stage of `golden` through the graphs of `bundle` and the runtime's own preprocessing."""
    manifest = read_bundle(bundle)
    if manifest.speech is None:
        raise EdgeOmniError(
            f"{bundle} is of the family {manifest.family}, which neither listens nor speaks; a golden set records an "
            "omni model: give the bundle of the checkpoint that it was recorded from"
        )
    graphs = Graphs(bundle, manifest.graphs)
    recorded = {f"{group}/{name}": array for group in groups(golden) for name, array in golden.arrays(group).items()}
    verdicts: dict[str, Verdict] = {}
    for replayed in (replayed for replay in REPLAYS for replayed in replay(golden, graphs, manifest)):
        verdict = judge(replayed, recorded[replayed.name])
        verdicts[verdict.name] = worse(verdict, verdicts.get(verdict.name, verdict))
    left = [name for name in golden.names if name not in verdicts]
    uncovered = {name: why for name in left if (why := excuse(name))}
    return Parity(tuple(verdicts.values()), uncovered, tuple(name for name in left if name not in uncovered))


def groups(golden: Golden) -> list[str]:
    return sorted({name.split("/")[0] for name in golden.names})


def excuse(name: str) -> str:
    """Why an array is not replayed, "" if nothing says so."""
    return next((why for pattern, why in UNCOVERED.items() if fnmatch.fnmatchcase(name, pattern)), "")


def worse(a: Verdict, b: Verdict) -> Verdict:
    """Of two replays of one array, from a file and from a recorded input for instance, the one that says more."""
    return max(a, b, key=lambda verdict: (not verdict.passed, verdict.relative / max(verdict.tolerance, 1e-12)))


def judge(replayed: Replayed, recorded: np.ndarray) -> Verdict:
    """Integers must be equal; floats may differ by `tolerance` of the recorded array's largest value.

    Recorded PCM samples that come from a recomputed wave are replayed as floats, and judged as such.
    """
    name, ours, tolerance = replayed.name, replayed.ours, replayed.tolerance
    if ours.shape != recorded.shape:
        found = f"shape {list(ours.shape)}, recorded {list(recorded.shape)}"
        return Verdict(name, float("inf"), float("inf"), tolerance, False, found)
    if not np.issubdtype(ours.dtype, np.floating):
        wrong = int(np.count_nonzero(ours != recorded))
        return Verdict(
            name, float(wrong), wrong / max(1, ours.size), 0.0, not wrong, f"{wrong} differ" if wrong else ""
        )
    worst = float(np.abs(ours.astype(np.float64) - recorded.astype(np.float64)).max(initial=0.0))
    largest = float(np.abs(recorded).max(initial=0.0))
    relative = worst / largest if largest else worst
    passed = bool(relative <= tolerance)  # False for NaN
    return Verdict(name, worst, relative, tolerance, passed, "" if passed else f"{relative:.1e} of the largest value")
