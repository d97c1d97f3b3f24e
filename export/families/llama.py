"""Llama, SmolLM2 and Qwen2 text decoders, from Hugging Face safetensors or from GGUF."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.config import DecoderConfig, parse
from export.decoder import cache_layout, decoder, embed_tokens, lm_head
from export.families.chat_template import template_strings
from export.families.family import Blueprint, Family
from export.files import read_json, read_json_object
from export.graph import Derived
from export.lazy_tensor import LazyTensor
from export.tokenizer_files import tokenizer_json, tokenizer_json_from_gguf
from runtime.bundle import GenerationDefaults, Profile, PromptTemplate, Sampling, SpecialTokens, Step
from runtime.errors import CheckpointError

ARCHITECTURES = {"LlamaForCausalLM", "Qwen2ForCausalLM"}
GGUF_ARCHITECTURES = {"llama", "qwen2"}
# llama.cpp stores the queries and keys of "llama" with their rows permuted, so that rotary pairs lie side by side.
GGUF_INTERLEAVED = {"llama"}
GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PLAIN = PromptTemplate(system=("", "\n"), user=("", ""), assistant=("", ""))  # a base model continues a text


def recognises(checkpoint: Checkpoint) -> bool:
    named = set(checkpoint.config.get("architectures") or ())
    return bool(named & ARCHITECTURES) or checkpoint.metadata.get("general.architecture") in GGUF_ARCHITECTURES


def read(checkpoint: Checkpoint, profile: Profile) -> Blueprint:
    gguf = checkpoint.kind == "gguf"
    tensors = {hf_name(key): tensor for key, tensor in checkpoint.items()} if gguf else dict(checkpoint)
    config = gguf_config(checkpoint, tensors) if gguf else hf_config(checkpoint, tensors)
    text = tokenizer_json_from_gguf(checkpoint.metadata) if gguf else tokenizer_json(checkpoint.folder)
    template, ends = gguf_prompts(checkpoint.metadata) if gguf else hf_prompts(checkpoint)
    graphs = (embed_tokens(config, profile), decoder(config, profile), lm_head(config, profile))
    return Blueprint(
        family=FAMILY.name,
        subgraphs=tuple(graph.deriving(derivations(config)) for graph in graphs),
        tensors=tensors,
        unused=(
            "rope_freqs.weight",
            "*.rotary_emb.inv_freq",
            *(["lm_head.weight"] if config.tie_word_embeddings else []),
        ),
        tokenizer_json=text,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        cache=cache_layout(config, profile),
        tokens=SpecialTokens(eos=ends),
        template=template,
        generation=GenerationDefaults(text=Step(read_sampling(checkpoint), max_new=1024)),
    )


def hf_name(key: str) -> str:
    """A GGUF tensor name as Hugging Face spells it; unknown names stay, and are reported as left over."""
    stem, _, kind = key.rpartition(".")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in GGUF_LAYER_NAMES:
        return f"model.layers.{parts[1]}.{GGUF_LAYER_NAMES[parts[2]]}.{kind}"
    return key


def hf_config(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> DecoderConfig:
    """config.json as a DecoderConfig; what these graphs do not compute is refused by name."""
    fields = dict(checkpoint.config)
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{checkpoint.folder}/config.json asks for rotary scaling {kind!r}, only 'default' is built"
        )
    if fields.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{checkpoint.folder}/config.json has hidden_act {fields['hidden_act']!r}, expected 'silu'"
        )
    fields.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    heads = fields.get("num_attention_heads")
    fields.setdefault("num_key_value_heads", heads)
    if fields.get("head_dim") is None and heads and fields.get("hidden_size"):
        fields["head_dim"] = fields["hidden_size"] // heads
    return _finish(fields, tensors, f"{checkpoint.folder}/config.json")


def gguf_config(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> DecoderConfig:
    metadata = checkpoint.metadata
    kind = metadata["general.architecture"]
    heads, width = metadata.get(f"{kind}.attention.head_count"), metadata.get(f"{kind}.embedding_length")
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise CheckpointError(f"the GGUF asks for rotary scaling {scaling!r}, only none is built")
    table = tensors.get("model.embed_tokens.weight")
    fields = {
        "vocab_size": table.shape[0] if table else metadata.get(f"{kind}.vocab_size"),
        "hidden_size": width,
        "intermediate_size": metadata.get(f"{kind}.feed_forward_length"),
        "num_hidden_layers": metadata.get(f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": metadata.get(f"{kind}.attention.key_length") or (width // heads if width and heads else None),
        "rope_theta": metadata.get(f"{kind}.rope.freq_base", 10000.0),
        "rms_norm_eps": metadata.get(f"{kind}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.get(f"{kind}.context_length"),
        "rope_interleaved": kind in GGUF_INTERLEAVED,
    }
    return _finish(fields, tensors, "the GGUF's metadata")


def _finish(fields: dict[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> DecoderConfig:
    """Whether there is a bias and a head of its own is seen from the tensors."""
    fields["attention_qkv_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
    fields["tie_word_embeddings"] = bool(fields.get("tie_word_embeddings")) or "lm_head.weight" not in tensors
    return parse(DecoderConfig, fields, where)


def derivations(config: DecoderConfig) -> dict[str, Derived]:
    """Query, key and value weights are packed by rows; a tied head is the embedding table itself."""
    sizes = [config.num_attention_heads * config.head_dim] + 2 * [config.num_key_value_heads * config.head_dim]
    derived = {}
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}.self_attn"
        for kind, tail in (("weight", (config.hidden_size,)), ("bias", ())):
            keys = tuple(f"{path}.{side}_proj.{kind}" for side in "qkv")
            derived[f"{path}.W_pack.{kind}"] = Derived(
                keys, tuple((size, *tail) for size in sizes), stack_rows, stacks=True
            )
    if config.tie_word_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        derived["lm_head.weight"] = Derived(("model.embed_tokens.weight",), (shape,))
    return derived


def stack_rows(*arrays: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays)


def hf_prompts(checkpoint: Checkpoint) -> tuple[PromptTemplate, tuple[int, ...]]:
    """The chat template's strings, and the ids that end an answer."""
    folder = checkpoint.folder
    stated = read_json_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    jinja = folder / "chat_template.jinja"
    source = jinja.read_text(encoding="utf-8") if jinja.exists() else stated.get("chat_template")
    tokens = {name: _content(stated.get(name)) for name in ("bos_token", "eos_token")}
    ends = [checkpoint.config.get("eos_token_id")]
    if (folder / "generation_config.json").exists():
        ends.append(read_json_object(folder / "generation_config.json").get("eos_token_id"))
    flat = [end for group in ends for end in (group if isinstance(group, list) else [group]) if end is not None]
    return (template_strings(source, tokens) if source else PLAIN), tuple(dict.fromkeys(flat))


def gguf_prompts(metadata: Mapping[str, Any]) -> tuple[PromptTemplate, tuple[int, ...]]:
    names = metadata.get("tokenizer.ggml.tokens", [])
    tokens = {}
    for name in ("bos", "eos"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        tokens[f"{name}_token"] = names[index] if index is not None else ""
    source = metadata.get("tokenizer.chat_template")
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return (template_strings(source, tokens) if source else PLAIN), tuple(
        {end: None for end in ends if end is not None}
    )


def _content(token: Any) -> str:
    """A special token as tokenizer_config.json states it: a string, or an object that holds one."""
    return str((token.get("content") if isinstance(token, dict) else token) or "")


def read_sampling(checkpoint: Checkpoint) -> Sampling:
    """generation_config.json where there is one; a GGUF states none, and SmolLM2's card suggests 0.2 and 0.9."""
    path = checkpoint.folder / "generation_config.json"
    stated = read_json(path) if checkpoint.kind == "safetensors" and path.exists() else {}
    return Sampling(
        temperature=stated.get("temperature") or 0.2,
        top_k=stated.get("top_k") or 0,
        top_p=stated.get("top_p") or 0.9,
        repetition_penalty=stated.get("repetition_penalty") or 1.0,
    )


FAMILY = Family("llama", recognises, read)
