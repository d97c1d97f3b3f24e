"""Ctrl-C while a turn is answered at a terminal: it ends the answer or cancels the reading, and never the program."""

import signal
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.events import Event, Forgotten, Reading


class Interrupt:
    """Says, when called, whether Ctrl-C was pressed.

    Once there is something of an answer, the first press asks it to end after its next piece, so that it stays in the
    conversation. Before, and at the second press, the graph that is running is stopped, which is an EdgeOmniError
    wherever it runs.
    """

    def __init__(self, engine: Engine):
        self.engine, self.presses, self.answering = engine, 0, False

    def __call__(self) -> bool:
        return self.presses > 0

    def pressed(self, *_: object) -> None:
        self.presses += 1
        if self.presses > 1 or not self.answering:
            self.engine.cancel()

    def watching(self, events: Generator[Event, None, None]) -> Generator[Event, None, None]:
        """The same events; EdgeOmniError where Ctrl-C was pressed before the first of the answer itself."""
        with closing(events):
            for event in events:
                self.answering = self.answering or not isinstance(event, Forgotten | Reading)
                if self.presses and not self.answering:
                    raise EdgeOmniError("the turn was taken back while it was read")
                yield event


@contextmanager
def interruptible(engine: Engine) -> Iterator[Interrupt]:
    """Take Ctrl-C for what runs in here."""
    interrupt = Interrupt(engine)
    before = signal.signal(signal.SIGINT, interrupt.pressed)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
        engine.rearm()
