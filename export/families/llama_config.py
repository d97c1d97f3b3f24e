"""A Llama, Qwen2 or Qwen3 checkpoint's dimensions, from config.json or GGUF metadata, held against its tensors.

Nothing is built from a number before it has been found to be one, within bounds, and that of the tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from export.checkpoint import Checkpoint
from export.config import READ, Base, Count, DecoderConfig, Layers, Positions, Real, parse
from export.families.llama_settings import CONFIG, layer_windows, refuse_gguf, refuse_others
from export.lazy_tensor import LazyTensor
from export.problems import refuse
from export.rotary import RotaryScaling, base_frequencies, read_scaling, scaled
from runtime.errors import CheckpointError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
# What transformers takes where config.json says nothing.
DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
HEAD_NORMS = {"qwen3"}  # architectures that normalise queries and keys head by head
ROPE_THETA = 10000.0
# llama.cpp stores the queries and keys of "llama" with their rows permuted, so that rotary pairs lie side by side.
GGUF_INTERLEAVED = {"llama"}
GGUF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
# As RotaryScaling calls what a GGUF states under rope.scaling.
GGUF_SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
EMBEDDINGS, HEAD, FREQUENCIES = "model.embed_tokens.weight", "lm_head.weight", "rope_freqs.weight"

Tensors = Mapping[str, LazyTensor]


def with_table(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """A folder's tensors; the one table of a tied model may have been saved under its head's name alone."""
    tensors = dict(checkpoint)
    if checkpoint.config.get("tie_word_embeddings") is True and EMBEDDINGS not in tensors and HEAD in tensors:
        tensors[EMBEDDINGS] = replace(tensors.pop(HEAD), key=EMBEDDINGS)
    return tensors


@dataclass(frozen=True, config=READ)
class Dimensions:
    """What the files state, spelled as config.json spells it."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    rms_norm_eps: Annotated[Real, Field(le=1)]
    max_position_embeddings: Positions
    rope_theta: Base
    num_key_value_heads: Count | None = None  # as many as heads
    head_dim: Count | None = None  # hidden_size / num_attention_heads
    tie_word_embeddings: Annotated[bool, Field(strict=True)] | None = None


def architecture(checkpoint: Checkpoint) -> str | None:
    """Which of the known decoders the files name; None for another, or none. A GGUF's metadata counts for itself."""
    if checkpoint.kind == "gguf":
        named = checkpoint.metadata.get("general.architecture")
        return named if isinstance(named, str) and named in ARCHITECTURES.values() else None
    known = [ARCHITECTURES[name] for name in checkpoint.architectures if name in ARCHITECTURES]
    model_type = checkpoint.config.get("model_type")
    if not checkpoint.architectures and model_type in list(ARCHITECTURES.values()):
        return str(model_type)
    return known[0] if known else None


def hf_config(checkpoint: Checkpoint, tensors: Tensors, kind: str) -> DecoderConfig:
    """config.json of the architecture `kind` as a DecoderConfig; what the graphs do not compute is refused."""
    fields, where = dict(checkpoint.config), f"{checkpoint.folder}/config.json"
    rope = _rope_parameters(fields, where)
    refuse_others(fields, CONFIG, where)
    if kind != "qwen2" and not fields.get("attention_bias") and _has_bias(tensors):
        raise CheckpointError(
            f"{where} has no attention_bias, but the tensors have q_proj.bias: expected true, or none"
        )
    stated = {**DEFAULTS[kind], **fields}
    # Where a file says both, transformers takes what stands among the rotary parameters.
    stated["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", ROPE_THETA))
    read = parse(Dimensions, stated, where)
    scaling = read_scaling(rope, read.max_position_embeddings, where)
    refuse(where, list(_contradictions(read, tensors, {})))
    windows = layer_windows(stated, kind != "llama", where)
    return _rotated(replace(_decoder(read, tensors, kind), windows=windows), scaling)


def gguf_config(checkpoint: Checkpoint, tensors: Tensors, kind: str) -> DecoderConfig:
    """As `hf_config`, of a GGUF's metadata."""
    metadata, where = checkpoint.metadata, "the GGUF's metadata"
    spelled = {field: f"{kind}.{key}" for field, key in GGUF_FIELDS.items()}
    stated = {field: metadata[key] for field, key in spelled.items() if key in metadata}
    table = tensors.get(EMBEDDINGS)
    if table is not None and table.shape:
        stated["vocab_size"] = table.shape[0]
    read = parse(Dimensions, {"rope_theta": ROPE_THETA} | stated, where, spelled)
    scaling = _gguf_scaling(metadata, kind, read, where)
    refuse(where, list(_contradictions(read, tensors, spelled)))
    config = replace(_decoder(read, tensors, kind), rope_interleaved=kind in GGUF_INTERLEAVED)
    refuse_gguf(metadata, kind, config.head_dim, config.max_position_embeddings)
    return _rotated(config, scaling, tensors.get(FREQUENCIES))


def _rope_parameters(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What config.json says of rotary positions, under its older key or its newer one."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(key)
    if rope is not None and not isinstance(rope, dict):
        raise CheckpointError(f"{where}: {key} is {rope!r}, expected an object with a rope_type, or none")
    rope = rope or {}
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise CheckpointError(f"{where}: {key} differs by kinds of layers ({', '.join(nested)}), which is not built")
    refuse_others(rope, {"partial_rotary_factor": (None, 1)}, f"{where}, {key}")
    return rope


def _gguf_scaling(metadata: Mapping[str, Any], kind: str, read: Dimensions, where: str) -> RotaryScaling:
    """llama.cpp takes a factor without a type for a linear one; the oldest files have it as scale_linear."""
    start = f"{kind}.rope.scaling."
    stated = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
    named = {ours: stated[theirs] for theirs, ours in GGUF_SCALING.items() if theirs in stated}
    factor = named.get("factor") or metadata.get(f"{kind}.rope.scale_linear") or 1.0
    scaling = stated.get("type", "linear")
    named |= {"factor": factor, "rope_type": "default" if scaling == "none" else scaling}
    return read_scaling(named, read.max_position_embeddings, f"{where}, {start}*")


def _rotated(config: DecoderConfig, scaling: RotaryScaling, divisors: LazyTensor | None = None) -> DecoderConfig:
    """The config with the frequencies of a scaled rotation; `divisors` [head_dim / 2] slow each pair by its own."""
    if scaling.rope_type in ("default", "dynamic") and divisors is None:
        return config
    frequencies = base_frequencies(config.rope_theta, config.head_dim)
    if divisors is not None:
        frequencies = (frequencies / _divisors(divisors, len(frequencies))).astype(np.float32)
    rotation = scaled(frequencies, scaling, config.rope_theta)
    return replace(config, rope_frequencies=tuple(rotation.frequencies.tolist()), rope_length=rotation.length)


def _divisors(tensor: LazyTensor, pairs: int) -> np.ndarray:
    if tensor.shape != (pairs,):
        raise CheckpointError(f"{tensor.key} is {list(tensor.shape)}, expected one value for each of {pairs} pairs")
    values = tensor.read().astype(np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise CheckpointError(f"{tensor.key} holds {values.min()} to {values.max()}, expected positive numbers")
    return values


def _contradictions(read: Dimensions, tensors: Tensors, spelled: Mapping[str, str]) -> Iterator[str]:
    """Dimensions that are not those of the first layer's tensors, before anything is built from them."""
    heads, head_dim = read.num_attention_heads, _head_dim(read)
    kv_heads = read.num_key_value_heads or heads
    layers = {key.split(".")[2] for key in tensors if key.startswith("model.layers.")}
    if not head_dim:
        yield f"hidden_size is {read.hidden_size}, which {heads} heads cannot share: expected a head_dim"
    if read.num_hidden_layers > len(layers):
        name = spelled.get("num_hidden_layers", "num_hidden_layers")
        missing = f"missing: model.layers.{len(layers)}.*"
        yield f"{name} is {read.num_hidden_layers}, but there are tensors of {len(layers)} layers ({missing})"
    first = "model.layers.0"
    for key, axis, size, names in (
        (EMBEDDINGS, 0, read.vocab_size, ("vocab_size",)),
        (EMBEDDINGS, 1, read.hidden_size, ("hidden_size",)),
        (f"{first}.mlp.gate_proj.weight", 0, read.intermediate_size, ("intermediate_size",)),
        (f"{first}.self_attn.q_proj.weight", 0, heads * head_dim, ("num_attention_heads", "head_dim")),
        (f"{first}.self_attn.k_proj.weight", 0, kv_heads * head_dim, ("num_key_value_heads", "head_dim")),
    ):
        shape = tensors[key].shape if key in tensors else ()
        if head_dim and len(shape) == 2 and shape[axis] != size:
            product = " * ".join(spelled.get(name, name) for name in names)
            yield f"{product} is {size}, but {key} is {list(shape)}: expected {shape[axis]}"
            if "head_dim" in names:  # the keys' would often be the same mistake
                return


def _head_dim(read: Dimensions) -> int:
    return read.head_dim or read.hidden_size // read.num_attention_heads


def _decoder(read: Dimensions, tensors: Tensors, kind: str) -> DecoderConfig:
    """Whether there is a bias and a head of its own is seen from the tensors."""
    head, table = tensors.get(HEAD), tensors.get(EMBEDDINGS)
    tied = head is None or (bool(read.tie_word_embeddings) and (table is None or _equal(head, table)))
    return DecoderConfig(
        vocab_size=read.vocab_size,
        hidden_size=read.hidden_size,
        intermediate_size=read.intermediate_size,
        num_hidden_layers=read.num_hidden_layers,
        num_attention_heads=read.num_attention_heads,
        num_key_value_heads=read.num_key_value_heads or read.num_attention_heads,
        head_dim=_head_dim(read),
        rope_theta=read.rope_theta,
        rms_norm_eps=read.rms_norm_eps,
        max_position_embeddings=read.max_position_embeddings,
        attention_qkv_bias=_has_bias(tensors),
        tie_word_embeddings=tied,
        head_norms=kind in HEAD_NORMS,
    )


def _has_bias(tensors: Tensors) -> bool:
    return "model.layers.0.self_attn.q_proj.bias" in tensors


TABLE_STEP = 4096  # rows that are compared at once


def _equal(head: LazyTensor, table: LazyTensor) -> bool:
    """Whether a head that config.json calls tied is the embedding table; where both are stored and differ, it is not.

    transformers decides so too, from version 5 on.
    """
    if head.shape != table.shape:
        return False
    spans = [(at, min(at + TABLE_STEP, head.shape[0])) for at in range(0, head.shape[0], TABLE_STEP)]
    return all(np.array_equal(head.rows(*span), table.rows(*span)) for span in spans)
