"""`make demo`: from the checkpoint that comes along to a spoken answer, with the commands that a person would type."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from apps.cli import one_message
from apps.embedded import CHECKPOINT, RECIPE, REMEMBERED
from apps.tables import OUT as SCREEN
from apps.tables import table
from runtime.audio import Wave, load_mono, write_wav
from runtime.errors import EdgeOmniError
from runtime.live.settings import RATE

SAMPLES = CHECKPOINT.parent / "samples"
QUESTION, PICTURE, TURNS = SAMPLES / "question.flac", SAMPLES / "picture.png", SAMPLES / "turns.jsonl"
OUT = Path("demo-output")
FLOAT, SMALL = OUT / "nano", OUT / f"nano-{RECIPE}"
# One person's half of a conversation: a question, another one over its answer, a third, and a cough over that answer.
INTERRUPTED, INTERRUPTING, COUGHED_AT = "espeak-002.flac", "espeak-004.flac", "espeak-003.flac"
CONVERSATION_SECONDS = 30
LOUDSPEAKERS = ("paplay", "pw-play", "aplay", "afplay")


class Demo:
    """Runs commands one after the other, and remembers which failed and how long each took."""

    def __init__(self) -> None:
        self.results: list[tuple[str, bool, float]] = []

    def run(self, about: str, *arguments: str, quiet: bool = False) -> str:
        """Run one command as a person would; `quiet` keeps its output for the caller, else it is shown."""
        print(f"\n# {about}\n$ edgeomni {shlex.join(arguments)}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "apps", *arguments]
        done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if quiet else None)
        self.results.append((shlex.join(arguments[:2]), done.returncode == 0, time.perf_counter() - start))
        return done.stdout or ""

    def asked(self, about: str, *arguments: str) -> dict[str, Any]:
        """Run one command that prints a JSON object; empty if it failed."""
        printed = self.run(about, *arguments, "--json", quiet=True)
        return json.loads(printed) if self.results[-1][1] else {}

    def summary(self) -> bool:
        """Show what was run; returns whether all of it succeeded."""
        print("\nSummary")
        for command, succeeded, seconds in self.results:
            print(f"  {'ok' if succeeded else 'FAILED':7}{seconds:6.1f} s  {command}")
        return all(succeeded for _, succeeded, _ in self.results)


def talk(demo: Demo) -> None:
    """Ask the spoken question about the picture, of the float and of the small bundle."""
    media = ("--audio", str(QUESTION), "--image", str(PICTURE))
    heard = demo.asked("what the small bundle hears", "transcribe", str(SMALL), str(QUESTION))
    answers = {}
    for bundle in (FLOAT, SMALL):
        speech = OUT / f"answer-{bundle.name}.wav"
        about = f"the recorded question about a picture, answered aloud by {bundle.name}"
        answers[bundle.name] = demo.asked(about, "chat", str(bundle), *media, "--speak", str(speech), "--seed", "0")
    print(f"\nheard:     {heard.get('text', '').strip()}")
    for name, answer in answers.items():
        print(f"{name + ':':11}{answer.get('text', '').strip()}")
    SCREEN.print(latency(answers))
    if answers[SMALL.name].get("speech"):
        play(Path(answers[SMALL.name]["speech"]))


def converse(demo: Demo) -> None:
    """A conversation of half a minute through the live loop, as if by microphone."""
    said, both = OUT / "conversation-said.wav", OUT / "conversation.wav"
    write_wav(said, half_a_conversation(), RATE)
    files = ("--out", str(both), "--log", str(OUT / "conversation.jsonl"))
    about = "a conversation: the person interrupts an answer, and later coughs over another"
    how = ("--fast", "--seed", "0", "--remember", str(REMEMBERED))
    demo.run(about, "talk", str(SMALL), "--simulate", str(said), *how, *files)
    play(both)


def half_a_conversation() -> Wave:
    """What the person says, float32 [n] at 16 kHz, from recordings that come along and a cough made here."""
    first, second, third = (load_mono(SAMPLES / name, RATE) for name in (INTERRUPTED, INTERRUPTING, COUGHED_AT))
    wave = np.zeros(CONVERSATION_SECONDS * RATE, np.float32)
    at = RATE
    for part, pause in ((first, 0.9), (second, 5.0), (third, 1.4), (cough(), 0.0)):
        wave[at : at + len(part)] += part
        at += len(part) + int(pause * RATE)
    return wave


def cough() -> Wave:
    """A third of a second of noise that dies away, float32 [n] at 16 kHz."""
    length = RATE // 3
    noise = np.random.default_rng(0).normal(0, 0.25, length)
    return (noise * np.exp(-np.linspace(0, 6, length))).astype(np.float32)


def latency(answers: dict[str, dict[str, Any]]):
    """Times of the answers, a row a bundle."""
    rows = table("answer by", "first token>", "first sound>", "RTF of speech>", "in all>")
    for name, answer in answers.items():
        timings = answer.get("timings", {})
        seconds = [timings.get(key) for key in ("first_token", "first_audio", "real_time_factor", "total")]
        cells = ["–" if value is None else f"{value:.2f}" for value in seconds]
        rows.add_row(name, *(cell + ("" if i == 2 or cell == "–" else " s") for i, cell in enumerate(cells)))
    return rows


def play(speech: Path) -> None:
    """Play a file where a player and a loudspeaker are found."""
    for player in filter(None, map(shutil.which, LOUDSPEAKERS)):
        try:
            if subprocess.run([player, str(speech)], check=False, capture_output=True, timeout=30).returncode == 0:
                return
        except subprocess.TimeoutExpired:  # a sound server that never answers
            continue
    print(f"No loudspeaker was found; the answer is in {speech}.")


def main() -> None:
    """Run everything; exit code 1 if a command failed."""
    if not any(CHECKPOINT.glob("*.safetensors")) or not TURNS.is_file():
        raise EdgeOmniError(f"the demo needs the weights in {CHECKPOINT} and the recordings in {SAMPLES}")
    OUT.mkdir(exist_ok=True)
    demo = Demo()
    demo.run(
        "the small checkpoint that comes along, to a float bundle",
        "export",
        str(CHECKPOINT),
        "-o",
        str(FLOAT),
        "--force",
    )
    demo.run(
        f"quantized by the recipe {RECIPE}",
        "quantize",
        str(FLOAT),
        "-o",
        str(SMALL),
        "--recipe",
        RECIPE,
        "--force",
        quiet=True,
    )
    demo.run("checksums, graphs and ports", "verify", str(SMALL))
    talk(demo)
    converse(demo)
    report = str(OUT / "report")
    demo.run(
        "both bundles on questions, voices and pictures that training never met",
        *("compare", str(FLOAT), str(SMALL), "--turns", str(TURNS), "--report", report),
        *("--swap-turns", "0", "--recogniser", "none"),
    )
    succeeded = demo.summary()
    print(
        "Bundles, spoken answers, the conversation (left the person, right the answers) and the report are in "
        f"{OUT.resolve()}."
    )
    print("The model knows a small world only; what it can be asked is in export/nano/README.md.")
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    with one_message():
        main()
