"""Level 3 of a report: each data set's scores on both sides, and the items that went from right to wrong or back."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apps.report.page import note, rows
from quant.comparison.compare import Comparison
from quant.comparison.figures import Figure, TurnResult
from quant.comparison.task_figures import Item, items_of, suites_of
from quant.turn import Turn

FLIPS = 50  # of each kind that are in the page; all are in report.json
HEAD = (
    "data set",
    "judged by",
    "n",
    "reference",
    "candidate",
    "change",
    "95 % interval",
    "p",
    "detectable",
    "lost",
    "gained",
)
_METRICS = {
    "contains": "an answer stands in it",
    "exists": "an answer is part of it",
    "prefix": "it begins with the answer",
    "letter": "likeliest letter",
    "option": "option named (VLMEvalKit)",
    "omnibench": "option named (OmniBench)",
    "wer": "word error rate",
    "cer": "character error rate",
    "judge": "not judged here",
}


@dataclass(frozen=True, eq=False)
class SuiteResult:
    """One data set: its turns, and what counts as one item of it."""

    name: str
    results: tuple[TurnResult, ...]
    items: tuple[Item, ...]

    @property
    def metric(self) -> str:
        return self.results[0].turn.metric

    @property
    def lost(self) -> list[Item]:
        return [item for item in self.items if item.lost]

    @property
    def gained(self) -> list[Item]:
        return [item for item in self.items if item.gained]

    def groups(self) -> dict[str, list[Item]]:
        """Items by what the authors report apart; empty where they do not."""
        found: dict[str, list[Item]] = {}
        for item in self.items:
            found.setdefault(item.results[0].turn.group, []).append(item)
        return found if len(found) > 1 else {}


def suite_results(found: Comparison) -> list[SuiteResult]:
    return [
        SuiteResult(name, tuple(results), tuple(items_of(results)))
        for name, results in suites_of(found.results).items()
    ]


def suite_rows(found: Comparison) -> list[tuple[str, ...]]:
    """A row under HEAD for each data set."""
    return [_row(found, suite) for suite in suite_results(found)]


def _row(found: Comparison, suite: SuiteResult) -> tuple[str, ...]:
    def figure(name: str) -> Figure | None:
        return found.figure(f"suite.{suite.name}.{name}")

    names = ("accuracy_reference", "accuracy", "accuracy_loss", "detectable_loss")
    if figure("error_rate_added"):
        names = ("error_rate_reference", "error_rate", "error_rate_added", "detectable_errors")
    before, after, change, least = map(figure, names)
    p = figure("mcnemar_p")
    count = str(len(suite.items) or len(suite.results))
    shown = (_percent(before), _percent(after), _change(before, after), "" if change is None else _spread(change))
    flips = (str(len(suite.lost)), str(len(suite.gained)))
    return (
        suite.name,
        _METRICS[suite.metric],
        count,
        *shown,
        "–" if p is None else f"{p.value:.3g}",
        _percent(least),
        *flips,
    )


def _percent(figure: Figure | None) -> str:
    return "–" if figure is None else f"{figure.value:.1%}"


def _change(before: Figure | None, after: Figure | None) -> str:
    return "–" if before is None or after is None else f"{after.value - before.value:+.1%}"


def _spread(change: Figure) -> str:
    """Of candidate less reference: figures of losses are the other way round."""
    if change.low is None or change.high is None:
        return ""
    low, high = (0 - change.high, 0 - change.low) if change.name.endswith("_loss") else (change.low, change.high)
    return f"{low:+.1%} to {high:+.1%}"


def suite_record(found: Comparison) -> list[dict[str, Any]]:
    """For report.json: everything of each data set, with all items that flipped."""
    return [
        {
            "name": suite.name,
            "metric": suite.metric,
            "figures": [asdict(f) for f in found.figures if f.name.rsplit(".", 1)[0] == f"suite.{suite.name}"],
            "groups": {name: _tally(items) for name, items in suite.groups().items()},
            "lost": [_item_record(item) for item in suite.lost],
            "gained": [_item_record(item) for item in suite.gained],
        }
        for suite in suite_results(found)
    ]


def _tally(items: Sequence[Item]) -> dict[str, int]:
    right = [sum(item.right[side] for item in items) for side in (0, 1)]
    lost, gained = sum(item.lost for item in items), sum(item.gained for item in items)
    return {"items": len(items), "reference": right[0], "candidate": right[1], "lost": lost, "gained": gained}


def _item_record(item: Item) -> dict[str, Any]:
    first = next((r for r in item.results if r.right != (True, True)), item.results[0])
    taken = [score.taken for score in first.scores or ()]
    return {
        "item": first.turn.item,
        "group": first.turn.group,
        "asked": asked(first.turn),
        "expected": list(first.turn.answers),
        "reference": first.reference.text,
        "candidate": first.candidate.text,
        "taken": taken,
    }


def asked(turn: Turn) -> str:
    """What was said, or where nothing was, what was heard and seen."""
    return turn.text or ", ".join(media.name for media in (turn.audio, *turn.images) if media)


def suite_markdown(found: Comparison) -> Iterator[str]:
    """Lines of a table; none where no data set was asked."""
    lines = suite_rows(found)
    if lines:
        yield from ("", f"| {' | '.join(HEAD)} |", "|---|---|" + "---:|" * (len(HEAD) - 2))
        yield from (f"| {' | '.join(row)} |" for row in lines)


def suite_section(found: Comparison) -> str:
    """HTML: the table, and for each data set its groups and its flips."""
    suites = [suite for suite in suite_results(found) if suite.items]
    options = "".join(_options(found, suite) for suite in suites)
    return rows(HEAD, suite_rows(found), range(2, len(HEAD))) + note(TOLD) + options + "".join(map(_details, suites))


TOLD = (
    "Both sides answered the same items, so what counts is how many flipped: p is the exact McNemar test's, of "
    "transcriptions on those without an error. Detectable: the smallest loss that so many items show in 4 of 5 cases. "
    "Intervals: 95 %, bootstrap over items."
)


def _options(found: Comparison, suite: SuiteResult) -> str:
    """How likely the right option was, where options were chosen by letters."""
    names = ("right_option_reference", "right_option", "right_option_loss")
    before, after, change = (found.figure(f"suite.{suite.name}.{name}") for name in names)
    if before is None or after is None or change is None:
        return ""
    spread = f", a change of {_spread(change)}" if change.low is not None else ""
    text = f"{suite.name}: the right option had a probability of {before.value:.1%}, and has {after.value:.1%}{spread}."
    return note(text)


def _details(suite: SuiteResult) -> str:
    parts = [
        _groups(suite),
        _flips("right → wrong", suite.lost, "bad"),
        _flips("wrong → right", suite.gained, "good"),
    ]
    if not any(parts):
        return ""
    summary = f"{html.escape(suite.name)}: {len(suite.lost)} lost, {len(suite.gained)} gained"
    return f"<details><summary>{summary}</summary>{''.join(parts)}</details>"


def _groups(suite: SuiteResult) -> str:
    lines = []
    for name, items in suite.groups().items():
        n, before, after, lost, gained = _tally(items).values()
        shares = (f"{before / n:.1%}", f"{after / n:.1%}")
        lines.append((name or "(none)", str(n), *shares, str(lost), str(gained)))
    return rows(("group", "n", "reference", "candidate", "lost", "gained"), lines, range(1, 6)) if lines else ""


def _flips(title: str, items: Sequence[Item], kind: str) -> str:
    if not items:
        return ""
    more = f" The first {FLIPS} of {len(items)}; all are in report.json." if len(items) > FLIPS else ""
    lines = []
    for record in map(_item_record, items[:FLIPS]):
        said = (f"{record[side]}{_taken(record, place)}" for place, side in enumerate(("reference", "candidate")))
        lines.append((record["item"], record["asked"], " / ".join(record["expected"][:5]), *said))
    table = rows(("item", "asked", "expected", "reference", "candidate"), lines)
    return f'<p><span class="tag {kind}">{title}</span>{html.escape(more)}</p>{table}'


def _taken(record: dict[str, Any], place: int) -> str:
    """What was taken for the answer, where that is not all of it."""
    taken, said = record["taken"][place], record["reference" if place == 0 else "candidate"]
    return "" if taken.strip() == said.strip() else f" [{taken or 'nothing found'}]"
