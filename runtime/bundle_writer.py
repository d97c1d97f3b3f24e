"""Writing a bundle: beside its target, whole or not at all; its weights where ONNX Runtime can map them into memory."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from runtime.bundle import MANIFEST
from runtime.errors import EdgeOmniError

ALIGNMENT = 4096  # ONNX Runtime maps initializers into memory by pages
FINE_ALIGNMENT = 64  # of those that are smaller than a page
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


def link(file: Path, folder: Path) -> str | None:
    """Give `file` a second name in the bundle (ONNX Runtime refuses symbolic links that leave the folder).

    Returns that name, or None on another file system or one without hard links: then it must be copied.
    """
    try:
        os.link(file.resolve(), folder / file.name)
    except OSError:
        return None
    return file.name


def refuse_target(out: Path, force: bool) -> None:
    """EdgeOmniError if `out` holds anything but a bundle that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise EdgeOmniError(f"{out} exists and is not a bundle; name a folder that does not exist")
    if not force:
        raise EdgeOmniError(f"{out} is a bundle already; --force replaces it")


def require_space(folder: Path, needed: int) -> None:
    """EdgeOmniError if the disk under `folder` cannot take `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeOmniError(f"{folder.parent} has {free / 1e9:.2f} GB free, the bundle needs {needed / 1e9:.2f} GB")


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the body succeeds, and is removed when it fails.

    What a killed run left behind is removed by the next one; two at once are refused by a lock.
    """
    scratch, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
    with _lock_file(out) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EdgeOmniError(f"another process is writing {out}; wait for it or stop it") from None
        if old.exists() and not out.exists():  # killed between the two renames below
            old.rename(out)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
            _take_place(scratch, out, old)
        except OSError as error:
            raise EdgeOmniError(
                f"{out} could not be written: {error.strerror or error}; nothing was changed"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


def _lock_file(out: Path) -> TextIO:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return (out.parent / f".{out.name}.lock").open("w")
    except OSError as error:
        raise EdgeOmniError(f"nothing can be written beside {out}: {error.strerror}; name another folder") from None


def _take_place(scratch: Path, out: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    scratch.rename(out)
    shutil.rmtree(old, ignore_errors=True)
