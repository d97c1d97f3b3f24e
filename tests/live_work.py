"""Runs the generators of a live model to their end."""

from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")


def done(work: Generator[Any, None, T]) -> T:
    """What the work returns."""
    return listed(work)[1]


def listed(work: Generator[Any, None, T]) -> tuple[list[Any], T]:
    """What the work yields but for its pauses, and what it returns."""
    items = []
    while True:
        try:
            item = next(work)
        except StopIteration as stop:
            return items, stop.value
        if item is not None:
            items.append(item)
