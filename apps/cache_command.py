"""`edgeomni cache`: what is kept for quick starts, whom it belongs to, and the removal of what nobody needs."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.options import Json
from runtime.errors import EdgeOmniError
from runtime.files import cache_folder

if TYPE_CHECKING:
    from runtime.cached import Entry

DAY = 24 * 3600

app = typer.Typer(help="List or prune what is kept on disk so that later starts are quick.", no_args_is_help=True)


@app.command("list")
def show(as_json: Json = False) -> None:
    """Show what the cache holds: whom it belongs to, its size, when it was last used, what nobody needs any more."""
    from apps.streams import json_text
    from apps.tables import OUT, line, size

    cache = _folder()
    found = list(entries(cache))
    if as_json:
        return print(json_text({"cache": str(cache), "entries": [record(entry) for entry in found]}, indent=1))
    if not found:
        return line(f"The cache {cache} is empty.")
    OUT.print(_table(found))
    unneeded = [entry for entry in found if entry.unneeded]
    line(f"{cache}: {_count(found)}, {size(total(found))}")
    if unneeded:
        line(f"Nobody needs {_count(unneeded)}, {size(total(unneeded))}. Next: edgeomni cache prune")
    return None


@app.command()
def prune(
    everything: Annotated[bool, typer.Option("--all", help="Remove all that the cache holds.")] = False,
    days: Annotated[
        float | None, typer.Option("--unused", metavar="DAYS", min=0, help="Remove also what was not used for so long.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what belongs to bundles that are gone or changed. All that is removed is made again when it is needed."""
    from apps.streams import json_text
    from apps.tables import OUT, line, size

    cache = _folder()
    found = list(entries(cache))
    before = None if days is None else time.time() - days * DAY
    chosen = [entry for entry in found if everything or entry.unneeded or (before is not None and entry.used < before)]
    failed = {} if dry_run else dict(_removed(chosen, cache))
    gone = [entry for entry in chosen if entry.path not in failed]
    if as_json:
        report = {"cache": str(cache), "dry_run": dry_run, "removed": [record(entry) for entry in gone]}
        report |= {"bytes": total(gone), "failed": {str(path): why for path, why in failed.items()}}
        print(json_text(report, indent=1))
    else:
        if chosen:
            OUT.print(_table(chosen))
        stays = size(total(found) - total(gone))
        line(
            f"{'Would remove' if dry_run else 'Removed'} {_count(gone)}, {size(total(gone))}; {stays} stay in {cache}."
        )
    if failed:
        first, why = next(iter(failed.items()))
        raise EdgeOmniError(f"{len(failed)} could not be removed, {first} for one: {why}")


def entries(cache: Path) -> Iterator["Entry"]:
    """All that the cache folder holds and is ours. OSError where it cannot be read."""
    from apps import embedded
    from apps.doctor import WHEELS, installed
    from runtime import packed, vouched

    bundles = list(embedded.entries(cache))
    yield from bundles
    gone = [entry.path for entry in bundles if entry.kind == "bundle" and entry.unneeded]
    yield from packed.entries(cache, [number for wheel in WHEELS.values() if (number := installed(wheel))], gone)
    yield from vouched.entries(cache)


def _folder() -> Path:
    """The cache itself, where a link stands in its place. EdgeOmniError if something else does."""
    cache = cache_folder().resolve()
    if cache.exists() and not cache.is_dir():
        raise EdgeOmniError(f"{cache} is no folder, so nothing is kept there; remove it, or set XDG_CACHE_HOME")
    return cache


def _removed(chosen: Sequence["Entry"], cache: Path) -> Iterator[tuple[Path, str]]:
    """Remove entries; yields those that could not be, each with the reason."""
    from runtime.cached import remove

    for entry in chosen:
        try:
            remove(entry, cache)
        except OSError as error:
            yield entry.path, error.strerror or str(error)


def total(found: Sequence["Entry"]) -> int:
    return sum(entry.nbytes for entry in found)


def record(entry: "Entry") -> dict[str, Any]:
    """For machines; the time is in seconds since 1970, and null stands for what is not known or not so."""
    return {
        "path": str(entry.path),
        "kind": entry.kind,
        "owner": entry.owner or None,
        "part": entry.part or None,
        "bytes": entry.nbytes,
        "used": entry.used,
        "unneeded": entry.unneeded,
    }


def _table(found: Sequence["Entry"]):
    """A row for all that is of one kind, of one owner (or, of single files, in one folder) and equally needed."""
    from apps.tables import size, table

    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in found:
        owner = str(Path(entry.owner).parent) if entry.kind == "checksum" and entry.owner else entry.owner
        groups.setdefault((owner, entry.kind, entry.unneeded or ""), []).append(entry)
    rows = table("belongs to", "what", "size>", "last used", "why it is not needed")
    for (owner, kind, unneeded), group in sorted(groups.items(), key=lambda row: -total(row[1])):
        times = f" × {len(group)}" if len(group) > 1 else ""
        rows.add_row(owner or "unknown", kind + times, size(total(group)), _ago(max(e.used for e in group)), unneeded)
    return rows


def _ago(when: float) -> str:
    days = int((time.time() - when) / DAY)
    return "today" if days < 1 else "yesterday" if days == 1 else f"{days} days ago"


def _count(found: Sequence["Entry"]) -> str:
    return f"{len(found)} {'entry' if len(found) == 1 else 'entries'}"
