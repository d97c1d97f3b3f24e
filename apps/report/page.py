"""The pieces that the report's page is put together from: tables, notes, and figures that say what they stand on."""

import html
import math
import re
from collections.abc import Iterable, Sequence

from quant.comparison.compare import Comparison
from quant.comparison.record import Machine


def anchor(heading: str) -> str:
    """What a section is linked by."""
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def section(heading: str, body: str) -> str:
    return f'<section id="{anchor(heading)}"><h2>{html.escape(heading)}</h2>{body}</section>'


def rows(head: Sequence[str], lines: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of texts; the columns in `numbers` stand to the right. It scrolls by keyboard where it is too wide."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = (' class="n"' if place in numbers else "" for place in range(len(cells)))
        return "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))

    heading = f"<thead><tr>{line(head, 'th')}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in lines)
    return f'<div class="wide" tabindex="0"><table>{heading}<tbody>{body}</tbody></table></div>'


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def folded(summary: str, body: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def figure(found: Comparison, plot: str, caption: str) -> str:
    """A plot with what it shows, and beneath it what it was measured with."""
    told = f"{html.escape(caption)}<br><small>{html.escape(stamp(found))}</small>"
    return f"<figure>{plot}<figcaption>{told}</figcaption></figure>"


def stamp(found: Comparison) -> str:
    """Which bundles, seed, ONNX Runtime and processor: short, for under a figure; whole at the end of the page."""
    ours, theirs = (side.manifest_sha256[:12] for side in (found.reference, found.candidate))
    machine = found.machine
    return (
        f"reference {ours}, candidate {theirs}, {len(found.results)} turns, seed {found.seed}, "
        f"{machine.onnxruntime}, {machine.cpu}, {threads(machine)}"
    )


def threads(machine: Machine) -> str:
    """How many a graph has."""
    return f"{machine.threads or 'all'} thread{'' if machine.threads == 1 else 's'}"
