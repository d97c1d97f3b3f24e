"""Which piece of work runs next: one engine, jobs that stop between pieces, and the most urgent of them first."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.errors import EdgeOmniError
from runtime.live.clock import Clock

# The person waits for sound; a verdict is wanted; sound is in hand; pictures; what may be needed; what may be nice.
SOUND, JUDGE, MORE_SOUND, SEE, SPECULATE, TIDY = 1, 2, 3, 4, 5, 6
LEARN = 0.3  # share of the newest piece in the estimate of what a piece costs


@dataclass(eq=False)
class Job:
    """Work in pieces: a generator that yields after each. Jobs of one lane run one after the other.

    `priority` is asked before each piece: a number, lower is sooner, or None while the job should wait.
    """

    lane: str
    name: str
    work: Generator[Any, None, Any]
    priority: Callable[[], int | None]
    ran_ms: float = field(default=0.0, init=False)


@dataclass(frozen=True)
class Result:
    """What a piece gave at `t`: an item, the job's result at its end, or its error."""

    t: float
    job: Job
    kind: Literal["item", "done", "failed"]
    value: Any


class Scheduler:
    """Runs pieces until the next hop is due. A result that is ready later than that waits behind the hop."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.jobs: list[Job] = []
        self.costs: dict[str, float] = {}  # ms of a piece, by the name of its job
        self.wasted_ms = 0.0  # spent on jobs that were cancelled
        self.longest_ms = 0.0
        self._held: Result | None = None

    def submit(self, job: Job) -> Job:
        self.jobs.append(job)
        return job

    def cancel(self, job: Job | None) -> None:
        """Close the job; nothing that it made is passed on any more."""
        if job is not None and job in self.jobs:
            self.jobs.remove(job)
            self.wasted_ms += job.ran_ms
            job.work.close()
        if self._held is not None and self._held.job is job:
            self._held = None

    def cancel_lane(self, lane: str) -> None:
        for job in self.in_lane(lane):
            self.cancel(job)
        if self._held is not None and self._held.job.lane == lane:
            self._held = None

    def in_lane(self, lane: str) -> list[Job]:
        return [job for job in self.jobs if job.lane == lane]

    @property
    def idle(self) -> bool:
        return not self.jobs and self._held is None

    def next_result(self, until: float) -> Result | None:
        """The next result before `until`, or None."""
        while True:
            if self._held is not None:
                if self._held.t >= until:
                    return None
                held, self._held = self._held, None
                return held
            job = self._most_urgent()
            if job is None or self.clock.now() >= until:
                return None
            self._held = self._run_piece(job)

    def _most_urgent(self) -> Job | None:
        heads: dict[str, Job] = {}
        for job in self.jobs:
            heads.setdefault(job.lane, job)
        ready = [(wanted, job) for job in heads.values() if (wanted := job.priority()) is not None]
        return min(ready, key=lambda pair: pair[0])[1] if ready else None

    def _run_piece(self, job: Job) -> Result | None:
        began = self.clock.now()
        kind, value = "item", None
        try:
            value = next(job.work)
        except StopIteration as stop:
            kind, value = "done", stop.value
        except (EdgeOmniError, MemoryError) as error:
            kind, value = "failed", error
        now = self.clock.now()
        self._note(job, now - began)
        if kind != "item":
            self.jobs.remove(job)
        return Result(now, job, kind, value) if kind != "item" or value is not None else None

    def _note(self, job: Job, ms: float) -> None:
        job.ran_ms += ms
        self.longest_ms = max(self.longest_ms, ms)
        self.costs[job.name] = ms if job.name not in self.costs else (1 - LEARN) * self.costs[job.name] + LEARN * ms
