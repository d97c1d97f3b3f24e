"""Checkpoint to quantized bundle in one pass: the place where the exporter and the quantizer are put together."""

import math
from dataclasses import replace
from pathlib import Path

from export import convert
from export.families.family import Blueprint
from quant import plan as quantization
from quant.scheme import AS_STORED, Recipe
from runtime.bundle import Profile


def plan(
    checkpoint: Path, profile: Profile, recipe: Recipe | None, random: bool, floats: bool = False
) -> tuple[convert.Plan, quantization.Plan | None]:
    """The export as it would be told, with the sizes that `recipe` leaves, and the quantization that does it.

    Without a recipe a checkpoint that stores most of its weights as integers keeps those, unless `floats` are wanted;
    of any other a float bundle is made, and there is no quantization. With one no float weight is written, nor more
    than a few rows of one read at a time. Errors are those of the two plans.
    """
    planned = convert.plan(checkpoint, profile)
    if recipe is None and not floats and mostly_integers(planned.blueprint):
        recipe = AS_STORED
    if recipe is None:
        return planned, None
    smaller = quantization.plan(convert.stream(planned, random), recipe)
    sizes = {graph.name: sum(item.bytes_after(profile) for item in graph.decided) for graph in smaller.graphs}
    rows = tuple(replace(row, bytes_after=sizes[row.name]) for row in planned.graphs)
    return replace(planned, graphs=rows, bytes_after=smaller.bytes_after()), smaller


def mostly_integers(blueprint: Blueprint) -> bool:
    """Whether at least half of a checkpoint's values are stored as integers that operators know."""
    sizes = {key: math.prod(tensor.shape) for key, tensor in blueprint.tensors.items()}
    stored = sum(sizes[key] for key, tensor in blueprint.tensors.items() if tensor.form() is not None)
    return 2 * stored >= sum(sizes.values())
