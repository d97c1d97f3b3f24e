"""What a reply yields: a closed union of small frozen types, matched with `match`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# The model ended it; its limit was reached; the context is full; it went round in a loop; the model found that nobody
# spoke to it.
Finish = Literal["end", "length", "context", "repeats", "unaddressed"]


@dataclass(frozen=True)
class TextDelta:
    """Text that is certain: a character is never sent in parts."""

    text: str


@dataclass(frozen=True, eq=False)
class AudioChunk:
    """The next samples of the spoken answer, float32 [n] in -1..1."""

    samples: NDArray[np.float32]
    sampling_rate: int


@dataclass(frozen=True, eq=False)
class StepDone:
    """One text step or one segment of audio frames is complete.

    `inputs` is the whole sequence of ids before the step, `ids` after it; `codes` [frames, codebooks] are the frames
    of an audio step, the frame with the end code included.
    """

    kind: Literal["text", "audio"]
    inputs: tuple[int, ...]
    ids: tuple[int, ...]
    codes: NDArray[np.int64]


@dataclass(frozen=True)
class Timings:
    """Seconds on the wall clock since the reply was asked for, and what was made in them."""

    prompt_positions: int = 0
    prefill: float = 0.0
    first_token: float | None = None
    first_audio: float | None = None
    text_seconds: float = 0.0  # spent in text steps
    total: float = 0.0
    text_tokens: int = 0
    audio_frames: int = 0
    samples: int = 0
    sampling_rate: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Text tokens a second, the prefill left out."""
        return self.text_tokens / self.text_seconds if self.text_tokens and self.text_seconds else None

    @property
    def real_time_factor(self) -> float | None:
        """Seconds spent after the prefill for each second of speech; below 1 is faster than it is heard."""
        return (self.total - self.prefill) * self.sampling_rate / self.samples if self.samples else None


@dataclass(frozen=True)
class Forgotten:
    """The context was full: so many of the oldest pictures and whole turns went, and positions stay of those before."""

    pictures: int
    turns: int
    before: int
    kept: int

    def __str__(self) -> str:
        counted = ((self.pictures, "picture"), (self.turns, "turn"))
        gone = [f"the oldest {n} {what}{'s' * (n > 1)}" for n, what in counted if n]
        return f"forgot {' and '.join(gone)}: {self.before} positions were used, {self.kept} are kept"


@dataclass(frozen=True)
class Reading:
    """So many positions of a long prompt have been read, of all that are new. To cancel it is to close the reply: the
    conversation stands as before the turn then."""

    done: int
    total: int


@dataclass(frozen=True)
class ReplyDone:
    """The last event of a reply."""

    text: str
    finish: Finish
    timings: Timings


Event = Forgotten | Reading | TextDelta | AudioChunk | StepDone | ReplyDone
