"""Earlier reports that a comparison is set beside: the same reference, turns and limits, another recipe."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.compare import Comparison
from quant.pareto import Tried
from runtime.errors import EdgeOmniError

FIGURES = {"text_kl": "text.kl", "text_top1": "text.top1", "codes_kl": "codes.kl", "codes_top1": "codes.top1"}


def read_reports(folders: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """report.json of each folder; EdgeOmniError names all that are none."""
    found, problems = [], []
    for folder in folders:
        try:
            record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            tried_of(record, folder)
            found.append((folder, record))
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            problems.append(f"  {folder}: no report of this version in it ({error!r})")
    if problems:
        raise EdgeOmniError(
            "what --beside names cannot be read:\n" + "\n".join(problems) + "\nrun these compares again"
        )
    return found


def beside(found: Comparison, reports: Sequence[tuple[Path, dict[str, Any]]]) -> tuple[Tried, ...]:
    """All that was tried, this comparison first; EdgeOmniError names reports that measured something else."""
    problems = [f"  {folder}: {', '.join(said)}" for folder, record in reports if (said := [*_unlike(found, record)])]
    if problems:
        raise EdgeOmniError("these reports cannot stand beside this one:\n" + "\n".join(problems))
    return (tried(found), *(tried_of(record, folder) for folder, record in reports))


def _unlike(found: Comparison, record: Mapping[str, Any]) -> Iterator[str]:
    if record["reference"]["manifest_sha256"] != found.reference.manifest_sha256:
        yield f"its reference is {record['reference']['path']}, not {found.reference.path}"
    if record["machine"]["turns_sha256"] != found.machine.turns_sha256:
        yield "its turns were others"
    if record["limits"] != vars(found.limits):
        yield f"its answers were limited to {record['limits']}, not {vars(found.limits)}"


def tried(found: Comparison) -> Tried:
    values = {name: figure.value for name in FIGURES.values() if (figure := found.figure(name)) is not None}
    bits = found.figure("cost.bits_per_weight")
    return Tried(
        name=found.candidate.recipe or "float",
        folder="",
        weight_bytes=found.candidate.weight_bytes,
        bits_per_weight=bits.value if bits else 0.0,
        **{field: values.get(name) for field, name in FIGURES.items()},
    )


def tried_of(record: Mapping[str, Any], folder: Path) -> Tried:
    """The same of a report.json; KeyError where it lacks something."""
    values = {figure["name"]: figure["value"] for figure in record["figures"]}
    _ = record["reference"]["manifest_sha256"], record["machine"]["turns_sha256"], record["limits"]
    return Tried(
        name=record["candidate"]["recipe"] or "float",
        folder=str(folder),
        weight_bytes=record["candidate"]["weight_bytes"],
        bits_per_weight=values["cost.bits_per_weight"],
        **{field: values.get(name) for field, name in FIGURES.items()},
    )
