"""A checkpoint as published: opens a folder (or GGUF file), checks all of it, and yields its tensors one at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from export.files import file_size, read_json_object
from export.gguf_file import read_gguf
from export.lazy_tensor import LazyTensor
from export.problems import gathering, listed, refuse, shown
from export.quantized_layers import assembled
from export.safetensors_file import read_safetensors, read_sharded
from export.torch_archive import read_torch
from runtime.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HIFT_CONFIG = "hift_config.json"

# torch's two spellings of a weight-normalised parameter: the first is that of torch.nn.utils.weight_norm, which the
# official code builds; the second that of torch.nn.utils.parametrizations.weight_norm (0 is g, 1 is v).
OLD_STYLE = (".weight_g", ".weight_v")
NEW_STYLE = (".parametrizations.weight.original0", ".parametrizations.weight.original1")


@dataclass(frozen=True)
class CheckpointFile:
    """One file of the checkpoint, for the manifest's provenance: path relative to the folder, size in bytes."""

    name: str
    size: int


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, LazyTensor]):
    """An opened checkpoint: a mapping of the checkpoint's own keys to tensors that have not been read.

    What a quantized layer is made of (`….qweight` and such) is one tensor here, under the key of its weight.

    `config` is config.json as the file states it (empty for a GGUF without one), `metadata` the key-value pairs of
    a GGUF (empty otherwise). `hift` holds the vocoder's tensors, keys without prefix and weight norm always spelled
    `weight_g`/`weight_v`; None if there is no vocoder. `hift_config` is the path of hift_config.json, if it exists.
    """

    folder: Path
    kind: Literal["safetensors", "gguf"]
    files: tuple[CheckpointFile, ...]
    tensors: Mapping[str, LazyTensor] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)
    hift: Mapping[str, LazyTensor] | None = field(repr=False)
    hift_config: Path | None

    def __getitem__(self, key: str) -> LazyTensor:
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @property
    def architectures(self) -> tuple[str, ...]:
        """What config.json names under `architectures`; empty where it names nothing."""
        named = self.config.get("architectures")
        if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
            raise CheckpointError(
                f"{self.folder}/config.json: architectures is {shown(named)}, expected a list of names"
            )
        return tuple(named or ())

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True)
class _Weights:
    kind: Literal["safetensors", "gguf"]
    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any] = field(default_factory=dict)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a folder with safetensors (single or sharded) or one GGUF, or a .gguf file itself.

    Only headers are read. Of several forms in one folder the single `model.safetensors` comes first, then the index,
    then GGUF; `hift.safetensors` comes before `hift.pt`. Raises CheckpointError that says everything wrong with all
    of the files.
    """
    path = Path(path)
    try:
        return _open_folder(path) if path.is_dir() else _open_gguf(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: {error}") from None


def _open_gguf(path: Path) -> Checkpoint:
    size = file_size(path)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{str(path)!r} is a file: expected a checkpoint's folder or a .gguf file")
    gguf = read_gguf(path)
    files = (CheckpointFile(path.name, size),)
    return Checkpoint(path.parent, "gguf", files, gguf.tensors, {}, gguf.metadata, None, None)


def _open_folder(folder: Path) -> Checkpoint:
    problems: list[str] = []
    weights, config, hift = _Weights("safetensors", {}), {}, None
    with gathering(problems):
        weights = _read_weights(folder)
    with gathering(problems):
        config = _read_config(folder, weights.kind)
    with gathering(problems):
        hift = _read_hift(folder)
    if weights.kind == "safetensors" and (config or not problems):  # what cannot be read says nothing of quantization
        with gathering(problems):
            weights = replace(weights, tensors=assembled(weights.tensors, config, folder))
    refuse(f"checkpoint {str(folder)!r}", problems)
    hift_config = folder / HIFT_CONFIG
    return Checkpoint(
        folder,
        weights.kind,
        _list_files(folder, weights),
        weights.tensors,
        config,
        weights.metadata,
        hift,
        hift_config if hift_config.is_file() else None,
    )


def _read_weights(folder: Path) -> _Weights:
    if _is_there(folder / SINGLE):
        return _Weights("safetensors", read_safetensors(folder / SINGLE))
    if _is_there(folder / INDEX):
        return _Weights("safetensors", read_sharded(folder / INDEX))
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) > 1:
        raise CheckpointError(f"holds several GGUF files, {listed(file.name for file in ggufs)}: name one of them")
    if not ggufs:
        raise CheckpointError(_no_weights(folder))
    gguf = read_gguf(ggufs[0])
    return _Weights("gguf", gguf.tensors, gguf.metadata)


def _no_weights(folder: Path) -> str:
    found = sorted(file.name for file in folder.iterdir())
    message = f"holds no weights: expected {SINGLE}, {INDEX} with its shards, or a .gguf file; "
    if any(name.startswith("pytorch_model") for name in found):
        return message + "pytorch_model*.bin is not read, convert it to safetensors first"
    if any(name.endswith(".safetensors") and not name.startswith("hift") for name in found):
        return message + f"there are safetensors files, but {INDEX} is missing: download it too"
    return message + (f"found {listed(found)}" if found else "the folder is empty")


def _is_there(path: Path) -> bool:
    """Also true of a broken link, so that reading it can say that it is one."""
    return path.is_symlink() or path.exists()


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    config = folder / "config.json"
    if kind == "gguf" and not _is_there(config):
        return {}
    return read_json_object(config)


def _read_hift(folder: Path) -> dict[str, LazyTensor] | None:
    """The vocoder's tensors; None if the folder has no vocoder (the checkpoint may be of a text model)."""
    if _is_there(folder / "hift.safetensors"):
        return _with_old_style(read_safetensors(folder / "hift.safetensors"), "hift.safetensors")
    if _is_there(folder / "hift.pt"):
        return _with_old_style(read_torch(folder / "hift.pt"), "hift.pt")
    return None


def _with_old_style(tensors: dict[str, LazyTensor], file: str) -> dict[str, LazyTensor]:
    """Weight norm spelled `weight_g`/`weight_v` throughout; CheckpointError for a layer that has both spellings."""
    mixed = sorted(_stems(tensors, OLD_STYLE) & _stems(tensors, NEW_STYLE))
    if mixed:
        raise CheckpointError(
            f"{file!r}: weight norm is spelled both weight_g/weight_v and parametrizations.weight in {listed(mixed)}; "
            "expected one spelling for each layer"
        )
    renamed = [replace(tensor, key=_old_style(tensor.key)) for tensor in tensors.values()]
    return {tensor.key: tensor for tensor in renamed}


def _stems(keys: Mapping[str, LazyTensor], endings: tuple[str, ...]) -> set[str]:
    return {key.removesuffix(ending) for key in keys for ending in endings if key.endswith(ending)}


def _old_style(key: str) -> str:
    for new, old in zip(NEW_STYLE, OLD_STYLE, strict=True):
        if key.endswith(new):
            return key.removesuffix(new) + old
    return key


def _list_files(folder: Path, weights: _Weights) -> tuple[CheckpointFile, ...]:
    """The regular files at the folder's top, and shards further down, by name."""
    paths = {path for path in folder.iterdir() if path.is_file()} | {t.file for t in weights.tensors.values()}
    names = sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    return tuple(CheckpointFile(name, size) for name, size in names)


def fold_weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The weight of a weight-normalised layer, w = g * v / ||v||, float32, shape of v.

    The norm is over all dims but 0 (of transposed convolutions that is the input channel), computed in float64.
    v [n, ...] float, g [n, 1, ...] float. Raises CheckpointError if the shapes do not fit or a row of v is all zero.
    Source: Salimans and Kingma 2016, "Weight Normalization", equation 2.
    """
    if v.ndim < 2 or g.shape != (v.shape[0], *[1] * (v.ndim - 1)):
        raise CheckpointError(f"weight_g {g.shape} does not fit weight_v {v.shape}: expected one scale for each row")
    v64 = v.astype(np.float64)
    norm = np.sqrt(np.sum(v64 * v64, axis=tuple(range(1, v.ndim)), keepdims=True))
    if not norm.all():
        rows = np.flatnonzero(norm.reshape(-1) == 0).tolist()
        raise CheckpointError(f"weight_v has all-zero rows, which have no direction: {listed(map(str, rows))}")
    return (g.astype(np.float64) * (v64 / norm)).astype(np.float32)
