"""A comparison in sentences: what a person should know first, and no more than so many turns can show."""

from collections.abc import Iterator

from quant.comparison.advice import Advice
from quant.comparison.compare import Comparison
from quant.comparison.pareto import beaten_by
from quant.comparison.speech_verdict import speech_sentences
from quant.comparison.task_verdict import task_sentences


def verdict(found: Comparison) -> list[str]:
    """What a person should know first, the worst first."""
    return [*_degenerate(found), *_gates(found), *_tasks(found), *_speech(found), *_beaten(found), *_guilty(found)]


def _degenerate(found: Comparison) -> Iterator[str]:
    for who, place in (("candidate", 1), ("reference", 0)):
        bad = [result.defects[place] for result in found.results if result.defects[place]]
        if bad:
            kinds = ", ".join(sorted({reason.split(":")[0] for reasons in bad for reason in reasons}))
            yield f"{len(bad)} of {len(found.results)} answers of the {who} are degenerate ({kinds})."


def _gates(found: Comparison) -> Iterator[str]:
    failed = [judged for judged in found.gates if not judged.passed]
    for judged in failed:
        what = "was not measured" if judged.found is None else f"is {judged.found:.4g}"
        bound = "at most" if judged.gate.side == "max" else "at least"
        yield f"Gate failed: {judged.gate.figure} {what}, must be {bound} {judged.gate.limit:g}."
    if found.gates and not failed:
        yield f"All {len(found.gates)} gates are passed."


def _tasks(found: Comparison) -> Iterator[str]:
    yield from task_sentences(found.figure, found.results, found.margin)


def _speech(found: Comparison) -> Iterator[str]:
    yield from speech_sentences(found.figure, found.results, found.recogniser, found.candidate.random)


def _beaten(found: Comparison) -> Iterator[str]:
    """Among the recipes that were tried, whether another makes this one pointless."""
    better = beaten_by(found.tried[0], found.tried) if found.tried else None
    if better is not None:
        yield f"Another recipe beats it: {better.name} ({better.folder}) weighs no more and loses no more."


def _guilty(found: Comparison) -> Iterator[str]:
    if not found.swaps or not any(found.swaps[0].weight):
        return
    worst = found.swaps[0]
    figures = (("text KL", worst.text_kl, ""), ("code KL", worst.codes_kl, ""), ("log-mel", worst.log_mel, " dB"))
    shown = ", ".join(f"{name} {value:.4g}{unit}" for name, value, unit in figures if value)
    yield f"Most is lost in {worst.graph}: it alone, in the reference's place, costs {shown}; " + _cure(found)


def _cure(found: Comparison) -> str:
    """The line of the recipe that is guilty, and what to put before it."""
    if not found.governing:
        return "give it more bits."
    guilty, best = found.governing[0], next(iter(found.advice), None)
    where = f"line {guilty.line} of the recipe, {guilty.text}," if guilty.line else f"the recipe's {guilty.pattern!r}"
    said = f"{where} decided for {guilty.share:.0%} of what was lost."
    if best is None:
        return said
    lines = ", ".join(best.lines)
    return f"{said} To raise first: {lines} before line {best.before}, {spell_gain(best)}."


def spell_gain(best: Advice) -> str:
    """What a line buys, and for how much."""
    return f"KL {best.kl_now:.4g} to at best {best.kl_then:.4g} for {best.extra_bytes / 1e6:.3g} MB"
