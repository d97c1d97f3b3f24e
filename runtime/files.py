"""Paths on this machine: whether one names something, whatever was typed, and where what can be made again is kept."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from runtime.errors import EdgeOmniError


def is_file(path: str | Path) -> bool:
    return _asked(path, Path.is_file)


def exists(path: str | Path) -> bool:
    return _asked(path, Path.exists)


def _asked(path: str | Path, question: Callable[[Path], bool]) -> bool:
    """A name that is too long or not permitted names nothing."""
    try:
        return question(Path(path))
    except (OSError, ValueError):  # ValueError: a character that no name may hold
        return False


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """All of the text or nothing, also when two processes write at once; OSError where it cannot be written."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where packed weights and the like are kept: $XDG_CACHE_HOME/edgeomni, else ~/.cache/edgeomni.

    Raises EdgeOmniError where neither variable nor home folder says where that is.
    """
    place = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not place.is_absolute():
        try:
            place = Path.home() / ".cache"
        except RuntimeError:
            raise EdgeOmniError("this user has no home folder; set HOME or XDG_CACHE_HOME to a folder") from None
    if not place.is_absolute():  # HOME may hold anything
        raise EdgeOmniError(f"HOME is {str(place.parent)!r}, expected a whole path; set HOME or XDG_CACHE_HOME")
    return place / "edgeomni"
