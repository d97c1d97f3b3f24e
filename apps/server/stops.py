"""Ends a text before a string that the client named, and holds back what may be the beginning of one."""

from collections.abc import Sequence


class Stops:
    """Text in pieces in, text that is certain to stand before every stop string out."""

    def __init__(self, marks: Sequence[str]):
        self._marks = tuple(marks)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far is certain and was not given yet. `found` tells that the rest does not count."""
        self._held += text
        ends = [at for mark in self._marks if (at := self._held.find(mark)) >= 0]
        if ends:
            self.found = True
            return self._give(min(ends))
        return self._give(len(self._held) - self._open())

    def flush(self) -> str:
        """What was held back, where the text ended without becoming a stop string."""
        return "" if self.found else self._give(len(self._held))

    def _open(self) -> int:
        """Characters at the end with which a stop string begins."""
        longest = min(len(self._held), max(map(len, self._marks), default=1) - 1)
        fits = (n for n in range(longest, 0, -1) if any(mark.startswith(self._held[-n:]) for mark in self._marks))
        return next(fits, 0)

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        return given
