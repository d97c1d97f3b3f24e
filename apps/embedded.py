"""Nano, the small checkpoint that comes along, as a bundle: made once, in the cache."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from runtime.bundle import MANIFEST
from runtime.cached import Entry, extent, inside, unfinished
from runtime.errors import EdgeOmniError
from runtime.files import cache_folder, is_file
from runtime.vouched import checksum

BUNDLE = re.compile(r"nano-[a-z0-9-]+-[0-9a-f]{16}")
UNFINISHED = re.compile(rf"\.{BUNDLE.pattern}\.(partial|old|lock)|{BUNDLE.pattern}\.gone-\d+")
CHECKPOINT = Path(__file__).parents[1] / "export" / "nano" / "checkpoint"
RECIPE = "int8"
REMEMBERED = 5  # turns before the present one: so many its card has measured
TRY = (
    "What's 7 + 5?",
    "set a timer for ten minutes",
    "make the kitchen light red",
    "what is the capital of japan",
    "what is your name",
)


def made() -> Path | None:
    """The folder of the embedded bundle if it was made already. EdgeOmniError where there is nothing to make it of."""
    bundle = cache_folder() / _name()
    return bundle if is_file(bundle / MANIFEST) else None


def is_embedded(bundle: Path) -> bool:
    """Whether this folder is the embedded model's own."""
    with suppress(EdgeOmniError):
        return BUNDLE.fullmatch(bundle.name) is not None and bundle.resolve().parent == cache_folder().resolve()
    return False


def greeting(bundle: Path, family: str) -> str:
    """What a conversation at a terminal begins with."""
    commands = "/help for commands, Ctrl-D to leave."
    if not is_embedded(bundle):
        return f"{bundle} ({family}). {commands}"
    return "\n  ".join(("Nano (built in), which knows a small world only. Try:", *TRY)) + f"\n{commands}"


def embedded_bundle() -> Path:
    """Folder of the embedded checkpoint's bundle, which the first call exports with `RECIPE`.

    The folder's name holds a digest of the checkpoint and our version, so that another checkpoint is another bundle.

    Raises:
        EdgeOmniError: the installed package holds no weights, or the bundle cannot be written.
        ModuleNotFoundError: it is to be made and the extra `export` is not installed.
    """
    bundle = cache_folder() / _name()
    if not is_file(bundle / MANIFEST):
        _export(bundle)
    with suppress(OSError):
        os.utime(bundle)  # when it was last used
    return bundle


def entries(cache: Path) -> Iterator[Entry]:
    """The bundles in the cache folder that were made of this or another embedded checkpoint."""
    for path in inside(cache):
        if UNFINISHED.fullmatch(path.name):
            yield unfinished(path)
        elif BUNDLE.fullmatch(path.name):
            nbytes, used = extent(path)
            unneeded = None if _is_current(path) else "made by another version"
            yield Entry(path, "bundle", str(path), "", nbytes, used, unneeded)


def _is_current(bundle: Path) -> bool:
    """Without weights of its own, this installation knows of no bundle that it would not use."""
    try:
        return bundle.name == _name()
    except EdgeOmniError:
        return True


def _name() -> str:
    if not any(CHECKPOINT.glob("*.safetensors")):
        raise EdgeOmniError(f"no weights lie in {CHECKPOINT}, so there is no default bundle; name one")
    parts = [version("edgeomni"), *(checksum(path) for path in sorted(CHECKPOINT.iterdir()))]
    return f"nano-{RECIPE}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}"


def _export(bundle: Path) -> None:
    from apps import one_pass, tables
    from quant import quantize
    from quant.scheme import read_recipe

    try:
        bundle.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgeOmniError(
            f"the embedded model cannot be kept in {bundle.parent} ({error.strerror}); set XDG_CACHE_HOME to a folder "
            "that may be written"
        ) from None
    with tables.waiting("preparing the embedded model, once", quiet=False):
        _, smaller = one_pass.plan(CHECKPOINT, "cpu", read_recipe(RECIPE), random=False)
        assert smaller is not None  # there is a recipe
        quantize.write(smaller, bundle, standalone=True)
