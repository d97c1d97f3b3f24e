"""Turns on workers of a real Ray, started for these tests: the same result, also when a worker is killed on the way."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")

from apps.report.findings import report_record
from quant.comparison.compare import Comparison, compare
from quant.comparison.each_turn import Spread, serially
from quant.comparison.record import Live
from quant.comparison.stored import Stored, record
from runtime.errors import EdgeOmniError
from runtime.session import Options
from tests.test_compare import MACHINE, float_bundle, small_bundle, turns

pytestmark = pytest.mark.slow  # Ray starts for twenty seconds on two cores
OPTIONS = Options(threads=1)


def over_ray() -> Spread:
    from apps.cluster import over_ray  # Ray is of an extra that only the slow tests have

    return over_ray("local", OPTIONS)


def compared(spread: Spread) -> Comparison:
    return compare(Live(float_bundle(), turns() * 3), small_bundle(), MACHINE, swap_turns=1, spread=spread)


def without_times(found: Comparison) -> dict[str, Any]:
    record = report_record(found)
    record.pop("costs")
    record["figures"] = [figure for figure in record["figures"] if not figure["name"].startswith("cost.")]
    return record


def workers() -> list[int]:
    """Processes of Ray that this one started to do turns."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::Worker" in (folder / "cmdline").read_bytes() and os.getpid() in ancestors(int(folder.name)):
                found.append(int(folder.name))
        except OSError:  # it is gone
            continue
    return found


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        status = Path(f"/proc/{pid}/status").read_text()
        pid = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
        found.append(pid)
    return found


def kill_one_when(ready: Callable[[], bool]) -> threading.Thread:
    def wait_and_kill() -> None:
        while not (ready() and workers()):
            time.sleep(0.05)
        os.kill(workers()[0], signal.SIGKILL)

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread


def test_spread_turns_give_the_serial_result_bit_by_bit_though_a_worker_is_killed() -> None:
    serial = without_times(compared(serially))
    told: list[str] = []

    def watched(pair: Any, progress: Any):
        return over_ray()(pair, told.append)

    killer = kill_one_when(lambda: len(told) >= 1)
    spread = without_times(compared(watched))
    killer.join(timeout=1)
    assert not killer.is_alive(), "no worker was killed"
    assert spread == serial
    assert len(told) == 9


def test_a_stored_reference_is_opened_by_workers_too(tmp_path: Path) -> None:
    record(Live(float_bundle(), turns(), 8), tmp_path / "ref")
    found = [
        without_times(compare(Stored(tmp_path / "ref"), small_bundle(), MACHINE, spread=spread))
        for spread in (serially, over_ray())
    ]
    assert found[0] == found[1]


def test_a_cluster_that_is_not_there_is_one_message() -> None:
    from apps.cluster import join

    with pytest.raises(EdgeOmniError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*ray start --head"):
        join("127.0.0.1:1")
