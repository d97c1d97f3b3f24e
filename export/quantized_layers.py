"""The quantized layers of a checkpoint, as its quantization_config describes them, put together under `….weight`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.files import read_json_object
from export.lazy_tensor import LazyTensor
from export.nf4_tensor import KINDS, PARTS, STATE, nf4_tensor
from export.packed_tensor import AWQ, Packing, gptq, packed_tensor
from export.problems import gathering, listed, refuse
from runtime.errors import CheckpointError

KEY = "quantization_config"
OLDER = "quantize_config.json"  # where AutoGPTQ wrote it before transformers knew it
PACKED_PARTS = ("qweight", "qzeros", "scales", "g_idx")
GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}
METHODS = ("gptq", "awq", "bitsandbytes")

Tensors = dict[str, LazyTensor]


@dataclass(frozen=True)
class Packed:
    """GPTQ or AWQ: how its words are packed, and the columns of a group; None: all of a row."""

    packing: Packing
    group_size: int | None


def assembled(tensors: Tensors, config: Mapping[str, Any], folder: Path) -> Tensors:
    """The tensors of a checkpoint with those that make up one quantized matrix replaced by that matrix.

    CheckpointError says everything that is wrong: a method or layout that is not read, settings that are no such,
    layers whose parts are missing or do not fit each other.
    """
    stated = _stated(config, folder)
    method = None if stated is None else str(stated.get("quant_method", stated.get("method", "gptq"))).lower()
    words = {key for key in tensors if key.endswith(".qweight")}
    states = {key for key in tensors if STATE in key}
    if method is None and (words or states):
        raise CheckpointError(f"config.json has no {KEY}, but there are quantized tensors: {listed(words | states, 2)}")
    if stated is None:
        return tensors
    if method == "bitsandbytes":
        refuse(KEY, list(_bitsandbytes_problems(stated)))
        return _with_nf4(tensors, states)
    if method not in ("gptq", "awq"):
        raise CheckpointError(f"{KEY} has quant_method {method!r}, which is not read; expected {', '.join(METHODS)}")
    return _with_packed(tensors, words, _read_gptq(stated) if method == "gptq" else _read_awq(stated))


def _stated(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    stated = config.get(KEY)
    if stated is None and (folder / OLDER).is_file():
        return read_json_object(folder / OLDER)
    if stated is not None and not isinstance(stated, dict):
        raise CheckpointError(f"{KEY} is {stated!r}, expected an object")
    return stated


def _read_gptq(stated: dict[str, Any]) -> Packed:
    bits: Any = stated.get("bits")
    size = stated.get("group_size")
    form = stated.get("checkpoint_format", stated.get("format", "gptq"))
    problems = list(_group_problems(size))
    if bits not in (2, 4, 8):
        problems.append(f"bits is {bits!r}, expected 2, 4 or 8")
    if form not in GPTQ_VERSIONS:
        problems.append(f"checkpoint_format is {form!r}, expected {' or '.join(GPTQ_VERSIONS)}")
    if stated.get("pack_dtype", "int32") != "int32":
        problems.append(f"pack_dtype is {stated['pack_dtype']!r}, expected 'int32'")
    different = [pattern for pattern in stated.get("dynamic") or {} if not pattern.startswith("-:")]
    if different:
        problems.append(f"dynamic gives {listed(different)} settings of their own, expected the same for all layers")
    refuse(f"{KEY} (GPTQ)", problems)
    return Packed(gptq(bits, 1 if form == "gptq" else 2), _group_size(size))


def _read_awq(stated: dict[str, Any]) -> Packed:
    bits, size = stated.get("bits", stated.get("w_bit")), stated.get("group_size", stated.get("q_group_size"))
    problems = list(_group_problems(size))
    if bits != AWQ.bits:
        problems.append(f"bits is {bits!r}, expected 4")
    version = str(stated.get("version", stated.get("format", "gemm"))).lower()
    if version != "gemm":
        problems.append(f"version is {version!r}, expected 'gemm'")
    # Of zero_point the tensors tell: writers state false for symmetric layers and store their zeros all the same.
    refuse(f"{KEY} (AWQ)", problems)
    return Packed(AWQ, _group_size(size))


def _bitsandbytes_problems(stated: dict[str, Any]) -> Iterator[str]:
    if stated.get("load_in_8bit") or not stated.get("load_in_4bit"):
        yield "load_in_4bit is not set: of bitsandbytes' formats NF4 and FP4 are read, LLM.int8() is not"
    kind = stated.get("bnb_4bit_quant_type", "nf4")
    if kind not in KINDS:
        yield f"bnb_4bit_quant_type is {kind!r}, expected {' or '.join(KINDS)}"
    if stated.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        yield f"bnb_4bit_quant_storage is {stated['bnb_4bit_quant_storage']!r}, expected 'uint8'"


def _group_problems(size: object) -> Iterator[str]:
    if type(size) is not int or (size != -1 and size < 1):
        yield f"group_size is {size!r}, expected a number of columns, or -1 for all of a row"


def _group_size(size: Any) -> int | None:
    return None if size == -1 else size


def _with_packed(tensors: Tensors, words: set[str], method: Packed) -> Tensors:
    problems: list[str] = []
    stems = sorted(key.removesuffix(".qweight") for key in words)
    left = dict(tensors)
    for stem in stems:
        parts = {name: left.pop(f"{stem}.{name}") for name in PACKED_PARTS if f"{stem}.{name}" in left}
        with gathering(problems):
            left[f"{stem}.weight"] = packed_tensor(stem, parts, method.packing, method.group_size)
    refuse(f"layers of {method.packing.name}", problems)
    idle = _idle_biases(left, stems)
    return {key: tensor for key, tensor in left.items() if key not in idle}


def _idle_biases(tensors: Tensors, stems: list[str]) -> set[str]:
    """Biases of nothing but zeros, which older writers gave every layer; only where all layers of a name have such."""
    kinds: dict[str, list[str]] = {}
    for stem in stems:
        if f"{stem}.bias" in tensors:
            kinds.setdefault(stem.rpartition(".")[2], []).append(f"{stem}.bias")
    idle = [keys for keys in kinds.values() if not any(tensors[key].read().any() for key in keys)]
    return {key for keys in idle for key in keys}


def _with_nf4(tensors: Tensors, states: set[str]) -> Tensors:
    problems: list[str] = []
    left = dict(tensors)
    for name in sorted(states):
        key, _, kind = name.partition(STATE)
        state, codes = left.pop(name), left.pop(key, None)
        parts = {part: left.pop(f"{key}.{part}") for part in PARTS if f"{key}.{part}" in left}
        with gathering(problems):
            if codes is None or kind not in KINDS:
                raise CheckpointError(f"{name!r} describes {kind!r} codes in {key!r}, expected {' or '.join(KINDS)}")
            left[key] = nf4_tensor(key, kind, codes, parts, state)
    refuse("layers of bitsandbytes", problems)
    return left
