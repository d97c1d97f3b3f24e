"""A command in a process of its own, with its memory by kind as the kernel counts it while it runs."""

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02  # seconds between two looks
KINDS = ("VmHWM", "RssAnon", "RssFile")


@dataclass(frozen=True)
class Watched:
    """Seconds by the clock and of processor time; peaks in bytes, each of its own moment. `resident` is the kernel's
    own high-water mark of all kinds together (not ru_maxrss, which counts the parent before the command is loaded);
    `anonymous` and `mapped` (pages of files, which can be dropped) are the largest seen from outside every INTERVAL, so
    that a peak shorter than that is missed."""

    seconds: float
    processor_seconds: float
    resident: int
    anonymous: int
    mapped: int


def watched(command: Sequence[str], folder: Path) -> Watched:
    """Run `command` to its end; what it prints goes to `folder`/output.txt. RuntimeError with that if it fails."""
    log = folder / "output.txt"
    with log.open("w") as out:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1])
        peaks: dict[str, int] = dict.fromkeys(KINDS, 0)
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            for kind, size in memory_of(child.pid).items():
                peaks[kind] = max(peaks[kind], size)
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - began
    _, status, used = ended
    child.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for here, not by subprocess
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{log.read_text()}")
    return Watched(
        seconds=seconds,
        processor_seconds=used.ru_utime + used.ru_stime,
        resident=peaks["VmHWM"],
        anonymous=peaks["RssAnon"],
        mapped=peaks["RssFile"],
    )


def memory_of(pid: int) -> dict[str, int]:
    """Resident bytes of a process by kind; nothing of one that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except ProcessLookupError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {kind: 1024 * int(fields[kind].split()[0]) for kind in KINDS if kind in fields}
