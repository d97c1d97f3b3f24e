"""Several mistakes in one error: gather them as they are met, then refuse the whole subject once."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from runtime.errors import CheckpointError

MAX_LINES = 40  # a header of nonsense would otherwise fill the terminal


@contextmanager
def gathering(problems: list[str]) -> Iterator[None]:
    """Adds the message of a CheckpointError that is raised inside to `problems` instead of letting it out."""
    try:
        yield
    except CheckpointError as error:
        problems.append(str(error))


def refuse(subject: object, problems: Sequence[str]) -> None:
    """Raises one CheckpointError about `subject` that says every problem; returns if there is none."""
    if len(problems) == 1:
        raise CheckpointError(f"{subject}: {problems[0]}")
    if problems:
        lines = [problem.replace("\n", "\n    ") for problem in problems[:MAX_LINES]]
        if len(problems) > MAX_LINES:
            lines.append(f"and {len(problems) - MAX_LINES} more")
        raise CheckpointError("\n  - ".join([f"{subject}: {len(problems)} problems", *lines]))


def shown(value: object, limit: int = 80) -> str:
    """The value as Python writes it, cut where it would fill the line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def listed(names: Iterable[str], limit: int = 6) -> str:
    """The names quoted and in a row, the first `limit` of them: `'a', 'b' and 12 more`."""
    names = list(names)
    shown = ", ".join(repr(name) for name in islice(names, limit))
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
