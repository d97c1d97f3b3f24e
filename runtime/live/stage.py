"""What a live conversation stands on: its parts, its state, and the table that alone changes it."""

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.live.clock import Clock
from runtime.live.endpointer import Endpointer
from runtime.live.events import LiveEvent, Notice, State, Transition
from runtime.live.model import Model
from runtime.live.player import Player
from runtime.live.recording import Recording
from runtime.live.scheduler import TIDY, Job, Scheduler
from runtime.live.settings import DEFAULTS, HOP_MS, Settings
from runtime.live.turn import Answer, UserTurn
from runtime.live.turn_taking import Facts, Next, row_for

Events = Iterator[LiveEvent]
Wave = NDArray[np.float32]
EPISODE = 1000  # ms within which echoes are one echo


class Detects(Protocol):
    """What is asked of a detector (`runtime.live.vad`)."""

    def probability(self, chunk: Wave, /) -> float: ...
    def reset(self) -> None: ...


class Suspects(Protocol):
    """What is asked of an echo test (`runtime.live.echo`)."""

    def suspicious(self, chunk: Wave, /) -> bool: ...


class Stage:
    """Parts, state and flags. An action of the table is the method `_do_NAME(t)`: it yields events, or returns None."""

    def __init__(
        self,
        model: Model,
        detector: Detects,
        player: Player,
        clock: Clock,
        settings: Settings = DEFAULTS,
        echo: Suspects | None = None,
    ):
        self.model, self.detector, self.player, self.clock = model, detector, player, clock
        self.settings, self.echo = settings, echo
        self.scheduler, self.endpointer, self.recording = Scheduler(clock), Endpointer(settings), Recording()
        self.state: State = "IDLE"
        self.half_duplex, self.muted, self.text_only = settings.half_duplex, False, not settings.spoken
        self.ducked = self.paused = False
        self.turn: UserTurn | None = None
        self.answer: Answer | None = None
        self.draft: Answer | None = None  # an answer to a turn that may still go on
        self.frames: deque[tuple[float, Any]] = deque(maxlen=settings.frame_ring)
        self.level_db = -120.0
        self._requests: deque[tuple[str, str]] = deque()
        self._timers: dict[str, float] = {}
        self._gen, self._now, self._last_event, self._mouth_until = 0, 0.0, 0.0, float("-inf")
        self._suspicions: deque[bool] = deque(maxlen=int(settings.t_start_play / HOP_MS))
        self._echoes: deque[float] = deque()
        self._starved: deque[float] = deque()
        self._see_ms = 0.0
        self._lead_ms = 0.0  # from the first to the second piece of an answer's sound, as it was lately
        self._underruns = player.underruns
        self._see_failed = False
        self._incomplete = 0  # turns that were found so
        self._at = self._voiced = self._last_heard = 0.0
        self._text = ""

    @property
    def mouth(self) -> bool:
        """The assistant is audible, or was a moment ago."""
        return self._now <= self._mouth_until

    def _happen(self, event: str, t: float, detail: str = "") -> Events:
        """Follow the table: tell, change the state, act."""
        before = self.state
        row = row_for(before, event, self._facts(t))
        if row is None:
            return
        self.state = self._state_after(row.next)
        self._last_event = t
        speak, listen = self.model.lengths()
        yield Transition(t, before, event, self.state, row.number, speak, listen, self._answer_number(), detail)
        for action in row.actions:
            yield from getattr(self, f"_do_{action}")(t) or ()

    def _facts(self, t: float) -> Facts:
        turn, answer, settings = self.turn, self.answer, self.settings
        suspicious = list(self._suspicions)
        return Facts(
            voiced_ms=turn.voiced_ms if turn else 0.0,
            voiced_query=settings.voiced_query,
            voiced_query_play=settings.voiced_query_play,
            echo=self.mouth and bool(suspicious) and 2 * sum(suspicious) >= len(suspicious),
            half_duplex=self.half_duplex and self.mouth,
            played=answer is not None and answer.opened and self.player.heard_ms > 0,
            sound_ready=self.draft is not None and self._playable_at(self.draft) <= t,
            full=turn is not None and self._now - turn.began >= settings.utt_max,
            reading=self.answer is None and bool(self.scheduler.in_lane("listen")),
        )

    def _state_after(self, following: Next) -> State:
        match following:
            case "same":
                return self.state
            case "THINK or SPEAK":
                if self.answer is None:
                    return "IDLE"
                return "SPEAK" if self.answer.opened else "THINK"
            case state:
                return state

    def _answer_number(self) -> int:
        return self.answer.gen if self.answer else self._gen

    def _when_spare(self, name: str, priority: int) -> int | None:
        """A priority that waits while an answer could run out of sound."""
        answer = self.answer
        if answer is None or answer.finish is not None or self.paused:
            return priority
        enough = self.scheduler.costs.get(name, 0.0) + self.settings.buffer_low
        return priority if self._sound_in_hand(answer) >= enough else None

    def _sound_in_hand(self, answer: Answer) -> float:
        return answer.waiting_ms + (self.player.buffered_ms if answer.opened else 0.0)

    def _playable_at(self, answer: Answer) -> float:
        """From when on the answer can be played without running dry before its second piece of sound comes."""
        if answer.silent:
            return float("inf")
        if answer.finish is not None or answer.chunks > 1:
            return 0.0
        return answer.first_t + min(self._lead_ms - answer.waiting_ms, self.settings.lead_max)

    def _drop_draft(self) -> None:
        if self.draft is not None:
            self.scheduler.cancel(self.draft.job)
            self.draft = None

    def _tidy(self) -> None:
        """Make room for the next turn while nobody waits."""
        if not any(job.name == "compact" for job in self.scheduler.jobs):
            work = self.model.compact(self.settings.context_reserve)
            self.scheduler.submit(Job("tidy", "compact", work, lambda: TIDY if self.state == "IDLE" else None))

    def _count_echo(self, t: float) -> Events:
        if not self._echoes or t - self._echoes[-1] >= EPISODE:
            self._echoes.append(t)
        while self._echoes and t - self._echoes[0] > 60_000:
            self._echoes.popleft()
        if len(self._echoes) > self.settings.echoes_a_minute and not self.half_duplex:
            yield from self._go_half_duplex(t, "the microphone hears the loudspeaker; use headphones or turn it down")

    def _go_half_duplex(self, t: float, why: str) -> Events:
        self.half_duplex = True
        yield Notice(t, "half_duplex", f"the assistant does not listen while it speaks any more: {why}")
