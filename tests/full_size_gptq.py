"""What GPTQ takes for matrices of full width, in a process of its own: `python -m tests.full_size_gptq` prints JSON.

Rows are solved by themselves and positions are added up one by one, so some of both are timed and the rest is
multiplied; Hessians are made, inverted and factorised whole. Running the calibration turns through the graphs is not
in it.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.audio_head import audio_head
from export.checkpoint import open_checkpoint
from export.decoder import decoder
from export.families import baichuan_omni_1_5
from export.graph import Subgraph, static_shape
from quant.gptq import Gram, gptq
from quant.scheme import Recipe, Scheme, read_recipe
from tests.full_size_checkpoint import FULL, ONE_LAYER, merged, write_configs, write_safetensors

ROWS = 256  # of a matrix that are solved
POSITIONS = 256  # that are added up
CALIBRATION = 8192  # positions that the whole is told for


@dataclass(frozen=True)
class Matrices:
    """`count` matrices of one shape in a graph. Seconds of processor time: a row, a position and the Hessians' own."""

    graph: str
    shape: tuple[int, int]
    count: int
    per_row: float
    per_position: float
    factorising: float

    @property
    def seconds(self) -> float:
        """Of all of them, each with Hessians of its own, behind CALIBRATION positions."""
        return self.count * (self.shape[0] * self.per_row + CALIBRATION * self.per_position + self.factorising)


def measure(changes: dict[str, Any], rows: int = ROWS, positions: int = POSITIONS) -> list[Matrices]:
    """One decoder layer and the audio head of golden set A's config with `changes`."""
    with tempfile.TemporaryDirectory(prefix="edgeomni-gptq-") as name:
        folder = Path(name)
        write_configs(folder, changes)
        write_safetensors(folder / "model.safetensors", [], 0)
        config = baichuan_omni_1_5.read_config(open_checkpoint(folder))
    recipe, found = read_recipe("int4"), []
    for graph in (decoder(config.decoder, "cpu"), audio_head(config, "cpu")):
        for (shape, scheme), count in solved(graph, recipe).items():
            found.append(Matrices(graph.name, shape, count, *timed(shape, scheme, rows, positions)))
    return found


def solved(graph: Subgraph, recipe: Recipe) -> Counter[tuple[tuple[int, int], Scheme]]:
    """Shapes and schemes of the matrices that the recipe solves by GPTQ. One layer alone is no outer layer."""
    every: Counter[tuple[tuple[int, int], Scheme]] = Counter()
    for value in graph.parameters():
        shape, rule = static_shape(value), recipe.rule_for(str(value.name))
        scheme = rule.scheme_for(shape[-1]) if rule and len(shape) == 2 else None
        if scheme is not None and scheme.method == "gptq":
            every[(shape[0], shape[1]), scheme] += 1
    return every


def timed(shape: tuple[int, int], scheme: Scheme, rows: int, positions: int) -> tuple[float, float, float]:
    """Seconds for a row, for a position, and for what is done once."""
    rng, gram = np.random.default_rng(0), Gram(shape[1], scheme.group_size)
    x = rng.standard_normal((positions, shape[1]), np.float32)
    adding, _ = clocked(lambda: gram.add(x))
    factorising, curvatures = clocked(gram.curvatures)
    some = min(rows, shape[0])
    weight = rng.standard_normal((some, shape[1]), np.float32) * np.float32(shape[1] ** -0.5)
    solving, _ = clocked(lambda: gptq(weight, curvatures, scheme))
    return solving / some, adding / positions, factorising


def clocked(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


if __name__ == "__main__":
    json.dump([asdict(row) for row in measure(merged(FULL, ONE_LAYER))], sys.stdout, indent=1)
