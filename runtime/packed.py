"""Whom packed weights belong to: a note beside them names the bundles that use them, and its time is the last use."""

import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from runtime.bundle import MANIFEST
from runtime.cached import Entry, extent, inside, is_folder, unfinished
from runtime.files import is_file, sha256_of, write_whole

NOTE = "note.json"
NAME = re.compile(r"[0-9a-f]{32}")  # session.cache_key
UNFINISHED = re.compile(r"[0-9a-f]{32}\..+")


@dataclass(frozen=True)
class Note:
    """Packed weights serve every bundle with this manifest, wherever it lies: copies share them."""

    graph: str  # its file in the bundle
    manifest: str  # sha256 of the bundle's manifest
    onnxruntime: str  # version whose kernels they are packed for
    bundles: tuple[str, ...]  # folders they were opened from


def note_use(home: Path, folder: Path, graph: str, onnxruntime: str) -> None:
    """Note that the entry `home` was opened for a graph of the bundle `folder`; whatever is in the way of that is not
    worth a word, since it costs no more than the entry's place in the cache.
    """
    with suppress(OSError):
        note, bundle = read_note(home), str(folder.resolve())
        if note is not None and bundle in note.bundles:
            os.utime(home / NOTE)
        elif is_folder(home) and is_file(folder / MANIFEST):
            manifest = sha256_of(folder / MANIFEST)
            others = [other for other in note.bundles if _holds(other, manifest)] if note is not None else []
            _write(home, Note(graph, manifest, onnxruntime, (*others, bundle)))


def read_note(home: Path) -> Note | None:
    """None where there is no note, or none that can be understood."""
    try:
        found = json.loads((home / NOTE).read_bytes())
        graph, manifest, onnxruntime, bundles = (found[field.name] for field in fields(Note))
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    if not isinstance(bundles, list) or not all(
        isinstance(text, str) for text in (graph, manifest, onnxruntime, *bundles)
    ):
        return None
    return Note(graph, manifest, onnxruntime, tuple(bundles))


def entries(cache: Path, installed: Collection[str], gone: Collection[Path] = ()) -> Iterator[Entry]:
    """All packed weights in the cache folder.

    `installed` are the versions of ONNX Runtime that may use them (empty: any may), `gone` bundles that are still
    there but will not stay.
    """
    doomed = {str(bundle.resolve()) for bundle in gone}
    for path in inside(cache):
        if UNFINISHED.fullmatch(path.name):
            yield unfinished(path)
        elif NAME.fullmatch(path.name):
            yield _entry(path, installed, doomed)


def _entry(home: Path, installed: Collection[str], doomed: Collection[str]) -> Entry:
    nbytes, used = extent(home)
    note = read_note(home) if is_folder(home) else None
    if note is None:
        return Entry(home, "packed weights", "", "", nbytes, used, "nothing says what it belongs to")
    owners = [bundle for bundle in note.bundles if bundle not in doomed and _holds(bundle, note.manifest)]
    owner = (*owners, *note.bundles, "")[0]
    return Entry(home, "packed weights", owner, note.graph, nbytes, used, _unneeded(note, owners, installed, doomed))


def _unneeded(note: Note, owners: list[str], installed: Collection[str], doomed: Collection[str]) -> str | None:
    if not owners:
        there = any(is_file(Path(bundle) / MANIFEST) for bundle in note.bundles if bundle not in doomed)
        return "its bundle was changed" if there else "its bundle is gone"
    if installed and note.onnxruntime not in installed:
        return f"packed for ONNX Runtime {note.onnxruntime}, installed is {', '.join(sorted(installed))}"
    return None


def _holds(bundle: str, manifest: str) -> bool:
    """Whether a bundle with this manifest is (still) in a folder."""
    path = Path(bundle) / MANIFEST
    with suppress(OSError):
        return is_file(path) and sha256_of(path) == manifest
    return False


def _write(home: Path, note: Note) -> None:
    write_whole(home / NOTE, json.dumps(asdict(note), indent=1))
