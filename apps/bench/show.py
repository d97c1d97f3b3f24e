"""What a bench found, for people: tables on stdout."""

from rich.table import Table

from apps import tables
from apps.bench.against import Against
from apps.bench.audio_head import Spread, Timing
from apps.bench.bench import Bench, Machine
from apps.bench.turn import Turn


def show(result: Bench) -> None:
    """The result for people."""
    tables.line(f"{result.bundle}: {result.recipe or 'floats'}, {tables.size(result.weight_bytes)} of weights")
    tables.line(_machine(result.machine))
    for shown in (_starts(result), _prefill(result), _decode(result), _roofline(result), _frames(result)):
        _print(shown)
    for turn in result.turns:
        _turn(turn)
    tables.line(f"\nA second start keeps {result.private_share:.2f} of the weights in private memory.")


def _machine(found: Machine) -> str:
    return (
        f"{found.cpu}, {found.cores} cores, ONNX Runtime {found.onnxruntime}, "
        f"load {found.load_before:.1f} before and {found.load_after:.1f} after"
    )


def _starts(result: Bench) -> Table:
    shown = tables.table("start", "open>", "first token>", "private: graphs>", "tokenizer>", "mapped>", "peak>")
    for name, row in result.starts.items():
        sizes = (row.private_graphs, row.private_tokenizer, row.mapped_after_token, row.peak)
        shown.add_row(
            name, f"{row.seconds:.2f} s", f"{row.first_token_seconds:.2f} s", *(tables.size(max(0, n)) for n in sizes)
        )
    return shown


def _prefill(result: Bench) -> Table:
    shown = tables.table("prefill", "threads>", "ms>", "10 to 90 %>", "processor ms>", "positions/s>")
    for row in result.prefill:
        shown.add_row(f"{row.positions} positions", str(row.threads), *_cells(row.timing), f"{row.per_second:.0f}")
    return shown


def _decode(result: Bench) -> Table:
    shown = tables.table(
        "decode", "threads>", "ms>", "10 to 90 %>", "processor ms>", "tokens/s>", "floor>", "sampling>", "overhead>"
    )
    for row in result.decode:
        parts = (f"{part.wall_ms.median:.2f}" for part in (row.floor, row.sampling))
        shown.add_row(
            f"behind {row.context}", str(row.threads), *_cells(row.timing),
            f"{row.per_second:.1f}", *parts, f"{row.overhead.median:.1%}",
        )  # fmt: skip
    return shown


def _frames(result: Bench) -> Table:
    shown = tables.table("audio frame", "threads>", "ms>", "10 to 90 %>", "processor ms>", "head ms>", "budget ms>")
    for row in result.audio_frames:
        head = f"{row.head.wall_ms.median:.2f}"
        shown.add_row(f"behind {row.context}", str(row.threads), *_cells(row.frame), head, f"{row.budget_ms:.0f}")
    return shown


def _roofline(result: Bench) -> Table:
    shown = tables.table("roofline", "threads>", "bytes a token>", "read alone GB/s>", "share reached>", "10 to 90 %>")
    for row in result.decode:
        line, read = row.roofline, row.roofline.bandwidth.median / 1e9
        shown.add_row(
            f"behind {row.context}", str(row.threads), tables.size(line.moved_bytes), f"{read:.1f}",
            f"{line.share.median:.0%}", f"{line.share.low:.0%} to {line.share.high:.0%}",
        )  # fmt: skip
    return shown


def _turn(turn: Turn) -> None:
    """What a person waits for, and each graph's part of it."""
    shown = tables.table("graph in a turn", "rows>", "calls>", "ms a call>", "10 to 90 %>", "ms in all>", "share>")
    for row in turn.graphs:
        each = (f"{row.ms.median:.2f}", f"{row.ms.low:.2f} to {row.ms.high:.2f}", f"{row.total_ms:.1f}")
        shown.add_row(row.graph, row.rows or "", str(row.calls), *each, f"{row.share:.1%}")
    _print(shown)
    outside = 1 - sum(row.share for row in turn.graphs)
    tables.line(f"Outside of graphs: {outside:.1%} of the time")
    if turn.not_run:
        tables.line(f"Not run in this turn: {', '.join(turn.not_run)}")
    times = {"question understood": turn.understood, "first token": turn.first_token, "first audio": turn.first_audio}
    said = [f"{name} after {seconds:.2f} s" for name, seconds in times.items() if seconds is not None]
    kind = "A spoken answer" if turn.spoken else "A written answer"
    tables.line(f"{kind}, threads {turn.threads}: {', '.join(said)}, over after {turn.total:.2f} s.")
    if turn.frame_ms is not None and turn.real_time_factor is not None:
        tables.line(
            f"{turn.frames} audio frames, {turn.frame_ms.median:.1f} ms each ({turn.frame_ms.high:.1f} at the last "
            f"decile), {turn.frames_over_budget} over their budget of {turn.budget_ms:.0f} ms; "
            f"{turn.audio_seconds:.2f} s of sound, real-time factor {turn.real_time_factor:.2f}."
        )


def show_against(result: Against) -> None:
    tables.line(_machine(result.machine))
    tables.line(
        f"Prefill of {result.prefill} positions, then {result.tokens} tokens behind {result.context} of them; all in "
        f"turns, {result.rounds} rounds, medians"
    )
    _print(_programs(result))
    _print(_ratios(result))
    for name, how in result.missing.items():
        tables.line(f"{name} is not installed: {how}")
    for name, why in result.refused.items():
        tables.line(f"{name} cannot run this bundle: {why}")


def _programs(result: Against) -> Table:
    shown = tables.table(
        "program", "threads>", "prefill/s>", "decode/s>", "bits a weight>", "private>", "mapped>", "same tokens>"
    )
    for row in result.measured:
        speeds = 1e3 * result.prefill / row.prefill_ms.median, 1e3 / row.decode_ms.median
        bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
        memory = tables.size(row.private_bytes), tables.size(row.mapped_bytes)
        shown.add_row(
            row.name, str(row.threads), f"{speeds[0]:.0f}", f"{speeds[1]:.1f}", bits, *memory, f"{row.same_tokens:.0%}"
        )
    return shown


def _ratios(result: Against) -> Table:
    shown = tables.table(
        "we are so many times as fast as",
        "threads>",
        "prefill>",
        "decode>",
        "prefill, processor>",
        "decode, processor>",
    )
    for row in result.ratios:
        cells = (_ratio(spread) for spread in (row.prefill, row.decode, row.prefill_cpu, row.decode_cpu))
        shown.add_row(row.name, str(row.threads), *cells)
    return shown


def _ratio(found: Spread) -> str:
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _print(shown: Table) -> None:
    if shown.row_count:
        tables.OUT.print()
        tables.OUT.print(shown)


def _cells(timing: Timing) -> tuple[str, str, str]:
    wall = timing.wall_ms
    return f"{wall.median:.2f}", f"{wall.low:.2f} to {wall.high:.2f}", f"{timing.cpu_ms.median:.2f}"
