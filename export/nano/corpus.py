"""Recordings on disk: a folder of shards, each one file of int16 samples beside one JSON line a clip."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Clip:
    """One recording's row in a manifest; `alignment` holds (first sample, phone) at the clip's own rate."""

    text: str  # what is said
    answer: str  # what the assistant answers ("" for read-aloud speech and non-queries)
    intent: str
    key: str | None  # what the split hashes
    voice: str  # engine/name, or the kind of noise
    turn: int  # 1 for a follow-up of the clip before it, else 0
    rate: int  # Hz
    offset: int  # first sample in the shard's file
    samples: int
    alignment: list[tuple[int, str]] = field(default_factory=list)


class Shard:
    """Clips written together; reading maps the samples into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.clips = [Clip(**json.loads(line)) for line in path.with_suffix(".jsonl").read_text().splitlines()]

    @cached_property
    def _samples(self) -> np.ndarray:
        return np.memmap(self._path.with_suffix(".pcm"), np.int16, mode="r")

    def wave(self, clip: Clip) -> np.ndarray:
        """Samples of a clip, float32 in [-1, 1]."""
        return self._samples[clip.offset : clip.offset + clip.samples].astype(np.float32) / 32768


@dataclass(frozen=True)
class Recording:
    """A clip together with the shard that holds its samples."""

    clip: Clip
    shard: Shard

    def wave(self) -> np.ndarray:
        """Its samples, float32 in [-1, 1]."""
        return self.shard.wave(self.clip)


def write_shard(path: Path, clips: list[tuple[Clip, np.ndarray]]) -> None:
    """Write clips (offsets set here) to `path`.pcm and .jsonl; the .jsonl appears last and marks the shard whole."""
    offset = 0
    lines = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".pcm").open("wb") as out:
        for clip, wave in clips:
            pcm = (np.clip(wave, -1, 1) * 32767).astype(np.int16)
            out.write(pcm.tobytes())
            lines.append(json.dumps(asdict(clip) | {"offset": offset, "samples": len(pcm)}, ensure_ascii=False))
            offset += len(pcm)
    partial = path.with_suffix(".jsonl.part")
    partial.write_text("\n".join(lines) + "\n")
    partial.rename(path.with_suffix(".jsonl"))


def shards(folder: Path) -> Iterator[Shard]:
    """Every whole shard of a set, by name."""
    for manifest in sorted(folder.glob("*.jsonl")):
        yield Shard(manifest.with_suffix(""))


def recordings(folder: Path) -> list[Recording]:
    """Every clip of a set (empty where it has not been made yet)."""
    return [Recording(clip, shard) for shard in shards(folder) for clip in shard.clips]
