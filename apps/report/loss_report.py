"""Where a comparison lost what: along the layers, by graph, by group of weights, by line of the recipe, by byte."""

import math
from collections.abc import Iterable, Iterator, Sequence

from apps.report.page import figure, folded, note, number, rows
from apps.report.plots import Bar, Line, Point, bar_plot, line_plot, scatter_plot
from apps.tables import size
from quant.comparison.advice import Advice, patterns
from quant.comparison.compare import Comparison, LayerError
from quant.comparison.pareto import Tried, beaten_by, front
from quant.comparison.within import Loss

ADVISED = 8  # lines of advice that are shown
DRAWN = 2  # of them that are drawn among the recipes that were tried
MB = 1e6


def by_layer(found: Comparison) -> str:
    """Signal to noise behind each layer, a curve a graph; the numbers worst first."""
    graphs = list(dict.fromkeys(error.graph for error in found.layers))
    differing = [name for name in graphs if any(math.isfinite(e.sqnr) or e.non_finite for e in _of(found, name))]
    if not differing:
        return note("No layer differs." if graphs else "Not measured: no graph has layers.")
    lines = [Line(name, [error.sqnr for error in _of(found, name)]) for name in differing]
    plot = line_plot(lines, "layer", "signal to quantization noise, dB")
    worst = sorted((e for name in differing for e in _of(found, name)), key=lambda e: (-e.non_finite, e.sqnr))
    table = rows(
        ("graph", "layer", "max abs", "cosine", "SQNR dB", "not finite"),
        ((e.graph, e.layer, number(e.max_abs), f"{e.cosine:.6f}", number(e.sqnr), str(e.non_finite)) for e in worst),
        range(2, 6),
    )
    equal = [name for name in graphs if name not in differing]
    caption = "What leaves each layer, on the inputs that the reference gave; higher is closer, 20 dB is a tenth off."
    caption += f" Equal in every layer: {', '.join(equal)}." if equal else ""
    return figure(found, plot, caption) + folded(f"All {len(worst)} layers, worst first", table)


def _of(found: Comparison, graph: str) -> list[LayerError]:
    return [error for error in found.layers if error.graph == graph]


def swaps(found: Comparison) -> str:
    """One graph swapped at a time."""
    if not found.swaps:
        why = "the reference is a record, which has no graphs" if found.stored else "no graph was swapped"
        return note(f"Not measured: {why}.")
    parts = []
    for what, values in (("text", [s.text_kl for s in found.swaps]), ("code", [s.codes_kl for s in found.swaps])):
        bars = [Bar(s.graph, v, number(v)) for s, v in zip(found.swaps, values, strict=True) if v is not None]
        if any(bar.value for bar in bars):
            label = f"KL divergence, nats a {'token' if what == 'text' else 'code'}"
            caption = f"{label}: the reference with this one graph of the candidate in the place of its own."
            parts.append(figure(found, bar_plot(bars, label), caption))
    table = rows(
        ("graph", "text KL", "code KL", "log-mel dB"),
        ((s.graph, number(s.text_kl), number(s.codes_kl), number(s.log_mel)) for s in found.swaps),
        (1, 2, 3),
    )
    return "".join(parts) + table


def groups(found: Comparison) -> str:
    """Groups of weights within the graphs: what each loses alone, and what is won back where it stays float."""
    if found.within is None:
        return note("Not measured: it takes a reference that can be run and a decoder or audio head that differs.")
    parts = []
    for by, told in (("kind", "Weights of one kind, in all layers"), ("layer", "All weights of some layers")):
        losses = sorted((x for x in found.within.losses if x.by == by), key=lambda x: x.alone, reverse=True)
        if losses:
            whole = found.within.whole
            bars = [Bar(_short(x), x.alone, _told(x, whole), whole - x.without) for x in losses]
            plot = bar_plot(bars, told, ("lost by it alone", "won back where it stays float"))
            caption = f"{told}. KL divergence in nats a choice; all together lose {number(whole)}."
            parts.append(figure(found, plot, caption))
    where = f"Measured on {found.within.choices} choices of the reference's answers. What groups lose need not add up. "
    where += "Behind the bars: lost / won back, ± half of its 95 % interval over turns."
    return "".join(parts) + note(where)


def _short(loss: Loss) -> str:
    """The end of a name, which tells groups apart."""
    if loss.by == "layer":
        return f"{loss.graph} · {loss.group}"
    return ".".join(loss.group.removesuffix(".weight").split(".")[-2:])


def _told(loss: Loss, whole: float) -> str:
    error = f" ± {loss.error:.1g}" if math.isfinite(loss.error) else ""  # one turn does not tell it
    return f"{loss.alone:.3g} / {whole - loss.without:.3g}{error}"


def recipe(found: Comparison) -> str:
    """The lines of the recipe that decided, and what to put before them."""
    if not found.governing:
        return note("The candidate's recipe had no part in what was tried.")
    lines = rows(
        ("line", "recipe", "share of the loss"),
        ((str(line.line or "–"), line.text or line.pattern, f"{line.share:.1%}") for line in found.governing),
        (2,),
    )
    if not found.advice:
        return lines + note("No group of weights alone makes it surely better.")
    table = rows(ADVICE_HEAD, map(advice_row, found.advice[:ADVISED]), (2, 3, 4, 5))
    promise = (
        "Best for its bytes first; where the gain may be chance, nothing is advised. Measured with these weights as "
        "floats, which is the best that more bits can do. Quantize with one of these lines, and compare again with "
        "--beside this report."
    )
    return lines + "<h3>What to put before it</h3>" + table + note(promise)


ADVICE_HEAD = ("new line", "before line", "costs", "KL now", "KL then, at best", "per MB")


def advice_row(one: Advice) -> tuple[str, ...]:
    costs = f"{one.extra_bytes / MB:+.3g} MB"
    gain = (number(one.kl_now), f"{one.kl_then:.3g} ± {one.error:.1g}", f"{one.per_megabyte:.3g}")
    return "\n".join(one.lines), str(one.before), costs, *gain


def pareto(found: Comparison) -> str:
    """Bytes against divergence of all that was tried, with what is advised next; then the table."""
    caption = "Divergence by size. Joined: no other recipe is better in both. Hollow: what is advised next, at best."
    kinds = [kind for kind in ("text", "codes") if any(_kl(one, kind) is not None for one in found.tried)]
    plots = [figure(found, _scatter(found, kind), caption) for kind in kinds]
    head, *lines = tried_table(found.tried)
    return "".join(plots) + rows(head, lines, range(1, len(head) - 1))


def _kl(one: Tried, kind: str) -> float | None:
    return one.text_kl if kind == "text" else one.codes_kl


def _scatter(found: Comparison, kind: str) -> str:
    best, points = front(found.tried), []
    for one in found.tried:
        kl = _kl(one, kind)
        if kl is not None:
            points.append(Point(one.name, one.weight_bytes / MB, kl, tried_note(one), joined=one in best))
    here = _kl(found.tried[0], kind)
    if here is not None and kind == "text":
        points += _promised(found.advice, found.tried[0].weight_bytes / MB, here)
    label = f"KL divergence, nats a {'token' if kind == 'text' else 'code'}"
    return scatter_plot(points, "weights, MB", label, lambda value: f"{value:g}")


def _promised(found: Sequence[Advice], megabytes: float, kl: float) -> Iterator[Point]:
    """Where the candidate would go, its own divergence falling by the share that was measured."""
    for one in found[:DRAWN]:
        name = "+ " + one.group.removesuffix(".weight").removeprefix("model.")
        then = kl * one.kl_then / one.kl_now
        yield Point(name, megabytes + one.extra_bytes / MB, then, "at best", True, (megabytes, kl))


def tried_note(one: Tried) -> str:
    return f"{size(one.weight_bytes)}, {one.bits_per_weight:.2f} bits a weight"


def tried_table(every: Sequence[Tried]) -> list[tuple[str, ...]]:
    """Head and rows, the smallest first; columns that nobody has are left out."""
    head = ("recipe", "weights", "bits a weight", "text KL", "same token", "code KL", "same code", "")
    lines = [head, *(_tried_row(one, every) for one in sorted(every, key=lambda one: one.weight_bytes))]
    used = [place for place in range(len(head)) if any(line[place] != "–" for line in lines[1:])]
    return [tuple(line[place] for place in used) for line in lines]


def _tried_row(one: Tried, every: Sequence[Tried]) -> tuple[str, ...]:
    better = beaten_by(one, every)
    return (
        one.name + ("" if one.folder else " (this)"),
        size(one.weight_bytes),
        f"{one.bits_per_weight:.2f}",
        number(one.text_kl),
        _share(one.text_top1),
        number(one.codes_kl),
        _share(one.codes_top1),
        f"{better.name} is no larger and no worse" if better else "on the front",
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def markdown_lines(found: Comparison) -> Iterator[str]:
    """Layers, groups, the recipe's lines, advice and the front as Markdown tables."""
    for name in dict.fromkeys(error.graph for error in found.layers):
        finite = [error for error in _of(found, name) if math.isfinite(error.sqnr)]
        if finite:
            worst = min(finite, key=lambda error: error.sqnr)
            yield f"- worst layer of {name}: {worst.layer}, {worst.sqnr:.1f} dB, cosine {worst.cosine:.6f}"
    if found.within is not None:
        yield from _table(("graph", "weights", "KL alone", "KL of all but these"), _loss_rows(found.within.losses))
    if found.governing:
        lines = ((str(line.line), f"`{line.text or line.pattern}`", f"{line.share:.1%}") for line in found.governing)
        yield from _table(("line", "recipe", "share of the loss"), lines)
    if found.advice:
        yield from _table(ADVICE_HEAD, (advice_row(one) for one in found.advice[:ADVISED]))
    if found.tried:
        head, *lines = tried_table(found.tried)
        yield from _table(head, lines)


def _loss_rows(losses: Sequence[Loss]) -> Iterator[tuple[str, ...]]:
    for loss in losses:
        yield loss.graph, ", ".join(patterns(loss)), number(loss.alone), number(loss.without)


def _table(head: Sequence[str], lines: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield ""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(map(_cell, row))} |" for row in lines)


def _cell(text: str) -> str:
    return text.replace("\n", "<br>").replace("|", "\\|")
