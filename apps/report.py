"""A comparison as one HTML page that needs nothing beside it; Markdown and JSON are written next to it."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from string import Template

import numpy as np

from apps.findings import as_json, interval, markdown, number, provenance, title
from apps.plots import Bar, Line, bar_plot, line_plot
from apps.side_by_side import degenerate, pairs
from apps.sound_report import numbers, sounds
from apps.suite_report import suite_section
from apps.tables import size
from quant.compare import Comparison
from quant.figures import TurnResult, bits_per_weight
from quant.record import Side
from quant.task_figures import suites_of
from quant.verdict import verdict
from runtime.errors import EdgeOmniError

TEMPLATE = Path(__file__).parent / "report.html"
PLAYERS = 12  # turns whose speech is in the page: a second of it is 64 kB
WORST = 16  # outputs of graphs that are drawn
POSITIONS = 64  # positions that are drawn


def prepare(folder: Path) -> None:
    """Make the report's folder before anything is measured; EdgeOmniError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgeOmniError(f"the report cannot be written to {folder}: {error.strerror}; name a folder") from None


def write(found: Comparison, folder: Path) -> None:
    """report.html, report.md and report.json."""
    texts = {"report.html": page(found), "report.md": markdown(found), "report.json": as_json(found)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def page(found: Comparison) -> str:
    """The HTML page."""
    parts = [
        _verdict(found),
        _section("Degenerate answers", _degenerate(found)) if degenerate(found) else "",
        _cards(found),
        _section("Side by side", _side_by_side(found)),
        _section("Gates", _gates(found)) if found.gates else "",
        _section("Data sets", suite_section(found)) if suites_of(found.results) else "",
        _section("Figures", _figures(found)),
        _section("KL divergence by position in the answer", _by_position(found)),
        _section("Error of each graph on the reference's own inputs", _by_graph(found)),
        _section("Which graph loses it", _swaps(found)),
        _section("Answers", "".join(_answer(n, result) for n, (_, result) in enumerate(order(found.results), 1))),
        _section("What it weighs", _cost(found.reference, found.candidate)),
        _section("Measured with", _rows(("", ""), provenance(found))),
    ]
    subtitle = f"{found.candidate.path} against {found.reference.path}"
    texts = {"title": html.escape(title(found)), "subtitle": html.escape(subtitle), "body": "\n".join(parts)}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(texts)


def order(results: Sequence[TurnResult]) -> list[tuple[int, TurnResult]]:
    """Degenerate answers first, then what was right and is wrong, then by divergence."""

    def badness(item: tuple[int, TurnResult]) -> tuple[bool, bool, float]:
        result = item[1]
        kl = [float(np.nanmean(s.kl)) for s in result.stretches.values() if s.finite.any()]
        return bool(result.defects[1]), result.right == (True, False), max(kl, default=0.0)

    return sorted(enumerate(results, 1), key=badness, reverse=True)


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{body}</section>"


def _verdict(found: Comparison) -> str:
    return f'<section><ul class="verdict">{"".join(map(_sentence, verdict(found)))}</ul></section>'


def _sentence(text: str) -> str:
    good = text.startswith(("No regression", "Improvement", "All "))
    bad = "degenerate" in text or text.startswith(("Gate failed", "Regression"))
    return f'<li class="{"bad" if bad else "good" if good else ""}">{html.escape(text)}</li>'


def _degenerate(found: Comparison) -> str:
    return _rows(
        ("item", "side", "what is wrong", "question"),
        [(one.item, one.side, ", ".join(one.defects), one.question or "(media only)") for one in degenerate(found)],
    )


def _side_by_side(found: Comparison) -> str:
    return _rows(("", "reference", "candidate"), [(r.what, r.reference, r.candidate) for r in pairs(found)], (1, 2))


CARDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("text.kl", "KL, nats a token", lambda v: f"{v:.3g}"),
    ("text.top1", "same likeliest token", lambda v: f"{v:.1%}"),
    ("codes.kl", "KL, nats a code", lambda v: f"{v:.3g}"),
    ("codes.top1", "same likeliest code", lambda v: f"{v:.1%}"),
    ("answers.exact", "answers unchanged", lambda v: f"{v:.0%}"),
    ("answers.accuracy", "answers right", lambda v: f"{v:.0%}"),
    ("cost.bytes_ratio", "of the bytes", lambda v: f"{v:.0%}"),
    ("cost.decode_ratio", "of the time a token", lambda v: f"{v:.0%}"),
)


def _cards(found: Comparison) -> str:
    shown = [(found.figure(name), label, spell) for name, label, spell in CARDS]
    cards = (f'<div class="card"><b>{spell(f.value)}</b><span>{label}</span></div>' for f, label, spell in shown if f)
    return f'<div class="cards">{"".join(cards)}</div>'


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of texts; the columns in `numbers` stand to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = (' class="n"' if place in numbers else "" for place in range(len(cells)))
        return "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))

    heading = f"<thead><tr>{line(head, 'th')}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table>{heading}<tbody>{body}</tbody></table></div>'


def _gates(found: Comparison) -> str:
    rows = (
        (
            judged.gate.figure,
            number(judged.found),
            f"{'at most' if judged.gate.side == 'max' else 'at least'} {judged.gate.limit:g}",
            "passed" if judged.passed else "failed",
        )
        for judged in found.gates
    )
    return _rows(("figure", "found", "must be", ""), rows, (1,))


def _figures(found: Comparison) -> str:
    rows = ((f.name, number(f.value), interval(f), str(f.count), f.meaning) for f in found.figures)
    note = (
        "Intervals: 95 %, bootstrap over turns, of shares of answers Wilson's; none where no draw differs. "
        "Choices are measured along the reference's own answers."
    )
    return _rows(("figure", "value", "interval", "n", "meaning"), rows, (1, 2, 3)) + f'<p class="note">{note}</p>'


def _by_position(found: Comparison) -> str:
    names = list(dict.fromkeys(name for result in found.results for name in result.stretches))
    plots = []
    for kind, label in (("text", "token"), ("code", "frame")):
        lines = [_curve(found.results, name) for name in names if name.startswith(kind)]
        if lines:
            plots.append(line_plot(lines, label, "KL, nats, mean over turns"))
    shade = '<p class="note">Shaded: the middle half of the turns.</p>' if "text" in names else ""
    return "".join(plots) + shade or '<p class="note">Nothing was answered.</p>'


def _curve(results: Sequence[TurnResult], name: str) -> Line:
    """Mean over turns at each position, up to POSITIONS; of text also the quartiles."""
    kls = [result.stretches[name].kl[:POSITIONS] for result in results if name in result.stretches]
    table = np.full((len(kls), max(map(len, kls))), np.nan)
    for row, kl in zip(table, kls, strict=True):
        row[: len(kl)] = kl
    columns = [column[np.isfinite(column)] for column in table.T]
    mean = [float(column.mean()) if len(column) else math.nan for column in columns]
    if name != "text":
        return Line(name, mean)
    low, high = (
        [float(np.percentile(column, share)) if len(column) else math.nan for column in columns] for share in (25, 75)
    )
    return Line(name, mean, low, high)


def _by_graph(found: Comparison) -> str:
    errors = [error for error in found.tensors if error.same is None]
    bars = [
        Bar(f"{e.graph} · {e.output}", e.sqnr, f"{e.non_finite} not finite" if e.non_finite else f"{e.sqnr:.1f} dB")
        for e in errors[:WORST]
    ]
    rows = (
        (e.graph, e.output, number(e.max_abs), f"{e.cosine:.6f}", number(e.sqnr), str(e.non_finite), _share(e.same))
        for e in found.tensors
    )
    head = ("graph", "output", "max abs", "cosine", "SQNR dB", "not finite", "same")
    plot = bar_plot(bars, "Signal to quantization noise, worst first") if bars else ""
    table = _rows(head, rows, range(2, 7))
    note = '<p class="note">Signal to quantization noise, worst first; present.N are keys and values of layer N.</p>'
    return f"{plot}{note}<details><summary>All {len(found.tensors)} outputs</summary>{table}</details>"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _swaps(found: Comparison) -> str:
    if not found.swaps:
        why = "the reference is a record, which has no graphs" if found.stored else "no graph was swapped"
        return f'<p class="note">Not measured: {why}.</p>'
    rows = ((s.graph, number(s.text_kl), number(s.codes_kl), number(s.log_mel)) for s in found.swaps)
    note = "The reference with this one graph of the candidate in the place of its own."
    return _rows(("graph", "text KL", "code KL", "log-mel dB"), rows, (1, 2, 3)) + f'<p class="note">{note}</p>'


def _answer(place: int, result: TurnResult) -> str:
    tags = "".join(f'<span class="tag {kind}">{html.escape(text)}</span>' for text, kind in _tags(result))
    asked = html.escape(result.turn.text or "(media only)")
    before, after = differing(result.reference.text, result.candidate.text)
    players = sounds(result) if result.rate and place <= PLAYERS else ("", "")
    sides = "".join(
        f"<div><h3>{who}</h3>{text}{sound}</div>"
        for who, text, sound in zip(("reference", "candidate"), (before, after), players, strict=True)
    )
    opened = " open" if result.defects[1] or result.right == (True, False) else ""
    return f'<details{opened}><summary>{tags}{asked}</summary><div class="pair">{sides}</div>{_sound(result)}</details>'


def _sound(result: TurnResult) -> str:
    measured = numbers(result)
    return _rows(("", "reference", "candidate"), measured, (1, 2)) if measured else ""


def _tags(result: TurnResult) -> list[tuple[str, str]]:
    tags = [(f"candidate: {defect}", "bad") for defect in result.defects[1]]
    tags += [(f"reference: {defect}", "") for defect in result.defects[0]]
    words = {True: "right", False: "wrong"}
    if result.right is not None:
        before, after = result.right
        kind = "" if before == after else "bad" if before else "good"
        tags.append((words[after] if before == after else f"{words[before]} → {words[after]}", kind))
    return [*tags, ("same", "good")] if result.exact else tags


def differing(before: str, after: str) -> tuple[str, str]:
    """Two texts as HTML with what only one of them has marked."""
    matcher, ours, theirs = SequenceMatcher(None, before, after, autojunk=False), "", ""
    for kind, a, b, c, d in matcher.get_opcodes():
        old, new = html.escape(before[a:b]), html.escape(after[c:d])
        ours += old if kind == "equal" or not old else f"<del>{old}</del>"
        theirs += new if kind == "equal" or not new else f"<ins>{new}</ins>"
    return ours, theirs


def _cost(reference: Side, candidate: Side) -> str:
    before = {graph.name: graph for graph in reference.graphs}
    rows = [
        (g.name, g.precision, *_weights(before[g.name].weight_bytes if g.name in before else None, g.weight_bytes),
         f"{bits_per_weight([g]):.2f}")
        for g in candidate.graphs
    ]  # fmt: skip
    rows.append(
        ("whole bundle", candidate.recipe or "float", *_weights(reference.weight_bytes, candidate.weight_bytes),
         f"{bits_per_weight(candidate.graphs):.2f}")
    )  # fmt: skip
    return _rows(("graph", "precision", "reference", "candidate", "share", "bits a weight"), rows, range(2, 6))


def _weights(before: int | None, after: int) -> tuple[str, str, str]:
    return "–" if before is None else size(before), size(after), f"{after / before:.0%}" if before else "–"
