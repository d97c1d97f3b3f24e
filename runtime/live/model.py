"""What the live loop asks of a model that listens while it speaks: one set of weights, two branches of memory."""

from collections.abc import Generator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.events import Event, Finish
from runtime.live.events import Verdict

Work = Generator[None, None, None]


class Model(Protocol):
    """SPEAK holds the conversation as it was heard; LISTEN is what it would become if the person is answered.

    What computes is a generator that yields None after each piece of work, of some 40 ms at most, and returns its
    result; to cancel it is to close it. EdgeOmniError where something fails; the branches stand as before then.
    """

    def fork(self, heard_ms: float | None) -> None:
        """LISTEN becomes SPEAK up to what was heard of the answer in progress, closed, and a user turn is opened.

        None: all of SPEAK, nothing is being said. 0: nothing was heard yet, so there is no answer to close.
        """
        ...

    def see(self, frame: Any) -> Work:
        """Encode one frame and read it, before any audio of the turn."""
        ...

    def hear(self, wave: NDArray[np.float32], last: bool) -> Generator[None, None, int]:
        """Read a wave [n] at 16 kHz; `last` closes the turn up to where the answer begins. Positions that were read."""
        ...

    def unhear(self) -> None:
        """LISTEN as it was before `hear(last=True)`; pictures and earlier segments stay."""
        ...

    def read(self, text: str) -> Work:
        """A typed turn, whole."""
        ...

    def judge(self, speaking: bool) -> Generator[None, None, tuple[Verdict, float]]:
        """What the family's gate says of the turn on LISTEN, and how sure it is."""
        ...

    def reply(self, spoken: bool) -> Generator[Event | None, None, Finish]:
        """Answer the turn on LISTEN; goes on undisturbed when LISTEN becomes SPEAK."""
        ...

    def reply_in_text(self) -> Generator[Event | None, None, Finish]:
        """Answer the turn on SPEAK anew, in text, whatever of its answer is there already."""
        ...

    def accept(self) -> None:
        """LISTEN becomes SPEAK."""
        ...

    def reject(self) -> None:
        """Forget LISTEN."""
        ...

    def heard_text(self, heard_ms: float) -> str:
        """The text of the answer up to what was heard of it."""
        ...

    def commit(self, heard_ms: float | None) -> None:
        """The answer on SPEAK is over, cut at what was heard; None: all of it was."""
        ...

    def caption(self, wave: NDArray[np.float32]) -> Generator[None, None, str | None]:
        """What was said, in words; None where the bundle cannot write it down."""
        ...

    def compact(self, reserve: int) -> Generator[None, None, str | None]:
        """Make room for `reserve` positions if there is less; returns a line about what went, or None."""
        ...

    def reset(self) -> None:
        """A new conversation with the same system prompt."""
        ...

    def lengths(self) -> tuple[int, int]:
        """Positions of SPEAK and LISTEN."""
        ...

    def check(self) -> None:
        """Assert that the rows which both branches share are equal."""
        ...
