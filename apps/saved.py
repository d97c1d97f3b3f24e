"""Files of a conversation: each is written beside its target and renamed, so that it is whole or absent."""

import json
import wave
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.audio import Wave, pcm16
from runtime.errors import EdgeOmniError


class SaveError(EdgeOmniError):
    """A file cannot be written; the conversation goes on."""


def save_text(path: Path, text: str) -> None:
    whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_json(path: Path, record: Any) -> None:
    """One JSON object."""
    save_text(path, json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def save_lines(path: Path, records: Iterable[Any]) -> None:
    """One JSON object a line."""
    save_text(path, "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in records))


def save_two_sides(path: Path, left: Wave, right: Wave, rate: int) -> None:
    """Two waves [n] of one rate as the channels of a 16-bit WAV file; the shorter one ends in silence."""
    save_pcm(path, two_sides(pcm16(left), pcm16(right)), rate)


def save_pcm(path: Path, samples: NDArray[np.int16], rate: int) -> None:
    """int16 samples [n, channels] as a WAV file."""

    def write(part: Path) -> None:
        # Through a file of our own: what fills the disk is then an OSError.
        with part.open("wb") as raw, wave.open(raw, "wb") as file:
            file.setparams((samples.shape[1], 2, rate, len(samples), "NONE", "not compressed"))
            file.writeframes(samples.tobytes())

    whole(path, write)


def two_sides(left: NDArray[np.int16], right: NDArray[np.int16]) -> NDArray[np.int16]:
    """[n] and [m] -> [max(n, m), 2]."""
    both = np.zeros((max(len(left), len(right)), 2), np.int16)
    both[: len(left), 0], both[: len(right), 1] = left, right
    return both


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a name beside `path` and rename what it wrote; SaveError, and nothing left, if it cannot."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        why = error.strerror or str(error)
        raise SaveError(f"{path} cannot be written ({why}); name a file in a folder that exists and has room") from None
