"""The vision tower and its projector: recorded values of the official code, and what positions do."""

from dataclasses import replace
from fnmatch import fnmatch
from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from export.config import VisionConfig
from export.families.baichuan_omni_1_5 import vision_front_end
from export.parity.graphs import Graphs
from export.parity.vision import GROUP, UNCOVERED, replay_pictures
from export.vision_encoder import ENCODER, patch_size, vision_encoder, vision_projector
from runtime.image import rotary_positions
from tests.tiny import GOLDEN, golden_config, golden_graphs, random_graphs

OMNI = golden_config()
assert OMNI.visual_config is not None and OMNI.video_config is not None
CONFIG, FRAMES = OMNI.visual_config, OMNI.video_config
ODD = replace(CONFIG, depth=1, embed_dim=36, num_heads=3, patch_size=3, mlp_ratio=1.5, hidden_size=22)  # heads of 12
ARRAYS = {f"{GROUP}/{name}": array for name, array in GOLDEN.arrays(GROUP).items()}


@cache
def graphs() -> Graphs:
    return golden_graphs(vision_encoder(CONFIG, "cpu"), vision_projector(CONFIG, "cpu"))


@cache
def odd_graphs() -> tuple[Graphs, dict[str, np.ndarray]]:
    return random_graphs(vision_encoder(ODD, "cpu"), vision_projector(ODD, "cpu"))


def random_patches(config: VisionConfig, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, patch_size(config)), np.float32)


def features(patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return odd_graphs()[0].run("vision_encoder", {"patches": patches, "positions": positions})["features"]


def assert_close(ours: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def test_every_recorded_array_is_replayed_within_its_tolerance():
    seen = set()
    for replayed in replay_pictures(GOLDEN, graphs(), vision_front_end(CONFIG), vision_front_end(FRAMES)):
        expected = ARRAYS[replayed.name].astype(np.float64)
        seen.add(replayed.name)
        exact = ARRAYS[replayed.name].dtype.kind in "iu"
        assert replayed.ours.shape == expected.shape, replayed.name
        error = np.abs(replayed.ours - expected).max() / np.abs(expected).max()
        assert error <= (0 if exact else replayed.tolerance), f"{replayed.name}: {error:.2e}"
    left = ARRAYS.keys() - seen
    assert all(any(fnmatch(name, pattern) for pattern in UNCOVERED) for name in left), left


def test_heads_of_any_even_size_turn_by_rows_and_columns():
    grid = (1, 6, 4)
    patches, positions = random_patches(ODD, 24), rotary_positions(grid, ODD.spatial_merge_size)
    assert_close(features(patches, positions), one_block(patches, positions), 1e-5)


def test_a_nearly_flat_picture_is_normalised_with_an_epsilon_of_a_millionth():
    patches, positions = 1e-3 * random_patches(ODD, 16), rotary_positions((1, 4, 4), 2)
    assert_close(features(patches, positions), one_block(patches, positions), 1e-4)


def one_block(patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """ODD's tower spelled out in float64, with complex numbers that turn."""
    w = {key.removeprefix(f"{ENCODER}."): value.astype(np.float64) for key, value in odd_graphs()[1].items()}
    frequencies = 10000.0 ** (-4 * np.arange(ODD.head_dim // 4) / ODD.head_dim)
    angles = np.concatenate([np.outer(positions[:, axis], frequencies) for axis in (0, 1)], axis=1)
    x = patches @ w["patch_embed.proj.weight"].reshape(ODD.embed_dim, -1).T
    h = norm(x, w["blocks.0.norm1.weight"], w["blocks.0.norm1.bias"])
    q, k, v = np.split(h @ w["blocks.0.attn.qkv.weight"].T + w["blocks.0.attn.qkv.bias"], 3, axis=1)
    q, k, v = (np.split(y, ODD.num_heads, axis=1) for y in (q, k, v))
    heads = [attend(*head, angles) for head in zip(q, k, v, strict=True)]
    x = x + np.concatenate(heads, axis=1) @ w["blocks.0.attn.proj.weight"].T + w["blocks.0.attn.proj.bias"]
    h = norm(x, w["blocks.0.norm2.weight"], w["blocks.0.norm2.bias"])
    h = h @ w["blocks.0.mlp.fc1.weight"].T + w["blocks.0.mlp.fc1.bias"]
    h = h / (1 + np.exp(-1.702 * h))
    return x + h @ w["blocks.0.mlp.fc2.weight"].T + w["blocks.0.mlp.fc2.bias"]


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6) * weight + bias


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, angles: np.ndarray) -> np.ndarray:
    def turn(y: np.ndarray) -> np.ndarray:
        real, imaginary = np.split(y, 2, axis=1)
        turned = (real + 1j * imaginary) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=1)

    scores = turn(q) @ turn(k).T / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500))
def test_only_the_distance_between_patches_matters(rows, columns):
    patches, positions = random_patches(ODD, 16), rotary_positions((1, 4, 4), 2)
    assert_close(features(patches, positions + np.array([rows, columns])), features(patches, positions), 2e-4)


def test_rows_are_not_columns():
    patches, positions = random_patches(ODD, 16), rotary_positions((1, 4, 4), 2)
    difference = features(patches, positions) - features(patches, positions[:, ::-1].copy())
    assert np.abs(difference).max() > 1e-3


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(16)))
def test_patches_that_keep_their_positions_may_come_in_any_order(order):
    patches, positions = random_patches(ODD, 16), rotary_positions((1, 4, 4), 2)
    assert_close(features(patches[order], positions[order]), features(patches, positions)[order], 1e-5)


def test_each_merge_block_becomes_a_row_of_its_own():
    values = np.random.default_rng(0).standard_normal((12, ODD.embed_dim)).astype(np.float32)
    opened = odd_graphs()[0]
    together = opened.run("vision_projector", {"features": values})["rows"]
    apart = [opened.run("vision_projector", {"features": block})["rows"] for block in np.split(values, 3)]
    assert together.shape == (3, ODD.hidden_size)
    assert_close(together, np.concatenate(apart), 1e-5)


def test_fp16_weights_keep_the_residual_stream_in_fp32():
    subgraphs = vision_encoder(CONFIG, "cuda"), vision_projector(CONFIG, "cuda")
    assert [subgraph.outputs[0].dtype for subgraph in subgraphs] == ["float32", "float16"]
    opened = golden_graphs(*subgraphs)
    grid = tuple(GOLDEN.tables["images"]["i0"]["grid_thw"])
    feeds = {"patches": ARRAYS[f"{GROUP}/i0.patches"], "positions": rotary_positions(grid, CONFIG.spatial_merge_size)}
    values = opened.run("vision_encoder", feeds)["features"]
    assert_close(values, ARRAYS[f"{GROUP}/i0.vit_out"], 2e-3)
    rows = opened.run("vision_projector", {"features": values})["rows"]
    assert_close(rows, ARRAYS[f"{GROUP}/i0.projector_out"], 2e-3)
