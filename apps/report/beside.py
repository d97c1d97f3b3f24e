"""Earlier reports that a comparison is set beside: the same reference, turns and limits, another recipe."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.comparison.compare import Comparison
from quant.comparison.pareto import Tried
from quant.comparison.record import Side
from quant.limits import Limits
from runtime.errors import EdgeOmniError

Reports = Sequence[tuple[Path, dict[str, Any]]]

FIGURES = {"text_kl": "text.kl", "text_top1": "text.top1", "codes_kl": "codes.kl", "codes_top1": "codes.top1"}


def read_reports(folders: Sequence[Path]) -> Reports:
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


def refuse_unlike(reports: Reports, reference: Side, turns_sha256: str, limits: Limits, is_stored: bool) -> None:
    """EdgeOmniError that names the reports which measured something else, or the same in another way."""
    asked = (reference.manifest_sha256, turns_sha256, vars(limits), is_stored)
    problems = [f"  {folder}: {', '.join(said)}" for folder, record in reports if (said := [*_unlike(record, *asked)])]
    if problems:
        raise EdgeOmniError("these reports cannot stand beside this one:\n" + "\n".join(problems))


def _unlike(
    record: Mapping[str, Any], reference: str, turns: str, limits: dict[str, Any], is_stored: bool
) -> Iterator[str]:
    if record["reference"]["manifest_sha256"] != reference:
        yield f"its reference was another, {record['reference']['path']}"
    if record["reference"]["stored"] != is_stored:
        yield "only one of the two was held against a stored reference, whose divergences are lower bounds"
    if not turns:
        yield "the stored reference does not say which turns it was asked, so that these may be others"
    elif record["machine"]["turns_sha256"] != turns:
        yield "its turns were others"
    if record["limits"] != limits:
        yield f"its answers were limited to {record['limits']}, not {limits}"


def beside(found: Comparison, reports: Reports) -> tuple[Tried, ...]:
    """All that was tried, this comparison first."""
    return (tried(found), *(tried_of(record, folder) for folder, record in reports))


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
    reference = record["reference"]
    _ = reference["manifest_sha256"], reference["stored"], record["machine"]["turns_sha256"], record["limits"]
    return Tried(
        name=record["candidate"]["recipe"] or "float",
        folder=str(folder),
        weight_bytes=record["candidate"]["weight_bytes"],
        bits_per_weight=values["cost.bits_per_weight"],
        **{field: values.get(name) for field, name in FIGURES.items()},
    )
