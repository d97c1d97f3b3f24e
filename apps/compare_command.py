"""`edgeomni record` and `edgeomni compare`: open both sides, compare, print what matters, write the report."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apps import tables
from apps.doctor import examine
from apps.report import findings, report
from apps.report.beside import beside, read_reports
from apps.report.beside import refuse_unlike as refuse_others
from apps.report.side_by_side import LISTED, degenerate, pairs
from apps.turn_sources import TurnSources
from quant.comparison.compare import Comparison, Machine, compare, refuse_unlike
from quant.comparison.each_turn import Spread, serially
from quant.comparison.gates import read_gates
from quant.comparison.memory import Memory, Task, measured
from quant.comparison.recognise import Recogniser, recogniser
from quant.comparison.record import Live, Reference, Side, side
from quant.comparison.stored import REFERENCE, TOP_K, Stored
from quant.comparison.stored import record as store
from quant.comparison.verdict import verdict
from quant.limits import Limits
from quant.observe import Observed
from runtime.bundle import read_bundle
from runtime.errors import EdgeOmniError
from runtime.files import cache_folder
from runtime.session import Options

SHOWN = ("text.kl", "text.top1", "text.rms_delta_p", "text.perplexity_ratio", "codes.kl", "codes.top1", "answers.exact",
         "answers.accuracy_loss", "speech.wer_added", "speech.duration_ratio",
         "speech.log_mel", "speech.f0_cents", "speech.streamed", "graphs.worst_sqnr",
         "cost.bytes_ratio", "cost.bits_per_weight", "cost.prefill_ratio", "cost.decode_ratio")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What both commands take."""

    turns: TurnSources = field(default_factory=TurnSources)
    limits: Limits = field(default_factory=Limits)
    threads: int = 0
    no_cache: bool = False

    def open(self, folder: Path, limits: Limits) -> Observed:
        cache = None if self.no_cache else cache_folder()
        options = Options(threads=self.threads, provider=read_bundle(folder).profile, prepack_cache=cache)
        return Observed(folder, options, limits)

    def memory(self, folder: Path, limits: Limits) -> Memory | None:
        """What a process takes in which the bundle answers, and nothing else happens."""
        cache = None if self.no_cache else str(cache_folder())
        return measured(Task(str(folder.resolve()), self.threads, cache, limits.max_new, limits.max_frames))


def record_command(reference: Path, out: Path, settings: Settings, quiet: bool = False) -> None:
    """Store what a bundle answers, for comparisons on machines that cannot load it."""
    engine = settings.open(reference, settings.limits)
    turns = settings.turns.turns_for(engine.whole, tables.note)
    machine = _machine(settings, settings.turns.sha256(turns))
    with tables.waiting("recording", quiet) as status:
        live = Live(engine, turns, TOP_K, settings.memory(reference, settings.limits))
        store(live, out, _shown(status, quiet), machine)
    tables.line(f"{out}: {len(turns)} turns answered by {reference}.")
    tables.line(f"Next: edgeomni compare {out} CANDIDATE --report DIR")


def compare_command(
    reference: Path,
    candidate: Path,
    folder: Path,
    settings: Settings,
    gates_file: Path | None = None,
    swap_turns: int = 8,
    margin: float = 0.02,
    quiet: bool = False,
    earlier: Sequence[Path] = (),
    listener: str | None = None,
    cluster: str | None = None,
) -> Comparison:
    """Compare and write the report; everything that can be wrong with what was given is said before it starts."""
    gates = read_gates(gates_file) if gates_file else ()
    reports = read_reports(earlier)
    ours = _reference(reference, settings)
    theirs = side(candidate, read_bundle(candidate))
    refuse_unlike(ours.side, theirs)
    heard_by = _listener(listener, ours, theirs, settings.threads)
    report.prepare(folder)
    engine = settings.open(candidate, ours.limits)
    machine = _machine(settings, _turns_sha256(ours, settings))
    refuse_others(reports, ours.side, machine.turns_sha256, ours.limits, isinstance(ours, Stored))
    spread = _spread(cluster, engine.options)
    with tables.waiting("comparing", quiet) as status:
        if isinstance(ours, Live):
            ours.memory = settings.memory(reference, ours.limits)
        memory, shown = settings.memory(candidate, ours.limits), _shown(status, quiet)
        found = compare(ours, engine, machine, gates, swap_turns, margin, shown, spread, heard_by, memory)
    if reports:
        found = replace(found, tried=beside(found, reports))
    report.write(found, folder)
    return found


def _turns_sha256(reference: Reference, settings: Settings) -> str:
    """Of the turns that are asked; a stored reference says it of those that it brings, "" if it does not know."""
    if isinstance(reference, Stored):
        return reference.machine.turns_sha256 if reference.machine else ""
    return settings.turns.sha256(reference.turns)


def _spread(cluster: str | None, options: Options) -> Spread:
    """Turns one by one, or over the Ray cluster at an address."""
    if cluster is None:
        return serially
    from apps.cluster import over_ray

    return over_ray(cluster, options)


def _listener(wanted: str | None, ours: Reference, theirs: Side, threads: int) -> Recogniser | None:
    """Who was asked for; by itself nobody listens to texts, or to what random weights say, which is noise."""
    needed = not theirs.random and any(turn.spoken for turn in ours.turns)
    return recogniser("none" if wanted is None and not needed else wanted, threads)


def _reference(path: Path, settings: Settings) -> Reference:
    if not (path / REFERENCE).is_file():
        engine = settings.open(path, settings.limits)
        return Live(engine, settings.turns.turns_for(engine.whole, tables.note))
    if settings.turns:
        raise EdgeOmniError(f"{path} is a stored reference, which brings its own turns; leave --turns and --suite out")
    return Stored(path)


def _machine(settings: Settings, turns_sha256: str) -> Machine:
    wheels = ", ".join(f"{name} {number}" for name, number in examine().onnxruntime.items())
    return Machine(cpu_name(), wheels, platform.python_version(), settings.threads, turns_sha256)


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _shown(status: Any, quiet: bool):
    return (lambda text: None) if quiet else status.update


def show(found: Comparison, folder: Path) -> None:
    """What is plainly wrong, what was lost beside what was saved, the chief figures, and the verdict."""
    _show_degenerate(found)
    both = tables.table("side by side", "reference>", "candidate>")
    for row in pairs(found):
        both.add_row(row.what, row.reference, row.candidate)
    shown = tables.table("figure", "value>", "95 % interval>", "n>", "meaning")
    for name in SHOWN:
        if figure := found.figure(name):
            row = (findings.number(figure.value), findings.interval(figure), str(figure.count), figure.meaning)
            shown.add_row(figure.name, *row)
    tables.OUT.print(both)
    tables.OUT.print(shown)
    for sentence in verdict(found):
        tables.line(sentence)
    tables.line(f"The whole report: {folder / 'report.html'}")


def _show_degenerate(found: Comparison) -> None:
    bad = degenerate(found)
    for one in bad[:LISTED]:
        tables.line(f"Degenerate: {one.sentence}")
    if len(bad) > LISTED:
        tables.line(f"... and {len(bad) - LISTED} more degenerate answers, in the report.")
