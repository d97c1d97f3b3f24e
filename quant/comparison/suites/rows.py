"""Rows of a data set's files: CSV, TSV and JSON Lines, one at a time, with every mistake collected."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.media import table_rows
from quant.turn import listed
from runtime.errors import EdgeOmniError

DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """A row by column names, and where it stands: its number among the rows, and the bytes before it."""

    file: Path
    number: int
    fields: dict[str, Any]
    columns: tuple[str, ...] = ()
    offset: int = 0

    def text(self, *names: str) -> str:
        """The first of these columns that says something, as text; "" where none does."""
        found = (self.fields.get(name) for name in names)
        return next((str(value).strip() for value in found if value is not None and str(value).strip()), "")

    @property
    def where(self) -> str:
        return f"{self.file.name} row {self.number}"


@dataclass
class Found:
    """A data set that is being read, and what is wrong with it."""

    what: str  # the suite and its folder, for messages
    problems: list[str] = field(default_factory=list)

    def wrong(self, row: Row, problem: str) -> None:
        self.problems.append(f"  {row.where}: {problem}")

    def lacks(self, row: Row, *columns: str) -> bool:
        """Whether any of these columns says nothing in the row, which is then a mistake."""
        missing = [name for name in columns if not row.text(name)]
        if missing:
            self.wrong(row, f"says nothing under {', '.join(missing)}")
        return bool(missing)

    def refuse(self) -> None:
        """EdgeOmniError with everything that was wrong, if anything was."""
        if self.problems:
            raise EdgeOmniError(f"{self.what} cannot be used:\n" + listed(self.problems))


def rows(path: Path, needed: Sequence[str], found: Found) -> Iterator[Row]:
    """Rows of a .csv, .tsv or .jsonl file; columns of `needed` that a table lacks are a mistake, and end it."""
    try:
        yield from (_table if path.suffix in DELIMITERS else _json_lines)(path, needed, found)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        found.problems.append(f"  {path.name} cannot be read: {error}")


def _table(path: Path, needed: Sequence[str], found: Found) -> Iterator[Row]:
    with path.open("rb") as file:
        lines = table_rows(file, DELIMITERS[path.suffix])
        columns = tuple(name.strip("\ufeff ") for name in next(lines, ()))
        missing = [name for name in needed if name not in columns]
        if missing:
            has = ", ".join(columns) or "no column"
            found.problems.append(f"  {path.name}: has no column {', '.join(missing)}; it has {has}")
            return
        offset, number = file.tell(), 0
        for values in lines:
            if any(values):
                number += 1
                yield Row(path, number, dict(zip(columns, values, strict=False)), columns, offset)
            offset = file.tell()


def _json_lines(path: Path, needed: Sequence[str], found: Found) -> Iterator[Row]:
    number = 0
    for line in path.read_text(encoding="utf-8-sig").split("\n"):  # splitlines would also cut at U+2028 in a text
        if not line.strip():
            continue
        number += 1
        try:
            said = json.loads(line)
        except ValueError as error:
            said = error
        row = Row(path, number, said if isinstance(said, dict) else {})
        if not isinstance(said, dict):
            found.wrong(row, f"is no JSON object ({said})" if isinstance(said, ValueError) else "is no JSON object")
        elif missing := [name for name in needed if name not in said]:
            found.wrong(row, f"has no {', '.join(missing)}; it has {', '.join(said)}")
        else:
            yield row


def files_in(data: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """The file that was named, or those of a folder with one of these suffixes; EdgeOmniError where there is none."""
    if data.is_file():
        return [data]
    files = sorted(path for path in data.glob("*") if path.suffix in suffixes) if data.is_dir() else []
    if not files:
        kinds = " or ".join(suffixes)
        there = "there is no such folder" if not data.exists() else f"it holds no {kinds} file"
        raise EdgeOmniError(f"{what} is not at {data}: {there}; name a {kinds} file or a folder of them with --data")
    return files
