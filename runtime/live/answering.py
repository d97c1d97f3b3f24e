"""The answering half: from an accepted turn to sound in the player, and what becomes of it when it is interrupted."""

from collections.abc import Generator
from typing import Any

from runtime.events import AudioChunk, TextDelta
from runtime.live.events import Caption, Notice, ReplyEnded, TurnTimes
from runtime.live.listening import Listening
from runtime.live.scheduler import JUDGE, MORE_SOUND, SOUND, SPECULATE, TIDY, Job, Result
from runtime.live.settings import HOP_MS
from runtime.live.stage import Events
from runtime.live.turn import Answer, UserTurn


class Answering(Listening):
    """What happens on SPEAK, and with an answer that is prepared before it may be heard."""

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
        self.scheduler.cancel_lane("listen")  # a gate that hangs would hang the next turn, too
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
            yield from self._release(t)
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
        for timer in ("T_FIRST", "A_RDY"):
            self._timers.pop(timer, None)
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
        for timer in ("T_FIRST", "A_RDY"):
            self._timers.pop(timer, None)
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
        yield Notice(t, "cut_short", "the rest of this answer could not be spoken")

    def _do_count_underrun(self, t: float) -> Events:
        self._starved.append(t)
        while t - self._starved[0] > 10_000:
            self._starved.popleft()
        if len(self._starved) >= self.settings.underruns and not self.half_duplex:
            yield from self._go_half_duplex(t, "this machine is too slow to listen and speak at once")

    def _from_judge(self, result: Result) -> Events:
        turn, t = self.turn, result.t
        if turn is None:
            return
        if result.kind == "failed":
            yield from self._judging_failed(turn, t, result.value)
        elif result.kind == "done":
            verdict, turn.verdict_t = result.value, t
            turn.verdict = verdict
            if self.state in ("GATE", "R_GATE"):
                yield from self._judged(t)
            elif verdict[0] == "QUERY" and (self.answer is None or self.paused):
                self.draft = self._begin_answer("draft", not self.text_only, self.model.reply(not self.text_only))

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
                if answer.told:
                    yield Caption("assistant", text)
            case AudioChunk(samples, rate):
                answer.rate = rate
                self._note_chunk(answer, t)
                if answer.opened:
                    self.player.write(samples, answer.gen)
                    return
                answer.waiting.append(samples)
                if answer is self.answer and self.state == "THINK":
                    yield from self._release(t)

    def _note_chunk(self, answer: Answer, t: float) -> None:
        answer.chunks += 1
        if answer.chunks == 1:
            answer.first_t = t
        elif answer.chunks == 2:
            self._lead_ms = max(t - answer.first_t + HOP_MS, 0.8 * self._lead_ms)

    def _release(self, t: float) -> Events:
        """Let the answer be heard, now or when enough of it is in hand."""
        assert self.answer is not None
        due = self._playable_at(self.answer)
        if due <= t:
            yield from self._happen("A_RDY", t)
        else:
            self._timers["A_RDY"] = due

    def _reply_complete(self, answer: Answer, t: float, finish: str) -> Events:
        answer.finish = finish
        if answer is not self.answer:
            return
        if answer.opened:
            self.player.end(answer.gen)
        elif not answer.silent:
            yield from self._happen("A_RDY", t)
        elif self.state == "THINK":
            yield from self._happen("GEN_EOS", t)

    def _reply_failed(self, answer: Answer, t: float, error: Exception) -> Events:
        if answer is self.draft:
            self._drop_draft()
            return
        answer.job = None
        yield Notice(t, "reply_failed", f"an answer failed ({error})")
        yield from self._happen("ERR(speech)" if answer.spoken else "ERR(reply)", t)
