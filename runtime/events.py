"""What a reply yields: a closed union of small frozen types, matched with `match`."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Finish = Literal["end", "length", "context"]  # the model ended it; its limit of tokens; the context is full


@dataclass(frozen=True)
class TextDelta:
    """Text that is certain: a character is never sent in parts."""

    text: str


@dataclass(frozen=True, eq=False)
class AudioChunk:
    """The next samples of the spoken answer, float32 [n] in -1..1."""

    samples: NDArray[np.float32]
    sampling_rate: int


@dataclass(frozen=True)
class Timings:
    """Seconds on the wall clock from the moment at which the reply was asked for, and what was made in them."""

    prompt_positions: int
    prefill: float
    first_token: float | None = None
    first_audio: float | None = None
    text_seconds: float = 0.0  # spent in text steps, and in audio steps, speech decoding left out
    audio_seconds: float = 0.0
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
        """Seconds spent on the reply after the prefill for each second of speech that came out."""
        return (self.total - self.prefill) * self.sampling_rate / self.samples if self.samples else None


@dataclass(frozen=True)
class ReplyDone:
    """The last event of a reply. `text` is all of it; `ids` are the positions that it added to the context."""

    text: str
    finish: Finish
    timings: Timings
    ids: tuple[int, ...] = field(default=(), repr=False)


Event = TextDelta | AudioChunk | ReplyDone
