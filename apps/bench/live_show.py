"""What a live bench found, for people: tables on stdout."""

from collections.abc import Iterator

from rich.table import Table

from apps import tables
from apps.bench.live import Latency, LiveBench, Waits
from apps.bench.score import Judged, Share

SHOWN = 40  # mistakes that are told one by one


def show_live(result: LiveBench) -> None:
    """The result for people."""
    found = result.machine
    tables.line(f"{result.bundle}: {result.recipe or 'floats'}, {result.how.scenes} scenes of seed {result.how.seed}")
    tables.line(f"{found.cpu}, {found.cores} cores, load {found.load_before:.1f} before, {found.load_after:.1f} after")
    if result.left_out:
        tables.line(f"Left out: {result.left_out}")
    for shown in (_shares(result), _waits(result.latency)):
        tables.OUT.print()
        tables.OUT.print(shown)
    for text in _lines(result):
        tables.line(text)
    wrong = [sound for sound in result.ours.sounds if sound.wrong]
    for sound in wrong[:SHOWN]:
        tables.line(_mistake(sound))


def _shares(result: LiveBench) -> Table:
    rules = result.rules.items()
    shown = tables.table("of the sounds", "ours>", "95 %>", *(f"rule by {name}>" for name, _ in rules), "of>")
    for name, share in result.ours.shares.items():
        cells = [_percent(rule.shares[name]) if name in rule.shares else "" for _, rule in rules]
        shown.add_row(name, _percent(share), f"{share.low:.1%} to {share.high:.1%}", *cells, str(share.n))
    return shown


def _percent(share: Share) -> str:
    return f"{share.share:.1%}" if share.n else "–"


def _waits(found: Latency) -> Table:
    shown = tables.table("first sound of the answer, ms", "median>", "95 % below>", "worst>")
    for name, waits in (
        ("after the turn was over", found.after_hard_end),
        ("after the last sound", found.after_speech),
    ):
        shown.add_row(name, *_cells(waits))
    return shown


def _cells(waits: Waits | None) -> tuple[str, ...]:
    return ("–",) * 3 if waits is None else tuple(f"{ms:.0f}" for ms in (waits.median, waits.p95, waits.worst))


def _lines(result: LiveBench) -> Iterator[str]:
    talk, memory = result.talk, result.memory
    yield f"\n{result.latency.answered} of {result.latency.questions} spoken questions were answered for these times."
    right = (f"{kind} {share.count} of {share.n}" for kind, share in result.ours.right.items())
    yield f"Right word for word in the scenes: {', '.join(right)}."
    yield (
        f"In a conversation of {talk.turns} turns, {talk.seconds:.0f} s: {talk.answered} answered, {talk.underruns} "
        f"underruns; the longest that a hop waited was {talk.longest_wait_ms:.0f} ms."
    )
    yield f"Listening to a quiet room takes {result.idle_share:.3f} of a core."
    yield (
        f"Two memories of {memory.positions} positions take {tables.size(memory.two)}, "
        f"{memory.ratio:.3f} of one ({tables.size(memory.one)}) and its keys and values ({tables.size(memory.cache)})."
    )


def _mistake(sound: Judged) -> str:
    when = f"{sound.start:.0f} to {sound.end:.0f} ms"
    return f"scene {sound.scene}, {sound.sound} at {when} ({sound.about}): {sound.outcome}"
