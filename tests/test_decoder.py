"""The text decoder and the graphs around it: recorded values, and what a cache of keys and values must never change."""

import threading
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.config import DecoderConfig
from export.decoder import decoder, embed_audio, rotary_tables
from export.graph import FLOAT, FLOAT16
from export.parity.graphs import Graphs
from export.parity.llm import GROUP, UNCOVERED, empty_cache, read, replay, split_turns
from export.parity.replay import judge
from runtime.bundle import Manifest, PromptTemplate, read_bundle
from runtime.errors import CheckpointError, EdgeOmniError
from runtime.generate import Decoder
from runtime.kv_cache import KVCache
from tests.tiny import GOLDEN, golden_config, golden_graphs, omni_bundle, random_graphs

RECORDED = GOLDEN.arrays(GROUP)
ROWS = RECORDED["mixed.embeds"][0][:60]
CONFIG = golden_config()


@cache
def opened() -> tuple[Graphs, Manifest]:
    manifest = read_bundle(omni_bundle())
    return Graphs(omni_bundle(), manifest.graphs), manifest


@cache
def verdicts() -> dict[str, Any]:
    return {part.name: judge(part, RECORDED[part.name.split("/")[1]]) for part in replay(GOLDEN, *opened())}


def reader(capacity: int = 128) -> Decoder:
    """The bundle's decoder on a cache of its own; all of them share one session."""
    graphs, manifest = opened()
    return Decoder(graphs.session("decoder"), manifest, KVCache(manifest.cache, capacity))


def read_all(decoder: Decoder, rows: np.ndarray) -> np.ndarray:
    """The last hidden state [hidden] behind rows [n, hidden]."""
    *_, hidden = decoder.prefill(rows)
    return hidden[0].copy()


def held(decoder: Decoder) -> dict[str, np.ndarray]:
    """Keys and values of the positions that were read."""
    return {name: buffer[:, :, : decoder.cache.length].copy() for name, buffer in decoder.cache.buffers.items()}


@cache
def whole() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    decoder = reader()
    return read_all(decoder, ROWS), held(decoder)


@pytest.mark.parametrize(
    "name", [n for n in RECORDED if not any(fnmatch(f"{GROUP}/{n}", known) for known in UNCOVERED)]
)
def test_a_recorded_array_comes_out_again(name: str) -> None:
    verdict = verdicts()[f"{GROUP}/{name}"]
    assert verdict.passed, verdict.problem


def test_every_excuse_is_needed() -> None:
    left = {f"{GROUP}/{name}" for name in RECORDED} - verdicts().keys()
    assert all(any(fnmatch(name, pattern) for name in left) for pattern in UNCOVERED)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, len(ROWS) - 1), max_size=6, unique=True).map(sorted))
def test_a_prefill_in_pieces_equals_one_shot(cuts: list[int]) -> None:
    decoder = reader()
    *_, last = [read_all(decoder, rows) for rows in np.split(ROWS, cuts)]
    hidden, cache = whole()
    np.testing.assert_allclose(last, hidden, atol=1e-5)
    for name, array in held(decoder).items():
        np.testing.assert_allclose(array, cache[name], atol=1e-5)


def test_steps_of_one_position_equal_one_shot() -> None:
    decoder = reader()
    *_, last = [decoder.decode_step(row[None])[0].copy() for row in ROWS]
    np.testing.assert_allclose(last, whole()[0], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, len(ROWS) - 2), st.integers(1, 20))
def test_rewound_is_as_good_as_fresh_to_the_last_bit(kept: int, forgotten: int) -> None:
    """What lies behind the rewound length in the buffers is never looked at."""
    rng = np.random.default_rng(kept)
    rewound, fresh = reader(), reader()
    read_all(rewound, ROWS[:kept])
    read_all(rewound, rng.standard_normal((forgotten, ROWS.shape[1]), np.float32))
    rewound.cache.truncate(kept)
    read_all(fresh, ROWS[:kept])
    np.testing.assert_array_equal(read_all(rewound, ROWS[kept:]), read_all(fresh, ROWS[kept:]))
    for ours, expected in zip(held(rewound).values(), held(fresh).values(), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_two_caches_on_one_session_do_not_know_of_each_other() -> None:
    ours, other, alone = reader(), reader(), reader()
    noise = np.random.default_rng(0).standard_normal(ROWS.shape).astype(np.float32)
    expected = [alone.decode_step(row[None]).copy() for row in ROWS]
    for row, strange, hidden in zip(ROWS, noise, expected, strict=True):
        step = ours.decode_step(row[None]).copy()
        other.decode_step(strange[None])
        np.testing.assert_array_equal(step, hidden)


def test_two_threads_may_run_one_session_on_two_caches_at_once() -> None:
    results: dict[int, list[np.ndarray]] = {0: [], 1: []}
    sources = [ROWS, ROWS[::-1].copy()]

    def run(which: int) -> None:
        decoder = reader()
        results[which] = [decoder.decode_step(row[None]).copy() for row in sources[which]]

    threads = [threading.Thread(target=run, args=(which,)) for which in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, source in enumerate(sources):
        alone = reader()
        for row, hidden in zip(source, results[which], strict=True):
            np.testing.assert_array_equal(hidden, alone.decode_step(row[None]))


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_the_size_of_the_buffers_changes_nothing(capacity: int) -> None:
    decoder = reader(capacity)
    read_all(decoder, ROWS[:50])
    np.testing.assert_allclose(read_all(decoder, ROWS[50:]), whole()[0], atol=1e-5)


def test_reading_in_place_equals_reading_into_new_arrays() -> None:
    graphs, manifest = opened()
    hidden, cache = read(graphs, ROWS, empty_cache(manifest))
    np.testing.assert_allclose(hidden[-1], whole()[0], atol=1e-5)
    for name, array in cache.items():
        np.testing.assert_allclose(array, whole()[1][name], atol=1e-5)


def test_a_position_depends_on_those_before_it_alone() -> None:
    graphs, manifest = opened()
    changed = ROWS.copy()
    changed[40:] += 1
    ours, theirs = (read(graphs, rows, empty_cache(manifest))[0] for rows in (ROWS, changed))
    np.testing.assert_allclose(ours[:40], theirs[:40], atol=1e-5)
    assert np.abs(ours[40:] - theirs[40:]).max() > 1e-2


def test_a_batch_of_two_is_refused_by_name() -> None:
    graphs, manifest = opened()
    two = np.stack([ROWS, ROWS])
    feeds = {f"past.{name}": array for name, array in empty_cache(manifest).items()}
    length = np.array(len(ROWS), np.int32)
    with pytest.raises(EdgeOmniError, match=r"inputs_embeds is float32\[2, 60, 128\], expected float32\[1, 'sequence'"):
        graphs.run(
            "decoder", {"inputs_embeds": two, "seqlens_k": length[None] - 1, "total_sequence_length": length, **feeds}
        )


def test_keys_follow_the_first_position_and_hidden_states_do_not() -> None:
    """Recorded: keys with positions from 0, as a bare forward() of the official code has them."""
    from_zero = golden_graphs(decoder(replace(CONFIG.decoder, first_position=0), "cpu"))
    hidden, cache = read(from_zero, RECORDED["mixed.embeds"][0], empty_cache(opened()[1]))
    expected = RECORDED["mixed.prefill_k0_pos0"]
    assert np.abs(cache["0.key"] - expected).max() < 2e-4 * np.abs(expected).max()
    assert np.abs(cache["0.key"] - RECORDED["mixed.prefill_k0"]).max() > 0.1
    assert np.abs(hidden - RECORDED["mixed.hidden"][0]).max() < 2e-4 * np.abs(RECORDED["mixed.hidden"]).max()


def test_rotary_tables_hold_every_position_of_the_context() -> None:
    config = replace(CONFIG.decoder, max_position_embeddings=37, head_dim=16, first_position=1)
    cos, sin = rotary_tables(config)
    assert cos.shape == sin.shape == (37, 8)
    np.testing.assert_allclose(cos[:, 0], np.cos(np.arange(1, 38)), atol=1e-6)
    slowest = 37 / config.rope_theta ** (14 / 16)
    np.testing.assert_allclose(sin[-1, -1], np.sin(slowest), rtol=1e-5)


ODD = DecoderConfig(  # no power of two but the 16 that the attention operator asks of a head
    vocab_size=41,
    hidden_size=30,
    intermediate_size=50,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=48,
    rope_theta=5000.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_interleaved=True,
)


def plain_attention(x: np.ndarray, tensors: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """Grouped-query attention with interleaved rotary positions, in float64 and without a cache."""
    path, dim = f"model.layers.{layer}.self_attn", ODD.head_dim
    heads, kv_heads = ODD.num_attention_heads, ODD.num_key_value_heads
    packed = (x @ tensors[f"{path}.W_pack.weight"].T).reshape(len(x), heads + 2 * kv_heads, dim)
    frequency = ODD.rope_theta ** (-np.arange(0, dim, 2) / dim)
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequency)
    pairs = packed[:, : heads + kv_heads].reshape(len(x), heads + kv_heads, dim // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    rotated = np.stack([turned.real, turned.imag], axis=-1).reshape(len(x), heads + kv_heads, dim)
    q, k, v = rotated[:, :heads], rotated[:, heads:], packed[:, heads + kv_heads :]
    k, v = (np.repeat(side, heads // kv_heads, axis=1) for side in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1) @ tensors[f"{path}.o_proj.weight"].T


def plain_decoder(x: np.ndarray, tensors: dict[str, np.ndarray]) -> np.ndarray:
    def norm(x: np.ndarray, key: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + ODD.rms_norm_eps) * tensors[f"{key}.weight"]

    for layer in range(ODD.num_hidden_layers):
        path = f"model.layers.{layer}"
        x = x + plain_attention(norm(x, f"{path}.input_layernorm"), tensors, layer)
        h = norm(x, f"{path}.post_attention_layernorm")
        gate, up = (h @ tensors[f"{path}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tensors[f"{path}.mlp.down_proj.weight"].T
    return norm(x, "model.norm")


def test_other_sizes_interleaved_rotary_and_no_bias_agree_with_plain_numpy() -> None:
    graphs, tensors = random_graphs(decoder(ODD, "cpu"))
    rows = np.random.default_rng(0).standard_normal((20, ODD.hidden_size)).astype(np.float32)
    layout = {
        f"{i}.{side}": np.zeros((1, 3, 0, ODD.head_dim), np.float32) for i in range(3) for side in ("key", "value")
    }
    hidden, cache = read(graphs, rows[:13], layout)
    behind, _ = read(graphs, rows[13:], cache)
    expected = plain_decoder(rows.astype(np.float64), {key: array.astype(np.float64) for key, array in tensors.items()})
    np.testing.assert_allclose(np.concatenate([hidden, behind]), expected, atol=2e-5 * np.abs(expected).max())


def test_a_head_that_the_attention_operator_cannot_take_is_refused_at_export() -> None:
    with pytest.raises(CheckpointError, match=r"head_dim is 24.* multiples of 16"):
        decoder(replace(ODD, head_dim=24), "cpu")


def test_the_row_of_a_frame_is_the_sum_of_its_codes_embeddings() -> None:
    graphs, tensors = random_graphs(embed_audio(ODD, (5, 3, 4), "cpu"))
    codes = np.array([[5, 0, 3], [0, 2, 4]])
    rows = graphs.run("embed_audio", {"codes": codes})["rows"]
    tables = [tensors[f"model.audio_embed_layers.{book}.weight"] for book in range(3)]
    np.testing.assert_allclose(rows, sum(table[codes[:, book]] for book, table in enumerate(tables)), atol=1e-6)


def test_fp16_weights_change_hidden_states_by_less_than_a_hundredth() -> None:
    exact, manifest = opened()
    narrow = golden_graphs(decoder(CONFIG.decoder, "cuda"))
    cache = {name: array.astype(np.float16) for name, array in empty_cache(manifest).items()}
    hidden, _ = read(narrow, ROWS, cache)
    expected, _ = read(exact, ROWS, empty_cache(manifest))
    assert np.abs(hidden - expected).max() < 1e-2 * np.abs(expected).max()


def test_residuals_are_summed_in_fp32_where_matrices_are_fp16() -> None:
    """Qwen2.5 has residuals in the thousands, which in fp16 would swallow what the later layers add."""
    nodes = list(decoder(CONFIG.decoder, "cuda").model.graph)
    norms = [node.inputs[0] for node in nodes if node.op_type == "SimplifiedLayerNormalization"]
    products = [node.outputs[0] for node in nodes if node.op_type == "FusedMatMul"]
    assert len(norms) == 2 * CONFIG.decoder.num_hidden_layers + 1
    assert {value.dtype for value in norms if value} == {FLOAT}
    assert {value.dtype for value in products} == {FLOAT16}


def test_a_prompt_string_falls_into_its_turns() -> None:
    template = PromptTemplate(
        system=("<S>", ""), user=("<U>", ""), assistant=("<A>", ""), spoken_assistant=("<V><A>", "")
    )
    assert split_turns("<S>be kind<U>hi<V><A>hello<U>bye<A>", template) == [
        ("system", "be kind"),
        ("user", "hi"),
        ("spoken", "hello"),
        ("user", "bye"),
        ("assistant", ""),
    ]
    assert split_turns("no roles at all", template) == []
