"""Bytes and JSON of a checkpoint's files, read within limits; whatever is wrong with a file is a CheckpointError."""

import json
import os
import stat
from collections import Counter
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from export.problems import listed
from runtime.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20


def file_size(path: Path) -> int:
    """Bytes of a regular file; a link counts as what it points to.

    Raises CheckpointError for what is missing, unreadable, or no regular file (a folder, a pipe, a device).
    """
    try:
        found = path.stat()
        readable = os.access(path, os.R_OK)
    except FileNotFoundError:
        how = "is a link to a file that is not there" if path.is_symlink() else f"is missing from {str(path.parent)!r}"
        raise CheckpointError(f"{path.name!r} {how}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL or a lone surrogate in it
        raise CheckpointError(f"cannot open {path.name!r}: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path.name!r} is not a regular file")
    if not readable:
        raise CheckpointError(f"{path.name!r} may not be read: its permissions forbid it")
    return found.st_size


def read_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """Exactly `nbytes` bytes from `offset` on, uint8 [nbytes], without mapping the file.

    Raises CheckpointError if the file holds fewer, which means that it changed after it was opened.
    """
    try:
        data = np.fromfile(path, np.uint8, count=nbytes, offset=offset)
    except OSError as error:
        raise CheckpointError(f"{path.name!r} can no longer be read: {error}") from None
    if data.size != nbytes:
        raise CheckpointError(
            f"{path.name!r} changed while it was in use: {data.size} bytes found at {offset}, {nbytes} expected"
        )
    return data


def read_text(path: Path) -> str:
    """The file's text. CheckpointError where it is not UTF-8."""
    try:
        return read_bytes(path, 0, file_size(path)).tobytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from None


def read_strips(path: Path, offset: int, nbytes: int, stride: int, count: int) -> np.ndarray:
    """`count` strips of `nbytes` bytes, the first at `offset` and each `stride` after the one before, in a row.

    Raises CheckpointError if the file holds fewer, which means that it changed after it was opened.
    """
    try:
        with path.open("rb", buffering=0) as file:
            strips = [os.pread(file.fileno(), nbytes, offset + index * stride) for index in range(count)]
    except OSError as error:
        raise CheckpointError(f"{path.name!r} can no longer be read: {error}") from None
    data = np.frombuffer(b"".join(strips), np.uint8)
    if data.size != nbytes * count:
        raise CheckpointError(f"{path.name!r} changed while it was in use: {data.size} bytes found at {offset}")
    return data


def read_json(path: Path) -> Any:
    """The file's JSON, with CheckpointError for what is too large, malformed or says a key twice."""
    size = file_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path.name!r} has {size} bytes, at most {MAX_JSON_BYTES} expected of a JSON file")
    return parse_json(read_bytes(path, 0, size).tobytes(), repr(path.name))


def read_json_object(path: Path) -> dict[str, Any]:
    """As `read_json`, for a file that must hold one JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name!r} holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_json(text: bytes, subject: str) -> Any:
    """Parsed JSON; `subject` is what the error calls it. A key said twice in one object is refused."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{subject} is not valid JSON: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
        raise ValueError(f"said more than once: {listed(twice)}")
    return value


def stays_inside(name: str) -> bool:
    """Whether a relative file name, joined to a folder, names something in that folder on every system."""
    # The Windows reading is the stricter one: it takes both slashes and knows drives.
    path = PureWindowsPath(name)
    return bool(path.parts) and not path.anchor and ".." not in path.parts
