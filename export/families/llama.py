"""Llama, SmolLM2, Qwen2 and Qwen3 text decoders, from Hugging Face safetensors or from GGUF."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.config import DecoderConfig
from export.decoder import cache_layout, decoder, embed_tokens, lm_head
from export.families.chat_template import default_template, template_strings
from export.families.family import Blueprint, Family
from export.families.llama_config import FREQUENCIES, architecture, gguf_config, hf_config, with_table
from export.families.llama_settings import TOKENIZER, gguf_generation, refuse_others, text_step
from export.files import read_json_object, read_text
from export.graph import Derived
from export.tokenizer_files import PRE, opened, tokenizer_json, tokenizer_json_from_gguf
from runtime.bundle import GenerationDefaults, Profile, PromptTemplate, SpecialTokens
from runtime.errors import CheckpointError

GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
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
PLAIN = PromptTemplate(system=("", "\n"), user=("", ""), assistant=("", ""))  # a base model continues a text


def recognises(checkpoint: Checkpoint) -> bool:
    return architecture(checkpoint) is not None


def read(checkpoint: Checkpoint, profile: Profile) -> Blueprint:
    gguf, kind = checkpoint.kind == "gguf", architecture(checkpoint)
    assert kind is not None
    tensors = {hf_name(key): tensor for key, tensor in checkpoint.items()} if gguf else with_table(checkpoint)
    config = gguf_config(checkpoint, tensors, kind) if gguf else hf_config(checkpoint, tensors, kind)
    text = tokenizer_json_from_gguf(checkpoint.metadata) if gguf else tokenizer_json(checkpoint.folder)
    template, ends = gguf_prompts(checkpoint.metadata, text) if gguf else hf_prompts(checkpoint, text)
    graphs = (embed_tokens(config, profile), decoder(config, profile), lm_head(config, profile))
    return Blueprint(
        family=FAMILY.name,
        subgraphs=tuple(graph.deriving(derivations(config)) for graph in graphs),
        tensors=tensors,
        unused=(
            FREQUENCIES,
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
