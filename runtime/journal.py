"""What a run has finished, line by line on disk, so that after a kill the same run goes on where it was."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

JOURNAL = "journal.jsonl"
EVERY = 0.25  # seconds of work that a kill may cost; more often is not waited for the disk, which takes 10 ms


class Journal:
    """The journal of one job in `folder`: JSON lines, the job first, then each thing that was finished.

    A run asks before each step whether it was done (`recall`), does it if not, and then says so (`record`), naming the
    files that it wrote to. It must come to its steps, and to what it writes, in the same order each time: then what a
    killed run and the one that takes it up write together is what one run would have written.

        journal = Journal.taken_up(folder, job) or Journal.begun(folder, job)
        with journal.append_to(folder / "x.data") as out:
            for name in names:
                place = journal.recall(name)
                if place is None:
                    place = write(name, out)
                    journal.record(name, place, out)

    `job` is whatever JSON tells one job from another. Only files below `folder` can be named. What was recorded is
    still known after a kill or a power cut, but for that of the last EVERY seconds, which is done again.
    """

    def __init__(self, folder: Path, out: BinaryIO, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._folder, self._out = folder, out
        self._done: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}
        self._waiting: list[dict[str, Any]] = []
        self._synced = time.monotonic()
        for line in lines:
            self._take(line)

    @classmethod
    def begun(cls, folder: Path, job: Any) -> "Journal":
        journal = cls(folder, (folder / JOURNAL).open("wb"))
        journal._write({"job": job})
        return journal

    @classmethod
    def taken_up(cls, folder: Path, job: Any) -> "Journal | None":
        """The journal that a killed run of the same job left; None if there is none, or its files are not there.

        A last line that was cut off while it was written counts for nothing.
        """
        path = folder / JOURNAL
        stored = path.read_bytes() if path.is_file() else b""
        end = stored.rfind(b"\n") + 1
        lines = [_parsed(line) for line in stored[:end].splitlines()]
        if not lines or lines[0] != {"job": json.loads(json.dumps(job))} or None in lines:
            return None
        journal = cls(folder, path.open("r+b"), (line for line in lines[1:] if line is not None))
        if not all(journal._reaches(*item) for item in journal._lengths.items()):
            journal.close()
            return None
        journal._out.truncate(end)
        journal._out.seek(end)
        return journal

    def recall(self, key: str) -> Any:
        """The value that `key` was recorded with, as JSON gives it back (tuples become lists); None if it never was."""
        return self._done.get(key)

    def record(self, key: str, value: Any, *written: BinaryIO) -> None:
        """Say that `key` is finished, and how far the open files have come that were written for it."""
        lengths = {}
        for out in written:
            out.flush()
            lengths[self._name(Path(out.name))] = out.tell()
        line = {"key": key, "value": value, "lengths": lengths}
        self._take(line)
        self._waiting.append(line)
        if time.monotonic() - self._synced >= EVERY:
            self.sync()

    def sync(self) -> None:
        """Put on disk what was recorded, first the files and then what is said of them; `record` calls it in time."""
        for name in {name for line in self._waiting for name in line["lengths"]}:
            with (self._folder / name).open("rb") as file:
                os.fsync(file.fileno())
        self._write(*self._waiting)
        self._waiting.clear()
        self._synced = time.monotonic()

    def append_to(self, file: Path) -> BinaryIO:
        """The file, open behind the last thing recorded of it; what a killed run wrote after that is cut off."""
        length = self._lengths.get(self._name(file), 0)
        out = file.open("r+b" if length else "wb")
        out.truncate(length)
        out.seek(length)
        return out

    def close(self) -> None:
        self._out.close()

    def _write(self, *lines: Mapping[str, Any]) -> None:
        self._out.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        self._out.flush()
        os.fsync(self._out.fileno())

    def _take(self, line: Mapping[str, Any]) -> None:
        self._done[line["key"]] = line["value"]
        self._lengths |= line["lengths"]

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    def _reaches(self, name: str, length: int) -> bool:
        file = self._folder / name
        return file.is_file() and file.stat().st_size >= length


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's JSON object; None if a disk that lost power left something else."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
