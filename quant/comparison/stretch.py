"""Choices along the reference's answer, one by one: how far the candidate's distribution lies from the reference's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.answer import Followed, Taken
from quant.comparison.metrics import kl_from_top
from quant.comparison.record import Recorded, Seen, choices, log_of

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stretch:
    """n choices in one turn from one vocabulary or codebook, along the reference's answer; each array is [n]."""

    kl: Floats
    same: NDArray[np.bool_]
    ref: Floats  # log-probability of what the reference took, by the reference
    cand: Floats  # and by the candidate

    @property
    def finite(self) -> NDArray[np.bool_]:
        return np.isfinite(self.kl)


def joined(stretches: Iterable[Stretch]) -> Stretch:
    every = list(stretches)
    return Stretch(
        np.concatenate([s.kl for s in every]),
        np.concatenate([s.same for s in every]),
        np.concatenate([s.ref for s in every]),
        np.concatenate([s.cand for s in every]),
    )


def stretches_of(recorded: Recorded, followed: Followed) -> list[dict[str, Stretch]]:
    """The choices of each step by what was chosen from: "text", or "code0" and so on for each codebook."""
    found = []
    for step, seen, logits in zip(recorded.answer.steps, recorded.seen, followed.logits, strict=True):
        names = ["text"] if step.kind == "text" else [f"code{book}" for book in range(len(seen))]
        ended = step.kind == "audio" and ends_audio(step, logits[0])
        found.append(
            {
                name: stretch(ours, theirs, taken, len(taken) - (ended and name != "code0"))
                for name, ours, theirs, taken in zip(names, seen, logits, choices(step), strict=True)
            }
        )
    return found


def by_name(steps: Sequence[dict[str, Stretch]]) -> dict[str, Stretch]:
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: joined(step[name] for step in steps if name in step) for name in names}


def same_frames(steps: Sequence[dict[str, Stretch]]) -> np.ndarray:
    """Of each audio frame [frames] but one that ends audio, whether all its codes have the same likeliest one."""
    found = [np.empty(0, np.bool_)]
    for streams in ([s.same for s in step.values()] for step in steps if "text" not in step):
        frames = min(map(len, streams))
        found.append(np.all([same[:frames] for same in streams], axis=0))
    return np.concatenate(found)


def ends_audio(step: Taken, first_logits: np.ndarray) -> bool:
    """Whether the last frame holds the code that ends audio: then its other codes mean nothing."""
    return len(step.chosen) > 0 and int(step.chosen[-1, 0]) == first_logits.shape[-1] - 1


def stretch(ours: Seen, theirs: np.ndarray, taken: np.ndarray, count: int) -> Stretch:
    """The first `count` choices from logits [n, vocab]; KL is NaN where one of them is not finite."""
    kept = slice(0, count)
    with np.errstate(invalid="ignore"):
        same = ours.top.ids[:, 0] == theirs.argmax(axis=-1)
        kl = np.where(np.isfinite(theirs).all(axis=-1), kl_from_top(ours.top, theirs), np.nan)
        return Stretch(kl[kept], (same & np.isfinite(kl))[kept], ours.taken[kept], log_of(theirs, taken)[kept])
