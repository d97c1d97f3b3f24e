"""Labelled scenes of turn-taking: what a microphone hears, given what the loudspeaker plays, and what must follow.

A scene is drawn from its seed and number alone. In half of the kinds the assistant is silent; in the others a first
question makes it speak, and what matters begins while its answer sounds. Echo is mixed from what is really played.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import numpy as np

from apps.bench.scene_sounds import PEAK, QUIET, Sound, Sounds
from runtime.audio import Wave
from runtime.live.settings import HOP, RATE

MS = RATE // 1000  # samples of a millisecond

Must = Literal["answer", "nothing"]  # what the assistant has to do about a sound


@dataclass(frozen=True)
class Part:
    """One sound of a scene: `start_ms` counts from the scene's beginning, or from the first sample of an answer."""

    kind: str  # question, cough, noise, talk, television, backchannel
    must: Must
    wave: Wave
    start_ms: float
    during_answer: bool
    about: str
    answer: str = ""  # that a right reply gives


@dataclass(frozen=True)
class Echo:
    """How the loudspeaker is heard by the microphone."""

    level_db: float
    delay_ms: float
    path: Wave  # impulse response behind the delay, its energy that of `level_db`


@dataclass(frozen=True)
class Scene:
    name: str
    kind: str
    parts: tuple[Part, ...]
    floor_db: float  # of the room's noise, against full scale
    seed: int
    echo: Echo | None = None

    @property
    def while_speaking(self) -> bool:
        return self.kind in WHILE_SPEAKING


# Kinds with their share. `question` parts must be answered, all others must neither interrupt nor be answered.
IN_SILENCE = {"question": 5, "question with a pause": 4, "cough": 2, "noise": 2, "talk": 2, "television": 2}
WHILE_SPEAKING = {
    "barge-in": 3, "double talk": 4, "echo": 4, "cough while speaking": 3, "noise while speaking": 3,
    "backchannel while speaking": 3, "talk while speaking": 2, "television while speaking": 2,
}  # fmt: skip
KINDS = IN_SILENCE | WHILE_SPEAKING


def draw_scenes(count: int, seed: int, sounds: Sounds) -> Iterator[Scene]:
    """`count` scenes whose kinds come in their shares; those for which `sounds` has nothing are left out."""
    kinds = [kind for kind in spread_kinds() if sound_of(kind) in {"question", *sounds.disturbances}]
    for number in range(count):
        yield draw_scene(kinds[number % len(kinds)], number, seed, sounds)


def spread_kinds() -> list[str]:
    """Every kind as often as its share says, so that any stretch of the list has some of each."""
    places = [((turn + 0.5) / share, kind) for kind, share in KINDS.items() for turn in range(share)]
    return [kind for _, kind in sorted(places)]


def sound_of(kind: str) -> str:
    """What the sound that matters in a scene of this kind is."""
    if kind in ("question", "question with a pause", "barge-in", "double talk", "echo"):
        return "question"
    return kind.removesuffix(" while speaking")


def draw_scene(kind: str, number: int, seed: int, sounds: Sounds) -> Scene:
    """The scene `number` of this seed; of another kind it is another scene."""
    rng = Random(f"{seed}/{number}/{kind}")
    speaking = kind in WHILE_SPEAKING
    parts: list[Part] = []
    if speaking:
        first = sounds.question(rng, long_answer=True)
        parts.append(_part(rng, "question", first, rng.uniform(600, 1000), during_answer=False, level=(-16, -6)))
    if kind != "echo":
        start = rng.uniform(250, 900) if speaking else rng.uniform(800, 1500)
        parts.append(_disturbance(rng, kind, start, sounds))
    echoing = kind in ("echo", "double talk") or (speaking and rng.random() < 0.3)
    return Scene(
        name=f"{number:03d} {kind}",
        kind=kind,
        parts=tuple(parts),
        floor_db=rng.uniform(-75, -55),
        seed=rng.getrandbits(32),
        echo=draw_echo(rng) if echoing else None,
    )


def _disturbance(rng: Random, kind: str, start: float, sounds: Sounds) -> Part:
    what, speaking = sound_of(kind), kind in WHILE_SPEAKING
    if what != "question":
        sound = sounds.disturbances[what](rng)
        far = what in ("talk", "television")
        return _part(rng, what, sound, start, speaking, level=(-26, -12) if far else (-18, -6), far=far)
    sound = sounds.question(rng, over_answer=speaking)
    if kind == "question with a pause":
        sound = with_pause(sound, rng.uniform(300, 600))
    return _part(rng, what, sound, start, speaking, level=(-18, -6))


def _part(
    rng: Random, kind: str, sound: Sound, start: float, during_answer: bool, level: tuple[float, float], far=False
) -> Part:
    """The sound at a level drawn between two (of its peak, dB); from far it comes with its room."""
    wave = in_a_room(sound.wave, rng) if far else sound.wave
    wave = wave * np.float32(10 ** (rng.uniform(*level) / 20) / PEAK)
    must: Must = "answer" if kind == "question" else "nothing"
    return Part(kind, must, wave, start, during_answer, sound.about, sound.answer)


def with_pause(sound: Sound, pause_ms: float) -> Sound:
    """The clip with `pause_ms` of silence where it is quietest in its middle; silence that was there counts."""
    wave = sound.wave
    width = 10 * MS
    blocks = np.abs(wave[: len(wave) // width * width]).reshape(-1, width).max(axis=1)
    first, last = len(blocks) * 3 // 10, max(len(blocks) * 7 // 10, len(blocks) * 3 // 10 + 1)
    quietest = first + int(np.argmin(blocks[first:last]))
    quiet = blocks < 10 * QUIET * np.abs(wave).max()
    left, right = quietest, quietest
    while left > 0 and quiet[left - 1]:
        left -= 1
    while right < len(blocks) and quiet[right]:
        right += 1
    gap = max(0, int(pause_ms * MS) - (right - left) * width)
    cut = quietest * width
    before, after = wave[:cut].copy(), wave[cut:].copy()
    fade = np.linspace(0, 1, 5 * MS, dtype=np.float32)
    before[-len(fade) :] *= fade[::-1]
    after[: len(fade)] *= fade
    return replace(sound, wave=np.concatenate([before, np.zeros(gap, np.float32), after]))


def in_a_room(wave: Wave, rng: Random) -> Wave:
    """A direct path and a tail of decaying noise, 100 to 300 ms; as loud as before."""
    length = rng.randint(100, 300) * MS
    tail = np.random.default_rng(rng.getrandbits(63)).standard_normal(length) * np.exp(-np.arange(length) * 5 / length)
    tail *= rng.uniform(0.3, 1.0) / np.sqrt((tail**2).sum())
    tail[0] += 1
    wet = np.fft.irfft(np.fft.rfft(wave, len(wave) + length) * np.fft.rfft(tail, len(wave) + length))
    return (wet * (np.abs(wave).max() / np.abs(wet).max())).astype(np.float32)


def draw_echo(rng: Random) -> Echo:
    """An echo of -10 to -25 dB after 50 to 250 ms, its path 20 ms of decaying reflections."""
    level, delay = rng.uniform(-25, -10), rng.uniform(50, 250)
    length = 20 * MS
    path = np.random.default_rng(rng.getrandbits(63)).standard_normal(length) * np.exp(-np.arange(length) * 6 / length)
    path *= 0.5 / np.sqrt((path**2).sum())
    path[0] += 1
    path *= 10 ** (level / 20) / np.sqrt((path**2).sum())
    return Echo(level, delay, path.astype(np.float32))


@dataclass(frozen=True)
class Span:
    """When a sound was heard, in milliseconds of the scene."""

    part: Part
    start: float
    end: float


class Microphone:
    """A scene's timeline, hop by hop; sounds that wait for an answer are placed when one begins to sound."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.heard = 0  # samples so far
        self.spans: list[Span] = []
        self._coming = np.zeros(0, np.float32)  # of what was placed, from now on
        self._waiting = [part for part in scene.parts if part.during_answer]
        self._noise = np.random.default_rng(scene.seed)
        delay = 0 if scene.echo is None else int(scene.echo.delay_ms * MS) + len(scene.echo.path)
        self._played = np.zeros(delay + HOP, np.float32)  # the newest last
        for part in scene.parts:
            if not part.during_answer:
                self._place(part, int(part.start_ms * MS))

    @property
    def waiting(self) -> bool:
        """Whether a sound waits for an answer to begin."""
        return bool(self._waiting)

    @property
    def last(self) -> float:
        """When the last sound that was placed ends."""
        return max((span.end for span in self.spans), default=0.0)

    def hear(self, played: Wave) -> Wave:
        """The next hop [512] while the loudspeaker plays `played` [512 at 16 kHz]."""
        begun = self.heard / MS > min((span.end for span in self.spans), default=0.0) and bool(np.abs(played).max() > 0)
        if self._waiting and begun:
            first = int(np.flatnonzero(played)[0])
            for part in self._waiting:
                self._place(part, self.heard + first + int(part.start_ms * MS))
            self._waiting = []
        room = self._noise.standard_normal(HOP).astype(np.float32) * np.float32(10 ** (self.scene.floor_db / 20))
        hop = room + self._next() + self._echo(played)
        self.heard += HOP
        return np.clip(hop, -1, 1).astype(np.float32)

    def _place(self, part: Part, at: int) -> None:
        start = max(0, at - self.heard)
        grown = np.zeros(max(len(self._coming), start + len(part.wave)), np.float32)
        grown[: len(self._coming)] = self._coming
        grown[start : start + len(part.wave)] += part.wave
        self._coming = grown
        self.spans.append(Span(part, (self.heard + start) / MS, (self.heard + start + len(part.wave)) / MS))

    def _next(self) -> Wave:
        hop, self._coming = self._coming[:HOP], self._coming[HOP:]
        return np.pad(hop, (0, HOP - len(hop)))

    def _echo(self, played: Wave) -> Wave:
        if self.scene.echo is None:
            return np.zeros(HOP, np.float32)
        self._played = np.concatenate([self._played[HOP:], played])
        path, delay = self.scene.echo.path, int(self.scene.echo.delay_ms * MS)
        end = len(self._played) - delay
        return np.convolve(self._played[end - HOP - len(path) + 1 : end], path, "valid").astype(np.float32)


class Thirds:
    """24 kHz to 16 kHz, a hop of 768 samples to 512 at a time: a low-pass of 96 taps at twice the rate, every third.

    Delays by 1 ms.
    """

    TAPS = 96

    def __init__(self):
        at = np.arange(self.TAPS) - (self.TAPS - 1) / 2
        self._taps = (2 / 3 * np.sinc(at / 3) * np.hanning(self.TAPS)).astype(np.float32)
        self._before = np.zeros(self.TAPS - 1, np.float32)

    def __call__(self, hop: Wave) -> Wave:
        twice = np.zeros(2 * len(hop), np.float32)
        twice[::2] = hop
        whole = np.concatenate([self._before, twice])
        self._before = whole[-(self.TAPS - 1) :]
        return np.convolve(whole, self._taps, "valid")[::3].astype(np.float32)
