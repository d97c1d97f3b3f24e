"""How much memory a bundle takes when it answers, measured in a process of its own that does nothing else.

`python -m quant.comparison.memory` reads what to do as JSON from its input and prints a `Memory` as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from quant.comparison.resident import STATUS, resident

SECOND = 16000  # samples of noise that are heard, where the bundle listens


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Memory:
    """Bytes at most: `peak` of the process, mapped weights and libraries included; `private` ones that are its own.

    `empty` is the peak before it opens the bundle: Python, numpy and ONNX Runtime.
    """

    peak: int
    private: int
    empty: int


@dataclass(frozen=True)
class Task:
    """A bundle, and how long its answers are; it answers one question in text, and in speech where it speaks."""

    bundle: str
    threads: int
    cache: str | None
    max_new: int
    max_frames: int


def measured(task: Task) -> Memory | None:
    """Memory of a fresh process that carries out the task.

    None where the system does not count it by kind, or the bundle cannot answer, of which the comparison itself tells.
    Where packed weights are kept it counts the second start: the first one packs them.
    """
    if not STATUS.is_file():
        return None
    starts = [_started(task) for _ in range(2 if task.cache else 1)]
    return starts[-1]


def _started(task: Task) -> Memory | None:
    command = [sys.executable, "-m", "quant.comparison.memory"]
    asked, root = json.dumps(asdict(task)), Path(__file__).parents[2]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, cwd=root, check=False)
    return Memory(**json.loads(done.stdout)) if done.returncode == 0 else None


def measure(task: Task) -> Memory:
    """The same in this process, which the peak counts from its start."""
    from quant.limits import Limits
    from runtime.bundle import read_bundle
    from runtime.conversation import Choices, Conversation
    from runtime.engine import Engine
    from runtime.prompt import Audio, Part, Text
    from runtime.session import Options

    empty, private = resident()["VmHWM"], 0
    folder, cache = Path(task.bundle), None if task.cache is None else Path(task.cache)
    engine = Engine(folder, Options(threads=task.threads, provider=read_bundle(folder).profile, prepack_cache=cache))
    engine.manifest = Limits(task.max_new, task.max_frames).of(engine.manifest)
    noise = np.random.default_rng(0).normal(0, 0.1, SECOND).astype(np.float32)
    heard: list[Audio] = [engine.hear(noise)] if engine.manifest.audio else []
    parts: Sequence[Part] = [*heard, Text("Tell me what you know about the sea.")]
    for spoken in (False, True) if engine.manifest.speech else (False,):
        for _ in Conversation.open(engine, seed=0).reply(parts, Choices(spoken=spoken, greedy=True, stop_loops=False)):
            private = max(private, resident()["RssAnon"])
    return Memory(peak=resident()["VmHWM"], private=private, empty=empty)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Task(**json.loads(sys.stdin.read()))))))
