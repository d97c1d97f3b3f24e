"""What a bundle answered, step by step, and what another would have chosen in its place."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.events import StepDone, Timings

Ending = Literal["end", "limit", "context"]  # by an end token; at a limit, the comparison's or its own; no room left
NOT_TIMED = Timings()
SILENCE = np.empty(0, np.float32)


@dataclass(frozen=True, eq=False)
class Taken:
    """One step of an answer: the ids before it, and the ids [n] or the codes [n, codebooks] that were chosen in it."""

    kind: Literal["text", "audio"]
    inputs: NDArray[np.int64]
    chosen: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a bundle answers by itself, always the likeliest; `failure` is the error that ended it, if one did.

    `cut` says whether a piece of its speech reached a limit before its end, so that not all of the text is heard.
    """

    text: str
    steps: tuple[Taken, ...]
    wave: NDArray[np.float32]  # [n] at the bundle's rate; none for an answer in text
    failure: str = ""
    ending: Ending = "end"
    cut: bool = False
    timings: Timings = NOT_TIMED
    letters: tuple[float, ...] = ()  # probability of each option, where one was to be chosen by its letter

    @property
    def ids(self) -> list[int]:
        return [int(token) for step in self.steps if step.kind == "text" for token in step.chosen]

    @property
    def codes(self) -> list[tuple[int, ...]]:
        return [tuple(map(int, row)) for step in self.steps if step.kind == "audio" for row in step.chosen]


@dataclass(frozen=True, eq=False)
class Followed:
    """What a bundle would have chosen along another's answer, step by step, before sampling.

    Logits of a text step are one array [n, vocab], of an audio step one for each codebook [n, codes].
    """

    logits: tuple[tuple[NDArray[np.float32], ...], ...]
    prompt_positions: int
    prefill: float  # seconds
    token_seconds: tuple[float, ...]  # of each text position


def taken(done: StepDone) -> Taken:
    inputs = np.array(done.inputs, np.int64)
    chosen = np.array(done.ids[len(inputs) :], np.int64) if done.kind == "text" else done.codes
    return Taken(done.kind, inputs, chosen)
