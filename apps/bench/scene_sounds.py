"""What scenes are made of: questions in voices that Nano never heard, talk, television, backchannels, coughs, noises.

The recordings that come along give questions on every machine. Other sentences are spoken by espeak-ng, flite and
festival where they are installed; real speech is what the Debian package asterisk-core-sounds-en-g722 and the Python
package useful-moonshine-onnx carry.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random

import numpy as np

from apps.bench.recordings import SHARE, SPEAKERS, decoded
from export.nano import domain, noises
from export.nano.split import read_split
from quant.turn import read_turns
from runtime.audio import Wave, load_mono, resample
from runtime.live.settings import RATE

SAMPLES = Path(noises.__file__).parent / "samples"
TELEVISION = ("Allison, English", "LibriVox, English", "June, French", "Carlo, Italian", "IvrvoiceRU, Russian")
LONG_BYTES = 16_000  # of a file, two seconds of G.722: what is shorter is a word, or a tone
PEAK = 0.7
QUIET = 0.01  # of the peak: what is below before and after is not speech
LONG_ANSWER = 24  # letters: about two seconds of speech
# Kinds with which training also drew noises; the last three it never had.
NOISES = ("clicks", "keys", "bursts", "whistle", "engine", "beeps", "sweep", "modulated", "drum")
BACKCHANNELS = ("mm hm", "uh huh", "yeah", "okay", "right", "hmm", "oh", "yes")
# Talk for somebody else: sentences of a world that is none of Nano's.
OTHERS = tuple(
    "did you feed the cat this morning|i will be home a little later tonight|she said they sold the house|"
    "we should really visit your mother on sunday|he never told me about the meeting|put it over there next to me|"
    "i think the children are still at school|have you seen my keys anywhere|they closed the old cinema|"
    "no i already paid for dinner|that was the best film of the whole year|can we talk about this when i am back|"
    "your brother called twice while you were out|the neighbours are going to paint their fence|"
    "i do not remember where we parked the car|it was raining the whole week".split("|")
)


@dataclass(frozen=True)
class Sound:
    """One clip, 16 kHz, its peak 0.7, silence before and after cut off."""

    wave: Wave
    about: str  # what is said in which voice, or the kind of noise
    answer: str = ""  # to a question


class Sounds:
    """Draws clips. What this machine cannot make is left out of `kinds` and named by `lacks`."""

    def __init__(self, synthesize: bool = True):
        self.programs = tuple(name for name in PROGRAMS if synthesize and shutil.which(COMMANDS[name]))
        self.recorded = recorded_questions()
        self.real = real_speech()
        made: dict[str, Callable[[Random], Sound]] = {"cough": self.cough, "noise": self.noise}
        if self.programs:
            made |= {"talk": self.talk, "backchannel": self.backchannel}
        if self.real:
            made["television"] = self.television
        self.disturbances = made

    @property
    def lacks(self) -> str | None:
        """One line on what is not there, and how to mend it."""
        missing = [name for name in PROGRAMS if name not in self.programs]
        said = []
        if missing:
            said.append(f"without {', '.join(missing)} there are fewer voices")
        if not self.programs:
            said.append("talk for somebody else and backchannels are left out")
        if not self.real:
            said.append("without recorded speech of real people, television is left out")
        how = "on Debian: sudo apt-get install espeak-ng flite festival festvox-kallpc16k asterisk-core-sounds-en-g722"
        return f"{'; '.join(said)} ({how} ffmpeg)" if said else None

    def question(self, rng: Random, long_answer: bool = False, over_answer: bool = False) -> Sound:
        """A question in a held-out voice; of those that come along one in three, all where nothing else is there.

        `over_answer`: one that must interrupt. A word alone is rightly taken for a listener's there, and talk of what
        lies outside the model's world for talk among people.
        """

        def fits(answer: str) -> bool:
            command = answer != domain.OUTSIDE and not answer.startswith("i hear ")
            return len(answer) >= LONG_ANSWER * long_answer and (command or not over_answer)

        if not self.programs or rng.random() < 1 / 3:
            return rng.choice([clip for clip in self.recorded if fits(clip.answer)])
        while True:
            turn = domain.draw_turn(rng)
            kept = turn.key is None or read_split().sentence_is_heldout(turn.key)
            if kept and turn.intent not in ("look", "chat") and fits(turn.answer):
                return self._spoken(rng, turn.question, turn.answer)

    def talk(self, rng: Random) -> Sound:
        return self._spoken(rng, rng.choice(OTHERS))

    def backchannel(self, rng: Random) -> Sound:
        return self._spoken(rng, rng.choice(BACKCHANNELS))

    def television(self, rng: Random) -> Sound:
        """Two to five seconds of a real person who speaks to nobody here."""
        path = rng.choice(rng.choice(self.real))
        wave, count = decoded(path), int(RATE * rng.uniform(2, 5))
        start = rng.randint(0, max(0, len(wave) - count))
        return Sound(tidy(wave[start : start + count], RATE), f"television, {path.stem}")

    def cough(self, rng: Random) -> Sound:
        return self._arithmetic(rng, ("cough",), rng.uniform(0.4, 1.2))

    def noise(self, rng: Random) -> Sound:
        return self._arithmetic(rng, NOISES, rng.uniform(0.5, 3))

    def _arithmetic(self, rng: Random, kinds: tuple[str, ...], seconds: float) -> Sound:
        kind, wave = noises.draw_noise(rng, kinds, lambda: rng.choice(self.recorded).wave, seconds)
        return Sound(tidy(wave, RATE), kind)

    def _spoken(self, rng: Random, text: str, answer: str = "") -> Sound:
        program = rng.choices(self.programs, [PROGRAMS[name] for name in self.programs])[0]
        voices = [voice for voice in read_split().heldout_voices if voice.startswith(f"{program}/")]
        voice = rng.choice(voices)
        wave, rate = speak(text, voice, rng.uniform(0.85, 1.15), rng.uniform(0.25, 0.75))
        return Sound(tidy(wave, rate), f"{text!r}, {voice}", answer)


# Voices of each program: espeak-ng has many, festival one.
PROGRAMS = {"espeak": 0.5, "flite": 0.35, "festival": 0.15}
COMMANDS = {"espeak": "espeak-ng", "flite": "flite", "festival": "text2wave"}


def speak(text: str, voice: str, speed: float, pitch: float) -> tuple[Wave, int]:
    """A sentence by the program that `voice` names, in a process of its own: espeak-ng remembers the last one."""
    program, name = voice.split("/", 1)
    with tempfile.TemporaryDirectory(prefix="edgeomni-voice-") as folder:
        out = Path(folder) / "out.wav"
        match program:
            case "espeak":
                how = ["-v", name, "-s", str(round(165 * speed)), "-p", str(round(100 * pitch)), "-w", str(out)]
                command = ["espeak-ng", *how, text]
            case "flite":
                command = ["flite", "-voice", name, "--setf", f"duration_stretch={1 / speed:.3f}", "-t", text, str(out)]
            case _:
                command = ["text2wave", "-eval", f"(voice_{name})", "-o", str(out)]
        subprocess.run(command, input=text, text=True, capture_output=True, check=True)
        return load_mono(out, RATE), RATE


def tidy(wave: Wave, rate: int) -> Wave:
    """At 16 kHz, peak 0.7, from the first to the last sample over a hundredth of the peak."""
    wave = resample(np.asarray(wave, np.float32), rate, RATE)
    peak = max(float(np.abs(wave).max()), 1e-6)
    loud = np.flatnonzero(np.abs(wave) > QUIET * peak)
    return (wave[loud[0] : loud[-1] + 1] * (PEAK / peak)).astype(np.float32)


@cache
def recorded_questions() -> tuple[Sound, ...]:
    """The spoken questions that come along, all in held-out voices and unseen sentences."""
    turns = read_turns(SAMPLES / "turns.jsonl")
    heard = [(turn.audio, turn.answers[0]) for turn in turns if turn.audio is not None]
    return tuple(Sound(tidy(load_mono(path, RATE), RATE), path.stem, answer) for path, answer in heard)


@cache
def real_speech() -> tuple[tuple[Path, ...], ...]:
    """Files with speech of real people that are installed, by person."""
    found = [sorted(SHARE.glob(SPEAKERS[person])) for person in TELEVISION if shutil.which("ffmpeg")]
    spec = find_spec("moonshine_onnx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found.append([Path(folder) / "assets" / "beckett.wav"])
    long = (tuple(path for path in paths if path.is_file() and path.stat().st_size >= LONG_BYTES) for paths in found)
    return tuple(paths for paths in long if paths)
