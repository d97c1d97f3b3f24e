"""Llama, SmolLM2 and Qwen2 text decoders, from Hugging Face safetensors or from GGUF."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.config import DecoderConfig, parse
from export.decoder import cache_layout, decoder, embed_tokens, lm_head
from export.families.chat_template import default_template, template_strings
from export.families.family import Blueprint, Family
from export.families.llama_settings import (
    CONFIG,
    TOKENIZER,
    gguf_generation,
    layer_windows,
    refuse_gguf,
    refuse_others,
    text_step,
)
from export.files import read_json_object, read_text
from export.graph import Derived
from export.lazy_tensor import LazyTensor
from export.tokenizer_files import PRE, opened, tokenizer_json, tokenizer_json_from_gguf
from runtime.bundle import GenerationDefaults, Profile, PromptTemplate, SpecialTokens
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
SPECIAL = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)  # as templates name them
GGUF_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
GGUF_ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message
GGUF_PRE_WITH_BOS = ("llama-bpe",)  # llama.cpp puts BOS before these where the file does not say whether
TABLE_STEP = 4096  # rows that are compared at once
PLAIN = PromptTemplate(system=("", "\n"), user=("", ""), assistant=("", ""))  # a base model continues a text


def recognises(checkpoint: Checkpoint) -> bool:
    named = set(checkpoint.config.get("architectures") or ())
    return bool(named & ARCHITECTURES) or checkpoint.metadata.get("general.architecture") in GGUF_ARCHITECTURES


def read(checkpoint: Checkpoint, profile: Profile) -> Blueprint:
    gguf = checkpoint.kind == "gguf"
    tensors = {hf_name(key): tensor for key, tensor in checkpoint.items()} if gguf else dict(checkpoint)
    config = gguf_config(checkpoint, tensors) if gguf else hf_config(checkpoint, tensors)
    text = tokenizer_json_from_gguf(checkpoint.metadata) if gguf else tokenizer_json(checkpoint.folder)
    template, ends = gguf_prompts(checkpoint.metadata, text) if gguf else hf_prompts(checkpoint, text)
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
        generation=generation_defaults(checkpoint),
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
    where = f"{checkpoint.folder}/config.json"
    refuse_others(fields, CONFIG, where)
    qwen = "Qwen2ForCausalLM" in fields["architectures"]
    if not qwen and not fields.get("attention_bias") and "model.layers.0.self_attn.q_proj.bias" in tensors:
        raise CheckpointError(
            f"{where} has no attention_bias, but the tensors have q_proj.bias: expected true, or none"
        )
    for key, value in {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768 if qwen else 2048}.items():
        fields.setdefault(key, value)  # as transformers has it
    fields["windows"] = layer_windows(fields, qwen, where)
    # Where a file says both, transformers takes what stands among the rotary parameters.
    fields["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    heads = fields.get("num_attention_heads")
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = heads
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
    refuse_gguf(metadata, kind, fields["head_dim"], fields["max_position_embeddings"])
    return _finish(fields, tensors, "the GGUF's metadata")


def _finish(fields: dict[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> DecoderConfig:
    """Whether there is a bias and a head of its own is seen from the tensors."""
    fields["attention_qkv_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
    head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    stated = bool(fields.get("tie_word_embeddings"))
    fields["tie_word_embeddings"] = head is None or (stated and (table is None or _equal(head, table)))
    return parse(DecoderConfig, fields, where)


def _equal(head: LazyTensor, table: LazyTensor) -> bool:
    """Whether a head that config.json calls tied is the embedding table; where both are stored and differ, it is not.

    transformers decides so too, from version 5 on.
    """
    if head.shape != table.shape:
        return False
    spans = [(at, min(at + TABLE_STEP, head.shape[0])) for at in range(0, head.shape[0], TABLE_STEP)]
    return all(np.array_equal(head.rows(*span), table.rows(*span)) for span in spans)


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


def hf_prompts(checkpoint: Checkpoint, tokenizer: str) -> tuple[PromptTemplate, tuple[int, ...]]:
    """The chat template's strings, and the ids that end an answer; `tokenizer` is the text of tokenizer.json."""
    folder = checkpoint.folder
    stated, generation = _read_if_there(folder / "tokenizer_config.json"), read_generation(folder)
    refuse_others(stated, TOKENIZER, str(folder / "tokenizer_config.json"))
    names = special_names(_read_if_there(folder / "special_tokens_map.json") | stated)
    jinja = folder / "chat_template.jinja"
    source = read_text(jinja) if jinja.exists() else default_template(stated.get("chat_template"))
    template = template_strings(source, names, tokenizer) if source else plain_strings(tokenizer, names, stated)
    ends = [checkpoint.config.get("eos_token_id"), generation.get("eos_token_id"), names.get("eos_token")]
    return template, end_tokens(ends, template, tokenizer, str(folder))


def gguf_prompts(metadata: Mapping[str, Any], tokenizer: str) -> tuple[PromptTemplate, tuple[int, ...]]:
    """As `hf_prompts`, of a GGUF's metadata."""
    subject = "the GGUF's metadata"
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {}
    for name, key in GGUF_SPECIAL.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            names[name] = tokens[_token_id(index, len(tokens), f"{subject}, tokenizer.ggml.{key}_token_id,")]
    source = default_template(metadata.get("tokenizer.chat_template"))
    adds = {"add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", metadata.get(PRE) in GGUF_PRE_WITH_BOS)}
    template = template_strings(source, names, tokenizer) if source else plain_strings(tokenizer, names, adds)
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in GGUF_ENDS]
    return template, end_tokens(ends, template, tokenizer, subject)


def special_names(stated: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and such, as far as the files state them: each a string, or an object that holds one."""
    found = {key: value.get("content") if isinstance(value, dict) else value for key, value in stated.items()}
    return {key: name for key in SPECIAL if isinstance(name := found.get(key), str) and name}


def plain_strings(tokenizer: str, names: Mapping[str, str], stated: Mapping[str, Any]) -> PromptTemplate:
    """The PromptTemplate of a model without a chat template: a text that it continues, behind what its tokenizer puts
    in front of every text. `stated` may say of add_bos_token whether that is the begin-of-text token.
    """
    read = opened(tokenizer)
    whole, bare = (read.encode("a", add_special_tokens=special).ids for special in (True, False))
    # What the tokenizer puts behind a text (an end-of-text token) would have the model continue another.
    start = next((whole[:index] for index in range(len(whole)) if whole[index : index + len(bare)] == bare), [])
    begin, bos = "".join(read.id_to_token(i) or "" for i in start), names.get("bos_token", "")
    if stated.get("add_bos_token") is True and not begin.startswith(bos):
        begin = bos + begin
    if stated.get("add_bos_token") is False:
        begin = begin.removeprefix(bos)
    return replace(PLAIN, begin=begin)


def end_tokens(ends: Sequence[object], template: PromptTemplate, tokenizer: str, subject: str) -> tuple[int, ...]:
    """Ids that end an answer: all that the files state, by id or by name, and the token that the chat template writes
    behind an answer. A config.json often keeps the base model's, so that the answer would run on into a turn of the
    user. CheckpointError for what is no token.
    """
    read = opened(tokenizer)
    added = {token.content: i for i, token in read.get_added_tokens_decoder().items()}
    found: list[int] = []
    for end in [end for group in ends for end in (group if isinstance(group, list) else [group]) if end is not None]:
        if isinstance(end, str):
            found += [i] if (i := read.token_to_id(end)) is not None else []
        else:
            found.append(_token_id(end, None, f"{subject}: eos_token_id"))
    behind = {name: at for name in added if (at := template.assistant[1].find(name)) >= 0}
    if behind:
        found.append(added[min(behind, key=lambda name: (behind[name], -len(name)))])
    return tuple(dict.fromkeys(found))


def _token_id(value: object, count: int | None, what: str) -> int:
    """`value` where it is the id of a token; `count` tokens there are, if that is known."""
    number = value.item() if isinstance(value, np.integer) else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0 or (count is not None and number >= count):
        raise CheckpointError(f"{what} is {value!r}, expected the id of a token")
    return number


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json; empty where there is none."""
    return _read_if_there(folder / "generation_config.json")


def generation_defaults(checkpoint: Checkpoint) -> GenerationDefaults:
    """generation_config.json, or where there is none what config.json or a GGUF's metadata says of generating."""
    if checkpoint.kind == "gguf" and checkpoint.metadata:
        return GenerationDefaults(text=text_step(gguf_generation(checkpoint.metadata), "the GGUF's metadata"))
    path = checkpoint.folder / "generation_config.json"
    if path.exists():
        return GenerationDefaults(text=text_step(read_generation(checkpoint.folder), str(path)))
    return GenerationDefaults(text=text_step(checkpoint.config, f"{checkpoint.folder}/config.json"))


FAMILY = Family("llama", recognises, read)
