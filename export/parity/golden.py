"""A golden set: inputs and outputs of every stage, recorded from the official code; and what a replay says of one."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from export.safetensors_file import read_safetensors
from runtime.errors import EdgeOmniError

TOLERANCE = 2e-4  # of the recorded array's largest value
RECOMPUTED_F0 = 2e-2  # the sine source integrates F0, so rounding of F0 grows to about 1e-3 of full scale


@dataclass(frozen=True)
class Replayed:
    """Our version of one recorded array, `name` = "group/array". Integers must be equal, floats within `tolerance`."""

    name: str
    ours: np.ndarray
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Golden:
    """A folder with manifest.json, tables.json, inputs/ and one safetensors file a group."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "manifest.json").is_file():
            raise EdgeOmniError(f"{self.folder} is not a golden set: it has no manifest.json")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The manifest: file, name, shape, dtype and meaning of each recorded array."""
        return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))

    @cached_property
    def tables(self) -> dict[str, Any]:
        return json.loads((self.folder / "tables.json").read_text(encoding="utf-8"))

    @property
    def names(self) -> list[str]:
        """Every recorded array as "group/array"."""
        return [f"{row['file'].removesuffix('.safetensors')}/{row['name']}" for row in self.rows]

    def arrays(self, group: str) -> dict[str, np.ndarray]:
        """The recorded arrays of one group; empty if the set has no such group."""
        path = self.folder / f"{group}.safetensors"
        return {key: tensor.read() for key, tensor in read_safetensors(path).items()} if path.is_file() else {}

    def meaning(self, name: str) -> str:
        """What the manifest says of array "group/array"; "" if it has none of that name."""
        return next((row["meaning"] for row, array in zip(self.rows, self.names, strict=True) if array == name), "")

    def mentioned(self, name: str, known: Iterable[str]) -> list[str]:
        """Those of `known` that the manifest's description of array "group/array" speaks of, in its order.

        Where one array holds several clips or pictures, nothing else says which.
        """
        wanted = set(known)
        return [word for word in re.findall(r"\w+", self.meaning(name)) if word in wanted]

    def input(self, path: str) -> Path:
        """An input file, named as tables.json names it."""
        return self.folder / path
