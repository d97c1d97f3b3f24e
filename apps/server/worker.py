"""The one thread that the engine runs in: replies of all clients are made by turns, a piece of each at a time.

Work is a generator. Each piece of it ends with a value for the client, or with None where there is nothing to tell
yet. To cancel is to close it, which the worker does before its next piece.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from apps.server.failures import Busy, Closing

Item = TypeVar("Item")
AHEAD = 64  # items that a reply may be ahead of its client; it then waits, and others go on


class Job(Generic[Item]):
    """A reply in the making, as its client sees it: an asynchronous iterator over the values, to be closed."""

    def __init__(self, work: Generator[Item | None, None, None], wake: Callable[[], None], ahead: int):
        self.work, self._wake, self._ahead = work, wake, ahead
        self._loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._news = asyncio.Event()
        self._error: BaseException | None = None
        self.cancelled = False
        self.ended = False

    def __aiter__(self) -> "Job[Item]":
        return self

    async def __anext__(self) -> Item:
        """The next value; the error that ended the work, where one did."""
        while not self._items:
            if self.ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._news.clear()
            if not self._items and not self.ended:  # what came since would have set it before
                await self._news.wait()
        item = self._items.popleft()
        self._wake()
        return item

    def close(self) -> None:
        """The client wants no more of it."""
        self.cancelled = True
        self._wake()

    # What follows is the worker's side.

    @property
    def ready(self) -> bool:
        """Whether there is something to do about it."""
        return self.cancelled or len(self._items) < self._ahead

    def advance(self) -> None:
        """Do one piece of the work, or end it."""
        try:
            if self.cancelled:
                self.work.close()
                self.ended = True
            elif (item := next(self.work)) is not None:
                self._items.append(item)
        except StopIteration:
            self.ended = True
        except BaseException as error:  # whatever it is, it is its client's
            self.end(error)
        self._tell()

    def end(self, error: BaseException) -> None:
        self._error, self.ended = error, True

    def abandon(self, error: BaseException) -> None:
        """End the work from outside."""
        try:
            self.work.close()
        except BaseException as other:
            error = other
        self.end(error)
        self._tell()

    def _tell(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.set)


class Worker:
    """Runs up to `places` jobs, each a piece at a time in turn; `submit` raises Busy beyond that."""

    def __init__(self, places: int, ahead: int = AHEAD):
        self.places, self._ahead = places, ahead
        self._jobs: deque[Job[Any]] = deque()
        self._changed = threading.Condition()
        self._awake = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, work: Generator[Item | None, None, None]) -> Job[Item]:
        """Begin work. Busy where every place is taken, Closing where the server is being shut down."""
        job = Job(work, self._wake, self._ahead)
        with self._changed:
            if self._closing:
                raise Closing
            if len(self._jobs) >= self.places:
                raise Busy(self.places)
            self._jobs.append(job)
        self._wake()
        return job

    @property
    def active(self) -> int:
        """Replies that are being made."""
        return len(self._jobs)

    def close(self, timeout: float = 10.0) -> None:
        """End every job after the piece that it is at, and the thread with them."""
        with self._changed:
            self._closing = True
        self._wake()
        self._thread.join(timeout)

    def _wake(self) -> None:
        with self._changed:
            self._awake = True
            self._changed.notify()

    def _run(self) -> None:
        while not self._closing:
            job = self._next()
            if job is not None:
                job.advance()
                if job.ended:
                    with self._changed:
                        self._jobs.remove(job)
        while self._jobs:
            self._jobs.popleft().abandon(Closing())

    def _next(self) -> Job[Any] | None:
        """The job whose turn it is; None where all wait for their clients, after waiting for news of one."""
        with self._changed:
            for _ in range(len(self._jobs)):
                self._jobs.rotate(-1)
                if self._jobs[-1].ready:
                    return self._jobs[-1]
            while not (self._awake or self._closing):
                self._changed.wait()
            self._awake = False
            return None
