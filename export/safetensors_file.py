"""Safetensors, one file or sharded with an index: every tensor as a LazyTensor, and everything wrong in one error.

The header is parsed here rather than by the safetensors package because a bundle may point into the file: that needs
the file and the offset of each tensor, which the package does not tell. Format: 8 bytes of header length (little
endian), that many bytes of JSON {key: {dtype, shape, data_offsets}}, then the data without gaps.
"""

import reprlib
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from export.files import file_size, parse_json, read_bytes, read_json_object, stays_inside
from export.lazy_tensor import STORED_TYPES, LazyTensor, checked_shape, is_size, layout_problems
from export.problems import gathering, listed, refuse
from runtime.errors import CheckpointError

DTYPES = tuple(name for name, stored in STORED_TYPES.items() if stored.block == 1)
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """All tensors of one file by key, in the order of their bytes.

    Raises CheckpointError that says everything wrong with the header and, of a truncated file, how many bytes were
    found and how many expected.
    """
    size = file_size(path)
    start, header = _read_header(path, size)
    problems: list[str] = []
    tensors = []
    for key, entry in header.items():
        if key != "__metadata__":
            with gathering(problems):
                tensors.append(_tensor(key, entry, path, start))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    problems += layout_problems(tensors, size)
    if not problems:  # a tensor that could not be understood would be taken for a gap
        problems += _gaps(tensors, start, size)
    refuse(repr(path.name), problems)
    return {tensor.key: tensor for tensor in tensors}


def read_sharded(index: Path) -> dict[str, LazyTensor]:
    """All tensors of the shards that `model.safetensors.index.json` names, by key.

    Raises CheckpointError that says everything wrong with the index and with every shard.
    """
    index_map = _read_weight_map(index)
    problems: list[str] = []
    shards: dict[str, dict[str, LazyTensor]] = {}
    for name in sorted(set(index_map.values())):
        with gathering(problems):
            if not stays_inside(name):
                raise CheckpointError(f"{index.name!r} names {name!r}, expected a file inside the checkpoint's folder")
            shards[name] = read_safetensors(index.parent / name)
    problems += _index_problems(index.name, index_map, shards)
    refuse(repr(str(index.parent)), problems)
    return {key: shards[name][key] for key, name in index_map.items()}


def _read_header(path: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the parsed header."""
    if size < 8:
        raise CheckpointError(f"{path.name!r} has {size} bytes, too few for a safetensors file: it is truncated")
    length = int.from_bytes(read_bytes(path, 0, 8).tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path.name!r} states a header of {length} bytes, at most {MAX_HEADER_BYTES} expected: "
            "it is damaged or no safetensors file"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path.name!r} is truncated inside its header: {size} bytes found, {8 + length} expected"
        )
    header = parse_json(read_bytes(path, 8, length).tobytes(), f"the header of {path.name!r}")
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path.name!r} is a JSON {type(header).__name__}, expected an object")
    return 8 + length, header


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _parse_entry(entry: object) -> _Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{reprlib.repr(entry)}: expected dtype, shape and data_offsets")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"dtype {reprlib.repr(dtype)} is not supported, expected one of {', '.join(DTYPES)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(offset) for offset in offsets):
        raise CheckpointError(f"data_offsets {reprlib.repr(offsets)}: expected two whole numbers, none negative")
    return _Entry(dtype, checked_shape(entry["shape"]), *offsets)


def _tensor(key: str, value: object, path: Path, start: int) -> LazyTensor:
    try:
        entry = _parse_entry(value)
        nbytes = STORED_TYPES[entry.dtype].nbytes(entry.shape)
        if entry.end - entry.begin != nbytes:
            what = f"{entry.dtype} {list(entry.shape)}"
            raise CheckpointError(f"{entry.end - entry.begin} bytes, but {what} takes {nbytes}")
    except CheckpointError as error:
        raise CheckpointError(f"tensor {key!r}: {error}") from None
    return LazyTensor(key, entry.dtype, entry.shape, path, start + entry.begin, nbytes)


def _gaps(tensors: list[LazyTensor], start: int, size: int) -> list[str]:
    """Bytes that belong to no tensor, which the format forbids; the tensors are in the order of their bytes."""
    ends = [start, *(tensor.offset + tensor.nbytes for tensor in tensors)]
    begins = [*(tensor.offset for tensor in tensors), size]
    return [
        f"{begin - end} bytes at {end} belong to no tensor"
        for end, begin in zip(ends, begins, strict=True)
        if begin > end
    ]


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index.name!r} has no weight_map of tensor names to file names")
    return weight_map


def _index_problems(index: str, weight_map: dict[str, str], shards: dict[str, dict[str, LazyTensor]]) -> list[str]:
    """Where the index and the shards that could be read contradict each other."""
    times = Counter(chain.from_iterable(shards.values()))
    twice = sorted(key for key, count in times.items() if count > 1)
    problems = [f"tensors in more than one shard: {listed(twice)}"] if twice else []
    for name, tensors in shards.items():
        mapped = {key for key, shard in weight_map.items() if shard == name}
        if absent := sorted(mapped - set(tensors)):
            problems.append(f"{index!r} says {name!r} holds {listed(absent)}, but it does not")
        if stray := sorted(set(tensors) - mapped - set(twice)):
            problems.append(f"{name!r} holds {listed(stray)}, but {index!r} does not say so")
    return problems
