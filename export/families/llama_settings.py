"""What the files of a Llama or Qwen checkpoint state beside its dimensions: computed, harmless, or refused by name.

Harmless are, of config.json: initializer_range, attention_dropout and other settings of training; use_cache,
torch_dtype and dtype, output_*, return_dict and _name_or_path (how Python code holds and returns things);
pretraining_tp (in how many slices the same product is computed); bos_token_id and pad_token_id (the tokenizer and the
template put the first, one conversation needs none of the second); whatever the architecture's code in transformers
never reads. Of generation_config.json: max_length and max_time (limits of a whole conversation, which the context
sets here), cache_*, low_memory, compile_*, prefill_chunk_size (how, not what), assistant_*, prompt_lookup_* and such
(guesses that are checked), renormalize_logits and remove_invalid_values (the draw does both), early_stopping,
length_penalty (of beams). Of tokenizer_config.json: model_max_length, padding_side and truncation_side (of batches),
clean_up_tokenization_spaces (text is shown as the model wrote it), legacy and use_fast (how tokenizer.json was made),
add_eos_token (behind a prompt it would end the text that is to be continued). Of GGUF: general.* but for sampling,
tokenizer.ggml.scores, quantize.*, split.*, imatrix.*.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeGuard

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from export.config import MOST, READ, Count, Real, parse
from export.problems import listed, refuse, shown
from runtime.bundle import Sampling, Step

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]

NONE: tuple[object, ...] = (None, [], {})
# Keys that change what transformers computes, with the values that change nothing: any other is refused.
CONFIG: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "logits_soft_cap": (None, 0),
}
GENERATION: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p", "guidance_scale"), (None, 1)),
    **dict.fromkeys(("encoder_repetition_penalty",), (None, 1)),
    **dict.fromkeys(("penalty_alpha", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "top_h"), (None, 0)),
    **dict.fromkeys(
        ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (None, 0)
    ),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), NONE),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), NONE),
    **dict.fromkeys(("constraints", "force_words_ids", "watermarking_config", "dola_layers"), NONE),
    "token_healing": (None, False),
}
TOKENIZER: Mapping[str, tuple[object, ...]] = {"split_special_tokens": (None, False)}
GGUF: Mapping[str, tuple[object, ...]] = {  # behind the architecture's name
    "expert_count": (None, 0),
    "use_parallel_residual": (None, False),
    "attention.causal": (None, True),
    "attention.clamp_kqv": (None, 0),
    "attention.max_alibi_bias": (None, 0),
    "attention.scale": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 0, 1),
    "residual_scale": (None, 0, 1),
    "embedding_scale": (None, 0, 1),
    "rope.scaling.attn_factor": (None, 0, 1),
    "rope.scaling.yarn_ext_factor": (None, -1, 1),
    "rope.scaling.yarn_attn_factor": (None, 0, 1),
    "rope.scaling.yarn_log_multiplier": (None, 0),
}
GGUF_SAMPLING: Mapping[str, tuple[object, ...]] = {"xtc_probability": (None, 0), "mirostat": (None, 0)}

FULL, SLIDING = "full_attention", "sliding_attention"

SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "min_p"}
# How transformers names what a GGUF recommends under general.sampling.
GGUF_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True, config=READ)
class Generation:
    """What of generation_config.json is computed, spelled as there."""

    do_sample: Annotated[bool, Field(strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6, strict=True)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST, strict=True)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Real | None = None
    max_new_tokens: Count | None = None
    stop_strings: tuple[str, ...] | str | None = None


def text_step(stated: Mapping[str, Any], where: str) -> Step:
    """How an answer is generated, from what a generation_config.json states.

    Where it says nothing of sampling, SmolLM2's card suggests 0.2 and 0.9; where it says something, the rest is as
    transformers has it. CheckpointError for what means nothing and for ways to generate that are not built.
    """
    refuse_others(stated, GENERATION, where)
    read = parse(Generation, dict(stated), where)
    stop = (read.stop_strings,) if isinstance(read.stop_strings, str) else read.stop_strings or ()
    return Step(_sampling(read, stated), max_new=read.max_new_tokens or 1024, stop=stop)


def _sampling(read: Generation, stated: Mapping[str, Any]) -> Sampling:
    penalty = 1.0 if read.repetition_penalty is None else read.repetition_penalty
    if not any(stated.get(key) is not None for key in SAMPLING):
        return Sampling(temperature=0.2, top_p=0.9, repetition_penalty=penalty)
    if read.do_sample is False or 0 in (read.temperature, read.top_p):
        return Sampling(repetition_penalty=penalty, greedy=True)
    top_k = 50 if "top_k" not in stated else read.top_k or 0
    return Sampling(
        temperature=1.0 if read.temperature is None else read.temperature,
        top_k=top_k,
        top_p=1.0 if read.top_p is None else read.top_p,
        min_p=read.min_p or 0.0,
        repetition_penalty=penalty,
    )


def gguf_generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF recommends under general.sampling, as generation_config.json would spell it."""
    start = "general.sampling."
    stated = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
    # Here a penalty counts all of the conversation, there the last so many tokens.
    last = (None, -1) if stated.get("penalty_repeat", 1) != 1 else (stated.get("penalty_last_n"),)
    refuse_others(stated, {**GGUF_SAMPLING, "penalty_last_n": last}, f"the GGUF's metadata, {start}*")
    return {name: _number(stated[key]) for key, name in GGUF_NAMES.items() if key in stated}


def _number(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def refuse_others(stated: Mapping[str, Any], known: Mapping[str, Sequence[object]], where: str) -> None:
    """CheckpointError that names every key of `known` whose value is none of those that change nothing."""
    refuse(where, list(_others(stated, known)))


def _others(stated: Mapping[str, Any], known: Mapping[str, Sequence[object]]) -> Iterator[str]:
    for key, harmless in known.items():
        if key in stated and not any(_equal(stated[key], value) for value in harmless):
            expected = " or ".join(repr(value) for value in harmless if value is not None)
            yield f"{key} is {shown(stated[key])}, which is not built: expected {expected or 'none'}"


def _equal(found: object, value: object) -> bool:
    """Equal, where True is not 1: a number for a switch is a mistake."""
    return isinstance(found, bool) == isinstance(value, bool) and type(found == value) is bool and found == value


def refuse_gguf(metadata: Mapping[str, Any], kind: str, head_dim: object, positions: object) -> None:
    """CheckpointError for what a GGUF of the architecture `kind` states and these graphs do not compute."""
    stated = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    sizes = dict.fromkeys(("attention.value_length", "rope.dimension_count"), (None, head_dim))
    window = stated.get("attention.sliding_window")
    windows = (None, 0, window) if _reaches_all(window, positions) else (None, 0)
    known = {**GGUF, **sizes, "attention.sliding_window": windows}
    refuse_others(stated, known, f"the GGUF's metadata, {kind}.*")


def _reaches_all(window: object, positions: object) -> bool:
    return isinstance(window, int) and isinstance(positions, int) and window >= positions


def layer_windows(fields: Mapping[str, Any], qwen: bool, where: str) -> tuple[int, ...]:
    """Of each layer, how many positions it attends to (0: all); empty where all attend to all.

    `fields` have their layers and positions, seen to be numbers. CheckpointError for kinds of layers that are not
    built, and for windows of Llama, whose code has none.
    """
    layers, positions = fields["num_hidden_layers"], fields["max_position_embeddings"]
    window, first = fields.get("sliding_window", 4096), fields.get("max_window_layers", 28)
    kinds = fields.get("layer_types")
    if kinds is None and fields.get("use_sliding_window") and window is not None:
        known = isinstance(first, int)
        odd = f"from layer {first!r} of {layers} on {SLIDING}"
        kinds = [SLIDING if layer >= first else FULL for layer in range(layers)] if known else odd
    if kinds is None:
        return ()
    built = [FULL, SLIDING] if qwen and fields.get("use_sliding_window") and _is_size(window) else [FULL]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in built for kind in kinds):
        names = listed(sorted(set(map(str, kinds)))) if isinstance(kinds, list) else shown(kinds)
        problem = f"the layers' attention is {names} with a sliding_window of {window!r}, which is not built"
        refuse(where, [f"{problem}: expected {' or '.join(map(repr, built))} for each of {layers} layers"])
    size = window if _is_size(window) and not _reaches_all(window, positions) else 0
    windows = tuple(size if kind == SLIDING else 0 for kind in kinds)
    return windows if any(windows) else ()


def _is_size(window: object) -> TypeGuard[int]:
    return isinstance(window, int) and not isinstance(window, bool) and window > 0
