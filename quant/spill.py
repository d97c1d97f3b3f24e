"""Values of a calibration on disk: one file a value, the samples one behind the other, known again after a kill."""

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.journal import Journal

SWEEP = 5.0  # seconds between two times at which useless values leave the disk, since each waits for it
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Spilled:
    """One value of every sample; they have one dtype and shapes of their own."""

    path: Path
    dtype: str
    shapes: Shapes

    @property
    def count(self) -> int:
        return len(self.shapes)

    def sample(self, number: int) -> np.ndarray:
        """The value of one sample: pages of the file, read when they are looked at."""
        shape, dtype = self.shapes[number], np.dtype(self.dtype)
        if not math.prod(shape):
            return np.empty(shape, dtype)
        offset = sum(map(math.prod, self.shapes[:number])) * dtype.itemsize
        return np.asarray(np.memmap(self.path, dtype, "r", offset, shape))


class Values:
    """What was stored in `work`, as the journal tells it."""

    def __init__(self, work: Path, journal: Journal):
        self.work, self.journal = work, journal
        self._useless: list[Path] = []
        self._swept = time.monotonic()

    def recall(self, label: str) -> dict[str, Spilled] | None:
        """What was stored under a label, in this run or in one that was killed; None if it was not."""
        found = self.journal.recall(label)
        return None if found is None else {name: self._spilled(*row) for name, row in found.items()}

    def store(self, label: str, names: tuple[str, ...], runs: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Spilled]:
        """Write the values `names` of each run, then say so in the journal. They outlast a kill, but no power cut."""
        files = [f"{label}.{place}" for place in range(len(names))]
        shapes: list[list[tuple[int, ...]]] = [[] for _ in names]
        dtypes = ["float32"] * len(names)
        with ExitStack() as stack:
            opened = [stack.enter_context((self.work / file).open("wb")) for file in files]
            for run in runs:
                for place, name in enumerate(names):
                    array = np.ascontiguousarray(run[name])
                    opened[place].write(array.data)
                    shapes[place].append(array.shape)
                    dtypes[place] = array.dtype.name
        rows = {name: [files[place], dtypes[place], shapes[place]] for place, name in enumerate(names)}
        self.journal.record(label, rows)
        return {name: self._spilled(*row) for name, row in rows.items()}

    def discard(self, value: Spilled) -> None:
        """Say that no step to come needs a value. Its file goes when the journal tells of the steps that did."""
        self._useless.append(value.path)
        if time.monotonic() - self._swept >= SWEEP:
            self.journal.sync()
            for path in self._useless:
                path.unlink(missing_ok=True)  # a run that was killed may have done so
            self._useless.clear()
            self._swept = time.monotonic()

    def _spilled(self, file: str, dtype: str, shapes: Iterable[Iterable[int]]) -> Spilled:
        return Spilled(self.work / file, dtype, tuple(tuple(shape) for shape in shapes))
