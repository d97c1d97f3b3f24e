"""What the second memory of a conversation costs, the one that listens, in a process of its own.

`python -m apps.bench.live_memory BUNDLE THREADS [CACHE]` prints one JSON object.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from quant.comparison.resident import resident
from runtime.errors import EdgeOmniError

POSITIONS = 1024  # that both memories hold


@dataclass(frozen=True)
class Memory:
    """Bytes that were added to an empty process, weights among them."""

    positions: int
    one: int  # every graph open, and one conversation that has read so much
    two: int  # the same, and a second memory with the same positions
    cache: int  # of keys and values in one of them

    @property
    def ratio(self) -> float:
        """Of two against one and its keys and values once more."""
        return self.two / (self.one + self.cache)


def memory(bundle: Path, threads: int, cache: Path | None) -> Memory:
    """Measure `bundle` in a fresh process. EdgeOmniError if that fails."""
    at = [str(bundle.resolve()), str(threads), *([str(cache.resolve())] if cache else [])]
    command = [sys.executable, "-m", "apps.bench.live_memory", *at]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    if done.returncode:
        raise EdgeOmniError(f"{bundle} could not be opened in a process of its own:\n{done.stderr.strip()}")
    return Memory(**json.loads(done.stdout))


def measure(bundle: Path, threads: int, cache: Path | None) -> Memory:
    """The same in this process, whose memory counts from here on."""
    from runtime.engine import Engine
    from runtime.prompt import Prompt
    from runtime.session import Options, give_back_freed

    def used() -> int:
        give_back_freed()
        found = resident()
        return found["RssAnon"] + found["RssFile"] - empty

    found = resident()
    empty = found["RssAnon"] + found["RssFile"]
    engine = Engine(bundle, Options(threads=threads, prepack_cache=cache))
    engine.open_all()
    count = min(POSITIONS, engine.manifest.cache.max_positions)
    books = len(engine.manifest.audio.codebook_sizes) if engine.manifest.audio else 0
    nothing = np.zeros((0, books), np.int64), np.zeros((0, engine.manifest.hidden_size), np.float32)
    speaking, listening = engine.context(), engine.context()
    speaking.append(Prompt(np.zeros(count, np.int64), *nothing))
    speaking.hidden()
    one = used()
    listening.take_over(speaking, count, 0)
    cache_bytes = sum(buffer[:, :, :count].nbytes for buffer in listening.cache.buffers.values())
    return Memory(count, one, used(), cache_bytes)


if __name__ == "__main__":
    folder, number, *kept = sys.argv[1:]
    print(json.dumps(asdict(measure(Path(folder), int(number), Path(kept[0]) if kept else None))))
