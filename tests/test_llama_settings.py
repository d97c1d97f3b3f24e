"""What a checkpoint's files state beside its dimensions is computed, known to be harmless, or refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.checkpoint import open_checkpoint
from export.convert import export, plan
from export.families.llama import hf_name
from export.families.llama_config import gguf_config
from export.kernels import lint
from runtime.bundle import PromptTemplate, Sampling, Step
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import CheckpointError
from runtime.events import ReplyDone
from runtime.prompt import Text
from tests import chat_templates, tiny_llama, tiny_pieces
from tests.chat_templates import TURNS

END = len(tiny_llama.tokens()) - 1  # <|im_end|>


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def stated(folder: Path, generation: dict[str, Any] | None = None, **config: object) -> Step:
    checkpoint = tiny_llama.save(folder / "checkpoint", None, **config)
    if generation is not None:
        write(checkpoint / "generation_config.json", generation)
    return plan(checkpoint, "cpu").blueprint.generation.text


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(path, "cpu")
    return str(caught.value)


# The end of a turn


def test_an_answer_ends_where_the_template_ends_a_turn_whatever_the_config_says(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", eos_token_id=0)
    write(checkpoint / "tokenizer_config.json", {"chat_template": tiny_llama.TEMPLATE})
    assert plan(checkpoint, "cpu").blueprint.tokens.eos == (0, END)


def test_an_answer_ends_at_the_token_that_the_tokenizer_config_names(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", eos_token_id=None)
    write(checkpoint / "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}})
    assert plan(checkpoint, "cpu").blueprint.tokens.eos == (END,)
    write(checkpoint / "tokenizer_config.json", {})
    write(checkpoint / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    assert plan(checkpoint, "cpu").blueprint.tokens.eos == (END,)


def test_an_answer_of_a_gguf_ends_where_the_template_ends_a_turn(tmp_path: Path) -> None:
    path = tiny_llama.save_gguf(tmp_path / "a.gguf", tiny_llama.tensors(), metadata={"tokenizer.ggml.eot_token_id": 3})
    gguf_end = plan(path, "cpu").blueprint.tokens.eos
    assert gguf_end == (END, 3)


def test_an_answer_that_reaches_the_end_of_a_turn_is_over(tmp_path: Path) -> None:
    export(tiny_llama.save(tmp_path / "checkpoint", eos_token_id=0), tmp_path / "bundle", random=True)
    engine = Engine(tmp_path / "bundle")
    weary = np.zeros((1, engine.manifest.vocab_size), np.float32)
    weary[0, END] = 1
    engine.session("lm_head").run = lambda **_: {"logits": weary}  # a model that has nothing to say
    *_, done = Conversation.open(engine).reply([Text("Who?")], Choices(greedy=True))
    assert isinstance(done, ReplyDone) and (done.finish, done.text) == ("end", "")


@pytest.mark.parametrize("wrong", [1.5, {}, -1, True, [1.5], "nowhere"])
def test_an_end_that_is_no_token_is_refused(tmp_path: Path, wrong: object) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", eos_token_id=wrong)
    if wrong == "nowhere":  # a name that the tokenizer has not: the others stand
        assert plan(checkpoint, "cpu").blueprint.tokens.eos == (END,)
    else:
        assert "eos_token_id is" in refused(checkpoint) and "expected the id of a token" in refused(checkpoint)


# Sampling


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, Sampling(temperature=0.2, top_p=0.9)),
        ({"repetition_penalty": 1.1}, Sampling(temperature=0.2, top_p=0.9, repetition_penalty=1.1)),
        ({"do_sample": False}, Sampling(greedy=True)),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.2}, Sampling(1, 0, 1, 1.2, greedy=True)),
        ({"temperature": 0.0}, Sampling(greedy=True)),
        ({"temperature": 0}, Sampling(greedy=True)),
        ({"do_sample": True}, Sampling(1.0, 50, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20}, Sampling(0.6, 20, 0.8)),
        ({"temperature": 0.7, "top_k": 0, "min_p": 0.05}, Sampling(0.7, 0, 1.0, min_p=0.05)),
        ({"temperature": 0.7, "top_k": None, "top_p": None}, Sampling(0.7, 0, 1.0)),
    ],
)
def test_answers_are_sampled_as_the_checkpoint_says(
    tmp_path: Path, generation: dict[str, Any], expected: Sampling
) -> None:
    assert stated(tmp_path, generation).sampling == expected


def test_a_config_that_says_how_to_sample_counts_where_no_other_file_does(tmp_path: Path) -> None:
    assert stated(tmp_path, do_sample=False).sampling.greedy
    assert not stated(tmp_path, {}, do_sample=False).sampling.greedy


def test_the_length_and_the_strings_that_end_an_answer_are_taken_over(tmp_path: Path) -> None:
    step = stated(tmp_path, {"max_new_tokens": 7, "stop_strings": ["\n\n", "END"]})
    assert (step.max_new, step.stop) == (7, ("\n\n", "END"))


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": -1.0},
        {"temperature": "warm"},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -2},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"num_beams": 4},
        {"no_repeat_ngram_size": 3},
        {"suppress_tokens": [1]},
        {"bad_words_ids": [[1]]},
        {"forced_eos_token_id": 2},
        {"typical_p": 0.9},
        {"penalty_alpha": 0.6},
        {"guidance_scale": 1.5},
        {"min_new_tokens": 5},
    ],
)
def test_what_cannot_be_generated_so_is_refused_by_name(tmp_path: Path, generation: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json.*(\n.*)?{next(iter(generation))}"):
        stated(tmp_path, generation)


def test_what_changes_nothing_is_accepted(tmp_path: Path) -> None:
    plain = stated(tmp_path, {"do_sample": True})
    generation = {"do_sample": True, "num_beams": 1, "typical_p": 1.0, "suppress_tokens": [], "max_length": 4096}
    more = {"bad_words_ids": None, "no_repeat_ngram_size": 0, "use_cache": True, "transformers_version": "4.31.0"}
    assert stated(tmp_path, generation | more) == plain


def test_a_gguf_says_how_its_answers_are_sampled(tmp_path: Path) -> None:
    said: dict[str, int | float | str] = {"general.sampling.temp": 0.5, "general.sampling.top_k": 7}
    said |= {"general.sampling.min_p": 0.25, "general.sampling.penalty_repeat": 1.5}
    path = tiny_llama.save_gguf(tmp_path / "a.gguf", tiny_llama.tensors(), metadata=said)
    assert plan(path, "cpu").blueprint.generation.text.sampling == Sampling(0.5, 7, 1.0, 1.5, min_p=0.25)
    greedy = tiny_llama.save_gguf(tmp_path / "b.gguf", tiny_llama.tensors(), metadata={"general.sampling.temp": 0.0})
    assert plan(greedy, "cpu").blueprint.generation.text.sampling.greedy


# Attention and other arithmetic


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding_window of 8"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ({"layer_types": ["full_attention"]}, "each of 2 layers"),
        ({"layer_types": "full_attention"}, "the layers' attention is 'full_attention'"),
        ({"use_sliding_window": True, "sliding_window": -3, "max_window_layers": 0}, "sliding_window of -3"),
        ({"use_sliding_window": True, "sliding_window": "8", "max_window_layers": 0}, "sliding_window of '8'"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "all"}, "from layer 'all' of 2"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
    ],
)
def test_what_these_graphs_do_not_compute_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", architectures=["Qwen2ForCausalLM"], **changes)
    assert named in refused(checkpoint) and "config.json" in refused(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0},
        {"layer_types": ["full_attention", "full_attention"]},
        {"hidden_act": "swish", "mlp_bias": False, "attention_bias": False, "num_key_value_heads": 2},
        {"pretraining_tp": 2, "attention_dropout": 0.1, "initializer_range": 0.1, "use_cache": False},
    ],
)
def test_what_changes_nothing_in_the_graphs_is_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    plan(tiny_llama.save(tmp_path / "checkpoint", architectures=["Qwen2ForCausalLM"], **changes), "cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 16),
        ("attention.value_length", 8),
        ("rope.dimension_count", 8),
        ("expert_count", 4),
        ("rope.scaling.yarn_log_multiplier", 0.5),
        ("final_logit_softcapping", 30.0),
        ("attention.clamp_kqv", 8.0),
        ("logit_scale", 0.5),
    ],
)
def test_what_a_gguf_states_and_these_graphs_do_not_compute_is_refused_by_name(
    tmp_path: Path, key: str, value: float
) -> None:
    path = tiny_llama.save_gguf(tmp_path / "a.gguf", tiny_llama.tensors(), metadata={f"llama.{key}": value})
    assert f"{key} is {value}" in refused(path)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    for window in (0, tiny_llama.CONTEXT):
        metadata: dict[str, int | float | str] = {"llama.attention.sliding_window": window}
        plan(tiny_llama.save_gguf(tmp_path / f"{window}.gguf", tiny_llama.tensors(), metadata=metadata), "cpu")


def test_the_rotary_base_is_the_one_that_transformers_takes(tmp_path: Path) -> None:
    plain, both = tmp_path / "plain", tmp_path / "both"
    export(tiny_llama.save(tmp_path / "a", rope_theta=500.0), plain, random=True)
    parameters = {"rope_theta": 500.0, "rope_type": "default"}
    export(tiny_llama.save(tmp_path / "b", rope_theta=10000.0, rope_parameters=parameters), both, random=True)
    ids = [1, 2, 3, 4, 5]
    assert tiny_llama.logits(plain, ids).tobytes() == tiny_llama.logits(both, ids).tobytes()


def test_a_tokenizer_that_splits_its_special_tokens_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    write(checkpoint / "tokenizer_config.json", {"split_special_tokens": True, "chat_template": tiny_llama.TEMPLATE})
    assert "split_special_tokens is True" in refused(checkpoint)


def windowed(folder: Path, **changes: object) -> Path:
    architecture = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    checkpoint = tiny_llama.save(folder / "checkpoint", None, **architecture, **changes)
    export(checkpoint, folder / "bundle", random=True)
    return folder / "bundle"


@pytest.mark.parametrize(
    ("changes", "reach"),
    [
        ({"sliding_window": 3, "max_window_layers": 0}, 4),  # two layers look two positions back each
        ({"sliding_window": 1, "max_window_layers": 0}, 0),
        ({"sliding_window": 3, "max_window_layers": 1}, 11),
        ({"sliding_window": 2, "layer_types": ["sliding_attention"] * 2}, 2),
    ],
)
def test_a_window_ends_where_it_says(tmp_path: Path, changes: dict[str, Any], reach: int) -> None:
    bundle, ids = windowed(tmp_path, **changes), [72, 101, 7, 9, 30, 5, 8, 1, 2, 17, 19, 23]
    plain = tiny_llama.logits(bundle, ids)
    for back in range(len(ids)):
        other = [*ids]
        other[-1 - back] = 50
        assert np.allclose(tiny_llama.logits(bundle, other), plain, atol=1e-4) == (back > reach), back


def test_a_window_is_the_same_for_a_text_that_is_read_position_by_position(tmp_path: Path) -> None:
    bundle, ids = windowed(tmp_path, sliding_window=3, max_window_layers=0), [72, 101, 7, 9, 30, 5, 8, 1, 2]
    engine = Engine(bundle)
    context = engine.context()
    for token in ids:
        context.push(token)
        context.hidden()
    logits = engine.session("lm_head").run(hidden=context.hidden())["logits"][0]
    np.testing.assert_allclose(logits, tiny_llama.logits(bundle, ids), atol=1e-4)


def test_windows_of_a_llama_are_refused_since_its_code_has_none(tmp_path: Path) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    assert "sliding_window of 16, which is not built" in refused(tiny_llama.save(tmp_path / "a", None, **changes))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "nothing of key/value heads": {"num_key_value_heads": None, "num_attention_heads": 2, "head_dim": 32},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "rope_theta": {"rope_theta": 100.0},
    "rope_theta twice": {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "rope_scaling": {"rope_scaling": {"type": "default"}},
    "swish": {"hidden_act": "swish"},
    "pretraining_tp": {"pretraining_tp": 2},
    "tied": {"tie_word_embeddings": True},
    "a window that is off": {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0},
    "a window from a layer that is not there": {
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 2,
    },
    "a window": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "a window everywhere": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "layer_types": {"layer_types": ["full_attention"] * 2},
    "layer_types with a window": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 3,
        "use_sliding_window": True,
    },
    "gelu": {"hidden_act": "gelu"},
    "linear scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "scaling of Llama 3": {"rope_scaling": LLAMA3},
    "scaling of Llama 3, newer key": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "rope_theta": 10000.0},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "dynamic scaling": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "longrope": {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
    "as many key/value heads": {"num_key_value_heads": None, "num_attention_heads": 4},
    "dropout and initializer": {"attention_dropout": 0.5, "initializer_range": 0.5},
    "without eps": {"rms_norm_eps": ...},
    "without positions": {"max_position_embeddings": ...},
}


def test_a_head_that_differs_from_the_table_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    weights = tiny_llama.tensors()
    checkpoint = tiny_llama.save(tmp_path / "apart", weights, tie_word_embeddings=True)
    assert plan(checkpoint, "cpu").graphs[2].parameters == weights["lm_head.weight"].size
    export(checkpoint, tmp_path / "one", random=True)
    export(tiny_llama.save(tmp_path / "untied", weights), tmp_path / "two", random=True)
    one, two = (tiny_llama.logits(tmp_path / name, [1, 2, 3]) for name in ("one", "two"))
    assert one.tobytes() == two.tobytes()
    same = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    manifest = export(tiny_llama.save(tmp_path / "same", same, tie_word_embeddings=True), tmp_path / "three")
    assert manifest.graphs["lm_head"].weights == manifest.graphs["embed_tokens"].weights


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_gives_the_logits_of_transformers_or_is_refused(tmp_path: Path, architecture: str, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    weights = tiny_llama.tensors() | (tiny_llama.head_norms() if architecture.startswith("Qwen3") else {})
    if name == "as many key/value heads":
        weights |= {key: np.tile(array, (2, 1)) for key, array in weights.items() if "k_proj" in key or "v_proj" in key}
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", weights, architectures=[architecture])
    config = json.loads((checkpoint / "config.json").read_text()) | VARIANTS[name]
    kind = architecture.removesuffix("ForCausalLM").lower()
    write(checkpoint / "config.json", {k: v for k, v in config.items() if v is not ...} | {"model_type": kind})
    try:
        export(checkpoint, tmp_path / "bundle", random=True)
    except CheckpointError:
        windows = {"a window", "a window everywhere", "layer_types with a window"}
        unbuilt = {"gelu", "longrope", "nothing of key/value heads"}
        assert name in (unbuilt if architecture.startswith("Qwen") else unbuilt | windows)
        return
    ids = [72, 101, 7, 9, 30, 5, 8, 1, 2] * 4
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0, -1].numpy()
    np.testing.assert_allclose(tiny_llama.logits(tmp_path / "bundle", ids), expected, atol=2e-4)


# The same content in another layout


def test_a_gguf_of_qwen3_gives_the_logits_of_its_folder(tmp_path: Path) -> None:
    weights, ids = tiny_llama.tensors() | tiny_llama.head_norms(), [72, 101, 7, 9, 30]
    export(tiny_llama.save(tmp_path / "folder", weights, architectures=["Qwen3ForCausalLM"]), tmp_path / "one")
    export(tiny_llama.save_gguf(tmp_path / "a.gguf", weights, architecture="qwen3"), tmp_path / "two")
    one, two = (tiny_llama.logits(tmp_path / name, ids) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, atol=1e-5)
    for key in tiny_llama.head_norms():
        weights[key] = np.ones_like(weights[key])
    export(tiny_llama.save_gguf(tmp_path / "b.gguf", weights, architecture="qwen3"), tmp_path / "three")
    assert np.abs(tiny_llama.logits(tmp_path / "three", ids) - one).max() > 0.01  # the norms count


def test_a_qwen3_without_its_norms_and_a_llama_with_them_are_refused(tmp_path: Path) -> None:
    norms = tiny_llama.head_norms()
    bare = tiny_llama.save(tmp_path / "bare", None, architectures=["Qwen3ForCausalLM"])
    assert "missing: model.layers.0.self_attn.q_norm.weight [16]" in refused(bare)
    llama = tiny_llama.save(tmp_path / "llama", tiny_llama.tensors() | norms)
    assert "left over: model.layers.0.self_attn.q_norm.weight [16]" in refused(llama)


def test_every_node_of_a_qwen3_has_a_kernel_of_cuda(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(
        tmp_path / "a", tiny_llama.tensors() | tiny_llama.head_norms(), architectures=["Qwen3ForCausalLM"]
    )
    graphs = plan(checkpoint, "cuda").blueprint.subgraphs
    assert {port.dtype for port in graphs[1].outputs} == {"float16"}
    assert [problem for graph in graphs for problem in lint(graph.model, "cuda")] == []


@pytest.mark.parametrize("named", [None, []])
def test_a_config_without_architectures_is_read_by_its_model_type(tmp_path: Path, named: object) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", None, architectures=named, model_type="llama")
    export(checkpoint, tmp_path / "bundle")
    ids = [1, 2, 3]
    assert (
        tiny_llama.logits(tmp_path / "bundle", ids).tobytes() == tiny_llama.logits(tiny_llama.bundle(), ids).tobytes()
    )


def test_a_tied_model_may_be_saved_under_the_name_of_its_head(tmp_path: Path) -> None:
    weights = tiny_llama.tensors()
    head = weights.pop("lm_head.weight")
    by_table = weights | {"model.embed_tokens.weight": head}
    by_head = {key: array for key, array in by_table.items() if "embed" not in key} | {"lm_head.weight": head}
    for name, tensors in (("one", by_table), ("two", by_head)):
        export(tiny_llama.save(tmp_path / f"checkpoint {name}", tensors, tie_word_embeddings=True), tmp_path / name)
    one, two = (tiny_llama.logits(tmp_path / name, [1, 2, 3]) for name in ("one", "two"))
    assert one.tobytes() == two.tobytes()
    assert "missing: model.embed_tokens.weight" in refused(tiny_llama.save(tmp_path / "untied", by_head))


# Numbers that mean nothing


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", True),
        ("architectures", [7]),
        ("rope_scaling", True),
        ("rope_parameters", 3),
        ("num_hidden_layers", 2147483648),
        ("num_hidden_layers", 9999),
        ("head_dim", 2**63),
        ("head_dim", 2**24),
        ("hidden_size", [32]),
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("num_attention_heads", 33),
        ("num_key_value_heads", True),
        ("max_position_embeddings", 2**40),
        ("vocab_size", 1e3),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", 10**400),
        ("rope_theta", 0),
        ("tie_word_embeddings", "yes"),
        ("layer_types", [{}, []]),
        ("layer_types", "x" * 100_000),
        ("eos_token_id", 1.5),
        ("eos_token_id", {}),
    ],
)
def test_a_value_of_a_config_that_means_nothing_is_refused_in_one_line(
    tmp_path: Path, field: str, value: object
) -> None:
    message = refused(tiny_llama.save(tmp_path / "checkpoint", None, **{field: value}))
    assert "\n" not in message and field in message.replace("the layers' attention", "layer_types")
    assert len(message) < 600


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 65535), ("block_count", "two"), ("attention.head_count", 0), ("context_length", 2**31 - 1)],
)
def test_a_value_of_a_gguf_that_means_nothing_is_refused_in_one_line(tmp_path: Path, key: str, value: Any) -> None:
    path = tiny_llama.save_gguf(tmp_path / "a.gguf", tiny_llama.tensors())
    read = open_checkpoint(path)
    read.metadata[f"llama.{key}"] = value
    with pytest.raises(CheckpointError, match=rf"^the GGUF's metadata.*llama\.{key} is .*$") as caught:
        gguf_config(read, {hf_name(name): tensor for name, tensor in read.items()}, "llama")
    assert "\n" not in str(caught.value)


# What stands in front of a text


def without_template(folder: Path, post: bool, **tokenizer: object) -> PromptTemplate:
    checkpoint = tiny_llama.save(folder)
    path = checkpoint / "tokenizer.json"
    if post:
        first = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        special = {"id": "<|im_start|>", "ids": [END - 1], "tokens": ["<|im_start|>"]}
        kind = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, text]}
        write(
            path,
            json.loads(path.read_text()) | {"post_processor": kind | {"special_tokens": {"<|im_start|>": special}}},
        )
    write(checkpoint / "tokenizer_config.json", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **tokenizer})
    return plan(checkpoint, "cpu").blueprint.template


def test_a_model_without_a_template_gets_what_its_tokenizer_puts_in_front(tmp_path: Path) -> None:
    assert without_template(tmp_path / "a", post=True).begin == "<|im_start|>"
    assert without_template(tmp_path / "b", post=True, add_bos_token=True).begin == "<|im_start|>"
    assert without_template(tmp_path / "c", post=False, add_bos_token=True).begin == "<|im_start|>"
    assert without_template(tmp_path / "d", post=False).begin == ""


def test_a_gguf_without_a_template_gets_bos_where_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llama, "TEMPLATE", "")
    for adds, begin in ((True, "<|im_start|>"), (False, "")):
        metadata: dict[str, int | float | str] = {"tokenizer.ggml.bos_token_id": END - 1}
        path = tmp_path / f"{adds}.gguf"
        tiny_llama.save_gguf(path, tiny_llama.tensors(), metadata=metadata | {"tokenizer.ggml.add_bos_token": adds})
        assert plan(path, "cpu").blueprint.template.begin == begin


# Whole bundles


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_llama_3_template_gives_its_ids_from_either_kind_of_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tiny_llama, "ENDS", chat_templates.HEADERS)
    monkeypatch.setattr(tiny_llama, "TEMPLATE", chat_templates.LLAMA3)
    tokens, weights = tiny_llama.tokens(), tiny_llama.tensors()
    if kind == "gguf":
        metadata: dict[str, int | float | str] = {"tokenizer.ggml.bos_token_id": tokens.index("<|begin_of_text|>")}
        metadata |= {"tokenizer.ggml.add_bos_token": True}
        path = tiny_llama.save_gguf(tmp_path / "a.gguf", weights, metadata=metadata)
    else:
        path = tiny_llama.save(tmp_path / "checkpoint", weights)
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        write(path / "tokenizer_config.json", {"chat_template": chat_templates.LLAMA3, **names})
    manifest = export(path, tmp_path / "bundle", random=True)
    spelled = Engine(tmp_path / "bundle").format
    assert tokens.index("<|eot_id|>") in manifest.tokens.eos
    for system, users, answers in TURNS:
        piece = spelled.open_conversation(system, waits=True)
        for user, answer in zip(users, answers, strict=False):
            piece = spelled.user_turn([Text(user)], False, behind=piece, waits=True)
            piece = spelled.close_assistant([Text(answer)], spoken=False, behind=piece, waits=True)
        ids = spelled.user_turn([Text(users[-1])], False, behind=piece).ids.tolist()
        said = [
            *([("system", system)] if system is not None else []),
            *zip(["user", "assistant"] * 9, _turns(users, answers), strict=False),
        ]
        whole = "<|begin_of_text|>" + "".join(f"{_header(role)}{text.strip()}<|eot_id|>" for role, text in said)
        assert ids == spelled.tokenizer.encode(whole + _header("assistant"), special=True).tolist()


def _turns(users: tuple[str, ...], answers: tuple[str, ...]) -> list[str]:
    return [text for pair in zip(users, (*answers, ""), strict=True) for text in pair][:-1]


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def test_the_reasoning_of_an_answer_is_forgotten_before_the_next_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful = tiny_llama.TEMPLATE.replace("turn.content", "turn.content.split('</think>')[-1]")
    monkeypatch.setattr(tiny_llama, "TEMPLATE", forgetful.replace("assistant\n", "assistant\n<think>\n"))
    export(tiny_llama.save(tmp_path / "checkpoint"), tmp_path / "bundle", random=True)
    engine = Engine(tmp_path / "bundle")
    tokenizer, conversation = engine.tokenizer, Conversation.open(engine, "be brief")
    script = iter([*tokenizer.encode("it is</think> seven", special=False).tolist(), END] * 2)
    engine.session("lm_head").run = lambda **_: {"logits": np.eye(1, END + 1, next(script), dtype=np.float32)}
    for question in ("Who?", "And?"):
        *_, done = conversation.reply([Text(question)], Choices(greedy=True))
        assert isinstance(done, ReplyDone) and done.text == "it is</think> seven"
        asked = conversation.context.ids
        assert tokenizer.decode(asked, skip_special=False).count("<think>") == 0  # read once more, as a history
    conversation.reply([Text("me")], Choices(greedy=True)).close()
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    said = [("system", "be brief"), ("user", "Who?"), ("assistant", " seven"), ("user", "And?")]
    pending = conversation._pending  # pyright: ignore[reportPrivateUsage]
    assert pending is not None
    whole = "".join(turn(*each) for each in [*said, ("assistant", " seven")])
    assert [*conversation.context.ids, *pending.ids.tolist()] == tokenizer.encode(whole, special=True).tolist()[:-1]
    assert pending.run == "\n"


@pytest.mark.parametrize("scheme", [None, "first"])
def test_a_checkpoint_with_sentencepiece_pieces_is_exported_opened_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str | None
) -> None:
    count = len(json.loads(tiny_pieces.tokenizer_json())["model"]["vocab"])
    with monkeypatch.context() as larger:
        larger.setattr(tiny_llama, "tokens", lambda: [""] * count)
        weights = tiny_llama.tensors()
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", weights, eos_token_id=2, vocab_size=count)
    tiny_pieces.save(checkpoint, scheme)
    write(checkpoint / "tokenizer_config.json", {"chat_template": chat_templates.ZEPHYR, **chat_templates.S})
    export(checkpoint, tmp_path / "bundle", random=True)
    conversation = Conversation.open(Engine(tmp_path / "bundle"), "be brief", seed=0)
    for question in ("the tree", "Who?"):
        *_, done = conversation.reply([Text(question)], Choices(max_new=12))
        assert isinstance(done, ReplyDone)
    ids = conversation.context.ids
    expected = conversation.engine.tokenizer.encode("<|system|>\nbe brief</s>\n<|user|>\nthe tree</s>\n", special=True)
    assert ids[: len(expected) - 1] == expected.tolist()[:-1]


def test_a_special_token_that_only_the_tokenizer_config_names_is_one_token(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    path = checkpoint / "tokenizer.json"
    document = json.loads(path.read_text())
    for token in document["added_tokens"]:
        document["model"]["vocab"][token["content"]] = token["id"]
    write(path, document | {"added_tokens": []})
    names = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    write(checkpoint / "tokenizer_config.json", {"chat_template": tiny_llama.TEMPLATE, **names})
    export(checkpoint, tmp_path / "bundle", random=True)
    ids = Engine(tmp_path / "bundle").format.user_turn([Text("a")], spoken=False).ids.tolist()
    assert (ids[0], ids.count(END), ids.count(END - 1)) == (END - 1, 1, 2)


def test_a_tokenizer_that_the_runtime_could_not_open_is_refused_at_export(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    path = checkpoint / "tokenizer.json"
    write(path, json.loads(path.read_text()) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}})
    assert "decodes by WordPiece, expected ByteLevel" in refused(checkpoint)
