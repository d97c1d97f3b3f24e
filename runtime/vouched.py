"""Whether a file that a bundle does not have to itself still holds what its checksum says; asked at every opening."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.cached import Entry, extent, inside, is_folder, unfinished
from runtime.errors import EdgeOmniError
from runtime.files import cache_folder, sha256_of, write_whole

NOTES = "vouched"  # folder, in the cache, of what was found out of large files
BLOCK, BLOCKS = 4096, 64  # bytes of a sample's pieces, and how many there are
SETTLED_NS = 2_000_000_000  # a file system's clock may tick so seldom that a later change bears the same time

Identity = tuple[int, int, int, int, int]
_known: dict[Identity, str] = {}


def sample_of(path: Path) -> str:
    """sha256 of 64 blocks of 4096 bytes, spread evenly over a file from its beginning to its end."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        last = max(0, os.fstat(file.fileno()).st_size - BLOCK)
        for index in range(BLOCKS):
            digest.update(os.pread(file.fileno(), BLOCK, last * index // (BLOCKS - 1)))
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """sha256 of a regular file.

    It is computed once and then remembered, in this process and in the cache folder, until the file is written to: by
    device, inode, size and the times of its last changes. OSError if it cannot be read.
    """
    before = identity(path)
    if (known := _known.get(before)) is not None:
        return known
    note = _note(path)
    if note is not None and (noted := _noted_of(note, path, before)) is not None:
        return noted
    found = sha256_of(path)
    if identity(path) == before and time.time_ns() - max(before[3:]) > SETTLED_NS:
        _known[before] = found
        if note is not None:
            _write(note, _content(path, before, found))
    return found


def holds(path: Path, sha256: str) -> bool:
    """Whether the content of a regular file has this checksum; OSError if it cannot be read."""
    return checksum(path) == sha256


def identity(path: Path) -> Identity:
    """What tells a file from another and from itself after it was written to."""
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def entries(cache: Path) -> Iterator[Entry]:
    """All that is remembered in the cache folder, each by the file that it is about."""
    for note in inside(cache / NOTES):
        nbytes, used = extent(note)
        if re.fullmatch(r"[0-9a-f]{32}\.\d+", note.name):
            yield unfinished(note)
        elif re.fullmatch("[0-9a-f]{32}", note.name):
            owner, unneeded = _about(note)
            yield Entry(note, "checksum", owner, "", nbytes, used, unneeded)


def _about(note: Path) -> tuple[str, str | None]:
    """The file that is remembered, and why that is of no use any more."""
    found = None if note.is_symlink() else _read(note)
    if not isinstance(found, dict) or not isinstance(path := found.get("path"), str):
        return "", "nothing says what it belongs to"
    try:
        return path, None if list(identity(Path(path))) == found.get("identity") else "the file was changed"
    except (OSError, ValueError):
        return path, "the file is gone"


def _note(path: Path) -> Path | None:
    with suppress(EdgeOmniError):
        return cache_folder() / NOTES / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return None


def _content(path: Path, state: Identity, sha256: str) -> dict[str, Any]:
    return {"path": str(path.resolve()), "identity": list(state), "sha256": sha256}


def _noted_of(note: Path, path: Path, state: Identity) -> str | None:
    """The checksum that was noted of the file in this state."""
    found = _read(note)
    sha256 = found.get("sha256") if isinstance(found, dict) else None
    return sha256 if isinstance(sha256, str) and found == _content(path, state, sha256) else None


def _read(note: Path) -> Any:
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _write(note: Path, content: dict[str, Any]) -> None:
    """A full or read-only place costs the next opening the time, and no more than that. A link is not followed."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        if is_folder(note.parent):
            write_whole(note, json.dumps(content))
