"""What a turn lets a model hear or see: a file, or a picture inside a table that is decoded when it is looked at."""

import ast
import base64
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from runtime.errors import MediaError


@dataclass(frozen=True)
class Embedded:
    """A picture as base64 in a field of a tab-separated table; nothing of it stays in memory, and no file is made."""

    table: Path
    offset: int  # bytes before its row
    column: int
    place: int = 0  # among several pictures of one field

    @property
    def name(self) -> str:
        return f"{self.table.stem}-{self.offset}-{self.place}"

    def read(self) -> bytes:
        """The picture's file. MediaError where the field is no base64."""
        try:
            return base64.b64decode(pictures(self._field())[self.place])
        except (OSError, ValueError, IndexError, StopIteration) as error:
            raise MediaError(f"the picture at byte {self.offset} of {self.table} cannot be read: {error}") from None

    def _field(self) -> str:
        with self.table.open("rb") as file:
            file.seek(self.offset)
            return next(table_rows(file, "\t"))[self.column]


Media = Path | Embedded


def table_rows(file: BinaryIO, delimiter: str, quoted: bool = True) -> Iterator[list[str]]:
    """A csv.reader over an open binary file that reads no further than each row, so that `file.tell()` is its end.

    csv.Error where the file ends inside quotes, which would make all rows behind a stray mark one field.
    """
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 kB is less than a picture
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(_lines(file), delimiter=delimiter, quoting=quoting, strict=quoted)


def _lines(file: BinaryIO) -> Iterator[str]:
    """Lines as text, without the byte order mark that some programs begin a file with."""
    while True:
        encoding = "utf-8" if file.tell() else "utf-8-sig"
        if not (line := file.readline()):
            return
        yield line.decode(encoding)


def pictures(field: str) -> list[str]:
    """The entries of a field that holds one text or, as a Python list, several."""
    if not field.startswith("["):
        return [field]
    try:
        return [str(entry) for entry in ast.literal_eval(field)]
    except (ValueError, SyntaxError):
        return [field]


def source(media: Media) -> Path | bytes:
    """What `Engine.look` takes."""
    return media.read() if isinstance(media, Embedded) else media
