"""Pieces of work in the order of their urgency, on a clock that is given."""

from collections.abc import Generator
from typing import Any

from runtime.errors import EdgeOmniError
from runtime.live.clock import LEAK, MeasuredClock, VirtualClock, WallClock
from runtime.live.scheduler import Job, Scheduler


def work(clock: VirtualClock, costs: list[float], result: Any = None, fails: bool = False) -> Generator[Any, None, Any]:
    for number, cost in enumerate(costs):
        clock.spend(cost)
        yield number
    if fails:
        raise EdgeOmniError("broken")
    return result


def test_the_most_urgent_lane_runs_first_and_a_lane_keeps_its_order() -> None:
    clock = VirtualClock()
    scheduler = Scheduler(clock)
    for lane, name, priority in (("a", "late", 5), ("b", "soon", 1), ("a", "later", 0)):
        scheduler.submit(Job(lane, name, work(clock, [10]), lambda p=priority: p))
    done = []
    while (result := scheduler.next_result(1000)) is not None:
        done += [result.job.name] if result.kind == "done" else []
    assert done == ["soon", "late", "later"]


def test_a_result_that_is_ready_after_the_hop_waits_behind_it() -> None:
    clock = VirtualClock()
    scheduler = Scheduler(clock)
    scheduler.submit(Job("a", "long", work(clock, [40]), lambda: 1))
    assert scheduler.next_result(32) is None
    assert clock.now() == 40
    result = scheduler.next_result(64)
    assert result is not None and result.t == 40


def test_a_cancelled_job_is_closed_and_what_it_had_made_is_not_passed_on() -> None:
    clock, closed = VirtualClock(), []

    def careful() -> Generator[Any, None, None]:
        try:
            clock.spend(40)
            yield "made"
        finally:
            closed.append(True)

    scheduler = Scheduler(clock)
    job = scheduler.submit(Job("a", "careful", careful(), lambda: 1))
    assert scheduler.next_result(32) is None
    scheduler.cancel(job)
    assert closed and scheduler.next_result(1000) is None and scheduler.idle
    assert scheduler.wasted_ms == 40


def test_a_job_that_should_wait_waits_and_an_error_is_a_result() -> None:
    clock, wanted = VirtualClock(), []
    scheduler = Scheduler(clock)
    scheduler.submit(Job("a", "waits", work(clock, [1], fails=True), lambda: 1 if wanted else None))
    assert scheduler.next_result(10) is None
    wanted.append(True)
    assert [scheduler.next_result(10).kind for _ in range(2)] == ["item", "failed"]  # type: ignore[union-attr]
    assert scheduler.idle


def test_a_late_hop_leaves_less_time_for_work_and_no_debt_is_carried_on() -> None:
    clock = WallClock()
    clock.reach(32)
    early = clock.now()
    assert 32 <= early < 1000
    clock.reach(-1000)  # as if this hop came a second late
    assert clock.now() >= early - 2 * LEAK


def test_time_measured_counts_work_and_not_waiting() -> None:
    clock = MeasuredClock()
    clock.reach(500)
    assert 500 <= clock.now() < 600
    clock.reach(100)
    assert clock.now() >= 500
