"""UltraEval-Audio's own data sets: YAML that registers JSON Lines with the path of each audio under WavPath."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quant.comparison.suites.prompts import WRITE_DOWN, WRITE_DOWN_CHINESE
from quant.comparison.suites.rows import Found, Row, rows
from quant.turn import Metric, Turn
from runtime.errors import EdgeOmniError

MAX_NEW = 256
AUDIO = "WavPath"
ARGUMENTS = ("default_task", "f_name", "ref_col", "file_path_prefix", "col_aliases")
_AQA = "answer the question without explain\n# Question: {QuestionText}"


@dataclass(frozen=True)
class Task:
    """How a default_task asks, and which of UltraEval's evaluators that need no other model judges it."""

    prompt: str
    metric: Metric
    columns: tuple[str, ...] = ()  # that the prompt quotes


# registry/eval_task/{asr,aqa}.yaml; asr and asr-zh ask as their variants -3o do, in words and not in JSON.
TASKS = {
    **dict.fromkeys(("asr", "asr-3o"), Task(WRITE_DOWN, "wer")),
    **dict.fromkeys(("asr-zh", "asr-zh-3o", "asr-yue"), Task(WRITE_DOWN_CHINESE, "cer")),
    "asr-jp": Task(WRITE_DOWN, "cer"),
    "aqa": Task(_AQA, "prefix", ("QuestionText",)),
    "loose-aqa": Task("", "exists"),
}


@dataclass(frozen=True)
class Registered:
    """One entry of a YAML file: the file, its task, the column with the reference, and where audio paths may begin."""

    name: str
    file: Path
    task: Task
    reference: str
    folders: tuple[Path, ...]
    aliases: dict[str, str]  # column -> its further name


def read(data: Path, found: Found) -> Iterator[Turn]:
    """Every data set that a YAML file registers, each with a score of its own."""
    for path in _registries(data):
        for entry in _entries(path, data, found):
            for row in rows(entry.file, (AUDIO, entry.reference), found):
                if turn := _turn(entry, row, found):
                    yield turn


def _registries(data: Path) -> list[Path]:
    if data.suffix in (".yaml", ".yml"):
        return [data]
    files = sorted(path for path in data.rglob("*.y*ml") if path.suffix in (".yaml", ".yml"))
    if not files:
        raise EdgeOmniError(
            f"the suite ultraeval-audio is not at {data}: there is no YAML file that registers a data set, like\n"
            "  mine: {class: audio_evals.dataset.dataset.JsonlFile, "
            "args: {default_task: asr, f_name: mine.jsonl, ref_col: Transcript}}"
        )
    return files


def _entries(path: Path, data: Path, found: Found) -> list[Registered]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        found.problems.append(f"  {path.name} cannot be read: {error}")
        return []
    entries = document.items() if isinstance(document, dict) else ()
    return [made for name, entry in entries if (made := _entry(path, data, str(name), entry, found))]


def _entry(path: Path, data: Path, name: str, entry: Any, found: Found) -> Registered | None:
    """None for what registers something else, and for what is wrong."""
    kind = str(entry.get("class", "")) if isinstance(entry, dict) else ""
    if not kind.startswith("audio_evals.dataset."):
        return None
    args = entry.get("args") or {}
    if not isinstance(args, dict):
        found.problems.append(f"  {path.name}, {name}: args is no mapping")
        return None
    problems = (
        [] if kind.endswith(("JsonlFile", "RelativePath")) else [f"{kind} is not read; JsonlFile and RelativePath are"]
    )
    problems += [f"says nothing under {key}" for key in ("f_name", "default_task", "ref_col") if not args.get(key)]
    problems += [f"{key} is not read, and may change what is asked" for key in args if key not in ARGUMENTS]
    task = TASKS.get(str(args.get("default_task")))
    if args.get("default_task") and task is None:
        problems.append(f"default_task {args['default_task']} cannot be judged here; {', '.join(TASKS)} can")
    aliases = args.get("col_aliases") or {}
    problems += [] if isinstance(aliases, dict) else [f"col_aliases is {aliases!r}; expected a mapping"]
    found.problems += [f"  {path.name}, {name}: {problem}" for problem in problems]
    if problems or task is None:
        return None
    roots = (path.parent, data if data.is_dir() else data.parent)
    file = _first(str(args["f_name"]), roots)
    folders = (file.parent, *roots)
    if prefix := args.get("file_path_prefix"):
        folders = (*(folder / str(prefix) for folder in folders), *folders)
    return Registered(name, file, task, str(args["ref_col"]), folders, aliases)


def _first(name: str, folders: Sequence[Path]) -> Path:
    """Where a file is, of several places: their paths are relative to wherever the harness is started."""
    places = [folder / name for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def _turn(entry: Registered, row: Row, found: Found) -> Turn | None:
    fields = {**row.fields, **{alias: row.fields.get(column) for column, alias in entry.aliases.items()}}
    found.refuse_asking(row)
    quoted = [name for name in entry.task.columns if not str(fields.get(name) or "").strip()]
    if quoted:
        found.wrong(row, f"says nothing under {', '.join(quoted)}")
    if found.lacks(row, AUDIO, entry.reference) or quoted:
        return None
    answers = row.fields[entry.reference]
    return Turn(
        text=entry.task.prompt.format(**{name: fields[name] for name in entry.task.columns}),
        audio=_first(row.text(AUDIO), entry.folders),
        answers=tuple(map(str, answers)) if isinstance(answers, list) else (str(answers),),
        metric=entry.task.metric,
        suite=entry.name,
        item=f"{row.number}",
        max_new=MAX_NEW,
    )
