"""Files that a bundle takes over whole from what it is made from: without room of their own, where that can be."""

import os
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

FICLONE = 0x40049409  # linux/fs.h: let a file have the blocks of another, until either of the two is written to


def share(files: Iterable[Path], folder: Path, link: bool, taken: Collection[str]) -> dict[Path, str]:
    """Give `files` a place in the bundle that takes no room, under their own names; those that got one, by theirs.

    They are cloned where the file system can, which keeps them as they are whatever becomes of the original. With
    `link` they are the original, by a hard link. The others, and those whose name is `taken` by what the bundle writes
    itself (into the original, it would be), must be copied. A killed run may have left any of them.
    """
    shared: dict[Path, str] = {}
    for file in files:
        if file.name not in taken and file.name not in shared.values():
            place = folder / file.name
            if _linked(file, place) if link else _cloned(file, place):
                shared[file] = file.name
    return shared


def _linked(file: Path, place: Path) -> bool:
    """ONNX Runtime refuses symbolic links that leave the folder, so it is a hard one."""
    try:
        if not (place.exists() and place.samefile(file)):
            os.link(file.resolve(), place)
    except OSError:  # another file system, or one without hard links
        return False
    return True


def _cloned(file: Path, place: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        place.unlink(missing_ok=True)
        with file.open("rb") as source, place.open("xb") as target:
            fcntl.ioctl(target, FICLONE, source.fileno())
    except OSError:  # another file system, or one that knows no clones
        with suppress(OSError):
            place.unlink(missing_ok=True)
        return False
    return True
