"""A bundle before it is made smaller: a folder on disk, or a checkpoint whose graphs were authored but never written.

Here the floors meet that do not know each other: `export` makes one of a checkpoint, `quant` reads it.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from runtime.bundle import Manifest
from runtime.integers import Form, Quantized


@runtime_checkable
class Streamed(Protocol):
    """An initializer [n, ...] that no file holds as a graph wants it: its rows are made whenever they are asked for."""

    @property
    def key(self) -> Hashable:
        """Equal for two initializers, of whichever graphs, that hold the same values."""
        ...

    @property
    def place(self) -> tuple[Path, int] | None:
        """File and offset of the same bytes in the same order, where some file holds them."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, [stop - start, ...], in the initializer's own type.

        To ask for all of them in their order is the quickest way, and takes the least memory.
        """
        ...

    @property
    def stored_as(self) -> tuple[str, ...]:
        """The quantized types that its checkpoint stores it in; none where it stores floats."""
        ...

    def form(self) -> Form | None:
        """How the checkpoint stores it as integers that operators know; None where it does not."""
        ...

    def integers(self, start: int, stop: int) -> Quantized:
        """Rows `start` to `stop` in that form: other values than `rows` has only where that has less precise a type."""
        ...


@dataclass(frozen=True)
class FloatBundle:
    """What a quantization starts from.

    `models` are onnx_ir models by the names of the manifest's graphs. Their initializers lie in files, in the graph,
    or are `Streamed`. `others` are the bundle's files that belong to no graph. `sources` are all files that any of it
    is read from. `folder` is None where the bundle was never written; its manifest then lists no files.
    """

    name: str  # by which messages call it
    manifest: Manifest
    models: Mapping[str, Any]
    others: Mapping[str, Path | bytes]
    sources: tuple[Path, ...]
    folder: Path | None = None
