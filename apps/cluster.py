"""Turns of a comparison spread over a Ray cluster: each worker opens both bundles once and does the turns it is given.

A worker that dies is started again and what it was at is done anew, so that nothing is lost: a turn is a pure function
of the two bundles and its number. Bundles and media must lie under the same paths on every machine.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine; Ray reads it when it is imported

import ray
from ray.exceptions import RayActorError, RayTaskError

from quant.comparison.each_turn import Pair, Progress, Spread, Work
from quant.comparison.record import Fed, Live
from quant.comparison.stored import Stored
from quant.limits import Limits
from quant.observe import Observed
from quant.turn import Turn
from runtime.bundle import MANIFEST, sha256_of
from runtime.errors import EdgeOmniError
from runtime.session import Options

ANSWER = 5.0  # seconds that a cluster may take to answer
DEATHS = 3  # of workers that one turn may cost: what kills every worker must not do so for ever


@dataclass(frozen=True)
class Opening:
    """What a worker opens: the same that the comparison has open itself."""

    reference: Path
    candidate: Path
    turns: tuple[Turn, ...]
    limits: Limits
    options: Options
    stored: bool
    swap_turns: int
    manifests: tuple[str, str]  # sha256 of both, so that no machine compares something else

    def pair(self) -> Pair:
        """EdgeOmniError where one lies elsewhere on this machine, or is another."""
        candidate = Observed(self.candidate, self.options, self.limits)
        if self.stored:
            reference: Stored | Live = Stored(self.reference)
        else:
            reference = Live(Observed(self.reference, self.options, self.limits), self.turns)
        found = (reference.side.manifest_sha256, sha256_of(self.candidate / MANIFEST))
        if found != self.manifests:
            raise EdgeOmniError(f"{os.uname().nodename} has other bundles under {self.reference} and {self.candidate}")
        return Pair(reference, candidate, self.swap_turns)


class Worker:
    """One process of the cluster."""

    def __init__(self, opening: Opening):
        self.pair = opening.pair()

    def work(self, index: int) -> tuple[Work, Fed]:
        """One turn, and what the reference's graphs were given in it."""
        work, reference = self.pair.work(index), self.pair.reference
        fed = reference.fed if isinstance(reference, Live) else {}
        return work, {name: [run for run in runs if run[0] == index] for name, runs in fed.items()}


def over_ray(address: str, options: Options) -> Spread:
    """Who does the turns: workers of the cluster at `address`, or of one that is started here for it ("local")."""

    def spread(pair: Pair, progress: Progress) -> Iterator[Work]:
        opening = _opening(pair, options)
        join(address)
        try:
            for work, fed in _in_order(opening, len(pair.reference.turns), progress):
                if isinstance(pair.reference, Live):
                    pair.reference.merge(fed)
                yield work
        finally:
            ray.shutdown()

    return spread


def _opening(pair: Pair, options: Options) -> Opening:
    reference, candidate = pair.reference, pair.candidate
    folder = reference.folder if isinstance(reference, Stored) else Path(reference.side.path)
    return Opening(
        reference=folder.resolve(),
        candidate=candidate.folder.resolve(),
        turns=tuple(reference.turns),
        limits=reference.limits,
        options=options,
        stored=reference.engine is None,
        swap_turns=pair.swap_turns,
        manifests=(reference.side.manifest_sha256, sha256_of(candidate.folder / MANIFEST)),
    )


def join(address: str) -> None:
    """Connect to a cluster, or start one of this machine's cores; EdgeOmniError where none answers."""
    try:
        _knock(address)
        ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=False)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise EdgeOmniError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or say --ray local"
        ) from None


def _knock(address: str) -> None:
    """OSError at once where nobody listens, for which Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), ANSWER).close()


def _in_order(opening: Opening, count: int, progress: Progress) -> Iterator[tuple[Work, Fed]]:
    """What all turns give, by their numbers, each as soon as those before it are there too."""
    made = ray.remote(max_restarts=-1, max_task_retries=DEATHS)(Worker)
    threads = max(1, opening.options.threads)
    workers = [made.options(num_cpus=threads).remote(opening) for _ in range(places(count, threads))]
    waiting, running, done = iter(range(count)), {}, {}
    for worker in workers:
        _give(worker, waiting, running)
    for index in range(count):
        while index not in done:
            (first, *_), _ = ray.wait([*running], num_returns=1)
            at, worker = running.pop(first)
            done[at] = _taken(first, at)
            progress(f"turn {at + 1} of {count}, on {len(workers)} workers")
            _give(worker, waiting, running)
        yield done.pop(index)


def places(count: int, threads: int) -> int:
    """Workers that fit: the cluster's cores by the threads of each, and no more than there are turns."""
    return max(1, min(count, int(ray.cluster_resources().get("CPU", 1)) // threads))


def _give(worker: Any, waiting: Iterator[int], running: dict[Any, tuple[int, Any]]) -> None:
    index = next(waiting, None)
    if index is not None:
        running[worker.work.remote(index)] = (index, worker)


def _taken(done: Any, index: int) -> tuple[Work, Fed]:
    try:
        return ray.get(done)
    except RayTaskError as error:
        raise EdgeOmniError(f"turn {index + 1} failed on a worker: {error.cause}") from error
    except RayActorError as error:
        raise EdgeOmniError(f"turn {index + 1} could not be done: {_reason(error)}") from error


def _reason(error: RayActorError) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if "EdgeOmniError: " in line]
    if lines:
        return lines[-1].split("EdgeOmniError: ", 1)[1]
    return f"its worker died {DEATHS + 1} times, which a lack of memory does; give --ray fewer cores or more threads"
