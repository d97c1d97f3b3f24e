"""Writing a bundle: beside its target, whole or not at all; its weights where ONNX Runtime can map them into memory."""

import fcntl
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from runtime.bundle import is_bundle
from runtime.errors import EdgeOmniError
from runtime.journal import Journal

ALIGNMENT = 4096  # ONNX Runtime maps initializers into memory by pages
FINE_ALIGNMENT = 64  # of those that are smaller than a page
DRAFT, WORK = "bundle", "work"  # folders of a bundle in the making
SMALL = 1024  # bytes; smaller initializers stay in the .onnx file, where shape inference can read them


@dataclass(frozen=True)
class Place:
    """Where an initializer's bytes lie, relative to the bundle."""

    file: str
    offset: int
    nbytes: int


def append(out: BinaryIO, name: str, array: np.ndarray) -> Place:
    """Write an array at the next aligned place of the weight file `name`, which is open as `out`."""
    return append_pieces(out, name, array.nbytes, [array])


def append_pieces(out: BinaryIO, name: str, nbytes: int, pieces: Iterable[np.ndarray]) -> Place:
    """As `append`, for an array of `nbytes` bytes that comes in rows, so that it is never whole in memory."""
    offset = align(out, nbytes)
    for piece in pieces:
        out.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return Place(name, offset, nbytes)


def align(out: BinaryIO, nbytes: int) -> int:
    """Fill up with zeros to where `nbytes` bytes may lie, and say where that is."""
    step = ALIGNMENT if nbytes >= ALIGNMENT else FINE_ALIGNMENT
    offset = -(-out.tell() // step) * step
    out.write(b"\0" * (offset - out.tell()))
    return offset


def refuse_target(out: Path, force: bool) -> None:
    """EdgeOmniError if `out` holds anything but a bundle that may be replaced, or lies in another bundle."""
    for folder in out.resolve().parents:
        if is_bundle(folder):
            raise EdgeOmniError(f"{out} lies in the bundle {folder}; name a folder outside of it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_bundle(out):
        raise EdgeOmniError(f"{out} exists and is not a bundle; name a folder that does not exist")
    if not force:
        raise EdgeOmniError(f"{out} is a bundle already; --force replaces it")


def require_space(folder: Path, needed: int) -> None:
    """EdgeOmniError if the disk under `folder` cannot take `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeOmniError(f"{folder} has {free / 1e9:.2f} GB free, the bundle needs {needed / 1e9:.2f} GB")


@dataclass(frozen=True)
class Draft:
    """A bundle in the making: `folder` becomes the bundle, `work` is for what it does not need in the end."""

    folder: Path
    work: Path
    journal: Journal

    def bytes_written(self, shared: Collection[str] = ()) -> int:
        """Bytes that are in the folder already; the files called `shared` have none of their own."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.name not in shared)


@contextmanager
def drafting(out: Path, job: Any) -> Iterator[Draft]:
    """A draft beside `out` whose folder takes that name when the body succeeds. Two at once are refused by a lock.

    If the body raises, Ctrl-C included, nothing is left. A run that is killed (a signal, a power cut) leaves its draft.
    The next run finds it again if `job` is equal, JSON values that must hold all that decides about the bytes; else
    removes it.
    """
    scratch, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
    known = out.exists() or old.exists()  # else what is there in the end is not ours to replace
    with _lock_file(out) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EdgeOmniError(f"another process is writing {out}; wait for it or stop it") from None
        if old.exists() and not out.exists():  # killed between the two renames below
            old.rename(out)
        try:
            _refuse_new(out, known)  # a/../b is there only now that a was made
            draft = _open_draft(scratch, job)
            with closing(draft.journal):
                yield draft
            _refuse_new(out, known)
            _take_place(draft.folder, out, old)
        except OSError as error:
            raise EdgeOmniError(
                f"{out} could not be written: {error.strerror or error}; nothing was changed"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """As `drafting`, for what is written so quickly that it is begun anew after a kill; yields the draft's folder."""
    with drafting(out, None) as draft:
        yield draft.folder


def _open_draft(scratch: Path, job: Any) -> Draft:
    folder, work = scratch / DRAFT, scratch / WORK
    journal = Journal.taken_up(scratch, job) if job is not None and folder.is_dir() else None
    if journal is None:
        shutil.rmtree(scratch, ignore_errors=True)
        for path in (scratch, work, folder):
            path.mkdir()
        journal = Journal.begun(scratch, job)
    return Draft(folder, work, journal)


def _lock_file(out: Path) -> TextIO:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return (out.parent / f".{out.name}.lock").open("w")
    except OSError as error:
        raise EdgeOmniError(f"nothing can be written beside {out}: {error.strerror}; name another folder") from None


def _refuse_new(out: Path, known: bool) -> None:
    if out.exists() and not known:
        raise EdgeOmniError(f"{out} was not there before and is now; nothing was changed, name another folder")


def _take_place(folder: Path, out: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)
