"""Rotary scaling: cosines and sines of transformers from config.json, the same from a GGUF, and clear refusals."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.bench.model import read_text_model
from export.config import DecoderConfig
from export.convert import export, plan
from export.decoder import rotary_tables
from export.rotary import base_frequencies, read_scaling, scaled
from runtime.errors import CheckpointError, EdgeOmniError
from tests import tiny_llama

# As Llama 3.1's files have it.
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHORT: dict[str, Any] = {"rope_type": "llama3", **LLAMA31, "original_max_position_embeddings": 16}
IDS = [72, 101, 7, 9, 30, 5, 8, 1, 2] * 5
YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def divisors(dim: int, theta: float, factor: float, low: float, high: float, context: int) -> list[float]:
    """By how much Llama 3.1 slows each pair, worked out pair by pair from how often it turns in the first context."""
    found = []
    for pair in range(dim // 2):
        turns = context / (2 * math.pi * theta ** (2 * pair / dim))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - share) / factor + share))
    return found


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(path, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pairs_that_turn_often_stay_and_slow_ones_are_slowed_by_the_factor() -> None:
    base = base_frequencies(500000.0, 128)
    found = scaled(base, read_scaling({"rope_type": "llama3", **LLAMA31}, 131072, "x"), 500000.0).frequencies
    expected = base / divisors(128, 500000.0, 8.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found[:28] == base[:28]).all() and (found[-20:] == base[-20:] / 8).all()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["llama3", "linear", "yarn", "yarn, said whole", "yarn with mscale", "dynamic"])
def test_cosines_and_sines_are_those_of_transformers(kind: str) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    second = {"beta_slow": 2.0, "attention_factor": 1.25, "truncate": False, "original_max_position_embeddings": 4096}
    stated: dict[str, dict[str, Any]] = {
        "llama3": {"rope_type": "llama3", **LLAMA31, "factor": 32.0},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        "yarn, said whole": {"rope_type": "yarn", "factor": 2.5, "beta_fast": 16.0, **second},
        "yarn with mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.4},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    }
    positions, theta = 8192, 500000.0
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": positions,
    }
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters={"rope_theta": theta, **stated[kind]}))
    cos, sin = (half[0, :, :32].numpy() for half in theirs(torch.zeros(1), torch.arange(positions)[None]))
    rotation = scaled(base_frequencies(theta, 64), read_scaling(stated[kind], positions, "x"), theta)
    ours = DecoderConfig(
        vocab_size=8,
        hidden_size=256,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        rope_theta=theta,
        rms_norm_eps=1e-6,
        max_position_embeddings=positions,
        rope_frequencies=tuple(rotation.frequencies.tolist()),
        rope_length=rotation.length,
    )
    for found, expected in zip(rotary_tables(ours), (cos, sin), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-3)  # an ulp of a frequency, 8192 positions on
        np.testing.assert_allclose(found[:64], expected[:64], atol=2e-5)


def test_a_gguf_of_llama_3_1_turns_as_its_folder_does(tmp_path: Path) -> None:
    weights = tiny_llama.tensors()
    export(tiny_llama.save(tmp_path / "folder", weights, rope_scaling=SHORT), tmp_path / "one", random=True)
    frequencies = np.array(divisors(tiny_llama.HEAD_DIM, 10000.0, 8.0, 1.0, 4.0, 16), np.float32)
    path = tiny_llama.save_gguf(tmp_path / "a.gguf", {**weights, "rope_freqs.weight": frequencies})
    export(path, tmp_path / "two", random=True)
    export(tiny_llama.save(tmp_path / "plain", weights), tmp_path / "three", random=True)
    one, two, plain = (tiny_llama.logits(tmp_path / name, IDS) for name in ("one", "two", "three"))
    np.testing.assert_allclose(two, one, atol=1e-4)
    assert np.abs(plain - one).max() > 0.01


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"type": "default"}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            YARN,
        ),
    ],
)
def test_scaling_that_a_gguf_states_is_that_of_the_same_config(
    tmp_path: Path, metadata: dict[str, Any], scaling: dict[str, Any]
) -> None:
    weights = tiny_llama.tensors()
    export(tiny_llama.save(tmp_path / "folder", weights, rope_scaling=scaling), tmp_path / "one", random=True)
    stated = {f"llama.{key}": value for key, value in metadata.items()}
    export(tiny_llama.save_gguf(tmp_path / "a.gguf", weights, metadata=stated), tmp_path / "two", random=True)
    one, two = (tiny_llama.logits(tmp_path / name, IDS) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        (True, "rope_scaling is True, expected an object"),
        ([8.0], "rope_scaling is [8.0], expected an object"),
        ({"rope_type": "longrope", "factor": 4.0}, "'longrope' is not built, expected 'default', 'linear'"),
        ({"rope_type": ["yarn"]}, "['yarn'] is not built"),
        ({"rope_type": "llama3", "factor": 8.0}, "'llama3' needs low_freq_factor, high_freq_factor"),
        ({**SHORT, "factor": 0}, "factor is 0"),
        ({**SHORT, "factor": "8"}, "factor is '8'"),
        ({**SHORT, "high_freq_factor": 1.0}, "low_freq_factor and high_freq_factor are both 1.0"),
        ({**SHORT, "original_max_position_embeddings": 2**40}, "original_max_position_embeddings is 1099511627776"),
        ({"full_attention": {"rope_type": "default"}}, "differs by kinds of layers (full_attention)"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_scaling_that_means_nothing_or_is_not_built_is_refused_in_one_line(
    tmp_path: Path, scaling: object, named: str
) -> None:
    message = refused(tiny_llama.save(tmp_path / "checkpoint", None, rope_scaling=scaling))
    assert named in message and "config.json" in message


@pytest.mark.parametrize("factors", [[1.0], [0.0] * 8, [float("nan")] * 8])
def test_frequencies_of_a_gguf_that_do_not_fit_its_heads_are_refused(tmp_path: Path, factors: list[float]) -> None:
    weights = {**tiny_llama.tensors(), "rope_freqs.weight": np.array(factors, np.float32)}
    assert "rope_freqs.weight" in refused(tiny_llama.save_gguf(tmp_path / "a.gguf", weights))


def test_other_programs_are_not_given_a_scaled_model_as_a_plain_one(tmp_path: Path) -> None:
    for scaling in (SHORT, {"type": "linear", "factor": 2.0}, YARN):
        export(
            tiny_llama.save(tmp_path / "a", None, rope_scaling=scaling), tmp_path / "bundle", random=True, force=True
        )
        with pytest.raises(EdgeOmniError, match="its rotary positions are scaled"):
            read_text_model(tmp_path / "bundle")
