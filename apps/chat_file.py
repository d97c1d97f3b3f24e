"""A conversation as a file: what was said and shown and answered, so that it can go on later, with any bundle."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from apps.saved import save_json
from runtime.errors import EdgeOmniError

Kind = Literal["text", "audio", "image", "video"]
VERSION = 1


@dataclass(frozen=True)
class Given:
    """A part of a turn: a text, or the whole path of a file."""

    kind: Kind
    value: str


@dataclass(frozen=True)
class Exchange:
    """A turn and what was answered, in text."""

    user: tuple[Given, ...]
    answer: str


@dataclass(frozen=True)
class Saved:
    system: str | None  # None: the bundle's own
    turns: tuple[Exchange, ...]


def save(path: Path, saved: Saved) -> None:
    """Write one JSON object. SaveError where that is not possible."""
    save_json(path, {"edgeomni_chat": VERSION, **asdict(saved)})


def load(path: Path) -> Saved:
    """Read what `save` wrote. EdgeOmniError for a file that is missing, or none of ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["edgeomni_chat"] != VERSION:
            raise ValueError(f"its version is {record['edgeomni_chat']!r}, expected {VERSION}")
        return Saved(_string(record["system"], none=True), tuple(_exchange(turn) for turn in record["turns"]))
    except OSError as error:
        raise EdgeOmniError(f"{path} cannot be read ({error.strerror}); name a file that /save wrote") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise EdgeOmniError(f"{path} is no conversation that /save wrote: {why}") from None


def _exchange(record: Any) -> Exchange:
    user = tuple(Given(_kind(part["kind"]), _string(part["value"]) or "") for part in record["user"])
    return Exchange(user, _string(record["answer"]) or "")


def _kind(value: Any) -> Kind:
    if value not in ("text", "audio", "image", "video"):
        raise ValueError(f"a part is of kind {value!r}, expected text, audio, image or video")
    return value


def _string(value: Any, none: bool = False) -> str | None:
    if not isinstance(value, str) and not (none and value is None):
        raise TypeError(f"{value!r} stands where a text is expected")
    return value
