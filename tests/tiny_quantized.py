"""The tiny llama as quantizers write it: GPTQ and AWQ in words packed here, GGUF and NF4 by the packages' own means."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, dequantize, quantize

from export.packed_tensor import AWQ, Packing
from tests import tiny_llama
from tests.tiny_llama import Tensors

GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
BNB_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LINEAR = ("_proj.weight",)


def save_packed(
    folder: Path, packing: Packing, group: int, symmetric: bool = False, act_order: bool = False
) -> Tensors:
    """A GPTQ or AWQ folder of the tiny llama's linear layers; returns the weights that it stands for."""
    rng = np.random.default_rng(5)
    stored, meant = {}, {}
    orders: dict[int, np.ndarray] = {}
    for key, weight in tiny_llama.tensors().items():
        if not key.endswith(LINEAR):
            stored[key] = meant[key] = weight
            continue
        group_of = np.arange(weight.shape[1]) // group
        if act_order:  # layers with the same input have the same order
            group_of = orders.setdefault(weight.shape[1], rng.permutation(group_of))
        codes, zeros, scales = rounded(weight, group_of, packing.bits, symmetric)
        stem = key.removesuffix(".weight")
        parts = packed_parts(codes, zeros, scales, packing)
        if act_order:
            parts["g_idx"] = group_of.astype(np.int32)
        stored |= {f"{stem}.{name}": np.ascontiguousarray(part) for name, part in parts.items()}
        less_zero = codes.astype(np.float32) - zeros.astype(np.float32)[:, group_of]
        meant[key] = less_zero * scales.astype(np.float32)[:, group_of]
    tiny_llama.save(folder, stored, quantization_config=config(packing, group))
    return meant


def config(packing: Packing, group: int) -> Mapping[str, object]:
    if packing is AWQ:
        return AWQ_CONFIG | {"group_size": group}
    version = {"checkpoint_format": "gptq" if packing.stored_less else "gptq_v2"}
    return GPTQ_CONFIG | version | {"bits": packing.bits, "group_size": group}


def rounded(
    weight: np.ndarray, group_of: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [rows, columns], zeros and scales [rows, groups] of round to nearest; zeros are at least 1."""
    groups = [weight[:, group_of == group] for group in range(group_of.max() + 1)]
    low = np.stack([np.minimum(part.min(1), 0) for part in groups], 1)
    high = np.stack([np.maximum(part.max(1), 0) for part in groups], 1)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 1, 2**bits - 1)
    zeros = np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    codes = np.rint(weight / scales.astype(np.float32)[:, group_of]) + zeros[:, group_of]
    return np.clip(codes, 0, 2**bits - 1).astype(np.uint32), zeros.astype(np.uint32), scales


def packed_parts(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, packing: Packing) -> Tensors:
    """qweight, qzeros and scales of codes [rows, columns], zeros and scales [rows, groups], as a format packs them."""
    return {
        "qweight": into_words(codes.T, packing, 0 if packing.along == "columns" else 1),
        "qzeros": into_words(zeros.T - np.uint32(packing.stored_less), packing, 1),
        "scales": scales.T,
    }


def into_words(codes: np.ndarray, packing: Packing, axis: int) -> np.ndarray:
    """uint32 codes, packed along an axis into int32 words."""
    codes = np.moveaxis(codes, axis, -1)
    stretches = codes.reshape(*codes.shape[:-1], -1, packing.per_word)
    words = np.zeros(stretches.shape[:-1], np.uint32)
    for place, code in enumerate(packing.fields):
        words |= stretches[..., code] << np.uint32(place * packing.bits)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def save_gguf(path: Path, kinds: dict[str, str]) -> Tensors:
    """A GGUF file whose tensors have the types of the first ending of their key in `kinds`; returns what they mean."""
    chosen = {key: next((kinds[end] for end in kinds if key.endswith(end)), "F32") for key in tiny_llama.tensors()}
    weights = {key: values_of(weight, chosen[key]) for key, weight in tiny_llama.tensors().items()}
    tiny_llama.save_gguf(path, weights, {key: kind for key, kind in chosen.items() if kind != "F32"})
    return weights


def values_of(weight: np.ndarray, kind: str) -> np.ndarray:
    """What is left of a weight in a GGUF type."""
    if kind == "F32":
        return weight
    return dequantize(quantize(weight, GGMLQuantizationType[kind]), GGMLQuantizationType[kind])


def save_nf4(folder: Path) -> Tensors:
    """A bitsandbytes folder: NF4 in blocks of 64 with plain largest values, rounded here; returns what it means."""
    table = np.array(NF4, np.float32)
    stored, meant = {}, {}
    for key, weight in tiny_llama.tensors().items():
        if not key.endswith(LINEAR):
            stored[key] = meant[key] = weight
            continue
        blocks = weight.reshape(-1, 64)
        largest = np.abs(blocks).max(1)
        codes = np.abs((blocks / largest[:, None])[..., None] - table).argmin(-1).astype(np.uint8).reshape(-1, 2)
        state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)})
        stored |= {
            key: codes[:, :1] << 4 | codes[:, 1:],
            f"{key}.absmax": largest,
            f"{key}.quant_map": table,
            f"{key}.quant_state.bitsandbytes__nf4": np.frombuffer(state.encode(), np.uint8),
        }
        meant[key] = (table[codes.reshape(blocks.shape)] * largest[:, None]).reshape(weight.shape)
    tiny_llama.save(folder, stored, quantization_config=BNB_CONFIG)
    return meant


# Quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
