"""A bundle's text decoder as a GGUF file for llama.cpp, with the bundle's own codes: `python -m apps.bench.gguf_file`.

A 4-bit matrix becomes Q4_0 or Q4_1, an 8-bit one Q8_0. Their codes stay as they are, only the scales are rounded to
fp16, which is all that these blocks of 32 hold; a larger group repeats its scale.
"""

import sys
from pathlib import Path
from typing import Literal, get_args

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from apps.bench.model import Matrix, TextModel, read_text_model, side_by_side, take_rows
from quant.affine import Quantized, middle
from runtime.errors import EdgeOmniError

FourBits = Literal["Q4_0", "Q4_1"]
BLOCK = 32
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: TextModel, path: Path, four_bits: FourBits = "Q4_0") -> None:
    """EdgeOmniError where a matrix fits no block: groups not of a multiple of 32, zero points in Q4_0, 2 bits."""
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, model)
    for layer, name, matrix in model.projections():
        if name in ("self_attn.q_proj", "self_attn.k_proj") and not model.interleaved:
            matrix = take_rows(matrix, side_by_side(len(rows(matrix)), model.head_dim))
        add(writer, f"blk.{layer}.{NAMES[name]}.weight", matrix, four_bits)
    for layer, name, weight in model.norms():
        add(writer, f"blk.{layer}.{NAMES[name]}.weight", weight, four_bits)
    add(writer, "token_embd.weight", model.matrices["model.embed_tokens.weight"], four_bits)
    add(writer, "output_norm.weight", model.matrices["model.norm.weight"], four_bits)
    if not model.tied:
        add(writer, "output.weight", model.matrices["lm_head.weight"], four_bits)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


def describe(writer: gguf.GGUFWriter, model: TextModel) -> None:
    """Llama's dimensions, and no vocabulary: the comparison speaks in token ids."""
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def rows(matrix: Matrix) -> NDArray:
    return matrix.codes if isinstance(matrix, Quantized) else matrix


def add(writer: gguf.GGUFWriter, name: str, matrix: Matrix, four_bits: FourBits) -> None:
    if not isinstance(matrix, Quantized):
        writer.add_tensor(name, np.ascontiguousarray(matrix, np.float32))
        return
    try:
        blocks, kind = q8_0(matrix) if matrix.bits == 8 else q4(matrix, four_bits)
    except EdgeOmniError as error:
        raise EdgeOmniError(f"{name}: {error}") from None
    writer.add_tensor(name, blocks, raw_dtype=kind)


def q4(matrix: Quantized, kind: FourBits) -> tuple[NDArray[np.uint8], Type]:
    """[rows, bytes of a row] in blocks of a scale, in Q4_1 what code 0 stands for, and 32 codes, halves interleaved."""
    if matrix.bits != 4 or (kind == "Q4_0" and matrix.zeros is not None):
        found = f"{matrix.bits} bits" + ("" if matrix.zeros is None else " with zero points")
        raise EdgeOmniError(f"{kind} holds 4 bits" + (" around 0" if kind == "Q4_0" else "") + f", this is {found}")
    codes, scales, zeros = in_blocks(matrix)
    heads = [scales] if kind == "Q4_0" else [scales, -zeros * scales]
    together = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << np.uint8(4)
    return blocks(heads, together), Type[kind]


def q8_0(matrix: Quantized) -> tuple[NDArray[np.uint8], Type]:
    """[rows, bytes of a row] in blocks of a scale and 32 signed codes."""
    if matrix.zeros is not None:
        raise EdgeOmniError("Q8_0 holds 8 bits around 0, this has zero points")
    codes, scales, _ = in_blocks(matrix)
    return blocks([scales], codes ^ np.uint8(0x80)), Type.Q8_0


def in_blocks(matrix: Quantized) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """codes [rows, blocks, 32]; scales and zeros [rows, blocks, 1]."""
    size = matrix.codes.shape[1] // matrix.scales.shape[1]
    if size % BLOCK:
        raise EdgeOmniError(f"groups of {size} do not fill blocks of {BLOCK}")
    scales = np.repeat(matrix.scales.astype(np.float32), size // BLOCK, axis=1)[..., None]
    zeros = np.full_like(scales, middle(matrix.bits))
    if matrix.zeros is not None:
        zeros = np.repeat(matrix.zeros.astype(np.float32), size // BLOCK, axis=1)[..., None]
    return matrix.codes.reshape(len(matrix.codes), -1, BLOCK), scales, zeros


def blocks(heads: list[NDArray[np.float32]], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each block's fp16 numbers before its codes; [rows, blocks, *] to [rows, bytes]."""
    parts = [head.astype("<f2").view(np.uint8) for head in heads]
    return np.concatenate([*parts, codes], axis=2).reshape(len(codes), -1)


def write(bundle: Path, path: Path, four_bits: FourBits = "Q4_0") -> None:
    write_gguf(read_text_model(bundle), path, four_bits)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[3] not in get_args(FourBits):
        sys.exit("python -m apps.bench.gguf_file BUNDLE FILE.gguf Q4_0|Q4_1")
    source, target, chosen = sys.argv[1:]
    write(Path(source), Path(target), "Q4_1" if chosen == "Q4_1" else "Q4_0")
