"""A torch file (`torch.save`, zip format) as LazyTensors, without torch and without unpickling.

Layout of the archive: `<root>/data.pkl` is the pickled state dict, `<root>/data/<n>` the storages, `<root>/byteorder`
says little or big. All members are stored, not compressed, so a storage's bytes can be read where they lie.
"""

import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from export.files import file_size, read_bytes
from export.lazy_tensor import STORED_TYPES, LazyTensor, checked_shape, is_size, span
from export.problems import gathering, refuse
from export.torch_pickle import StorageView, read_state_dict
from runtime.errors import CheckpointError

MAX_PICKLE_BYTES = 16 << 20  # the names and shapes of a hundred thousand tensors
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # what torch wrote before 1.6
# What zipfile raises for damaged files; NotImplementedError is its word for a compression that it does not know.
_BROKEN_ZIP = (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error, OverflowError)


@dataclass(frozen=True)
class _Member:
    """The bytes of one stored member of the archive."""

    offset: int
    nbytes: int


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """All tensors of a saved state dict by key; only their places are read.

    Raises CheckpointError for a file that is no torch zip archive, that is truncated or compressed, whose pickle asks
    for anything but tensors, or whose tensors lie outside their storages (all of those at once).
    """
    members = _read_members(path)
    with_root = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(with_root) != 1:
        raise CheckpointError(f"{path.name!r} holds {len(with_root)} data.pkl, expected one: it is no torch file")
    root = with_root[0].removesuffix("data.pkl")
    _check_byteorder(path, members.get(f"{root}byteorder"))
    state = _read_pickle(path, members[f"{root}data.pkl"])
    problems: list[str] = []
    tensors: dict[str, LazyTensor] = {}
    for key, value in state.items():
        with gathering(problems):
            tensors[key] = _tensor(key, value, path, root, members)
    refuse(repr(path.name), problems)
    return tensors


def _read_members(path: Path) -> dict[str, _Member]:
    """Place and size of every member, by name."""
    size = file_size(path)
    if read_bytes(path, 0, min(size, len(LEGACY_MAGIC))).tobytes() == LEGACY_MAGIC:
        raise CheckpointError(f"{path.name!r} is in the torch format from before 1.6. {_conversion(path)}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries, end = archive.infolist(), archive.start_dir
    except _BROKEN_ZIP as error:
        found = f"{path.name!r} ({size} bytes)"
        raise CheckpointError(f"{found} is truncated or no torch file: {error}. Download it again") from None
    problems: list[str] = []
    members: dict[str, _Member] = {}
    for entry in entries:
        with gathering(problems):
            if entry.filename in members:
                raise CheckpointError(f"member {entry.filename!r} is there twice")
            members[entry.filename] = _member(path, entry, end)
    refuse(repr(path.name), problems)
    return members


def _conversion(path: Path) -> str:
    name, target = path.name, path.with_suffix(".safetensors").name
    return (
        "Where torch is installed, convert it once: python -c "
        f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{name}', weights_only=True), '{target}')\""
    )


def _member(path: Path, entry: zipfile.ZipInfo, end: int) -> _Member:
    """Where a member's bytes lie: behind its local header, whose length only that header knows."""
    name = entry.filename
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise CheckpointError(f"member {name!r} is compressed or encrypted; torch stores its members as they are")
    if not 0 <= entry.header_offset <= end - LOCAL_HEADER.size:
        raise CheckpointError(f"member {name!r} lies outside the file")
    signature, name_length, extra_length = LOCAL_HEADER.unpack(
        read_bytes(path, entry.header_offset, LOCAL_HEADER.size).tobytes()
    )
    offset = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04" or offset + entry.file_size > end:
        raise CheckpointError(f"member {name!r} is damaged or reaches past the end of the data")
    return _Member(offset, entry.file_size)


def _check_byteorder(path: Path, member: _Member | None) -> None:
    """Files of older versions do not say their byte order; they are little endian in practice."""
    if member is not None and (order := read_bytes(path, member.offset, min(member.nbytes, 16)).tobytes()) != b"little":
        raise CheckpointError(f"{path.name!r} has byte order {order!r}, expected little. {_conversion(path)}")


def _read_pickle(path: Path, member: _Member) -> dict[str, object]:
    if member.nbytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path.name!r}: its pickle has {member.nbytes} bytes, at most {MAX_PICKLE_BYTES} expected"
        )
    try:
        return read_state_dict(read_bytes(path, member.offset, member.nbytes).tobytes())
    except CheckpointError as error:
        raise CheckpointError(f"{path.name!r}: {error}") from None


def _tensor(key: str, value: object, path: Path, root: str, members: dict[str, _Member]) -> LazyTensor:
    try:
        if not isinstance(value, StorageView):
            raise CheckpointError(f"is a {type(value).__name__}, expected a tensor")
        storage = value.storage
        member = members.get(f"{root}data/{storage.key}")
        itemsize = STORED_TYPES[storage.dtype].block_bytes
        if member is None:
            raise CheckpointError(f"its storage {storage.key!r} is missing from the file")
        if member.nbytes != storage.numel * itemsize:
            needed = storage.numel * itemsize
            raise CheckpointError(f"its storage {storage.key!r} has {member.nbytes} bytes, expected {needed}")
        return _place(key, value, path, member.offset)
    except CheckpointError as error:
        raise CheckpointError(f"tensor {key!r}: {error}") from None


def _place(key: str, view: StorageView, path: Path, start: int) -> LazyTensor:
    """The view's bytes in the file; CheckpointError unless it lies in its storage and names no value twice."""
    shape, strides, offset = checked_shape(view.shape), checked_shape(view.strides), view.offset
    stored = STORED_TYPES[view.storage.dtype]
    nbytes = stored.nbytes(shape)
    if len(strides) != len(shape) or not is_size(offset):
        raise CheckpointError(f"strides {list(strides)} and offset {offset} do not fit shape {list(shape)}")
    reach = span(shape, strides)
    if offset + reach > view.storage.numel:
        raise CheckpointError(f"ends at value {offset + reach} of a storage of {view.storage.numel}")
    if math.prod(shape) > reach:
        raise CheckpointError(f"strides {list(strides)} name values of shape {list(shape)} more than once")
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    at = start + offset * stored.block_bytes
    if _is_contiguous(shape, strides):
        return LazyTensor(key, view.storage.dtype, shape, path, at, nbytes)
    return LazyTensor(key, view.storage.dtype, shape, path, at, reach * stored.block_bytes, strides)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
