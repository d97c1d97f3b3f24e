"""Makes the small checkpoint from nothing: python -m export.nano WORK_FOLDER [CHECKPOINT_FOLDER].

Recordings, then every stage in order, then the checkpoint. Whatever was done before is kept: a run that was stopped
goes on where it was. Each step is a process of its own, so that its memory is given back.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from export.nano import vocabulary


def steps(work: Path, checkpoint: Path) -> list[list[str]]:
    """Module and arguments of each step, in order."""
    data, run = str(work / "data"), str(work / "run")
    return [
        ["synthesis", data],
        ["vad_stage", data, run],
        ["tokenizer_stage", data, run],
        ["codes", data, run],
        ["decoder_stage", data, run],
        ["vocoder_stage", data, run],
        ["vision_stage", run],
        ["language_stage", data, run],
        ["assemble", run, str(checkpoint)],
        ["evaluation", data, str(checkpoint)],
    ]


def main() -> None:
    """Run all steps; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=vocabulary.FOLDER)
    arguments = parser.parse_args()
    for module, *rest in steps(arguments.work, arguments.checkpoint):
        print(f"{module} ...", flush=True)
        done = subprocess.run([sys.executable, "-m", f"export.nano.{module}", *rest], check=False)
        if done.returncode:
            sys.exit(f"{module} failed; start again to go on from there")


if __name__ == "__main__":
    main()
