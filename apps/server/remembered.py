"""Spoken answers by the ids that clients know them by: codes do not travel, so a history names them."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from apps.server.failures import refused
from apps.server.settings import Limits
from runtime.prompt import Answer


class Remembered:
    """The newest answers, for a time. Ids cannot be guessed, so nobody finds those of others."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.time):
        self._limits, self._clock = limits, clock
        self._answers: OrderedDict[str, tuple[float, tuple[Answer, ...]]] = OrderedDict()

    def new(self) -> tuple[str, int]:
        """An id for an answer, and when it will be forgotten (Unix time)."""
        return f"audio_{secrets.token_hex(16)}", int(self._clock() + self._limits.remembered_seconds)

    def keep(self, name: str, expires: float, answer: tuple[Answer, ...]) -> None:
        self._answers[name] = expires, answer
        while len(self._answers) > self._limits.remembered or next(iter(self._answers.values()))[0] < self._clock():
            self._answers.popitem(last=False)

    def find(self, name: str, param: str) -> tuple[Answer, ...]:
        """ApiError for an id that is unknown or forgotten."""
        expires, answer = self._answers.get(name, (0.0, ()))
        if expires < self._clock():
            raise refused(
                "no spoken answer is remembered by this id; send its transcript as content instead",
                param,
                "audio_not_found",
            )
        return answer
