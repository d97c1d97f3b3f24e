"""One of the two contexts of a live conversation: where its turns, its open user turn and its answer begin."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from runtime.context import Context
from runtime.engine import Engine
from runtime.live.heard import ReplyLog
from runtime.prompt import Prompt


@dataclass
class Branch:
    """Positions are those of `context.ids`. `epoch` counts how often its end was forgotten: work from before is stale.

    A user turn that nobody answered (`user_end` is the end) is closed and the next one opened behind it, with no empty
    answer between them: the template's (before, after) of both user turns, and nothing of its assistant's.
    """

    engine: Engine
    context: Context
    shared: int = 0  # rows of the cache that are known to be those of the other branch
    starts: list[int] = field(default_factory=list)  # of the user turns
    user_end: int | None = None  # behind what the user gave in the newest turn, before what closes it
    answer: int | None = None  # where its answer begins, once it was asked for and until it is closed
    spoken: bool = True  # it was asked for aloud
    is_open: bool = False  # the newest user turn is not accepted yet
    within_audio: bool = False  # an audio tag is open in it
    kept: int = 0  # end of what `unhear` keeps of it
    log: ReplyLog = field(default_factory=lambda: ReplyLog(None))
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.context.ids)

    def take_over(self, other: "Branch", length: int) -> None:
        """Become what the other branch is up to `length`."""
        self.context.take_over(other.context, length, min(self.shared, other.shared))
        self.shared = other.shared = self.context.cache.length
        self.starts, self.log = list(other.starts), other.log
        self.user_end, self.answer, self.spoken = other.user_end, other.answer, other.spoken
        self.is_open = self.within_audio = False
        self.cut(length)

    def cut(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.context.truncate(length)
        self.shared = min(self.shared, length)
        self.starts = [start for start in self.starts if start < length]
        self.user_end = None if self.user_end is None or length < self.user_end else self.user_end
        self.answer = None if self.answer is None or length < self.answer else self.answer
        self.epoch += 1

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Leave the branch as it was if what is done in here fails or is cancelled, unless it was cut meanwhile."""
        length, epoch = len(self), self.epoch
        try:
            yield
        except BaseException:  # a closed generator, too
            if self.epoch == epoch:
                self.cut(length)
            raise

    def append(self, prompt: Prompt) -> None:
        if len(prompt):
            self.context.append(prompt)

    def open_user(self) -> None:
        """Begin a user turn behind whatever stands there."""
        self.close()
        self.starts.append(len(self))
        self.append(self.engine.format.open_user())
        self.is_open, self.within_audio, self.kept = True, False, len(self)
        self.user_end = self.answer = None

    def hear(self, codes: np.ndarray, last: bool) -> None:
        """Put audio into the user turn."""
        self.append(self.engine.format.sound(codes, opens=not self.within_audio, closes=last))

    def ask(self, spoken: bool, text: str = "") -> None:
        """End the user turn, behind a text, and ask for its answer."""
        closing = self.engine.format.close_user(spoken)
        self.append(self.engine.format.close_user(spoken, text) if text else closing)
        self.user_end, self.answer, self.spoken = len(self) - len(closing), len(self), spoken
        self.log = ReplyLog(self.engine.manifest.speech if spoken else None, self.engine.compat == "official")

    def ask_again(self, spoken: bool) -> None:
        """Forget what there is of the answer, and ask for it aloud or in writing."""
        assert self.user_end is not None
        self.cut(self.user_end)
        self.ask(spoken)

    def boundary(self, heard_ms: float | None) -> int:
        """Where the conversation ends if of the answer in progress only so much was heard; None: all of it.

        A written answer counts as heard once there is text of it.
        """
        if self.answer is None or self.user_end is None:
            return len(self)
        if len(self) == self.answer or (heard_ms is not None and not self.log.text):
            return self.user_end
        if heard_ms is None or not self.spoken:
            return len(self)
        heard = self.log.position(heard_ms)
        return self.user_end if heard is None else heard

    def close(self) -> None:
        """Put behind an answer, or behind a user turn without one, what ends it."""
        if self.answer is not None:
            self._close_answer()
        elif self.user_end == len(self):
            self.append(self.engine.format.close_user(None))
        self.answer = None
        self.epoch += 1

    def _close_answer(self) -> None:
        tokens, last = self.engine.manifest.tokens, len(self) - 1
        if self.context.ids[last] == tokens.audio_pad and last not in self.context.media:
            self.context.truncate(last)  # the frame of an end code, which stands for nothing
            self.shared = min(self.shared, last)
        within = self.context.ids[-1] in (tokens.audio_pad, tokens.audiogen_start)
        self.append(self.engine.format.close_assistant(spoken=self.spoken, within_audio=within))
