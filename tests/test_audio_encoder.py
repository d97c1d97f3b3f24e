"""The audio encoder: recorded values of the official code, lengths, and what the quantizer may not get wrong."""

from dataclasses import replace
from fnmatch import fnmatch
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.audio_encoder import BRIDGE, MODEL, Codebook, audio_encoder
from export.config import AudioConfig, VQConfig
from export.families.baichuan_omni_1_5 import audio_front_end
from export.graph import author
from export.parity.audio_in import ENCODER, FRONT_END, UNCOVERED, replay_encoder, replay_front_end
from export.parity.graphs import Graphs
from runtime.audio import lengths
from runtime.bundle import Port
from tests.tiny import GOLDEN, golden_config, golden_graphs, random_graphs

CONFIG = golden_config().audio_config
ODD = replace(  # no width is a multiple of 8
    CONFIG,
    num_mel_bins=11,
    d_model=18,
    encoder_attention_heads=3,
    encoder_ffn_dim=21,
    avg_pooler=3,
    vq_config=VQConfig((7, 5, 3)),
)
WIDTHS = {MODEL: ODD.d_model, BRIDGE: ODD.bridge_dim}
ARRAYS = {f"{group}/{name}": array for group in (FRONT_END, ENCODER) for name, array in GOLDEN.arrays(group).items()}


@cache
def graphs() -> Graphs:
    return golden_graphs(audio_encoder(CONFIG, "cpu"))


@cache
def odd_graphs() -> tuple[Graphs, dict[str, np.ndarray]]:
    """Random, but with frames that differ by enough to spread over the codewords."""
    far_apart = np.random.default_rng(0).standard_normal((ODD.max_frames // ODD.stride_size, ODD.d_model))
    centred = {f"{part}.layer_norm.bias": np.zeros(width, np.float32) for part, width in WIDTHS.items()}
    positions = {f"{MODEL}.positional_embedding": 3 * far_apart.astype(np.float32)}
    return random_graphs(audio_encoder(ODD, "cpu"), tensors={**centred, **positions})


def codebook(index: int) -> str:
    return f"{BRIDGE}.vq_list.{index}.codebook.embed"


def random_mel(config: AudioConfig, frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, config.num_mel_bins, frames), np.float32)


def test_every_recorded_array_is_replayed_within_its_tolerance():
    front, seen = audio_front_end(CONFIG), set()
    for part in (replay_front_end(GOLDEN, front), replay_encoder(GOLDEN, graphs(), front)):
        for replayed in part:
            expected = ARRAYS[replayed.name]
            seen.add(replayed.name)
            assert replayed.ours.shape == expected.shape, replayed.name
            if expected.dtype.kind == "i":
                assert np.array_equal(replayed.ours, expected), replayed.name
            else:
                error = np.abs(replayed.ours - expected).max() / np.abs(expected).max()
                assert error <= replayed.tolerance, f"{replayed.name}: {error:.2e}"
    left = ARRAYS.keys() - seen
    assert all(any(fnmatch(name, pattern) for pattern in UNCOVERED) for name in left), left
    assert all(any(fnmatch(name, pattern) for name in left) for pattern in UNCOVERED)


@pytest.mark.parametrize("frames", range(7, 40))
def test_a_segment_gives_as_many_codes_as_the_runtime_expects(frames):
    expected = lengths((frames - 1) * ODD.hop_length, audio_front_end(ODD))
    codes = odd_graphs()[0].run("audio_encoder", {"mel": random_mel(ODD, frames)})["codes"]
    assert codes.shape == (expected.codes, len(ODD.vq_config.codebook_sizes))
    assert codes.dtype == np.int64


def test_the_longest_segment_uses_the_whole_position_table():
    mel = random_mel(ODD, ODD.max_frames)
    codes = odd_graphs()[0].run("audio_encoder", {"mel": mel})["codes"]
    assert len(codes) == ODD.max_frames // ODD.stride_size // ODD.avg_pooler


@settings(max_examples=20, deadline=None)
@given(st.integers(7, 60), st.integers(0, 1000))
def test_each_code_is_the_nearest_codeword_to_what_earlier_codebooks_left(frames, seed):
    opened, tensors = odd_graphs()
    results = opened.run("audio_encoder", {"mel": random_mel(ODD, frames, seed)}, (f"{BRIDGE}.out",))
    left = results[f"{BRIDGE}.out"][0, : len(results["codes"])].astype(np.float64)
    for book in range(len(ODD.vq_config.codebook_sizes)):
        codewords = tensors[codebook(book)]
        distances = np.linalg.norm(left[:, None] - codewords, axis=2)
        chosen = results["codes"][:, book]
        nearest = distances.min(axis=1)
        assert np.all(distances[np.arange(len(left)), chosen] <= nearest * (1 + 1e-6))
        left -= codewords[chosen]


def nearest(r: np.ndarray, embed: np.ndarray, squared_norm: np.ndarray) -> np.ndarray:
    """Distances of one codebook's own graph, filled by hand."""
    book = Codebook(*embed.shape)
    subgraph = author(
        "codebook",
        book,
        [Port("r", "float32", ("n", embed.shape[1]))],
        [Port("distance", "float32", ("n", len(embed)))],
    )
    given_by_hand = {"embed": embed, "squared_norm": squared_norm}
    return random_graphs(subgraph, tensors=given_by_hand)[0].run("codebook", {"r": r})["distance"]


def test_a_codeword_itself_has_distance_zero_though_rounding_may_make_its_square_negative():
    embed = np.random.default_rng(0).standard_normal((50, 37)).astype(np.float32)
    distance = nearest(embed, embed, (embed.astype(np.float64) ** 2).sum(axis=1).astype(np.float32))
    assert np.all(np.isfinite(distance))
    assert np.array_equal(distance.argmin(axis=1), np.arange(len(embed)))
    assert distance.diagonal().max() < 5e-3


def test_the_square_root_decides_ties_as_the_official_code_does():
    just_above_one = np.nextafter(np.float32(1), np.float32(2))  # its square root rounds to 1
    distance = nearest(np.zeros((1, 3), np.float32), np.zeros((2, 3), np.float32), np.array([just_above_one, 1]))
    assert distance.tolist() == [[1.0, 1.0]]


def test_of_equally_near_codewords_the_first_is_taken():
    tensors = odd_graphs()[1]
    twice = np.repeat(tensors[codebook(0)][:4], 2, axis=0)[: ODD.vq_config.codebook_sizes[0]]  # a a b b c c d
    opened, _ = random_graphs(audio_encoder(ODD, "cpu"), tensors={**tensors, codebook(0): twice})
    codes = opened.run("audio_encoder", {"mel": random_mel(ODD, 200)})["codes"][:, 0]
    assert set(codes) == {0, 2, 4, 6}


def test_the_quantizer_and_all_norms_stay_fp32_where_the_rest_is_fp16():
    dtypes = {str(value.name): value.dtype.name for value in audio_encoder(CONFIG, "cuda").parameters() if value.dtype}
    exact = {name for name in dtypes if "vq_list" in name or "norm" in name or "positional" in name}
    assert {dtypes[name] for name in exact} == {"FLOAT"}
    assert {dtypes[name] for name in dtypes.keys() - exact} == {"FLOAT16"}


def test_fp16_weights_change_no_code_of_the_recorded_speech():
    opened = golden_graphs(audio_encoder(CONFIG, "cuda"))
    codes = opened.run("audio_encoder", {"mel": ARRAYS[f"{FRONT_END}/w0.seg0.logmel"][None]})["codes"]
    assert np.array_equal(codes, ARRAYS[f"{ENCODER}/w0.seg0.codes"])
