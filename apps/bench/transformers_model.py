"""A bundle's text decoder as a Llama of transformers, its weights dequantized."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

from apps.bench.model import TextModel, floats, half_apart, read_text_model


def load(bundle: Path, dtype: torch.dtype) -> Any:
    """The model, ready to run on the CPU; EdgeOmniError for a decoder that is no Llama."""
    model = read_text_model(bundle)
    network = LlamaForCausalLM(llama_config(model)).to(dtype)
    weights = {name: torch.tensor(array) for name, array in state(model).items()}
    network.load_state_dict(weights, strict=True)
    return network.eval()


def llama_config(model: TextModel) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        rope_theta=model.rope_theta,  # before version 5
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.eps,
        max_position_embeddings=model.context,
        tie_word_embeddings=model.tied,
    )


def state(model: TextModel) -> dict[str, Any]:
    """Every parameter by its key; rotary pairs half a head apart."""
    found: dict[str, Any] = {}
    for layer, name, matrix in model.projections():
        weight = floats(matrix)
        if name in ("self_attn.q_proj", "self_attn.k_proj") and model.interleaved:
            weight = weight[half_apart(len(weight), model.head_dim)]
        found[f"model.layers.{layer}.{name}.weight"] = weight
    for layer, name, weight in model.norms():
        found[f"model.layers.{layer}.{name}.weight"] = weight
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        found[name] = floats(model.matrices[name])
    return found
