"""A bundle's text decoder as other programs take it: its shape, and its weights by the names that Llama has for them.

Nothing is rounded anew: a matrix comes as the codes and scales that the bundle holds, so that a comparison of speed is
one of the same weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant.affine import Quantized, dequantize
from quant.pack import Packed, unpack
from quant.rewrite import Model, open_graph, weights
from runtime.bundle import read_bundle
from runtime.errors import EdgeOmniError

Matrix = Quantized | NDArray[np.floating]
LAYER = "model.layers.{}.{}.weight"
CODES = (".codes", ".code_rows")  # as MatMulNBits and GatherBlockQuantized read them
PARTS = (*CODES, ".scales", ".zeros")


@dataclass(frozen=True)
class TextModel:
    """`interleaved`: rotary pairs lie side by side in a head, as GGUF has them; else half a head apart."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    context: int
    interleaved: bool
    tied: bool  # the head reads the embeddings
    matrices: dict[str, Matrix]

    @property
    def bits(self) -> int:
        """The fewest bits that a matrix of a layer is stored with; 32 for floats."""
        return min(matrix.bits if isinstance(matrix, Quantized) else 32 for matrix in self.matrices.values())

    @property
    def symmetric(self) -> bool:
        """Whether no matrix has zero points."""
        return not any(isinstance(matrix, Quantized) and matrix.zeros is not None for matrix in self.matrices.values())

    def projections(self) -> Iterator[tuple[int, str, Matrix]]:
        """(layer, name in Llama, matrix) of all matrices of the layers; the packed query, key and value come apart."""
        for layer in range(self.layers):
            packed = self.matrices[LAYER.format(layer, "self_attn.W_pack")]
            q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
            for name, start, rows in (("q_proj", 0, q), ("k_proj", q, kv), ("v_proj", q + kv, kv)):
                yield layer, f"self_attn.{name}", take_rows(packed, np.arange(start, start + rows))
            for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
                yield layer, name, self.matrices[LAYER.format(layer, name)]

    def norms(self) -> Iterator[tuple[int, str, NDArray[np.floating]]]:
        for layer in range(self.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield layer, name, floats(self.matrices[LAYER.format(layer, name)])


def read_text_model(bundle: Path) -> TextModel:
    """EdgeOmniError for a decoder that Llama's layers cannot express: with biases, or positions that count from 1."""
    manifest = read_bundle(bundle)
    matrices: dict[str, Matrix] = {}
    for name in ("embed_tokens", "decoder", "lm_head"):
        matrices |= read_matrices(open_graph(bundle / manifest.graphs[name].file))
    graph = open_graph(bundle / manifest.graphs["decoder"].file).graph
    attention = next(node for node in graph if node.op_type == "GroupQueryAttention").attributes
    cos, sin = (floats(matrices.pop(f"rotary.{name}")) for name in ("cos", "sin"))
    refuse(bundle, matrices, cos, sin)
    table, head = matrices["model.embed_tokens.weight"], matrices["lm_head.weight"]
    return TextModel(
        vocab_size=manifest.vocab_size,
        hidden_size=manifest.hidden_size,
        intermediate_size=rows_of(matrices[LAYER.format(0, "mlp.gate_proj")]),
        layers=manifest.cache.layers,
        heads=attention["num_heads"].as_int(),
        kv_heads=manifest.cache.kv_heads,
        head_dim=manifest.cache.head_dim,
        rope_theta=rope_theta(cos, sin),
        eps=next(node for node in graph if node.op_type == "SkipSimplifiedLayerNormalization")
        .attributes["epsilon"]
        .as_float(),
        context=len(cos),
        interleaved=bool(attention["rotary_interleaved"].as_int()),
        tied=same(table, head),
        matrices=matrices,
    )


def refuse(bundle: Path, matrices: dict[str, Matrix], cos: NDArray[np.floating], sin: NDArray[np.floating]) -> None:
    wrong = []
    if biases := [name for name in matrices if name.endswith(".bias")]:
        wrong.append(f"it has {len(biases)} biases, {biases[0]} for one")
    if not np.all(sin[0] == 0):
        wrong.append("its positions do not count from 0")
    elif not _is_plain(cos, sin):
        wrong.append("its rotary positions are scaled")
    if wrong:
        raise EdgeOmniError(f"{bundle} cannot be given to other programs as a Llama: {'; '.join(wrong)}")


def read_matrices(model: Model) -> dict[str, Matrix]:
    """Every initializer by its name, with codes and scales put together."""
    arrays = {weight.name: weight.rows(0, weight.shape[0]) for weight in weights(model) if weight.shape}
    whole: dict[str, Matrix] = {}
    for node in model.graph:
        for codes in (value.name for value in node.inputs if value is not None and value.name):
            if codes.endswith(CODES):
                name, bits = codes.rpartition(".")[0], node.attributes["bits"].as_int()
                packed, scales, zeros = (arrays.get(key) for key in (codes, f"{name}.scales", f"{name}.zeros"))
                assert packed is not None and scales is not None
                whole[name] = unpack(Packed(packed, scales.reshape(len(packed), -1), zeros), bits)
    whole.update({name: array for name, array in arrays.items() if not name.endswith(PARTS)})
    return whole


def rope_theta(cos: NDArray[np.floating], sin: NDArray[np.floating]) -> float:
    """The base of the rotary tables [positions, head_dim / 2]: pair i turns by base^(-2i / head_dim) a position.

    Tables are fp32, and bases are round: five digits of it are known.
    """
    half = cos.shape[1]
    angle = np.arctan2(np.float64(sin[1, 1]), np.float64(cos[1, 1])) if half > 1 else 1.0
    return float(f"{angle**-half:.5g}")


def _is_plain(cos: NDArray[np.floating], sin: NDArray[np.floating]) -> bool:
    """Whether every pair turns as the base alone has it."""
    half = cos.shape[1]
    angle = rope_theta(cos, sin) ** (-np.arange(half) / half)
    return np.allclose(cos[1], np.cos(angle), atol=1e-3) and np.allclose(sin[1], np.sin(angle), rtol=1e-2, atol=1e-9)


def rows_of(matrix: Matrix) -> int:
    return len(matrix.codes if isinstance(matrix, Quantized) else matrix)


def take_rows(matrix: Matrix, rows: NDArray[np.integer]) -> Matrix:
    if not isinstance(matrix, Quantized):
        return matrix[rows]
    zeros = None if matrix.zeros is None else matrix.zeros[rows]
    return Quantized(matrix.codes[rows], matrix.scales[rows], zeros, matrix.bits)


def floats(matrix: Matrix) -> NDArray[np.floating]:
    return dequantize(matrix) if isinstance(matrix, Quantized) else matrix


def same(one: Matrix, other: Matrix) -> bool:
    if isinstance(one, Quantized) and isinstance(other, Quantized):
        return one.bits == other.bits and np.array_equal(one.codes, other.codes)
    return not isinstance(one, Quantized) and not isinstance(other, Quantized) and np.array_equal(one, other)


def side_by_side(rows: int, head_dim: int) -> NDArray[np.integer]:
    """The order of rows in which rotary pairs that lie half a head apart come to lie side by side."""
    return np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).ravel()


def half_apart(rows: int, head_dim: int) -> NDArray[np.integer]:
    """The inverse of `side_by_side`."""
    return np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).ravel()
