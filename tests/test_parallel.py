"""Work in several threads: results come in order, little is drawn ahead, and an error ends it."""

import threading
import time
from collections.abc import Iterator

import pytest

from quant.parallel import in_order


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3 == 0))  # every third takes longer
        return item * item

    assert list(in_order(work, range(50), threads)) == [item * item for item in range(50)]
    assert list(in_order(work, [], threads)) == []


def test_two_items_are_worked_on_at_once() -> None:
    together = threading.Barrier(2, timeout=10)
    assert len(list(in_order(lambda item: together.wait(), range(4), threads=2))) == 4


def test_no_more_is_drawn_than_threads_can_soon_take() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            drawn.append(item)
            yield item

    results = in_order(lambda item: item, items(), threads=3)
    for done in range(1, 20):
        next(results)
        assert len(drawn) <= done + 2 * 3


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_error_ends_the_work(threads: int) -> None:
    def work(item: int) -> int:
        if item >= 5:
            raise ValueError(f"item {item}")
        return item

    results = in_order(work, iter(range(1000)), threads)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="item 5"):
        next(results)
