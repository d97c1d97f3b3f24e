"""Reference and candidate side by side: what was lost beside what was saved, and every answer that is plainly wrong."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from apps.report.page import threads
from apps.tables import size
from quant.comparison.compare import Comparison
from quant.comparison.cost import Cost, Percentiles
from quant.comparison.figures import bits_per_weight
from quant.turn import name_of

LISTED = 20  # degenerate answers that are told one by one in the terminal


@dataclass(frozen=True)
class Row:
    """One line of the table; "–" where a side has no such figure."""

    what: str
    reference: str
    candidate: str


@dataclass(frozen=True)
class Degenerate:
    """An answer that is useless whatever the averages say."""

    item: str
    side: str
    defects: tuple[str, ...]
    question: str

    @property
    def sentence(self) -> str:
        return f"{self.item}, {self.side}: {', '.join(self.defects)} ({self.question or 'media only'})"


def degenerate(found: Comparison) -> list[Degenerate]:
    """Those of the candidate first."""
    return [
        Degenerate(name_of(result.turn, number), who, result.defects[place], result.turn.text)
        for who, place in (("candidate", 1), ("reference", 0))
        for number, result in enumerate(found.results, 1)
        if result.defects[place]
    ]


def pairs(found: Comparison) -> list[Row]:
    """Quality, then cost."""
    return [*_quality(found), *_cost(found)]


def _quality(found: Comparison) -> Iterator[Row]:
    bad = [sum(bool(result.defects[place]) for result in found.results) for place in (0, 1)]
    yield Row("degenerate answers", *(f"{count} of {len(found.results)}" for count in bad))
    yield from _pair(found, "right answers", "answers.accuracy_reference", "answers.accuracy", _percent)
    yield from _pair(found, "words misheard in its speech", "speech.wer_reference", "speech.wer", _percent)
    for what, name, spell in (
        ("KL divergence, nats a token", "text.kl", _short),
        ("same likeliest token", "text.top1", _percent),
        ("KL divergence, nats a code", "codes.kl", _short),
        ("same likeliest code", "codes.top1", _percent),
        ("pitch of the same codes, RMS cents off", "speech.f0_cents", _short),
        ("spectrum of the same codes, dB off", "speech.log_spectral", _short),
    ):
        yield from _pair(found, what, "", name, spell)


def _pair(found: Comparison, what: str, ours: str, theirs: str, spell: Callable[[float], str]) -> Iterator[Row]:
    before, after = found.figure(ours), found.figure(theirs)
    if after is not None:
        yield Row(what, "–" if before is None else spell(before.value), spell(after.value))


def _cost(found: Comparison) -> Iterator[Row]:
    ours, theirs = found.costs
    yield Row("weights", size(found.reference.weight_bytes), size(found.candidate.weight_bytes))
    bits = (f"{bits_per_weight(side.graphs):.2f}" for side in (found.reference, found.candidate))
    yield Row("bits a weight", *bits)
    yield Row("peak memory", *(_memory(cost, "peak") for cost in found.costs))
    yield Row("private memory", *(_memory(cost, "private") for cost in found.costs))
    for what, name, spell in (
        ("first token, P50 / P95", "first_token", _milliseconds),
        ("first sound, P50 / P95", "first_audio", _milliseconds),
        ("seconds a second of speech, P50 / P95", "real_time_factor", _factor),
        ("text tokens a second, P50 / P5", "tokens_per_second", _rate),
    ):
        pair = getattr(ours, name), getattr(theirs, name)
        if any(pair):
            yield Row(what, *(_percentiles(one, spell) for one in pair))
    yield Row("measured on", *(_machine(found, cost) for cost in found.costs))


def _memory(cost: Cost, kind: str) -> str:
    return "not measured" if cost.memory is None else size(getattr(cost.memory, kind))


def _percentiles(found: Percentiles | None, spell: Callable[[float], str]) -> str:
    return "–" if found is None else f"{spell(found.p50)} / {spell(found.p95)}"


def _machine(found: Comparison, cost: Cost) -> str:
    if cost.machine is None or cost.machine == found.machine:
        return "this machine"
    return f"{cost.machine.cpu}, {threads(cost.machine)}, when it was recorded"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.0f} ms"


def _factor(value: float) -> str:
    return f"{value:.2f}"


def _rate(value: float) -> str:
    return f"{value:.1f}"


def markdown_lines(found: Comparison) -> Iterator[str]:
    """Degenerate answers, then the table."""
    bad = degenerate(found)
    if bad:
        yield from ("## Degenerate answers", "", *(f"- {one.sentence}" for one in bad), "")
    yield from ("## Quality beside cost", "", "| | reference | candidate |", "|---|---:|---:|")
    yield from (f"| {row.what} | {row.reference} | {row.candidate} |" for row in pairs(found))
    yield ""


def as_record(found: Comparison) -> dict[str, Any]:
    """The same for machines, in seconds and bytes."""
    return {
        "degenerate": [asdict(one) for one in degenerate(found)],
        "costs": {"reference": asdict(found.costs[0]), "candidate": asdict(found.costs[1])},
        "recogniser": found.recogniser or None,
    }
