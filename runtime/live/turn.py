"""One person's turn and one answer, as far as they have come."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.live.events import Verdict
from runtime.live.scheduler import Job


@dataclass(eq=False)
class UserTurn:
    """What a person says, from the first sample that goes to the model to the last. Times in ms."""

    start: float
    end: float = 0.0  # where the audio ends that goes to the model; known at a pause
    began: float = 0.0
    voiced_ms: float = 0.0
    voiced_before: float = 0.0  # of it, before a pause that had seemed to end the turn
    soft_t: float | None = None  # when the pause was found that the verdict belongs to
    end_t: float = 0.0  # when the turn was over
    verdict: tuple[Verdict, float] | None = None
    verdict_t: float = 0.0
    asked: bool = False  # the model is hearing it, or has heard it
    heard: bool = False  # it has
    retried: bool = False
    speculations: int = 0
    segments: int = 0  # that are read for good
    frames: list[tuple[float, Any]] = field(default_factory=list)  # when each was taken

    def forget_verdict(self) -> None:
        self.verdict, self.soft_t, self.asked, self.heard = None, None, False, False


@dataclass(eq=False)
class Answer:
    """An answer being made, unheard while its turn may still go on."""

    gen: int
    spoken: bool
    job: Job | None = None
    text: str = ""
    waiting: list[NDArray[np.float32]] = field(default_factory=list)  # sound that may not be played yet
    rate: int = 24_000
    chunks: int = 0  # of sound that came so far
    first_t: float = 0.0  # when the first did
    opened: bool = False  # the player has it
    finish: str | None = None  # why it is complete
    told: bool = False  # its text so far was passed on
    turn: UserTurn | None = None  # which it answers

    @property
    def silent(self) -> bool:
        return not self.waiting and not self.opened

    @property
    def waiting_ms(self) -> float:
        return 1000 * sum(map(len, self.waiting)) / self.rate
