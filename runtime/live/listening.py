"""The listening half: from hops and frames to a turn that the model has heard and judged."""

from collections.abc import Generator

from runtime.audio import level_db
from runtime.errors import PromptError
from runtime.live.endpointer import Found
from runtime.live.events import Notice, Verdict
from runtime.live.gate import by_rule
from runtime.live.scheduler import JUDGE, SEE, Job
from runtime.live.settings import HOP_MS
from runtime.live.stage import Events, Stage, Wave
from runtime.live.turn import UserTurn

RING_MS = 2000  # of sound that is kept while nobody speaks
JUMP = 500  # ms by which time may jump before the detector's memory is of something else
ECHO_MS = 3000  # within which words that were played may come back
GAP = 1000  # ms without sound that end a turn


class Listening(Stage):
    """What happens on LISTEN, the branch that nobody hears of before the verdict."""

    def _listen(self, chunk: Wave, now: float) -> Events:
        if self.player.audible:
            self._mouth_until = now + self.settings.mouth_tail
        self.recording.push(chunk, now)
        self.level_db = level_db(chunk)
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

    def _mind_gap(self, now: float) -> Events:
        missing = now - self._now - HOP_MS
        if self._now and abs(missing) > JUMP:
            self.detector.reset()
            if missing > GAP:
                for found in self.endpointer.close(self._now, self.mouth):
                    yield from self._found(found, now)

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
        last = turn.frames[-1][0] if turn.frames else float("-inf")
        return self.frames[-1][0] - last >= period and len(turn.frames) < settings.frame_max

    def _do_fork(self, t: float) -> None:
        self.model.fork(None)
        self.turn = UserTurn(self._at, began=t, voiced_ms=self._voiced)
        self.scheduler.cancel_lane("tidy")

    def _do_fork_heard(self, t: float) -> None:
        answer = self.answer
        heard = self.player.heard_ms if answer is not None and answer.opened else 0.0
        self.model.fork(heard)
        self.turn = UserTurn(self._at, began=t, voiced_ms=self._voiced)

    def _do_see_newest(self, t: float) -> None:
        if self.frames and t - self.frames[-1][0] <= self.settings.frame_stale:
            self._do_see(t)

    def _do_see(self, t: float) -> None:
        assert self.turn is not None
        newest = self.frames[-1]
        self.frames.clear()
        self.turn.frames.append(newest)
        self.scheduler.submit(Job("listen", "see", self.model.see(newest[1]), lambda: self._when_spare("see", SEE)))

    def _do_speculate(self, t: float) -> None:
        turn = self.turn
        assert turn is not None
        turn.end, turn.soft_t = self._at, t
        if turn.speculations < self.settings.speculations:
            turn.speculations += 1
            self._ask(turn)

    def _ask(self, turn: UserTurn) -> None:
        """Let the model hear the turn and judge it. Frames that were not begun go to the next turn."""
        for job in reversed(self.scheduler.in_lane("listen")):
            if job.name == "see" and not job.ran_ms:
                self.scheduler.cancel(job)
                self.frames.appendleft(turn.frames.pop())
        turn.asked, turn.heard, turn.verdict = True, False, None
        wave = self.recording.wave(turn.start, turn.end)
        self.scheduler.submit(Job("listen", "judge", self._judging(turn, wave), lambda: JUDGE))

    def _judging(self, turn: UserTurn, wave: Wave) -> Generator[None, None, tuple[Verdict, float]]:
        speaking = self.answer is not None
        if speaking and turn.voiced_ms < self.settings.short_speech:
            said = yield from self.model.caption(wave)
            ruled = by_rule(said, self._just_heard(), turn.voiced_ms, self.settings.short_speech, speaking)
            if ruled is not None:
                return ruled, 1.0
        yield from self.model.hear(wave, True)
        turn.heard = True
        return (yield from self.model.judge(speaking))

    def _just_heard(self) -> str:
        """What the loudspeaker said in the last seconds."""
        heard = self.player.heard_ms
        before = self.model.heard_text(max(0.0, heard - ECHO_MS))
        return self.model.heard_text(heard)[len(before) :]

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
        self.scheduler.submit(Job("listen", "segment", self.model.hear(wave, False), lambda: JUDGE))
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
            self.endpointer.wary_until = t + self.settings.wary_ms
            yield from self._count_echo(t)
        yield from self._happen(f"G({said})", t, f"p={sure:.2f}")

    def _do_wait(self, t: float) -> None:
        self._incomplete += 1
        self.endpointer.extra_end = self.settings.t_end_more if self._incomplete >= 2 else 0.0
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
        echo = self._facts(t).echo
        self.endpointer.forget()
        if echo:
            yield from self._count_echo(t)

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
        yield from self.model.compact(2 * self.settings.context_reserve)
        self.model.fork(None)
        return (yield from judging)
