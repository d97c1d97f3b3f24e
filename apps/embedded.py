"""The small checkpoint that comes along, as a bundle: made once, in the cache, and used where none is named."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from runtime.bundle import MANIFEST, sha256_of
from runtime.cached import Entry, extent, inside, unfinished
from runtime.errors import EdgeOmniError
from runtime.files import cache_folder, is_file

BUNDLE = re.compile(r"nano-[a-z0-9-]+-[0-9a-f]{16}")
UNFINISHED = re.compile(rf"\.{BUNDLE.pattern}\.(partial|old|lock)|{BUNDLE.pattern}\.gone-\d+")
CHECKPOINT = Path(__file__).parents[1] / "export" / "nano" / "checkpoint"
RECIPE = "int8"
REMEMBERED = 5  # turns before the present one: so many its card has measured


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
    try:
        current = _name()
    except EdgeOmniError:  # without weights of its own, this installation knows of none that it would not use
        current = None
    for path in inside(cache):
        if UNFINISHED.fullmatch(path.name):
            yield unfinished(path)
        elif BUNDLE.fullmatch(path.name):
            other = current is not None and path.name != current
            nbytes, used = extent(path)
            yield Entry(path, "bundle", str(path), "", nbytes, used, "made by another version" if other else None)


def _name() -> str:
    if not any(CHECKPOINT.glob("*.safetensors")):
        raise EdgeOmniError(f"no weights lie in {CHECKPOINT}, so there is no default bundle; name one")
    parts = [version("edgeomni"), *(sha256_of(path) for path in sorted(CHECKPOINT.iterdir()))]
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
