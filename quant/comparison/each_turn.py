"""The work of a comparison that one turn is: a pure function of two bundles and a number, done here or elsewhere."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np

from quant.answer import Answer
from quant.comparison.attribution import Swapped, Swaps, swaps_of
from quant.comparison.figures import TurnResult
from quant.comparison.metrics import agreement
from quant.comparison.record import Recorded, Reference
from quant.comparison.stretch import by_name, same_frames, stretches_of
from quant.observe import Observed
from quant.turn import Turn

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Work:
    """What one turn gave."""

    result: TurnResult
    swaps: Swaps


@dataclass(eq=False)
class Pair:
    """Reference and candidate, open. Some turns, `swap_turns` many, are also tried with one graph swapped."""

    reference: Reference
    candidate: Observed
    swap_turns: int

    def work(self, index: int) -> Work:
        """Turn number `index`. Nothing but the times depends on the turns before, so that any process may do it."""
        recorded, engine = self.reference.recorded(index), self.reference.engine
        used = frozenset(engine.used) if engine else frozenset()
        result = one_turn(self.candidate, self.reference, index, recorded)
        if index not in self.swapped_turns:
            return Work(result, {})
        return Work(result, self._swapped.swaps(self.reference.turns[index], recorded, used))

    @cached_property
    def swapped_turns(self) -> list[int]:
        return varied(self.reference.turns, self.swap_turns)

    @cached_property
    def _swapped(self) -> Swapped:
        return Swapped(swaps_of(self.reference.engine, self.candidate))


def varied(turns: Sequence[Turn], count: int) -> list[int]:
    """Numbers of `count` turns, of each kind in turn: spoken ones, heard ones, seen ones, plain ones."""
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for index, turn in enumerate(turns):
        kinds.setdefault((turn.spoken, turn.audio is not None, bool(turn.images)), []).append(index)
    drawn = [index for row in zip_longest(*kinds.values()) for index in row if index is not None]
    return sorted(drawn[:count])


Spread = Callable[[Pair, Progress], Iterable[Work]]


def serially(pair: Pair, progress: Progress) -> Iterable[Work]:
    """One turn after the other, in this process."""
    count = len(pair.reference.turns)
    for index in range(count):
        progress(f"turn {index + 1} of {count}")
        yield pair.work(index)


def one_turn(candidate: Observed, reference: Reference, index: int, recorded: Recorded) -> TurnResult:
    """The candidate along the reference's answer, and then by itself."""
    turn, speech = reference.turns[index], candidate.manifest.speech
    prompt, answer = candidate.ask(turn)
    followed = candidate.follow(prompt, recorded.answer.steps)
    steps = stretches_of(recorded, followed)
    audible = turn.spoken and any(step.kind == "audio" for step in recorded.answer.steps)
    return TurnResult(
        turn=turn,
        reference=recorded.answer,
        candidate=answer,
        stretches=by_name(steps),
        frames=same_frames(steps),
        heard=agreement(recorded.heard, prompt.codes) if len(recorded.heard) else np.empty(0),
        same_wave=candidate.sound(recorded.answer.steps) if audible else np.empty(0, np.float32),
        prefill=(recorded.prefill / recorded.prompt_positions, followed.prefill / followed.prompt_positions),
        decode=(_median(recorded.token_seconds), _median(followed.token_seconds)),
        rate=speech.sampling_rate if audible and speech else 0,
        streamed=streamed_error(candidate, answer) if audible else math.nan,
    )


def streamed_error(engine: Observed, answer: Answer) -> float:
    """Largest difference of an answer's speech, made while its codes came, from the same codes made audible at once."""
    whole = engine.sound(answer.steps)
    if len(whole) != len(answer.wave):
        return math.inf
    return float(np.abs(whole - answer.wave).max()) if len(whole) else math.nan


def _median(seconds: Sequence[float]) -> float:
    return float(np.median(seconds)) if seconds else 0.0
