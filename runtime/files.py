"""Whether a path names something, whatever was typed: a name that is too long or not permitted names nothing."""

from collections.abc import Callable
from pathlib import Path


def is_file(path: str | Path) -> bool:
    return _asked(path, Path.is_file)


def exists(path: str | Path) -> bool:
    return _asked(path, Path.exists)


def _asked(path: str | Path, question: Callable[[Path], bool]) -> bool:
    try:
        return question(Path(path))
    except (OSError, ValueError):  # ValueError: a character that no name may hold
        return False
