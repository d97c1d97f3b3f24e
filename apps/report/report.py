"""A comparison as one HTML page that needs nothing beside it; Markdown and JSON are written next to it."""

import html
import math
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from string import Template
from tempfile import TemporaryFile

import numpy as np

from apps.report import loss_report
from apps.report.findings import as_json, interval, markdown, provenance, title
from apps.report.page import anchor, figure, folded, note, number, rows, section
from apps.report.plots import Bar, Line, bar_plot, line_plot
from apps.report.side_by_side import degenerate, pairs
from apps.report.sound_report import numbers, sounds
from apps.report.suite_report import suite_section
from apps.tables import size
from quant.comparison.compare import Comparison
from quant.comparison.figures import TurnResult, bits_per_weight
from quant.comparison.record import Side
from quant.comparison.task_figures import suites_of
from quant.comparison.verdict import verdict
from quant.comparison.wer import UNSPACED
from runtime.bundle import is_bundle
from runtime.errors import EdgeOmniError

TEMPLATE = Path(__file__).parent / "report.html"
PLAYERS = 12  # turns whose speech is in the page: a second of it is 64 kB
WORST = 16  # outputs of graphs that are drawn
ANSWERS = 100  # that are in the page
POSITIONS = 64  # positions that are drawn
# What is marked as one: a word, a character of scripts without spaces, white space, any other mark.
WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|\s+|.", re.DOTALL)


def prepare(folder: Path) -> None:
    """Make the report's folder before anything is measured; EdgeOmniError where that cannot be."""
    if is_bundle(folder):
        raise EdgeOmniError(f"{folder} is a bundle; name another folder for the report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # else an hour's measurements could not be written in the end
            pass
    except OSError as error:
        raise EdgeOmniError(f"the report cannot be written to {folder}: {error.strerror}; name a folder") from None


def write(found: Comparison, folder: Path) -> None:
    """report.html, report.md and report.json."""
    texts = {"report.html": page(found), "report.md": markdown(found), "report.json": as_json(found)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def page(found: Comparison) -> str:
    """The HTML page."""
    sections = [(heading, body) for heading, body in _sections(found) if body]
    first = f'<section id="verdict"><ul class="verdict">{"".join(map(_sentence, verdict(found)))}</ul></section>'
    texts = {
        "title": html.escape(title(found)),
        "subtitle": html.escape(f"{found.candidate.path} against {found.reference.path}"),
        "nav": "".join(_link(heading) for heading, _ in sections),
        "body": "\n".join([first, *(section(*part) for part in sections)]),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(texts)


def _sections(found: Comparison) -> list[tuple[str, str]]:
    """What is plainly wrong before any average; then what it costs and where it was lost; then every answer."""
    answers = [_answer(n, result) for n, (_, result) in enumerate(order(found.results)[:ANSWERS], 1)]
    if len(found.results) > ANSWERS:
        answers.append(note(f"The worst {ANSWERS} of {len(found.results)}; all are in report.json."))
    return [
        ("Degenerate answers", _degenerate(found) if degenerate(found) else ""),
        ("At a glance", _cards(found)),
        ("Quality beside cost", _side_by_side(found)),
        ("Gates", _gates(found) if found.gates else ""),
        ("Recipes that were tried", loss_report.pareto(found) if found.tried else ""),
        ("What to change in the recipe", loss_report.recipe(found)),
        ("Which weights lose it", loss_report.groups(found)),
        ("Which graph loses it", loss_report.swaps(found)),
        ("Error by layer", loss_report.by_layer(found)),
        ("Error of each graph's outputs", _by_graph(found)),
        ("KL divergence by position", _by_position(found)),
        ("Data sets", suite_section(found) if suites_of(found.results) else ""),
        ("Figures", _figures(found)),
        ("Answers", "".join(answers)),
        ("What it weighs", _cost(found.reference, found.candidate)),
        ("Measured with", rows(("", ""), provenance(found))),
    ]


def _link(heading: str) -> str:
    return f'<li><a href="#{anchor(heading)}">{html.escape(heading)}</a></li>'


def order(results: Sequence[TurnResult]) -> list[tuple[int, TurnResult]]:
    """Degenerate answers first, then what was right and is wrong, then by divergence."""

    def badness(item: tuple[int, TurnResult]) -> tuple[bool, bool, float]:
        result = item[1]
        kl = [float(np.nanmean(s.kl)) for s in result.stretches.values() if s.finite.any()]
        return bool(result.defects[1]), result.right == (True, False), max(kl, default=0.0)

    return sorted(enumerate(results, 1), key=badness, reverse=True)


def _sentence(text: str) -> str:
    good = text.startswith(("No regression", "Improvement", "All "))
    bad = "degenerate" in text or text.startswith(("Gate failed", "Regression"))
    return f'<li class="{"bad" if bad else "good" if good else ""}">{html.escape(text)}</li>'


def _degenerate(found: Comparison) -> str:
    return rows(
        ("item", "side", "what is wrong", "question"),
        [(one.item, one.side, ", ".join(one.defects), one.question or "(media only)") for one in degenerate(found)],
    )


def _side_by_side(found: Comparison) -> str:
    return rows(("", "reference", "candidate"), [(r.what, r.reference, r.candidate) for r in pairs(found)], (1, 2))


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


def _gates(found: Comparison) -> str:
    lines = (
        (
            judged.gate.figure,
            number(judged.found),
            f"{'at most' if judged.gate.side == 'max' else 'at least'} {judged.gate.limit:g}",
            "passed" if judged.passed else "failed",
        )
        for judged in found.gates
    )
    return rows(("figure", "found", "must be", ""), lines, (1,))


def _figures(found: Comparison) -> str:
    lines = ((f.name, number(f.value), interval(f), str(f.count), f.meaning) for f in found.figures)
    told = (
        "Intervals: 95 %, bootstrap over turns, of shares of answers Wilson's; none where no draw differs. "
        "Choices are measured along the reference's own answers."
    )
    return rows(("figure", "value", "interval", "n", "meaning"), lines, (1, 2, 3)) + note(told)


def _by_position(found: Comparison) -> str:
    names = list(dict.fromkeys(name for result in found.results for name in result.stretches))
    plots = []
    for kind, label in (("text", "token"), ("code", "frame")):
        lines = [_curve(found.results, name) for name in names if name.startswith(kind)]
        if lines:
            shade = "; shaded: the middle half of the turns" if kind == "text" else ", by codebook"
            plot = line_plot(lines, f"{label} of the answer", "KL divergence, nats")
            plots.append(figure(found, plot, f"Mean over turns at each {label}{shade}."))
    return "".join(plots) or note("Nothing was answered.")


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
        if e.non_finite or math.isfinite(e.sqnr)
    ]
    lines = (
        (e.graph, e.output, number(e.max_abs), f"{e.cosine:.6f}", number(e.sqnr), str(e.non_finite), _share(e.same))
        for e in found.tensors
    )
    head = ("graph", "output", "max abs", "cosine", "SQNR dB", "not finite", "same")
    table = folded(f"All {len(found.tensors)} outputs, worst first", rows(head, lines, range(2, 7)))
    if not bars:
        return note("No output differs.") + table
    told = "Signal to quantization noise on the reference's own inputs, worst first. present.N: keys and values."
    return figure(found, bar_plot(bars, told), told) + table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


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
    return rows(("", "reference", "candidate"), measured, (1, 2)) if measured else ""


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
    """Two texts as HTML with the words that only one of them has marked."""
    said, now = (WORDS.findall(text) for text in (before, after))
    matcher, ours, theirs = SequenceMatcher(None, said, now, autojunk=False), "", ""
    for kind, a, b, c, d in matcher.get_opcodes():
        old, new = html.escape("".join(said[a:b])), html.escape("".join(now[c:d]))
        ours += old if kind == "equal" or not old else f"<del>{old}</del>"
        theirs += new if kind == "equal" or not new else f"<ins>{new}</ins>"
    return ours, theirs


def _cost(reference: Side, candidate: Side) -> str:
    before = {graph.name: graph for graph in reference.graphs}
    lines = [
        (g.name, g.precision, *_weights(before[g.name].weight_bytes if g.name in before else None, g.weight_bytes),
         f"{bits_per_weight([g]):.2f}")
        for g in candidate.graphs
    ]  # fmt: skip
    lines.append(
        ("whole bundle", candidate.recipe or "float", *_weights(reference.weight_bytes, candidate.weight_bytes),
         f"{bits_per_weight(candidate.graphs):.2f}")
    )  # fmt: skip
    return rows(("graph", "precision", "reference", "candidate", "share", "bits a weight"), lines, range(2, 6))


def _weights(before: int | None, after: int) -> tuple[str, str, str]:
    return "–" if before is None else size(before), size(after), f"{after / before:.0%}" if before else "–"
