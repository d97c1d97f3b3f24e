"""`edgeomni list`: the bundles that lie in some folders, or are known from having been opened."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apps.names import NANO
from apps.options import Json
from runtime.errors import EdgeOmniError
from runtime.files import cache_folder, exists, is_file

if TYPE_CHECKING:
    from runtime.bundle import Manifest

DEPTH = 2  # folders below a given one that are looked into


@dataclass(frozen=True)
class Found:
    """One bundle. Where its manifest cannot be read, `problem` says why and the rest is empty."""

    path: str
    model: str = ""
    family: str = ""
    precision: str = ""
    nbytes: int = 0
    profile: str = ""
    problem: str | None = None


def show(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Where to look; else here, and at what was opened before."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which bundles there are: model, family, precision, size, and where each lies."""
    from apps.streams import json_text
    from apps.tables import OUT, line, size, table

    for folder in folders or ():
        if not folder.is_dir():
            raise EdgeOmniError(f"{folder} is no folder; name folders that hold bundles")
    paths = below(folders) if folders else (*below([Path()]), *opened())
    found = [told(path) for path in once(paths)]
    if not folders:
        found += nano()
    if as_json:
        return print(json_text({"bundles": [asdict(bundle) for bundle in found]}, indent=1))
    rows = table("bundle", "model", "family", "precision", "size>")
    for bundle in found:
        rows.add_row(bundle.path, bundle.model, bundle.family, bundle.problem or bundle.precision, size(bundle.nbytes))
    if found:
        OUT.print(rows)
        line(f"Next: edgeomni chat {found[0].path}")
    else:
        where = ", ".join(map(str, folders or [Path.cwd()]))
        line(f"There is no bundle in {where}. Next: edgeomni export CHECKPOINT -o BUNDLE")
    return None


def below(folders: Iterable[Path]) -> Iterator[Path]:
    """Bundles in these folders and the next two levels of folders; hidden ones and links to folders are left out."""
    from runtime.bundle import is_bundle

    for folder in folders:
        for at, names, _ in os.walk(folder):
            here = Path(at)
            if is_bundle(here):
                yield here
                names.clear()
            elif len(here.relative_to(folder).parts) == DEPTH:
                names.clear()
            names[:] = sorted(name for name in names if not name.startswith("."))


def opened() -> Iterator[Path]:
    """Bundles that packed weights were made for and that are still there. None where there is no cache."""
    from apps.embedded import is_embedded as is_ours
    from runtime.bundle import is_bundle
    from runtime.cached import inside
    from runtime.packed import read_note

    with suppress(EdgeOmniError, OSError):
        for home in inside(cache_folder().resolve()):
            note = read_note(home) if exists(home) else None
            for bundle in map(Path, note.bundles if note else ()):
                if is_bundle(bundle) and not is_ours(bundle):
                    yield bundle


def nano() -> Iterator[Found]:
    """The embedded bundle, where there are weights for it, under the name that it has everywhere."""
    from apps.embedded import RECIPE, made

    with suppress(EdgeOmniError, OSError):
        bundle = made()
        later = Found("", "nano", "baichuan_omni_1_5", f"{RECIPE}, made when it is first used")
        yield replace(later if bundle is None else told(bundle), path=NANO)


def once(paths: Iterable[Path]) -> Sequence[Path]:
    """Each bundle by the first of the paths that lead to it."""
    return tuple({path.resolve(): path for path in reversed([*paths])}.values())[::-1]


def told(folder: Path) -> Found:
    """What a bundle's manifest says of it."""
    from runtime.bundle import MANIFEST, parse_manifest

    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes())
    except (EdgeOmniError, OSError) as error:
        return Found(str(folder), problem=str(error).splitlines()[0])
    missing = [file.path for file in manifest.files if not is_file(folder / file.path)]
    return Found(
        str(folder),
        manifest.source.name,
        manifest.family,
        precision(manifest),
        sum(file.nbytes for file in manifest.files),
        manifest.profile,
        f"not whole: {', '.join(missing)} missing" if missing else None,
    )


def precision(manifest: "Manifest") -> str:
    """The recipe that made it, with the bits of a weight on average, or the type of its floats."""
    made = manifest.quantization
    if made is None:
        return ", ".join(sorted({graph.precision for graph in manifest.graphs.values()}))
    weights = (*made.quantized, *made.kept)
    bits = sum(weight.bits_per_weight * weight.parameters for weight in weights)
    return f"{made.recipe}, {bits / max(1, sum(weight.parameters for weight in weights)):.1f} bits a weight"
