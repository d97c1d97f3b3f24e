"""The audio decoder: recorded values of the official code, chunks against the whole, and codes of other shapes."""

from dataclasses import replace
from fnmatch import fnmatch
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.audio_decoder import BRIDGE, DECODER, audio_decoder, frames_short
from export.checkpoint import open_checkpoint
from export.config import AudioConfig, VQConfig
from export.families.baichuan_omni_1_5 import speech_layout, tensors
from export.parity.graphs import Graphs
from export.parity.replay import judge
from export.parity.speech_out import STATES, UNCOVERED, moments, replay_states
from runtime.bundle import Profile
from runtime.session import Carried
from tests.tiny import CHECKPOINT, GOLDEN, golden_config, golden_graphs, random_graphs

CONFIG = golden_config().audio_config
ODD = replace(  # no width is a multiple of 8
    CONFIG,
    d_model=18,
    decoder_attention_heads=3,
    decoder_ffn_dim=21,
    decoder_layers=1,
    avg_pooler=3,
    decoder_kernel_size=2,
    vq_config=VQConfig((7, 5, 3)),
)
OVERLAPPING = replace(CONFIG, avg_pooler=2, decoder_kernel_size=5)  # each code reaches into the next two
ARRAYS = {f"{STATES}/{name}": array for name, array in GOLDEN.arrays(STATES).items()}
CONV, NORMED = f"{DECODER}.dconv1.conv.out", f"{DECODER}.dconv1.out"


@cache
def graphs(profile: Profile = "cpu") -> Graphs:
    return golden_graphs(audio_decoder(CONFIG, profile))


@cache
def overlapping() -> Graphs:
    return random_graphs(audio_decoder(OVERLAPPING, "cpu"))[0]


def frames_of(codes: np.ndarray, config: AudioConfig = CONFIG, *, ends: bool = True) -> int:
    return config.avg_pooler * len(codes) - (frames_short(config) if ends else 0)


def run(
    graphs: Graphs, codes: np.ndarray, frames: int, taps: tuple[str, ...] = (), norm: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    past = Carried(graphs.session("audio_decoder")).state
    if norm is not None:
        past["past.norm"] = norm
    return graphs.run("audio_decoder", {"codes": codes, "frames": np.array(frames), **past}, taps)


def random_codes(length: int, config: AudioConfig = CONFIG, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, length) for size in config.vq_config.codebook_sizes], axis=1)


def merged(*parts: np.ndarray) -> np.ndarray:
    """Count, mean and sum of squared deviations of all values together."""
    values = np.concatenate([part.reshape(-1) for part in parts]).astype(np.float64)
    return np.array([values.size, values.mean(), values.size * values.var()])


def test_every_recorded_array_is_replayed_within_its_tolerance():
    layout = speech_layout(golden_config(), tensors(open_checkpoint(CHECKPOINT)))
    verdicts = [judge(replayed, ARRAYS[replayed.name]) for replayed in replay_states(GOLDEN, graphs(), layout)]
    assert [verdict for verdict in verdicts if not verdict.passed] == []
    left = ARRAYS.keys() - {verdict.name for verdict in verdicts}
    assert [name for name in left if not any(fnmatch(name, pattern) for pattern in UNCOVERED)] == []


def test_the_half_precision_profile_stays_near_the_recorded_states():
    codes, expected = ARRAYS[f"{STATES}/long.codes"], ARRAYS[f"{STATES}/long.hidden_before_dconv2"]
    ours = run(graphs("cuda"), codes, frames_of(codes))["hidden"]
    assert ours.dtype == np.float32
    assert np.abs(ours[0] - expected).max() < 2e-3 * np.abs(expected).max()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_chunks_equal_the_whole_where_the_norm_knows_the_rest_of_the_segment(sizes):
    codes = random_codes(sum(sizes))
    whole = run(graphs(), codes, frames_of(codes), (CONV,))
    chunks = np.split(codes, np.cumsum(sizes)[:-1])
    lengths = [frames_of(chunk, ends=False) for chunk in chunks[:-1]] + [frames_of(chunks[-1])]
    rows = np.split(whole[CONV], np.cumsum(lengths)[:-1], axis=1)
    carried, hidden = Carried(graphs().session("audio_decoder")), []
    for index, chunk in enumerate(chunks):
        others = merged(*rows[:index], *rows[index + 1 :]).astype(np.float32)
        carried.state["past.norm"] = others
        hidden.append(carried.run(codes=chunk, frames=np.array(lengths[index]))["hidden"])
    assert np.allclose(np.concatenate(hidden, axis=1), whole["hidden"], atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_carried_statistics_are_those_of_all_frames_so_far(sizes):
    codes = random_codes(sum(sizes))
    carried = Carried(graphs().session("audio_decoder"))
    for chunk in np.split(codes, np.cumsum(sizes)[:-1]):
        carried.run(codes=chunk, frames=np.array(frames_of(chunk, ends=False)))
    rows = run(graphs(), codes, frames_of(codes, ends=False), (CONV,))[CONV]
    assert np.allclose(carried.state["past.norm"], merged(rows), rtol=1e-5, atol=1e-6)


def test_the_statistics_of_nothing_are_zeros_and_change_nothing():
    codes = random_codes(5)
    alone = run(graphs(), codes, frames_of(codes))
    beside = run(graphs(), codes, frames_of(codes), norm=moments(np.ones(3), 0))
    assert np.array_equal(alone["hidden"], beside["hidden"])


def test_a_prefix_is_normalised_by_itself_and_so_only_near_the_whole():
    codes = random_codes(30)
    whole = run(graphs(), codes, frames_of(codes))["hidden"]
    frames = frames_of(codes[:10], ends=False)
    prefix = run(graphs(), codes[:10], frames)["hidden"]
    difference = np.abs(prefix - whole[:, :frames]).max() / np.abs(whole).max()
    assert 1e-4 < difference < 0.5


@pytest.mark.parametrize(("kernel", "stride"), [(2, 3), (3, 3), (1, 4)])
def test_each_code_gives_a_stride_of_frames_and_what_its_kernel_leaves_holds_the_bias(kernel, stride):
    config = replace(ODD, avg_pooler=stride, decoder_kernel_size=kernel)
    small, weights = random_graphs(audio_decoder(config, "cpu"))
    codes = random_codes(4, config)
    results = run(small, codes, frames_of(codes, config), (CONV, NORMED, f"{BRIDGE}.rvq_sum"))
    books = [weights[f"{BRIDGE}.vq_list.{i}.codebook.embed"] for i in range(len(config.vq_config.codebook_sizes))]
    total = sum(book[codes[:, i]] for i, book in enumerate(books))
    x = total @ weights[f"{BRIDGE}.proj_decoder.weight"].T + weights[f"{BRIDGE}.proj_decoder.bias"]
    rows = np.einsum("li,iok->lko", x, weights[f"{DECODER}.dconv1.conv.weight"])
    rows = np.pad(rows, ((0, 0), (0, stride - kernel), (0, 0))) + weights[f"{DECODER}.dconv1.conv.bias"]
    expected = rows.reshape(-1, config.d_model)[: frames_of(codes, config)]
    assert expected.shape[0] == (len(codes) - 1) * stride + kernel
    assert np.allclose(results[CONV][0], expected, atol=1e-5)
    normal = (expected - expected.mean()) / np.sqrt(expected.var() + 1e-5)
    scale, shift = weights[f"{DECODER}.dconv1.norm.weight"], weights[f"{DECODER}.dconv1.norm.bias"]
    assert np.allclose(results[NORMED][0], normal * scale + shift, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=6))
def test_codes_that_overlap_are_carried_from_chunk_to_chunk(sizes):
    graphs = overlapping()
    codes = random_codes(sum(sizes), OVERLAPPING)
    whole = run(graphs, codes, frames_of(codes, OVERLAPPING), (CONV,))
    chunks = np.split(codes, np.cumsum(sizes)[:-1])
    assert whole["hidden"].shape[1] == OVERLAPPING.avg_pooler * len(codes)
    assert whole[CONV].shape[1] == OVERLAPPING.avg_pooler * (len(codes) - 1) + OVERLAPPING.decoder_kernel_size
    carried, hidden, begin = Carried(graphs.session("audio_decoder")), [], 0
    for index, chunk in enumerate(chunks):
        frames = frames_of(chunk, OVERLAPPING, ends=index == len(chunks) - 1)
        others = np.delete(whole[CONV], np.s_[begin : begin + frames], axis=1)
        carried.state["past.norm"] = merged(others).astype(np.float32)
        hidden.append(carried.run(codes=chunk, frames=np.array(frames))["hidden"])
        begin += frames
    assert np.allclose(np.concatenate(hidden, axis=1), whole["hidden"], atol=2e-5)
