"""Probabilities of speech, hop by hop -> where speech begins, pauses, goes on and ends. Pure; time is what is heard."""

from dataclasses import dataclass
from typing import Literal

from runtime.live.settings import DEFAULTS, HOP_MS, Settings

Kind = Literal["V_ON", "V_BLIP", "V_SOFT", "V_RES", "V_END", "V_CUT", "V_MAX", "PAUSE"]
QUIET_DB = 6  # above the noise floor a hop is quiet enough to cut speech there
FLOOR_RISE = 0.02  # dB a hop by which the noise floor follows louder surroundings
CUT_SEARCH = 1000  # ms in which the quietest hop is looked for


@dataclass(frozen=True)
class Found:
    """`at`: V_ON where the audio of the turn begins; V_SOFT, V_END where it ends; V_CUT where to cut it."""

    kind: Kind
    t: float
    at: float
    voiced_ms: float


class Endpointer:
    """State of one turn: whether somebody speaks, the last voiced hop, how much was voiced, whether a pause is open."""

    def __init__(self, settings: Settings = DEFAULTS):
        self.settings = settings
        self.floor_db = 0.0  # of the surroundings; falls at once, rises slowly
        self.extra_end = 0.0  # silence that is waited for beyond t_end
        self.wary_until = 0.0  # until then a voice has to be surer: an echo was taken for one
        self.forget()

    def forget(self) -> None:
        """Nobody speaks."""
        self.on, self.soft, self.paused, self.voiced_before = False, False, False, False
        self.run = self.last = self.voiced_ms = self.t_on = self.segment = 0.0
        self._quietest: tuple[float, float] | None = None  # dB and end of the best hop to cut at
        self._search_ends = 0.0

    def step(self, t: float, probability: float, energy_db: float, mouth: bool) -> list[Found]:
        """The hop that ends at `t`; `mouth`: the assistant is audible. What is found, in the order of its weight."""
        settings = self.settings
        self.floor_db = min(energy_db, self.floor_db + FLOOR_RISE)
        voiced = probability >= self._threshold(t, mouth)
        self.run = self.run + HOP_MS if voiced else 0.0
        if self.on:
            found = self._while_on(t, voiced, energy_db, mouth)
        elif self.run >= (settings.t_start_play if mouth else settings.t_start):
            found = [self._begin(t)]
        else:
            found = []
        self.voiced_before = voiced
        return found

    def close(self, t: float, mouth: bool) -> list[Found]:
        """End the turn now, as if it had been silent long enough."""
        return [self._end(t, mouth)] if self.on else []

    def _threshold(self, t: float, mouth: bool) -> float:
        settings = self.settings
        if self.on:
            return settings.vad_off_play if mouth else settings.vad_off
        extra = settings.wary if t < self.wary_until else 0.0
        return (settings.vad_on_play if mouth else settings.vad_on) + extra

    def _begin(self, t: float) -> Found:
        start = max(0.0, t - self.run - self.settings.preroll)
        self.on, self.last, self.voiced_ms, self.t_on, self.segment = True, t, self.run, t, start
        self.run = 0.0
        return Found("V_ON", t, start, self.voiced_ms)

    def _while_on(self, t: float, voiced: bool, energy_db: float, mouth: bool) -> list[Found]:
        found: list[Found] = []
        if voiced:
            if self.voiced_before or self.run >= self.settings.t_res:
                found += self._voiced(t)
        elif not (cut := self._cut(t, energy_db)):
            return self._silent(t, mouth)
        else:
            return [*cut, *self._silent(t, mouth)]
        found += self._cut(t, energy_db)
        if t - self.t_on >= self.settings.utt_max:
            return [*found, Found("V_MAX", t, t, self.voiced_ms)]
        if mouth and not self.paused and self.voiced_ms >= self.settings.t_pause:
            self.paused = True
            found.append(Found("PAUSE", t, t, self.voiced_ms))
        return found

    def _voiced(self, t: float) -> list[Found]:
        self.voiced_ms, self.last = self.voiced_ms + HOP_MS, t
        was_soft, self.soft = self.soft, False
        return [Found("V_RES", t, t, self.voiced_ms)] if was_soft else []

    def _silent(self, t: float, mouth: bool) -> list[Found]:
        settings, silence = self.settings, t - self.last
        if silence >= settings.t_end + self.extra_end or t - self.t_on >= settings.utt_max:
            return [self._end(t, mouth)]
        if silence >= settings.t_soft and not self.soft:
            self.soft = True
            return [Found("V_SOFT", t, self.last + settings.pad, self.voiced_ms)]
        return []

    def _end(self, t: float, mouth: bool) -> Found:
        least = self.settings.min_voiced_play if mouth else self.settings.min_voiced
        kind: Kind = "V_BLIP" if self.voiced_ms < least else "V_END"
        found = Found(kind, t, min(t, self.last + self.settings.pad), self.voiced_ms)
        self.forget()
        return found

    def _cut(self, t: float, energy_db: float) -> list[Found]:
        """The model takes no more than seg_max at once: cut at a quiet hop before, else there."""
        length = t - self.segment
        if length >= self.settings.seg_soft:
            if energy_db <= self.floor_db + QUIET_DB and (self._quietest is None or energy_db < self._quietest[0]):
                self._search_ends = self._search_ends or t + CUT_SEARCH
                self._quietest = (energy_db, t)
            if self._quietest and t >= self._search_ends:
                return [self._cut_at(t, self._quietest[1])]
        if length + HOP_MS > self.settings.seg_max:
            return [self._cut_at(t, self._quietest[1] if self._quietest else t)]
        return []

    def _cut_at(self, t: float, where: float) -> Found:
        self.segment, self._quietest, self._search_ends = where, None, 0.0
        return Found("V_CUT", t, where, self.voiced_ms)
