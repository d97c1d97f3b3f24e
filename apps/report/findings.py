"""A comparison as JSON for machines and as Markdown, with what it was measured with."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from apps.report import loss_report, side_by_side
from apps.report.page import number, threads
from apps.report.suite_report import suite_markdown, suite_record
from quant.comparison.compare import Comparison
from quant.comparison.figures import Figure, TurnResult
from quant.comparison.pareto import Tried, beaten_by
from quant.comparison.verdict import verdict


def as_json(found: Comparison) -> str:
    return json.dumps(report_record(found), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def report_record(found: Comparison) -> dict[str, Any]:
    """Everything but waveforms; a number that is none is null."""
    return _finite(
        {
            **side_by_side.as_record(found),
            "verdict": verdict(found),
            "passed": found.passed,
            "gates": [{**asdict(judged), "passed": judged.passed} for judged in found.gates],
            "figures": [asdict(figure) for figure in found.figures],
            "graphs": [asdict(error) for error in found.tensors],
            "layers": [asdict(error) for error in found.layers],
            "swaps": [asdict(swap) for swap in found.swaps],
            "within": asdict(found.within) if found.within else None,
            "governing": [asdict(line) for line in found.governing],
            "advice": [{**asdict(one), "per_megabyte": one.per_megabyte} for one in found.advice],
            "tried": [{**asdict(one), "beaten_by": beaten(one, found.tried)} for one in found.tried],
            "suites": suite_record(found),
            "turns": [turn_record(result) for result in found.results],
            "reference": {**asdict(found.reference), "stored": found.stored},
            "candidate": asdict(found.candidate),
            "machine": asdict(found.machine),
            "seed": found.seed,
            "limits": asdict(found.limits),
            "edgeomni": version("edgeomni"),
        }
    )


def beaten(one: Tried, every: Sequence[Tried]) -> str:
    """The recipe that makes this one pointless, or nothing."""
    better = beaten_by(one, every)
    return better.name if better else ""


def turn_record(result: TurnResult) -> dict[str, Any]:
    kl = {name: [round(float(value), 7) for value in stretch.kl] for name, stretch in result.stretches.items()}
    return {
        "text": result.turn.text,
        "spoken": result.turn.spoken,
        "expected": result.turn.answers,
        "reference": result.reference.text,
        "candidate": result.candidate.text,
        "exact": result.exact,
        "right": result.right,
        "defects": {"reference": result.defects[0], "candidate": result.defects[1]},
        "kl": kl,
        "endings": {"reference": result.reference.ending, "candidate": result.candidate.ending},
        "speech": None if result.speech is None else asdict(result.speech),
        "recognised": None if result.recognised is None else asdict(result.recognised),
    }


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value


def markdown(found: Comparison) -> str:
    lines = [f"# {title(found)}", "", *(f"- {sentence}" for sentence in verdict(found)), ""]
    lines += [*side_by_side.markdown_lines(found), *suite_markdown(found), ""]
    lines += ["| figure | value | 95 % interval | n | meaning |", "|---|---:|---|---:|---|"]
    lines += [f"| {f.name} | {number(f.value)} | {interval(f)} | {f.count} | {f.meaning} |" for f in found.figures]
    lines += ["", "| swapped graph | text KL | code KL | log-mel dB |", "|---|---:|---:|---:|"]
    swaps = ((s.graph, *map(number, (s.text_kl, s.codes_kl, s.log_mel))) for s in found.swaps)
    lines += [f"| {' | '.join(row)} |" for row in swaps]
    lines += [*loss_report.markdown_lines(found)]
    lines += ["", "| measured with | |", "|---|---|", *(f"| {name} | {value} |" for name, value in provenance(found))]
    return "\n".join(lines) + "\n"


def title(found: Comparison) -> str:
    return f"{found.candidate.source}: {found.candidate.recipe or 'float'} against {found.reference.recipe or 'float'}"


def provenance(found: Comparison) -> list[tuple[str, str]]:
    machine = found.machine
    kind = "stored reference, cut to its likeliest ids: KL is a lower bound" if found.stored else "reference"
    random = [("weights", "random: the figures prove arithmetic, not quality")] if found.candidate.random else []
    return [
        (f"{kind}, sha256 of the manifest", found.reference.manifest_sha256),
        ("candidate, sha256 of the manifest", found.candidate.manifest_sha256),
        ("tokenizer, sha256", found.candidate.tokenizer_sha256),
        ("turns, sha256", machine.turns_sha256 or "from the stored reference"),
        *random,
        ("seed", str(found.seed)),
        ("CPU", f"{machine.cpu}, {threads(machine)}"),
        ("ONNX Runtime", machine.onnxruntime),
        ("Python", machine.python),
        ("EdgeOmni", version("edgeomni")),
    ]


def interval(figure: Figure) -> str:
    return "" if figure.low is None else f"{number(figure.low)} to {number(figure.high)}"
