"""Rows of a data set's files: CSV, TSV and JSON Lines, one at a time, with every mistake collected."""

import csv
import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.media import table_rows
from quant.turn import json_lines, listed
from runtime.errors import EdgeOmniError

# Columns under which data sets keep what belongs to a question.
ASKING = frozenset(
    ("context", "passage", "hint", "history", "system", "system_prompt", "dialogue", "image", "image_path", "video")
)
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
        """The first of these columns that says something, as text; "" where none does. NaN says nothing."""
        found = (said(self.fields.get(name)) for name in names)
        return next(filter(None, found), "")

    @property
    def where(self) -> str:
        return f"{self.file.name} row {self.number}"


def said(value: object) -> str:
    nothing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if nothing else str(value).strip()


@dataclass(frozen=True)
class Form:
    """How a table is written: what its columns are called here, and whether a quotation mark is only a character.

    `headless` names the columns of a table whose first row is one like the others.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    quoted: bool = True
    headless: tuple[str, ...] = ()


PLAIN = Form()


@dataclass
class Found:
    """A data set that is being read, what is wrong with it, and what of it is left out."""

    suite: str
    data: Path  # as the user named it
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _unread: set[tuple[str, str]] = field(default_factory=set)

    @property
    def what(self) -> str:
        return f"the suite {self.suite} at {self.data}"

    def wrong(self, row: Row, problem: str) -> None:
        self.problems.append(f"  {row.where}: {problem}")

    def lacks(self, row: Row, *columns: str) -> bool:
        """Whether any of these columns says nothing in the row, which is then a mistake."""
        missing = [name for name in columns if not row.text(name)]
        if missing:
            self.wrong(row, f"says nothing under {', '.join(missing)}")
        return bool(missing)

    def refuse_unread(self, row: Row, known: Container[str]) -> None:
        """Columns that say something and are neither read nor known to change nothing are a mistake, once a file."""
        for name in row.fields:
            if name in known or name.startswith("_") or not row.text(name) or (row.file.name, name) in self._unread:
                continue
            self._unread.add((row.file.name, name))
            self.problems.append(
                f"  {row.where}: column {name!r} is not read here and may change what is asked; leave it out, or call "
                f"it {'_' + name!r} if it does not"
            )

    def refuse_asking(self, row: Row) -> None:
        """The same where what is asked is known, whatever else is told: only columns that would ask are a mistake."""
        self.refuse_unread(row, frozenset(row.fields) - ASKING)

    def refuse(self) -> None:
        """EdgeOmniError with everything that was wrong, if anything was."""
        if self.problems:
            raise EdgeOmniError(f"{self.what} cannot be used:\n" + listed(self.problems))


def rows(path: Path, needed: Sequence[str], found: Found, form: Form = PLAIN) -> Iterator[Row]:
    """Rows of a .csv, .tsv or JSON Lines file; columns of `needed` that a table lacks are a mistake, and end it."""
    try:
        yield from (_table if path.suffix in DELIMITERS else _json_rows)(path, needed, found, form)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        found.problems.append(f"  {path.name} cannot be read: {error}")


def _table(path: Path, needed: Sequence[str], found: Found, form: Form) -> Iterator[Row]:
    with path.open("rb") as file:
        lines = table_rows(file, DELIMITERS[path.suffix], form.quoted)
        first = next(lines, [])
        columns = tuple(form.aliases.get(name.strip(), name.strip()) for name in first)
        if form.headless and len(first) == len(form.headless) and not set(needed) & set(columns):
            columns = form.headless
            file.seek(0)
        missing = [name for name in needed if name not in columns]
        if missing:
            has = ", ".join(columns) or "no column"
            found.problems.append(f"  {path.name}: has no column {', '.join(missing)}; it has {has}")
            return
        offset, number = file.tell(), 0
        for values in lines:
            if any(values):
                number += 1
                row = Row(path, number, dict(zip(columns, values, strict=False)), columns, offset)
                if len(values) == len(columns):
                    yield row
                else:  # a mark of quotation that is none, or one that is missing
                    found.wrong(row, f"has {len(values)} fields, and the table {len(columns)} columns")
            offset = file.tell()


def _json_rows(path: Path, needed: Sequence[str], found: Found, form: Form) -> Iterator[Row]:
    for number, line in enumerate(json_lines(path), 1):
        try:
            read = json.loads(line)
        except (ValueError, RecursionError) as error:
            found.wrong(Row(path, number, {}), f"is no JSON object ({error})")
            continue
        if not isinstance(read, dict):
            found.wrong(Row(path, number, {}), "is no JSON object")
            continue
        row = Row(path, number, {form.aliases.get(name, name): value for name, value in read.items()})
        if missing := [name for name in needed if name not in row.fields]:
            found.wrong(row, f"has no {', '.join(missing)}; it has {', '.join(row.fields)}")
        else:
            yield row


def files_in(data: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """The file that was named, or those of a folder whose names end so; EdgeOmniError where there is none."""
    if data.is_file():
        return [data]
    files = sorted(path for path in data.glob("*") if path.name.endswith(tuple(suffixes))) if data.is_dir() else []
    if not files:
        kinds = " or ".join(suffixes)
        there = "there is no such folder" if not data.exists() else f"it holds no {kinds} file"
        raise EdgeOmniError(f"{what} is not at {data}: {there}; name a {kinds} file or a folder of them with --data")
    return files
