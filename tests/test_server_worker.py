"""The engine's thread and the stop strings, each by itself."""

import asyncio
import threading
from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.server.failures import Busy, Closing
from apps.server.stops import Stops
from apps.server.worker import Job, Worker


def count(to: int, log: list[str], name: str) -> Generator[int | None, None, None]:
    try:
        for number in range(to):
            log.append(name)
            yield number
            yield None
    finally:
        log.append(f"{name} closed")


def test_jobs_take_turns_and_each_gives_all_that_it_has_in_order():
    log: list[str] = []

    async def both() -> list[list[int]]:
        worker = Worker(3)
        try:
            held = threading.Event()
            worker.submit(hold(held))  # so that the other two begin together
            jobs = [worker.submit(count(20, log, name)) for name in "ab"]
            held.set()
            return await asyncio.gather(*map(collect, jobs))
        finally:
            worker.close()

    assert asyncio.run(both()) == [list(range(20)), list(range(20))]
    assert "".join(name for name in log if len(name) == 1) in ("ab" * 20, "ba" * 20)


def hold(held: threading.Event) -> Generator[int | None, None, None]:
    held.wait(10)
    yield None


async def collect(job: Job[int]) -> list[int]:
    return [item async for item in job]


def test_a_job_that_has_no_end_leaves_the_others_their_turns():
    async def ask() -> tuple[list[int], int]:
        worker = Worker(3)
        try:
            endless = worker.submit(count(1_000_000, [], "endless"))
            short = await collect(worker.submit(count(50, [], "short")))
            return short, len(endless._items)
        finally:
            worker.close()

    short, ahead = asyncio.run(ask())
    assert short == list(range(50)) and ahead <= 64


def test_a_client_that_does_not_read_is_waited_for_and_no_more_is_made():
    log: list[str] = []

    async def ask() -> int:
        worker = Worker(1, ahead=3)
        try:
            job = worker.submit(count(1000, log, "a"))
            while len(log) < 3:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            made = len(log)
            assert await anext(job) == 0
            return made
        finally:
            worker.close()

    assert asyncio.run(ask()) == 3


def test_what_is_closed_ends_and_makes_room_and_beyond_the_places_it_is_busy():
    log: list[str] = []

    async def ask() -> None:
        worker = Worker(1)
        try:
            job = worker.submit(count(1_000_000, log, "a"))
            with pytest.raises(Busy):
                worker.submit(count(1, log, "b"))
            assert await anext(job) == 0
            job.close()
            while worker.active:
                await asyncio.sleep(0.001)
            assert await collect(worker.submit(count(2, log, "c"))) == [0, 1]
        finally:
            worker.close()

    asyncio.run(ask())
    assert "a closed" in log and "b" not in log


def test_an_error_is_its_own_clients_alone():
    def fails() -> Generator[int | None, None, None]:
        yield 1
        raise ZeroDivisionError

    async def ask() -> None:
        worker = Worker(2)
        try:
            bad, good = worker.submit(fails()), worker.submit(count(3, [], "good"))
            assert await anext(bad) == 1
            with pytest.raises(ZeroDivisionError):
                await anext(bad)
            assert await collect(good) == [0, 1, 2]
        finally:
            worker.close()

    asyncio.run(ask())


def test_at_the_end_every_client_is_told_and_nobody_new_is_taken():
    async def ask() -> None:
        worker = Worker(2)
        job = worker.submit(count(1_000_000, [], "a"))
        await anext(job)
        worker.close()
        with pytest.raises(Closing):
            await collect(job)
        with pytest.raises(Closing):
            worker.submit(count(1, [], "b"))

    asyncio.run(ask())


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.data())
def test_a_text_in_any_pieces_ends_before_the_first_stop_string(text: str, marks: list[str], data: st.DataObject):
    stops, given_out, at = Stops(marks), "", 0
    while at < len(text) and not stops.found:
        size = data.draw(st.integers(1, 5))
        given_out += stops.push(text[at : at + size])
        at += size
    given_out += stops.flush()
    # Of several that are complete in the same piece, the one that begins first counts.
    begins = [text[:at].find(mark) for mark in marks if mark in text[:at]]
    assert stops.found == bool(begins)
    assert given_out == (text[: min(begins)] if begins else text)
