"""OpenAudioBench (Baichuan 2025) as published: eval_datas/NAME/NAME.csv and eval_datas/NAME/audios."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from quant.comparison.suites.rows import Found, Row, rows
from quant.turn import Metric, Turn
from runtime.errors import EdgeOmniError

MAX_NEW = 128
FILE = "audio_filename"


@dataclass(frozen=True)
class Subset:
    """One of its five sets, and which columns hold the answers that count."""

    name: str
    answers: tuple[str, ...]
    metric: Metric
    split: Callable[[str], list[str]] = lambda text: [text]


def _at(delimiter: str) -> Callable[[str], list[str]]:
    return lambda text: [part.strip(" []'\"") for part in text.split(delimiter)]


# All five are published with a model as judge. The answers of three are short enough to be found in what was said.
SUBSETS = (
    Subset("llama_questions", ("Answer",), "contains"),
    Subset("web_questions", ("answers",), "contains", _at(";")),
    Subset("trivia_qa", ("answer_normalized_value", "answer_normalized_aliases"), "contains", _at(",")),
    Subset("reasoning_qa", (), "judge"),
    Subset("alpaca_eval", (), "judge"),
)


def read(data: Path, found: Found) -> Iterator[Turn]:
    """All of the five sets that are there, each with a score of its own; the question is heard, not read."""
    folder = data / "eval_datas" if (data / "eval_datas").is_dir() else data
    there = [(subset, path) for subset in SUBSETS if (path := folder / subset.name / f"{subset.name}.csv").is_file()]
    if not there:
        names = ", ".join(f"{subset.name}/{subset.name}.csv" for subset in SUBSETS)
        raise EdgeOmniError(f"the suite openaudiobench is not at {data}: there is none of {names}")
    for subset, path in there:
        for row in rows(path, (FILE, *subset.answers), found):
            if turn := _turn(subset, row, found):
                yield turn


def read_spoken(data: Path, found: Found) -> Iterator[Turn]:
    """The same, answered aloud; what is judged is the text that is spoken."""
    return (replace(turn, spoken=True, suite=f"{turn.suite}-spoken") for turn in read(data, found))


def _turn(subset: Subset, row: Row, found: Found) -> Turn | None:
    found.refuse_asking(row)
    if found.lacks(row, FILE, *subset.answers[:1]):
        return None
    answers = [part for name in subset.answers for part in subset.split(row.text(name)) if part]
    return Turn(
        text="",
        audio=row.file.parent / "audios" / row.text(FILE),
        answers=tuple(dict.fromkeys(answers)),
        metric=subset.metric,
        suite=f"openaudiobench/{subset.name}",
        item=row.text(FILE),
        max_new=MAX_NEW,
    )
