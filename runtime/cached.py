"""What lies in the cache folder: each entry, whom it belongs to, and its removal, which never leaves that folder."""

import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import EdgeOmniError

GIVEN_UP = 3600.0  # seconds without a change after which what was being written is nobody's any more
LEFT_BEHIND = "a killed run left it behind"
REMOVED = re.compile(r".+\.gone-\d+")  # what was being removed when that was killed

Kind = Literal["packed weights", "bundle", "checksum", "unfinished"]


@dataclass(frozen=True)
class Entry:
    """One file or folder of the cache. `unneeded` says why nothing will use it again; None: something may."""

    path: Path
    kind: Kind
    owner: str  # the bundle or file that it belongs to; "" where nothing tells
    part: str  # of the owner
    nbytes: int
    used: float  # seconds since 1970
    unneeded: str | None


def inside(folder: Path) -> Iterator[Path]:
    """What lies in a folder, sorted; nothing where there is none, or where a link stands in its place."""
    if folder.is_symlink():
        return
    try:
        yield from sorted(folder.iterdir())
    except FileNotFoundError:
        return


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, rather than a link to one."""
    with suppress(OSError):
        return stat.S_ISDIR(path.lstat().st_mode)
    return False


def extent(path: Path) -> tuple[int, float]:
    """Bytes of a file, or of all that a folder holds, and when any of it was last written to. Links are not followed.

    What vanishes meanwhile, or may not be looked at, does not count.
    """
    nbytes, changed = 0, 0.0
    within = os.walk(path) if is_folder(path) else ()
    for one in (path, *(Path(at, name) for at, _, names in within for name in names)):
        with suppress(OSError):
            state = one.lstat()
            nbytes += 0 if stat.S_ISDIR(state.st_mode) else state.st_size
            changed = max(changed, state.st_mtime)
    return nbytes, changed


def unfinished(path: Path, now: float | None = None) -> Entry:
    """What is being written, or was until its process was killed."""
    nbytes, changed = extent(path)
    left = (time.time() if now is None else now) - changed > GIVEN_UP
    return Entry(path, "unfinished", "", path.name, nbytes, changed, LEFT_BEHIND if left else None)


def remove(entry: Entry, cache: Path) -> None:
    """Take an entry out of the cache, a link as a link; no process ever finds half of it.

    OSError if that cannot be done; EdgeOmniError for a path that is not in the cache.
    """
    path = entry.path
    if path.parent not in (cache, *filter(is_folder, inside(cache))):
        raise EdgeOmniError(f"{path} does not lie in the cache {cache}, so it is not removed")
    if not is_folder(path):
        path.unlink(missing_ok=True)
        return
    gone = path if REMOVED.fullmatch(path.name) else path.with_name(f"{path.name}.gone-{os.getpid()}")
    path.rename(gone)
    shutil.rmtree(gone)
