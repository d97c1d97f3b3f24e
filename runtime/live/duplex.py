"""A conversation in real time: chunk (and frame) in, events out. No thread, no sleep; the clock is given.

A hop of sound goes down once: detector, endpointer, table; what the table orders becomes jobs, of which the scheduler
runs pieces until the next hop is due; what they give comes up as events, and as samples for the player.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.errors import EdgeOmniError
from runtime.live.answering import Answering
from runtime.live.events import Caption, Notice, ReplyEnded
from runtime.live.scheduler import Job, Result
from runtime.live.settings import HOP, HOP_MS
from runtime.live.stage import Events, Wave

SILENCE = np.zeros(HOP, np.float32)


class Duplex(Answering):
    """Holds one conversation. `step` once for each hop; `say`, `interrupt`, `reset`, `fail` take effect in the next.

    The parts are those of `runtime.live.stage.Stage`; the actions of the table are in `listening` and `answering`.
    """

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
        yield from self._listen(chunk if not self.muted and np.isfinite(chunk).all() else SILENCE, now)
        yield from self._look(now)
        yield from self._mind_player(now)
        yield from self._tick(now)
        yield from self._work(now + HOP_MS)

    def _serve_requests(self, now: float) -> Events:
        order = {"RST": 0, "STOP": 2, "TXT": 3}
        for event, text in sorted(self._requests, key=lambda request: order.get(request[0], 1)):
            self._text = text
            yield from self._restore(event, now) if event.endswith("_back)") else self._happen(event, now)
        self._requests.clear()

    def _mind_player(self, now: float) -> Events:
        answer = self.answer
        if self.player.underruns > self._underruns:
            self._underruns = self.player.underruns
            yield from self._happen("UNDERRUN", now)
        if answer is not None and answer.opened and answer.finish is not None and self.player.done:
            yield from self._happen("P_DONE", now)

    def _tick(self, now: float) -> Events:
        if self.state == "IDLE" and now - self._last_event >= self.settings.t_session:
            yield from self._happen("T_SESSION", now)

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
        elif job.name in ("hear", "segment"):
            yield Notice(t, "heard_failed", f"what was said could not be heard ({error}); say it again")
            yield from self._happen("ERR(hear)", t)
