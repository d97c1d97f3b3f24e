"""A two-layer llama of random weights: as a Hugging Face folder, as an equal GGUF file and as a bundle."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from export.convert import export
from runtime.engine import Engine
from runtime.prompt import Prompt
from runtime.session import Options
from tests.chat_templates import CHATML

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS, CONTEXT = 32, 4, 2, 16, 64, 2, 128
ENDS = ("<|im_start|>", "<|im_end|>")
TEMPLATE = CHATML
MERGES = [("h", "e"), ("l", "l")]

Tensors = dict[str, np.ndarray]


def tokens() -> list[str]:
    """Every byte, what two merges make of them, and the special tokens."""
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES), *ENDS]


def config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": len(tokens()),
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": len(tokens()) - 1,
    }


def tensors(seed: int = 0) -> Tensors:
    """Random weights under their Hugging Face names; norms scatter around 1."""
    rng = np.random.default_rng(seed)
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (len(tokens()), HIDDEN), "lm_head.weight": (len(tokens()), HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (queries, HIDDEN),
                "self_attn.k_proj": (keys, HIDDEN),
                "self_attn.v_proj": (keys, HIDDEN),
                "self_attn.o_proj": (HIDDEN, queries),
                "mlp.gate_proj": (MLP, HIDDEN),
                "mlp.up_proj": (MLP, HIDDEN),
                "mlp.down_proj": (HIDDEN, MLP),
            }.items()
        }
    made = {key: (0.3 * rng.standard_normal(shape)).astype(np.float32) for key, shape in shapes.items()}
    norms = [
        f"model.layers.{layer}.{name}_layernorm" for layer in range(LAYERS) for name in ("input", "post_attention")
    ]
    for name in [*norms, "model.norm"]:
        made[f"{name}.weight"] = (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)
    return made


def head_norms(seed: int = 1) -> Tensors:
    """What Qwen3 has beside a Llama's tensors: a norm of each layer's queries and one of its keys."""
    rng = np.random.default_rng(seed)
    keys = [f"model.layers.{layer}.self_attn.{side}_norm.weight" for layer in range(LAYERS) for side in "qk"]
    return {key: (1 + 0.3 * rng.standard_normal(HEAD_DIM)).astype(np.float32) for key in keys}


def save(folder: Path, weights: Tensors | None = None, **changes: object) -> Path:
    """Write a Hugging Face folder; `changes` are other values for its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if weights is None else weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config() | changes))
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens()[: -len(ENDS)])}, MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(ENDS))
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": ENDS[1]}))
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "rope_freqs": "rope_freqs",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(
    path: Path,
    weights: Tensors,
    kinds: dict[str, str] | None = None,
    metadata: dict[str, int | float | str] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write the same weights as llama.cpp's converter does: a llama's queries and keys with their halves interleaved.

    `kinds`: the GGML types of those that are to be quantized; `metadata`: more than a llama needs.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens())
    normal = len(tokens()) - len(ENDS)
    writer.add_token_types([gguf.TokenType.NORMAL] * normal + [gguf.TokenType.CONTROL] * len(ENDS))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(len(tokens()) - 1)
    if TEMPLATE:
        writer.add_chat_template(TEMPLATE)
    for key, value in (metadata or {}).items():
        kind = gguf.GGUFValueType.INT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    for key, array in weights.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(key, "F32")]
        plain = kind == gguf.GGMLQuantizationType.F32
        rows = interleaved(key, array) if architecture == "llama" else array
        writer.add_tensor(gguf_name(key), rows if plain else gguf.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(key: str) -> str:
    stem = key.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, name = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[name]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


def interleaved(key: str, array: np.ndarray) -> np.ndarray:
    """Rows of each head in the order first, middle, second, middle + 1, ... (llama.cpp, `LlamaModel.permute`)."""
    heads = HEADS if "q_proj" in key else KV_HEADS if "k_proj" in key else None
    if heads is None:
        return array
    halves = array.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2)
    return np.ascontiguousarray(halves.reshape(array.shape))


@cache
def bundle() -> Path:
    """One exported bundle, for tests that change nothing in it."""
    folder = Path(mkdtemp(prefix="edgeomni-test-"))
    export(save(folder / "checkpoint"), folder / "bundle", random=True)
    return folder / "bundle"


def logits(bundle: Path, ids: list[int], options: Options | None = None) -> np.ndarray:
    """The scores [vocabulary] behind the last of `ids`."""
    engine = Engine(bundle, options)
    context = engine.context()
    context.append(Prompt(np.array(ids), np.empty((0, 0), np.int64), np.empty((0, 0), np.float32)))
    return engine.session("lm_head").run(hidden=context.hidden())["logits"][0]
