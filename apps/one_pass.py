"""Checkpoint to quantized bundle in one pass: the place where the exporter and the quantizer are put together."""

from dataclasses import replace
from pathlib import Path

from export import convert
from quant import plan as quantization
from quant.scheme import Recipe
from runtime.bundle import Profile


def plan(checkpoint: Path, profile: Profile, recipe: Recipe, random: bool) -> tuple[convert.Plan, quantization.Plan]:
    """The export as it would be told, with the sizes that `recipe` leaves, and the quantization that does it.

    No float weight is written, nor more than a few rows of one read at a time. Errors are those of the two plans.
    """
    planned = convert.plan(checkpoint, profile)
    smaller = quantization.plan(convert.stream(planned, random), recipe)
    sizes = {graph.name: sum(item.bytes_after(profile) for item in graph.decided) for graph in smaller.graphs}
    rows = tuple(replace(row, bytes_after=sizes[row.name]) for row in planned.graphs)
    return replace(planned, graphs=rows, bytes_after=smaller.bytes_after()), smaller
