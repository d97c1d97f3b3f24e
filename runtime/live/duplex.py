"""A conversation in real time: chunk (and frame) in, events out. No thread, no sleep; the clock is given.

A hop of sound goes down once: detector, endpointer, table; what the table orders becomes jobs, of which the scheduler
runs pieces until the next hop is due; what they give comes up as events, and as samples for the player.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EdgeOmniError, PromptError
from runtime.events import AudioChunk, TextDelta
from runtime.live.clock import Clock
from runtime.live.endpointer import Endpointer, Found
from runtime.live.events import Caption, LiveEvent, Notice, ReplyEnded, State, Transition, TurnTimes, Verdict
from runtime.live.gate import by_rule
from runtime.live.model import Model
from runtime.live.player import Player
from runtime.live.recording import Recording
from runtime.live.scheduler import JUDGE, MORE_SOUND, SEE, SOUND, SPECULATE, TIDY, Job, Result, Scheduler
from runtime.live.settings import HOP, HOP_MS, Settings
from runtime.live.turn import Answer, UserTurn
from runtime.live.turn_taking import BACK, SAME, Facts, row_for

Events = Iterator[LiveEvent]
Wave = NDArray[np.float32]
SEGMENT = "segment"
RING_MS = 2000  # of sound that is kept while nobody speaks
JUMP = 500  # ms by which time may jump before the detector's memory is of something else
GAP = 1000  # ms without sound that end a turn
EPISODE = 1000  # ms within which echoes are one echo
REFORK_MS = 2560  # of an answer heard since a turn began over it, from which its end is worth to be known


class Detects(Protocol):
    """What is asked of a detector (`runtime.live.vad`)."""

    def probability(self, chunk: Wave, /) -> float: ...
    def reset(self) -> None: ...


class Suspects(Protocol):
    """What is asked of an echo test (`runtime.live.echo`)."""

    def suspicious(self, chunk: Wave, /) -> bool: ...


class Duplex:
    """Holds one conversation. `step` once for each hop; `say`, `interrupt`, `reset`, `fail` take effect in the next."""

    def __init__(
        self,
        model: Model,
        detector: Detects,
        player: Player,
        clock: Clock,
        settings: Settings = Settings(),
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
        self._played: deque[tuple[float, str]] = deque(maxlen=8)
        self._see_ms = 0.0
        self._underruns = player.underruns
        self._see_failed = False
        self._at = self._voiced = self._last_heard = 0.0
        self._text = ""

    # What may be asked from outside

    def say(self, text: str) -> None:
        """A typed turn."""
        self._requests.append(("TXT", text))

    def interrupt(self) -> None:
        """Stop the answer, as "stop" does."""
        self._requests.append(("STOP", ""))

    def reset(self) -> None:
        """A new conversation."""
        self._requests.append(("RST", ""))

    def fail(self, kind: str) -> None:
        """The microphone ("capture") or the loudspeaker ("playback") was lost; "capture_back", "playback_back"."""
        self._requests.append((f"ERR({kind})", ""))

    def close(self) -> None:
        """Stop all work and fall silent."""
        for job in list(self.scheduler.jobs):
            self.scheduler.cancel(job)
        self.player.silence()
        self.state = "CLOSED"

    @property
    def mouth(self) -> bool:
        """The assistant is audible, or was a moment ago."""
        return self._now <= self._mouth_until

    def step(self, chunk: Wave, frame: Any, now: float) -> Events:
        """Take the hop [512] of 16 kHz sound that ends at `now` ms, and the newest frame if there is a new one.

        Yields what happened. EdgeOmniError for a chunk of another length.
        """
        if np.shape(chunk) != (HOP,):
            raise EdgeOmniError(f"a hop has the shape {list(np.shape(chunk))}, expected [{HOP}] samples at 16 kHz")
        if self.state == "CLOSED":
            return
        self.clock.reach(now)
        yield from self._serve_requests(now)
        yield from self._mind_gap(now)
        self._now = now
        if frame is not None:
            self.frames.append((now, frame))
        yield from self._listen(
            np.zeros(HOP, np.float32) if self.muted else np.nan_to_num(chunk, posinf=0, neginf=0), now
        )
        yield from self._look(now)
        yield from self._mind_player(now)
        yield from self._tick(now)
        yield from self._work(now + HOP_MS)

    # The way of a hop

    def _serve_requests(self, now: float) -> Events:
        order = {"RST": 0, "STOP": 2, "TXT": 3}
        for event, text in sorted(self._requests, key=lambda request: order.get(request[0], 1)):
            self._text = text
            yield from self._restore(event, now) if event.endswith("_back)") else self._happen(event, now)
        self._requests.clear()

    def _mind_gap(self, now: float) -> Events:
        missing = now - self._now - HOP_MS
        if self._now and abs(missing) > JUMP:
            self.detector.reset()
            if missing > GAP:
                for found in self.endpointer.close(self._now, self.mouth):
                    yield from self._found(found, now)

    def _listen(self, chunk: Wave, now: float) -> Events:
        if self.player.audible:
            self._mouth_until = now + self.settings.mouth_tail
        self.recording.push(chunk, now)
        self.level_db = 10 * float(np.log10(np.mean(np.square(chunk, dtype=np.float64)) + 1e-12))
        self._suspicions.append(self.echo is not None and self.echo.suspicious(chunk))
        probability = self.detector.probability(chunk)
        for found in self.endpointer.step(now, probability, self.level_db, self.mouth):
            yield from self._found(found, now)
        if self.turn is None:
            self.recording.forget_before(now - RING_MS)

    def _found(self, found: Found, t: float) -> Events:
        self._at, self._voiced = found.at, found.voiced_ms
        if self.turn is not None and self.state not in ("THINK", "SPEAK"):
            self.turn.voiced_ms = self.turn.voiced_before + found.voiced_ms
        yield from self._happen(found.kind, t)

    def _look(self, now: float) -> Events:
        while self.frames and now - self.frames[0][0] > self.settings.frame_stale:
            self.frames.popleft()
        if self.state in ("HEAR", "R_HEAR") and self._may_see(now):
            yield from self._happen("FRM", now)

    def _may_see(self, now: float) -> bool:
        turn, settings = self.turn, self.settings
        if turn is None or not self.frames or turn.asked or turn.segments or self.endpointer.soft:
            return False
        period = max(settings.frame_period, 2 * self._see_ms)
        return self.frames[-1][0] - turn.last_frame >= period and len(turn.frames) < settings.frame_max

    def _mind_player(self, now: float) -> Events:
        answer = self.answer
        if self.player.underruns > self._underruns:
            self._underruns = self.player.underruns
            yield from self._happen("UNDERRUN", now)
        if answer is not None and answer.opened and answer.finish is not None and self.player.done:
            yield from self._happen("P_DONE", now)

    def _tick(self, now: float) -> Events:
        quiet = now - self._last_event
        if self.state == "IDLE" and quiet >= self.settings.t_session:
            yield from self._happen("T_SESSION", now)
        elif self.frames and self.state == "IDLE" and quiet >= self.settings.t_idle_frames:
            self.frames.clear()

    def _work(self, until: float) -> Events:
        """Run jobs and timers, each in its time, until the next hop is due."""
        while self.state != "CLOSED":
            name, due = min(self._timers.items(), key=lambda timer: timer[1], default=("", float("inf")))
            if (result := self.scheduler.next_result(min(until, due))) is not None:
                yield from self._result(result)
            elif due < until:
                del self._timers[name]
                yield from self._happen(name, due)
            else:
                return

    # The table

    def _happen(self, event: str, t: float, detail: str = "") -> Events:
        """Follow the table: tell, change the state, act."""
        before = self.state
        row = row_for(before, event, self._facts())
        if row is None:
            return
        self.state = before if row.next == SAME else self._state_of_answer() if row.next == BACK else row.next  # type: ignore[assignment]
        self._last_event = t
        speak, listen = self.model.lengths()
        yield Transition(t, before, event, self.state, row.number, speak, listen, self._answer_number(), detail)
        for action in row.actions:
            yield from getattr(self, f"_do_{action}")(t) or ()

    def _facts(self) -> Facts:
        turn, answer, settings = self.turn, self.answer, self.settings
        suspicious = list(self._suspicions)
        return Facts(
            voiced_ms=turn.voiced_ms if turn else 0.0,
            voiced_query=settings.voiced_query,
            voiced_query_play=settings.voiced_query_play,
            echo=self.mouth and bool(suspicious) and 2 * sum(suspicious) >= len(suspicious),
            half_duplex=self.half_duplex and self.mouth,
            played=answer is not None and answer.opened and self.player.heard_ms > 0,
            sound_ready=self.draft is not None and bool(self.draft.waiting),
            full=turn is not None and self._now - turn.began >= settings.utt_max,
            reading=self.answer is None and bool(self.scheduler.in_lane("listen")),
        )

    def _state_of_answer(self) -> State:
        if self.answer is None:
            return "IDLE"
        return "SPEAK" if self.answer.opened else "THINK"

    def _answer_number(self) -> int:
        return self.answer.gen if self.answer else self._gen

    # Actions: listening

    def _do_fork(self, t: float) -> None:
        self.model.fork(None)
        self.turn = UserTurn(self._at, began=t, voiced_ms=self._voiced)
        self.scheduler.cancel_lane("tidy")

    def _do_fork_heard(self, t: float) -> None:
        answer = self.answer
        heard = self.player.heard_ms if answer is not None and answer.opened else 0.0
        self.model.fork(heard)
        self.turn = UserTurn(self._at, began=t, voiced_ms=self._voiced, fork_heard=heard)

    def _do_fork_again(self, t: float) -> None:
        """The answer was heard to its end: let the turn that began over it follow all of it, if that is still cheap."""
        turn = self.turn
        assert turn is not None
        if turn.asked or turn.segments or turn.fork_heard is None:
            return
        if self._last_heard - turn.fork_heard > REFORK_MS:
            self.scheduler.cancel_lane("listen")
            self.model.reject()
            self.model.fork(None)
            for frame in turn.frames:
                self._submit_see(frame)

    def _do_see_newest(self, t: float) -> None:
        if self.frames and t - self.frames[-1][0] <= self.settings.frame_stale:
            self._do_see(t)

    def _do_see(self, t: float) -> None:
        assert self.turn is not None
        taken, frame = self.frames[-1]
        self.frames.clear()
        self.turn.last_frame = taken
        self.turn.frames.append(frame)
        self._submit_see(frame)

    def _submit_see(self, frame: Any) -> None:
        self.scheduler.submit(Job("listen", "see", self.model.see(frame), lambda: self._when_spare("see", SEE)))

    def _when_spare(self, name: str, priority: int) -> int | None:
        """A priority that waits while an answer could run out of sound."""
        answer = self.answer
        if answer is not None and answer.finish is None and not self.paused:
            if self._sound_in_hand(answer) < self.scheduler.costs.get(name, 0.0) + self.settings.buffer_low:
                return None
        return priority

    def _do_speculate(self, t: float) -> None:
        turn = self.turn
        assert turn is not None
        turn.end, turn.soft_t = self._at, t
        if turn.speculations < self.settings.speculations:
            turn.speculations += 1
            self._ask(turn)

    def _ask(self, turn: UserTurn) -> None:
        """Let the model hear the turn and judge it. Frames that were not begun go to the next turn."""
        started = [job for job in self.scheduler.in_lane("listen") if job.name == "see"]
        for job in started:
            if not job.ran_ms:
                self.scheduler.cancel(job)
                turn.frames.pop()
        turn.asked, turn.heard, turn.verdict = True, False, None
        wave = self.recording.wave(turn.start, turn.end)
        self.scheduler.submit(Job("listen", "judge", self._judging(turn, wave), lambda: JUDGE))

    def _judging(self, turn: UserTurn, wave: Wave) -> Generator[None, None, tuple[Verdict, float]]:
        speaking = self.answer is not None
        if speaking and turn.voiced_ms < self.settings.short_speech:
            said = yield from self.model.caption(wave)
            played = " ".join(text for _, text in self._played)
            ruled = by_rule(said, played, turn.voiced_ms, self.settings.short_speech, speaking)
            if ruled is not None:
                return ruled, 1.0
        yield from self.model.hear(wave, True)
        turn.heard = True
        return (yield from self.model.judge(speaking))

    def _do_unhear(self, t: float) -> None:
        self._drop_draft()
        for job in self.scheduler.in_lane("listen"):
            if job.name in ("judge", "hear"):
                self.scheduler.cancel(job)
        if self.turn is not None:
            if self.turn.asked:
                self.model.unhear()
            self.turn.forget_verdict()

    def _do_hear_segment(self, t: float) -> None:
        turn = self.turn
        assert turn is not None
        self._do_unhear(t)
        wave = self.recording.wave(turn.start, self._at)
        self.scheduler.submit(Job("listen", SEGMENT, self.model.hear(wave, False), lambda: JUDGE))
        turn.start, turn.segments = self._at, turn.segments + 1
        self.recording.forget_before(turn.start)

    def _do_end_speech(self, t: float) -> None:
        self.endpointer.forget()

    def _do_hear_all(self, t: float) -> Events:
        turn = self.turn
        assert turn is not None
        turn.end_t = t
        self._timers["G_TO"] = t + self.settings.t_gate
        if turn.asked and turn.end == self._at:
            if turn.verdict is not None:
                yield from self._judged(t)
            return
        self._do_unhear(t)
        turn.end = self._at
        self._ask(turn)

    def _judged(self, t: float) -> Events:
        assert self.turn is not None and self.turn.verdict is not None
        self._timers.pop("G_TO", None)
        said, sure = self.turn.verdict
        if said == "ECHO":
            yield from self._count_echo(t)
        yield from self._happen(f"G({said})", t, f"p={sure:.2f}")

    def _do_wait(self, t: float) -> None:
        self._timers["T_INCOMPLETE"] = t + self.settings.t_incomplete

    def _do_rejudge(self, t: float) -> Events:
        yield from self._happen("G(QUERY)", t)

    def _do_go_on(self, t: float) -> None:
        """The turn was not over: its sound, a short gap, and what comes now are one turn."""
        turn = self.turn
        assert turn is not None
        for timer in ("G_TO", "T_INCOMPLETE"):
            self._timers.pop(timer, None)
        self._do_unhear(t)
        turn.voiced_before = turn.voiced_ms
        onset = self._at + self.settings.preroll
        self.recording.drop(turn.end, onset - (self.settings.gap_max - self.settings.pad))

    def _do_drop_listening(self, t: float) -> None:
        self._drop_draft()
        self.scheduler.cancel_lane("listen")
        for timer in ("G_TO", "T_INCOMPLETE"):
            self._timers.pop(timer, None)
        if self.turn is not None:
            self.model.reject()
        self.turn = None
        self.endpointer.forget()
        if self.answer is None:
            self._tidy()

    def _do_ignore_speech(self, t: float) -> Events:
        echo = self._facts().echo
        self.endpointer.forget()
        if echo:
            yield from self._count_echo(t)

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

    def _do_drop_frames(self, t: float) -> None:
        self.frames.clear()

    # Actions: answering

    def _drop_draft(self) -> None:
        if self.draft is not None:
            self.scheduler.cancel(self.draft.job)
            self.draft = None

    def _begin_answer(self, lane: str, spoken: bool, work: Generator[Any, None, Any]) -> Answer:
        self._gen += 1
        answer = Answer(self._gen, spoken, rate=self.player.rate, turn=self.turn)
        answer.job = self.scheduler.submit(Job(lane, "reply", work, lambda: self._answer_priority(answer)))
        return answer

    def _answer_priority(self, answer: Answer) -> int | None:
        in_hand = self._sound_in_hand(answer)
        if answer is not self.answer:
            return None if in_hand >= self.settings.buffer_high else self._when_spare("reply", SPECULATE)
        if in_hand >= self.settings.buffer_high:
            return None
        return SOUND if in_hand < self.settings.buffer_low else MORE_SOUND

    def _sound_in_hand(self, answer: Answer) -> float:
        return answer.waiting_ms + (self.player.buffered_ms if answer.opened else 0.0)

    def _do_answer(self, t: float) -> Events:
        """The turn is accepted: what was heard becomes the conversation, and its answer is released or begun."""
        turn = self.turn
        assert turn is not None
        for timer in ("G_TO", "T_INCOMPLETE"):
            self._timers.pop(timer, None)
        if not turn.heard:  # no verdict came, and perhaps not even the end of the hearing
            self._do_unhear(t)
            turn.asked = True
            wave = self.recording.wave(turn.start, turn.end)
            self.scheduler.submit(Job("listen", "hear", self.model.hear(wave, True), lambda: JUDGE))
            return
        yield from self._accept(t)

    def _accept(self, t: float) -> Events:
        turn, draft = self.turn, self.draft
        assert turn is not None
        if draft is None:
            draft = self._begin_answer("reply", not self.text_only, self.model.reply(not self.text_only))
        elif draft.job is not None:
            draft.job.lane = "reply"
        self.model.accept()
        self.answer, self.draft, self.turn = draft, None, None
        self.ducked = self.paused = False
        self._timers["T_FIRST"] = t + self.settings.t_first_audio
        wave = self.recording.wave(turn.start, turn.end)
        if len(wave):
            self.scheduler.submit(
                Job("tidy", "caption", self.model.caption(wave), lambda: self._when_spare("caption", TIDY))
            )
        self.recording.clear() if not self.endpointer.on else None
        if draft.text:
            yield Caption("assistant", draft.text)
        draft.told = True
        if draft.waiting and self.state == "THINK":
            yield from self._happen("A_RDY", t)
        elif draft.finish is not None and draft.silent:
            yield from self._happen("GEN_EOS", t)

    def _do_read_text(self, t: float) -> None:
        if self.turn is None:
            self.model.fork(None)
        self.turn = UserTurn(t, end=t, began=t, heard=True, end_t=t, verdict=("QUERY", 1.0), verdict_t=t)
        self.endpointer.forget()
        self.scheduler.submit(Job("listen", "hear", self.model.read(self._text), lambda: JUDGE))

    def _do_play(self, t: float) -> Events:
        answer = self.answer
        assert answer is not None
        self._timers.pop("T_FIRST", None)
        self.player.open(answer.gen)
        for samples in answer.waiting:
            self.player.write(samples, answer.gen)
        answer.waiting, answer.opened = [], True
        self._underruns = self.player.underruns
        if answer.finish is not None:
            self.player.end(answer.gen)
        if answer.turn is not None and answer.turn.end > answer.turn.start:
            turn = answer.turn
            yield TurnTimes(turn.end - self.settings.pad, turn.soft_t, turn.verdict_t, turn.end_t, t)

    def _do_duck(self, t: float) -> None:
        self.ducked = True
        self.player.duck(self.settings.duck_db, self.settings.duck_ms)

    def _do_pause(self, t: float) -> None:
        self.paused = True
        self.player.pause()

    def _do_resume(self, t: float) -> Events:
        """The answer goes on, from a little before where it was when it had paused."""
        self.player.resume(self.settings.rewind_ms)
        self.player.unduck(self.settings.resume_ms)
        self.ducked = self.paused = False
        answer = self.answer
        if answer is not None and answer.waiting and not answer.opened:
            yield from self._happen("A_RDY", t)
        elif answer is not None and answer.finish is not None and answer.silent:
            yield from self._happen("GEN_EOS", t)

    def _do_stop_reply(self, t: float) -> Events:
        answer, self.answer = self.answer, None
        self._timers.pop("T_FIRST", None)
        self._last_heard = 0.0
        if answer is None:
            return
        self.scheduler.cancel(answer.job)
        if answer.opened:
            self._last_heard = self.player.flush(self.settings.fade_ms)
        self.ducked = self.paused = False
        heard = self.model.heard_text(self._last_heard) if answer.opened else ""
        yield ReplyEnded(t, answer.text, heard, self._last_heard, True, answer.finish or "interrupted")

    def _do_keep_heard(self, t: float) -> None:
        self.model.commit(self._last_heard)
        self._tidy()

    def _do_commit(self, t: float) -> Events:
        """The answer was heard to its end, or given as text."""
        answer, self.answer = self.answer, None
        assert answer is not None
        self._timers.pop("T_FIRST", None)
        self._last_heard = self.player.heard_ms if answer.opened else 0.0
        self.ducked = self.paused = False
        self.model.commit(None)
        yield ReplyEnded(t, answer.text, answer.text, self._last_heard, False, answer.finish or "end")
        if self.state == "IDLE":
            self._tidy()

    def _do_answer_in_text(self, t: float) -> Events:
        """Its sound failed or does not come: the same turn is answered in text."""
        answer = self.answer
        assert answer is not None
        self.scheduler.cancel(answer.job)
        self._timers.pop("T_FIRST", None)
        if not answer.spoken:
            yield from self._happen("ERR(reply)", t)
            return
        yield Notice(t, "no_audio", "this answer could not be spoken, so it is given as text")
        self.answer = self._begin_answer("reply", False, self.model.reply_in_text())
        self.answer.told = True

    def _do_end_early(self, t: float) -> Events:
        answer = self.answer
        assert answer is not None
        answer.finish = "failed"
        self.player.end(answer.gen)
        if not answer.opened:
            answer.waiting = answer.waiting or [np.zeros(1, np.float32)]
        yield Notice(t, "cut_short", "the rest of this answer could not be spoken")

    def _do_count_underrun(self, t: float) -> Events:
        self._starved.append(t)
        while t - self._starved[0] > 10_000:
            self._starved.popleft()
        if len(self._starved) >= self.settings.underruns and not self.half_duplex:
            yield from self._go_half_duplex(t, "this machine is too slow to listen and speak at once")

    # Actions: the conversation

    def _tidy(self) -> None:
        """Make room for the next turn while nobody waits."""
        if not any(job.name == "compact" for job in self.scheduler.jobs):
            work = self.model.compact(self.settings.context_reserve)
            self.scheduler.submit(Job("tidy", "compact", work, lambda: TIDY if self.state == "IDLE" else None))

    def _do_reset(self, t: float) -> Events:
        answer, self.answer, self.turn = self.answer, None, None
        self._drop_draft()
        for job in list(self.scheduler.jobs):
            self.scheduler.cancel(job)
        if answer is not None and answer.opened:
            heard = self.player.flush(10)
            yield ReplyEnded(t, answer.text, self.model.heard_text(heard), heard, True, "reset")
        self._timers.clear()
        self.frames.clear()
        self.recording.clear()
        self._played.clear()
        self.ducked = self.paused = False
        self.half_duplex, self.text_only = self.settings.half_duplex, not self.settings.spoken
        self.endpointer.forget()
        self.detector.reset()
        self.model.reset()

    def _do_close(self, t: float) -> Events:
        yield Notice(t, "closed", f"nothing was said for {self.settings.t_session / 60_000:.0f} minutes")
        self.close()

    def _do_lose_microphone(self, t: float) -> Events:
        self.muted = True
        yield Notice(t, "capture", "the microphone is gone; type, until it is back")

    def _do_lose_loudspeaker(self, t: float) -> Events:
        self.text_only = True
        yield Notice(t, "playback", "the loudspeaker is gone; answers are given as text, until it is back")
        yield from self._happen("STOP", t)

    def _restore(self, event: str, t: float) -> Events:
        if event == "ERR(capture_back)":
            self.muted = False
            yield Notice(t, "capture_back", "the microphone is back")
        else:
            self.text_only = not self.settings.spoken
            yield Notice(t, "playback_back", "the loudspeaker is back")

    # What jobs give

    def _result(self, result: Result) -> Events:
        job, t = result.job, result.t
        handlers: dict[str, Callable[[Result], Events]] = {"reply": self._from_reply, "judge": self._from_judge}
        if job.name in handlers:
            yield from handlers[job.name](result)
        elif result.kind == "failed":
            yield from self._failed(job, t, result.value)
        elif job.name == "hear":
            yield from self._accept(t)
        elif job.name == "see":
            self._see_ms = job.ran_ms
        elif job.name == "caption" and result.value:
            yield Caption("user", result.value)
        elif job.name == "compact" and result.value:
            yield Notice(t, "context", result.value)

    def _failed(self, job: Job, t: float, error: Exception) -> Events:
        if job.name == "see":
            if not self._see_failed:
                self._see_failed = True
                yield Notice(t, "see_failed", f"a picture could not be looked at ({error})")
        elif job.name in ("hear", SEGMENT):
            yield Notice(t, "heard_failed", f"what was said could not be heard ({error}); say it again")
            self._timers.pop("T_FIRST", None)
            if self.state == "THINK" and self.answer is None:
                self.turn, self.state = None, "IDLE"
                self.model.reject()
            else:
                yield from self._happen("ERR(hear)", t)

    def _from_judge(self, result: Result) -> Events:
        turn, t = self.turn, result.t
        if turn is None:
            return
        if result.kind == "failed":
            yield from self._judging_failed(turn, t, result.value)
        elif result.kind == "done":
            turn.verdict, turn.verdict_t = result.value, t
            if self.state in ("GATE", "R_GATE"):
                yield from self._judged(t)
            elif turn.verdict[0] == "QUERY" and (self.answer is None or self.paused):
                self.draft = self._begin_answer("draft", not self.text_only, self.model.reply(not self.text_only))

    def _judging_failed(self, turn: UserTurn, t: float, error: Exception) -> Events:
        """Once more; a context that is full is made room in first."""
        if not turn.retried:
            turn.retried = True
            self.model.unhear()
            wave = self.recording.wave(turn.start, turn.end)
            again = self._judging(turn, wave)
            if isinstance(error, PromptError) and self.answer is None:
                again = self._with_room(turn, again)
            self.scheduler.submit(Job("listen", "judge", again, lambda: JUDGE))
            return
        yield Notice(t, "heard_failed", f"what was said could not be heard ({error}); say it again")
        yield from self._happen("ERR(hear)", t)

    def _with_room(
        self, turn: UserTurn, judging: Generator[None, None, tuple[Verdict, float]]
    ) -> Generator[None, None, tuple[Verdict, float]]:
        self.model.reject()
        yield from self.model.compact(2 * self.settings.context_reserve)  # type: ignore[misc]
        self.model.fork(None)
        return (yield from judging)

    def _from_reply(self, result: Result) -> Events:
        answer = next((a for a in (self.answer, self.draft) if a is not None and a.job is result.job), None)
        if answer is None:
            return
        if result.kind == "failed":
            yield from self._reply_failed(answer, result.t, result.value)
        elif result.kind == "done":
            yield from self._reply_complete(answer, result.t, result.value)
        else:
            yield from self._reply_item(answer, result.t, result.value)

    def _reply_item(self, answer: Answer, t: float, item: Any) -> Events:
        match item:
            case TextDelta(text):
                answer.text += text
                self._played.append((t, text))
                if answer.told:
                    yield Caption("assistant", text)
            case AudioChunk(samples, rate):
                answer.rate = rate
                if answer.opened:
                    self.player.write(samples, answer.gen)
                    return
                answer.waiting.append(samples)
                if answer is self.answer and self.state == "THINK":
                    yield from self._happen("A_RDY", t)

    def _reply_complete(self, answer: Answer, t: float, finish: str) -> Events:
        answer.finish = finish
        if answer is not self.answer:
            return
        if answer.opened:
            self.player.end(answer.gen)
        elif answer.silent and self.state == "THINK":
            yield from self._happen("GEN_EOS", t)

    def _reply_failed(self, answer: Answer, t: float, error: Exception) -> Events:
        if answer is self.draft:
            self._drop_draft()
            return
        answer.job = None
        yield Notice(t, "reply_failed", f"an answer failed ({error})")
        yield from self._happen("ERR(speech)" if answer.spoken else "ERR(reply)", t)
