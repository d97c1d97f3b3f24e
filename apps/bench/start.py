"""What opening a bundle costs in time and memory, measured in a process of its own that has done nothing else.

`python -m apps.bench.start BUNDLE THREADS [CACHE]` prints one JSON object.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from quant.comparison.resident import resident
from runtime.errors import EdgeOmniError


@dataclass(frozen=True)
class Start:
    """From nothing to all graphs open, and on to the first token. Memory is what was added; `private` bytes are this
    process's own (RssAnon), `mapped` ones belong to files and can be dropped when memory is short (RssFile)."""

    seconds: float
    first_token_seconds: float
    private_tokenizer: int
    private_graphs: int
    private_after_token: int  # everything, with what the first token touched of the cache
    mapped_after_token: int
    peak: int  # of the process, its code and libraries included


def start(bundle: Path, threads: int, cache: Path | None) -> Start:
    """Open `bundle` in a fresh process. EdgeOmniError if that fails."""
    at = [str(bundle.resolve()), str(threads), *([str(cache.resolve())] if cache else [])]
    command = [sys.executable, "-m", "apps.bench.start", *at]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    if done.returncode:
        raise EdgeOmniError(f"{bundle} could not be opened in a process of its own:\n{done.stderr.strip()}")
    return Start(**json.loads(done.stdout))


def measure(bundle: Path, threads: int, cache: Path | None) -> Start:
    """The same in this process, whose memory counts from here on."""
    from runtime.engine import Engine
    from runtime.session import Options, give_back_freed

    empty, began = resident(), time.perf_counter()
    engine = Engine(bundle, Options(threads=threads, prepack_cache=cache))
    give_back_freed()
    read = resident()
    engine.open_all()
    opened, seconds = resident(), time.perf_counter() - began
    context = engine.context()
    context.push(0)
    engine.session("lm_head").run(hidden=context.hidden())
    token = resident()
    return Start(
        seconds=seconds,
        first_token_seconds=time.perf_counter() - began,
        private_tokenizer=read["RssAnon"] - empty["RssAnon"],
        private_graphs=opened["RssAnon"] - read["RssAnon"],
        private_after_token=token["RssAnon"] - empty["RssAnon"],
        mapped_after_token=token["RssFile"] - empty["RssFile"],
        peak=token["VmHWM"],
    )


if __name__ == "__main__":
    folder, count, *kept = sys.argv[1:]
    print(json.dumps(asdict(measure(Path(folder), int(count), Path(kept[0]) if kept else None))))
