"""What commands print of plans, bundles, checks and comparisons: a table for people, a record for machines."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from quant.summary import second_hand, summary
from runtime.bundle import MANIFEST, Graph, Manifest, Port, Quantization

if TYPE_CHECKING:
    from export.convert import Plan
    from export.parity.replay import Parity, Verdict
    from runtime.verify import Check

CACHE_POSITIONS = 4096  # of the conversation that memory is estimated for

# Names come from files: without markup, a bracket in one is a bracket.
OUT = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
ERR = Console(stderr=True, markup=False, highlight=False)


def line(text: str, style: str | None = None) -> None:
    """One line, however wide the terminal is: what is copied from it or searched in it stays whole."""
    OUT.print(text, style=style, soft_wrap=True)


def note(text: str) -> None:
    """One line beside the result, which it is no part of."""
    ERR.print(text, soft_wrap=True)


def size(nbytes: int) -> str:
    """Bytes as a person reads them: 1000 of each unit make one of the next."""
    value, unit = float(nbytes), 0
    while value >= 1000 and unit < 3:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.2f} {('kB', 'MB', 'GB')[unit - 1]}"


def table(*columns: str, title: str | None = None) -> Table:
    """A table whose columns are aligned to the right where their heading ends in '>'."""
    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return made


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """A progress bar of bytes on stderr; yields what is to be called with each graph that is done and its bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, disable=quiet or not ERR.is_terminal, transient=True) as bar:
        task = bar.add_task("writing", total=total)
        yield lambda name, nbytes: bar.update(task, advance=nbytes, description=f"{name} is written")


def waiting(message: str, quiet: bool):
    """A spinner on stderr while something runs."""
    return nullcontext() if quiet else ERR.status(message)


def plan_record(plan: "Plan") -> dict[str, Any]:
    positions = min(CACHE_POSITIONS, plan.blueprint.cache.max_positions)
    return {
        "checkpoint": str(plan.checkpoint.folder),
        "family": plan.blueprint.family,
        "profile": plan.profile,
        "graphs": [
            {
                "name": row.name,
                "tensors": row.tensors,
                "parameters": row.parameters,
                "bytes_now": row.bytes_now,
                "bytes_after": row.bytes_after,
            }
            for row in plan.graphs
        ],
        "bytes_after": plan.bytes_after,
        "cache_positions": positions,
        "memory_estimate": plan.memory_estimate(positions),
    }


def show_plan(plan: "Plan") -> None:
    record = plan_record(plan)
    shown = table("graph", "tensors>", "parameters>", "now>", "after>")
    for row in plan.graphs:
        shown.add_row(row.name, str(row.tensors), f"{row.parameters:,}", size(row.bytes_now), size(row.bytes_after))
    line(f"{record['checkpoint']}: {record['family']} for {record['profile']}")
    OUT.print(shown)
    line(f"The bundle will hold {size(record['bytes_after'])} of weights (shared ones counted once).")
    line(
        f"Running it takes about {size(record['memory_estimate'])} of memory: "
        f"the weights and a conversation of {record['cache_positions']} positions."
    )


def memory_estimate(manifest: Manifest) -> tuple[int, int]:
    """Bytes to run a bundle, all weights resident, and the positions of conversation that are counted in.

    A weight file that is linked from a checkpoint may hold more than the graphs use, and two graphs may share a
    weight: the smaller of the two sums is nearer to the truth.
    """
    positions = min(CACHE_POSITIONS, manifest.cache.max_positions)
    weights = min(manifest.weight_bytes, sum(graph.weight_bytes for graph in manifest.graphs.values()))
    return weights + positions * manifest.cache.bytes_per_position, positions


def bundle_record(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest as it is written, with what follows from it."""
    estimate, positions = memory_estimate(manifest)
    return {
        "bundle": str(folder),
        "weight_bytes": manifest.weight_bytes,
        "memory_estimate": estimate,
        "cache_positions": positions,
        "manifest": json.loads((folder / MANIFEST).read_text(encoding="utf-8")),
    }


def show_written(folder: Path, manifest: Manifest, link: bool) -> None:
    if manifest.quantization is not None:
        _show_quantization(manifest, manifest.quantization)
    weights = size(manifest.weight_bytes)
    line(f"{folder}: {manifest.family} for {manifest.profile}, {len(manifest.graphs)} graphs, {weights} of weights.")
    if link:
        line(_what_was_linked(manifest))
    line(f"Next: edgeomni verify {folder}; edgeomni chat {folder}")


def _what_was_linked(manifest: Manifest) -> str:
    linked = [file for file in manifest.files if file.linked is not None]
    if not linked:
        return (
            "Nothing was linked: no file holds the weights as the bundle needs them, or it is on another file system."
        )
    names, nbytes = ", ".join(file.path for file in linked), sum(file.nbytes for file in linked)
    return f"Hard-linked, {size(nbytes)}: {names}. If the original is written to, the bundle is no longer opened."


def show_bundle(folder: Path, manifest: Manifest) -> None:
    estimate, positions = memory_estimate(manifest)
    source = manifest.source
    line(f"{folder}: {manifest.family} for {manifest.profile}")
    line(f"source   {source.name}, stored as {', '.join(source.stored_dtypes)}")
    line(f"licence  {source.licence}")
    if manifest.quantization is not None:
        made = manifest.quantization
        line(f"recipe   {made.recipe}: {len(made.quantized)} weights quantized, {len(made.kept)} kept as they were")
    cache = manifest.cache
    line(f"context  {cache.max_positions} positions of {size(cache.bytes_per_position)}, kept as {cache.dtype}")
    line(f"memory   about {size(estimate)}: the weights and a conversation of {positions} positions\n")
    OUT.print(_graph_table(manifest.graphs))
    OUT.print()
    OUT.print(_port_table(manifest.graphs))
    if manifest.quantization is not None:
        OUT.print()
        _show_quantization(manifest, manifest.quantization)
    for note in manifest.notes:
        line(f"note: {note}")
    if source.random:
        line("\nThese weights are random: what comes out proves arithmetic, not quality.", style="bold")


def _graph_table(graphs: dict[str, Graph]) -> Table:
    shown = table("graph", "precision", "parameters>", "weights>", "files")
    for name, graph in graphs.items():
        files = " ".join((graph.file, *graph.weights))
        shown.add_row(name, graph.precision, f"{graph.parameters:,}", size(graph.weight_bytes), files)
    return shown


def _port_table(graphs: dict[str, Graph]) -> Table:
    """Ports of each graph; those that a graph has for each layer are gathered in one row."""
    shown = table("graph", "", "port", "type and shape")
    for name, graph in graphs.items():
        for side, ports in (("in", graph.inputs), ("out", graph.outputs)):
            for port, count in gathered(ports):
                times = f"  × {count}" if count > 1 else ""
                shown.add_row(name, side, port.name + times, f"{port.dtype} {list(port.shape)}")
    return shown


def _show_quantization(manifest: Manifest, quantization: Quantization) -> None:
    OUT.print(_quantization_table(quantization))
    for sentence in second_hand(manifest):
        line(f"checkpoint: {sentence}")


def _quantization_table(quantization: Quantization) -> Table:
    """How each weight is stored; those whose names differ in numbers only are one row."""
    shown = table("graph", "weight", "stored as", "bits>", "size>")
    for row in summary(quantization):
        times = f"  × {row.count}" if row.count > 1 else ""
        shown.add_row(row.graph, row.names + times, row.stored, f"{row.bits_per_weight:.2f}", size(row.nbytes))
    return shown


def gathered(ports: Sequence[Port]) -> list[tuple[Port, int]]:
    """Ports that differ only in a number in their name, as one with how many there are: past.0.key, past.1.key, ..."""
    groups: dict[tuple[object, ...], list[Port]] = {}
    for port in ports:
        stem = ".".join("#" if part.isdigit() else part for part in port.name.split("."))
        groups.setdefault((stem, port.dtype, port.shape), []).append(port)
    return [(group[0], len(group)) for group in groups.values()]


def show_check(check: "Check") -> None:
    verdict = "failed" if check.problems else "skipped" if check.skipped else "ok"
    line(f"{verdict:8}{check.subject}  {'; '.join(check.problems) or check.skipped}".rstrip())


def checks_record(checks: Sequence["Check"]) -> dict[str, Any]:
    return {
        "passed": not any(check.problems for check in checks),
        "checks": [
            {"subject": check.subject, "problems": list(check.problems), "skipped": check.skipped or None}
            for check in checks
        ],
    }


def finite(value: float) -> float | None:
    """JSON has no infinity; an error that cannot be measured is null."""
    return value if math.isfinite(value) else None


def parity_record(parity: "Parity") -> dict[str, Any]:
    return {
        "passed": parity.passed,
        "compared": [
            {
                "name": verdict.name,
                "worst_absolute": finite(verdict.worst),
                "worst_relative": finite(verdict.relative),
                "tolerance": verdict.tolerance,
                "passed": verdict.passed,
                "problem": verdict.problem or None,
            }
            for verdict in parity.verdicts
        ],
        "not_covered": dict(parity.uncovered),
        "unexplained": list(parity.unexplained),
    }


def show_parity(parity: "Parity") -> None:
    shown = table("stage", "arrays>", "worst absolute>", "worst relative>", "tolerance>", "verdict")
    for stage, verdicts in sorted(parity.stages().items()):
        shown.add_row(stage, *_stage_row(verdicts))
    OUT.print(shown)
    for verdict in parity.verdicts:
        if not verdict.passed:
            line(f"failed: {verdict.name}: {verdict.problem}", style="bold red")
    for reason, names in _by_reason(parity).items():
        line(f"not covered: {', '.join(names)}: {reason}")
    for name in parity.unexplained:
        line(f"failed: {name} was recorded, but nothing replays it and nothing says why", style="bold red")
    line("parity holds" if parity.passed else "parity does not hold", style="bold")


def _stage_row(verdicts: list["Verdict"]) -> tuple[str, ...]:
    """Equal integers count as error 0; several tolerances are shown where the arrays of a stage differ in theirs."""
    limits = sorted({f"{verdict.tolerance:.0e}" for verdict in verdicts if verdict.tolerance}) or ["equal"]
    failed = sum(not verdict.passed for verdict in verdicts)
    return (
        str(len(verdicts)),
        f"{max(verdict.worst for verdict in verdicts):.1e}",
        f"{max(verdict.relative for verdict in verdicts):.1e}",
        ", ".join(limits),
        f"{failed} of {len(verdicts)} failed" if failed else "ok",
    )


def _by_reason(parity: "Parity") -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in parity.uncovered.items():
        grouped.setdefault(reason, []).append(name)
    return grouped
