"""The program inside a torch file, run by a machine that can build nothing but views of storages.

A pickle is a program that may call anything. This one is never given to `pickle`: the standard library's
`pickletools` only splits it into instructions, and the machine below knows those that a saved state dict needs. It
calls nothing and imports nothing; the three names that it knows become inert markers, every other name is refused.
"""

import pickletools
from dataclasses import dataclass
from typing import Any, TypeGuard

from runtime.errors import CheckpointError

STORAGE_TYPES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
ORDERED_DICT = "collections.OrderedDict"

_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of `numel` values of one type (a name of STORED_TYPES) in the archive's member `data/<key>`."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class StorageView:
    """A tensor: `shape` and `strides` (in values) over a storage from value `offset` on; no bounds are checked yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """A global that the program named; it stands for itself and cannot be called."""

    name: str


def read_state_dict(program: bytes) -> dict[str, object]:
    """The dict that the program builds; a tensor in it is a StorageView.

    Raises CheckpointError that names the first global or instruction that no state dict of tensors needs. Nothing
    that the program asks for is imported or called, before that or after.
    """
    try:
        result = _Machine().run(program)
    except (IndexError, KeyError, ValueError, TypeError) as error:  # of pickletools, or from an empty stack or memo
        raise CheckpointError(f"its pickle is malformed: {error}") from None
    if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
        raise CheckpointError("its pickle holds no dict of tensor names")
    return result


class _Machine:
    """Stack, memo and marks (heights of the stack) of one run of a pickle program."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> object:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("it ends without STOP")

    def step(self, instruction: str, argument: Any) -> None:
        match instruction:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case _ if instruction in _LITERALS:
                self.stack.append(argument)
            case _ if instruction in _CONSTANTS:
                self.stack.append(_CONSTANTS[instruction])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "EMPTY_DICT" | "SETITEM" | "SETITEMS":
                self.build_dict(instruction)
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.pop(_TUPLES.get(instruction))))
            case _:
                self.refer(instruction, argument)

    def refer(self, instruction: str, argument: Any) -> None:
        """The instructions by which a pickle reaches out of itself."""
        match instruction:
            case "GLOBAL":
                self.stack.append(_named(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                self.stack.append(_named(".".join(self.pop(2))))
            case "BINPERSID":
                self.stack.append(_storage(*self.stack.pop()))
            case "REDUCE":
                function, arguments = self.pop(2)
                self.stack.append(_apply(function, arguments))
            case "BUILD":  # the attributes of an OrderedDict: torch keeps its module versions there
                self.stack.pop()
                if not isinstance(self.stack[-1], dict):
                    raise CheckpointError("its pickle sets attributes of something that is no dict")
            case _:
                raise CheckpointError(f"its pickle uses the instruction {instruction}, which no state dict needs")

    def pop(self, count: int | None) -> list[Any]:
        """The last `count` values of the stack, or those since the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if not 0 <= start <= len(self.stack):
            raise IndexError("it takes more values than it made")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def build_dict(self, instruction: str) -> None:
        if instruction == "EMPTY_DICT":
            self.stack.append({})
            return
        pairs = self.pop(2 if instruction == "SETITEM" else None)
        keys, values = pairs[::2], pairs[1::2]
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError("its pickle fills something that is no dict of names")
        self.stack[-1].update(zip(keys, values, strict=True))


def _named(name: str) -> _Name:
    if name not in STORAGE_TYPES and name not in (REBUILD_TENSOR, ORDERED_DICT):
        raise CheckpointError(
            f"its pickle asks for {name!r}, which no tensor needs: refused, and nothing of it was run. "
            "Save a plain state dict, best as safetensors"
        )
    return _Name(name)


def _storage(tag: object, kind: object, key: object, _location: object, numel: object) -> Storage:
    if tag != "storage" or not isinstance(kind, _Name) or kind.name not in STORAGE_TYPES:
        raise CheckpointError("its pickle refers to something outside itself that is no storage")
    if not isinstance(key, str) or type(numel) is not int:
        raise CheckpointError("its pickle names a storage without key or size")
    return Storage(STORAGE_TYPES[kind.name], key, numel)


def _apply(function: object, arguments: object) -> object:
    """What stands in for a call; the only two functions there are."""
    name = function.name if isinstance(function, _Name) else None
    if name == ORDERED_DICT and isinstance(arguments, tuple) and not arguments:
        return {}
    if name == REBUILD_TENSOR and isinstance(arguments, tuple):
        return _rebuild_tensor(*arguments)
    raise CheckpointError(f"its pickle calls {name or type(function).__name__!r} in a way that no tensor needs")


def _rebuild_tensor(
    storage: object, offset: object, shape: object, strides: object, _grad: object, _hooks: object, flags: object = None
) -> StorageView:
    if not isinstance(storage, Storage):
        raise CheckpointError("its pickle builds a tensor of something that is no storage")
    if type(offset) is not int or not _are_whole(shape) or not _are_whole(strides):
        raise CheckpointError("its pickle builds a tensor whose offset, shape or strides are no whole numbers")
    if flags:
        raise CheckpointError("its pickle holds a lazily conjugated or negated tensor; save it after `.resolve_neg()`")
    return StorageView(storage, offset, shape, strides)


def _are_whole(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(type(item) is int for item in value)
