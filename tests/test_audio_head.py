"""The audio head: recorded values of the official code, the official order of work, and how codes are drawn inside."""

import json
from dataclasses import asdict
from fnmatch import fnmatch
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnxscript import nn

from apps.bench.audio_head import bench_audio_head, greedy_frame, weights_read
from export.audio_head import HeadShape, audio_head, headnorm_tap, layer_tap, logits_tap, score_sizes, unrolled
from export.decoder import embed_audio
from export.draw import Draw, scores_tap
from export.graph import Subgraph, author, static_shape
from export.parity.audio_head import HEAD, SAMPLER, UNCOVERED, head_feeds, replay
from export.parity.full_audio_head import RandomWeights, full_audio_head, official_frame
from export.parity.graphs import Graphs
from export.parity.replay import judge
from runtime.bundle import Port, Profile, Sampling, read_bundle
from runtime.errors import CheckpointError
from runtime.sampling import gumbel, penalise, probabilities
from runtime.session import Options, Session
from tests.tiny import GOLDEN, golden_config, golden_graphs, omni_bundle, random_graphs

ARRAYS = {f"{group}/{name}": array for group in (HEAD, SAMPLER) for name, array in GOLDEN.arrays(group).items()}
SHAPE = HeadShape(hidden_size=256, layers=2, codebook_sizes=(23, 9, 5))  # two attention heads
SIZES = score_sizes(SHAPE.codebook_sizes)
COUNT = sum(SIZES)

samplings = st.builds(
    Sampling,
    temperature=st.floats(0.1, 4.0),
    top_k=st.integers(0, 30),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    repetition_penalty=st.floats(0.5, 2.0),
)


@cache
def graphs() -> Graphs:
    return random_graphs(unrolled(SHAPE, "cpu"))[0]


def hidden_state(seed: int, width: int = SHAPE.hidden_size) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def settings_of(sampling: Sampling) -> dict[str, np.ndarray]:
    return {
        "temperature": np.array(sampling.temperature, np.float32),
        "top_k": np.array(sampling.top_k, np.int64),
        "top_p": np.array(sampling.top_p, np.float32),
        "repetition_penalty": np.array(sampling.repetition_penalty, np.float32),
    }


def frame(seed: int, taps: list[str] | None = None, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """One frame of the random head from a random hidden state, greedy unless `changes` say otherwise."""
    feeds = {**head_feeds(graphs(), SHAPE.codebook_sizes, hidden_state(seed)), **changes}
    return graphs().run("audio_head", feeds, taps or [])


def starts() -> np.ndarray:
    """Where each depth's scores begin in noise and seen."""
    return np.cumsum([0, *SIZES])[:-1]


@cache
def verdicts() -> dict[str, Any]:
    folder = omni_bundle()
    manifest = read_bundle(folder)
    replayed = replay(GOLDEN, Graphs(folder, manifest.graphs), manifest)
    return {part.name: judge(part, ARRAYS[part.name]) for part in replayed}


@pytest.mark.parametrize("name", [name for name in ARRAYS if not any(fnmatch(name, known) for known in UNCOVERED)])
def test_a_recorded_array_comes_out_again(name: str) -> None:
    assert verdicts()[name].passed, verdicts()[name].problem


def test_every_excuse_is_needed() -> None:
    left = ARRAYS.keys() - verdicts().keys()
    assert all(any(fnmatch(name, pattern) for name in left) for pattern in UNCOVERED)


def test_recorded_codes_come_out_of_the_recorded_hidden_states() -> None:
    """Frame by frame, so that a wrong code is not hidden behind the decoder."""
    opened = golden_graphs(audio_head(golden_config(), "cpu"))
    books = golden_config().audio_config.vq_config.codebook_sizes
    for run, penalty in (("greedy4", 1.0), ("toend", 1.3)):
        seen = np.zeros(sum(score_sizes(books)), np.bool_)
        for hidden, codes in zip(ARRAYS[f"{HEAD}/{run}.hidden"], ARRAYS[f"{HEAD}/{run}.codes"][:-1], strict=True):
            changes = {"seen": seen, "repetition_penalty": np.array(penalty, np.float32)}
            results = opened.run("audio_head", {**head_feeds(opened, books, hidden), **changes})
            np.testing.assert_array_equal(results["codes"], codes)
            seen = results["seen_next"]


@pytest.mark.parametrize("kind", ["sliced", "einsum"])
@pytest.mark.parametrize("books", [(23, 9, 5), (7, 3), (6, 5, 4, 3, 6, 5, 4, 3)])
def test_greedy_codes_are_those_of_the_official_order_of_work(kind, books, tmp_path: Path) -> None:
    shape = HeadShape(hidden_size=256, layers=2, codebook_sizes=books)
    weights = RandomWeights(seed=1)
    ours = weights.open(unrolled(shape, "cpu"), tmp_path, Options(threads=1))
    official = weights.open(full_audio_head(shape, kind), tmp_path, Options(threads=1))
    different = set()
    for seed in range(10):
        hidden = hidden_state(seed, shape.hidden_size)[None]
        codes = greedy_frame(ours, shape, hidden)
        np.testing.assert_array_equal(codes, official_frame(official, shape.depths, hidden))
        different.add(tuple(codes))
    assert len(different) > 1


def test_one_codebook_is_enough() -> None:
    shape = HeadShape(hidden_size=128, layers=1, codebook_sizes=(7,))
    opened, _ = random_graphs(unrolled(shape, "cpu"))
    results = opened.run("audio_head", head_feeds(opened, (7,), hidden_state(0, 128)), [logits_tap(0)])
    assert results["codes"].tolist() == [results[logits_tap(0)].argmax()]


def products(subgraph: Subgraph) -> int:
    """Multiplications of one run by weights: output rows times the weight's size, over all matrix products."""
    total = 0
    for node in subgraph.model.graph:
        if node.op_type == "FusedMatMul":
            weight = node.inputs[1]
            assert weight is not None
            attends = "self_attention" in str(node.name)
            rows = subgraph.inputs[1].shape[1] if attends and subgraph.name.startswith("full") else 1
            total += int(rows) * prod(static_shape(weight))
    return total


def test_a_whole_frame_multiplies_no_more_than_one_of_the_official_runs_of_which_it_needs_one_for_each_code() -> None:
    shape = HeadShape(hidden_size=256, layers=3, codebook_sizes=(63, 31, 15, 15, 15, 15, 15, 15))  # none is padded
    assert products(unrolled(shape, "cpu")) == products(full_audio_head(shape, "sliced"))


def test_the_benchmark_says_how_much_faster_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    bench = bench_audio_head(HeadShape(hidden_size=256, layers=2, codebook_sizes=(64, 32, 16, 16)), frames=5)
    assert json.loads(json.dumps(asdict(bench)))["timings"].keys() == {"unrolled", "sliced", "einsum"}
    assert bench.speedup_cpu["sliced"].median > 1 and bench.speedup_cpu["einsum"].median > 1
    assert 1 < bench.weights_saved < bench.multiplications_saved == 4


@settings(max_examples=150, deadline=None)
@given(samplings, st.integers(0, 10**6), st.floats(0, 1))
def test_codes_are_drawn_as_the_runtime_draws_tokens(sampling: Sampling, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    seen, noise = rng.random(COUNT) < share, gumbel(rng, COUNT, greedy=False)
    taps = [logits_tap(depth) for depth in range(SHAPE.depths)]
    results = frame(seed, taps, seen=seen, noise=noise, **settings_of(sampling))
    for depth, (start, size) in enumerate(zip(starts(), SIZES, strict=True)):
        part = slice(start, start + size)
        logits = results[logits_tap(depth)].ravel()[:size]
        scores = penalise(logits, np.flatnonzero(seen[part]), sampling.repetition_penalty)
        assume(clear_of_the_limit(scores, sampling))
        noisy = np.where(probabilities(scores, sampling) > 0, scores / sampling.temperature + noise[part], -np.inf)
        first, second = np.sort(noisy)[-1], np.sort(noisy)[-2]
        assume(first - second > 1e-4)
        assert results["codes"][depth] == noisy.argmax()


def clear_of_the_limit(scores: np.ndarray, sampling: Sampling) -> bool:
    """Whether no sum of probabilities lies so close to top-p that rounding decides."""
    everything = Sampling(sampling.temperature, sampling.top_k)
    above = np.cumsum(np.sort(probabilities(scores, everything).astype(np.float64))[::-1])
    return sampling.top_p == 1 or bool(np.abs(above - sampling.top_p).min() > 1e-5)


class Chooser(nn.Module):
    """Draw alone, for one codebook."""

    def forward(self, op: Any, logits: ir.Value, *ports: ir.Value) -> ir.Value:
        draw = Draw(op, [static_shape(logits)[-1]], {str(port.name): port for port in ports})
        return op.Reshape(draw.code(logits, 0), op.Constant(value_ints=[1]))


@cache
def chooser(size: int) -> Session:
    ports = [
        Port("logits", "float32", (1, 1, size)),
        *(port for port in unrolled(SHAPE, "cpu").inputs if port.shape == ()),
        Port("noise", "float32", (size,)),
        Port("seen", "bool", (size,)),
        Port("forced", "int64", (1,)),
    ]
    return random_graphs(author("chooser", Chooser(), ports, [Port("code", "int64", (1,))]))[0].session("chooser")


def choose(logits: np.ndarray, sampling: Sampling, noise: np.ndarray, seen: np.ndarray | None = None) -> int:
    run = chooser(len(logits)).run
    none, nothing = np.full(1, -1, np.int64), np.zeros(len(logits), np.bool_)
    feeds = {"logits": logits[None, None], "noise": noise, "seen": nothing if seen is None else seen, "forced": none}
    return int(run(**feeds, **settings_of(sampling))["code"][0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=12, max_size=12), samplings, st.integers(0, 10**6))
def test_of_equal_scores_top_k_keeps_all_and_so_does_top_p(grid, sampling: Sampling, seed: int) -> None:
    logits = np.array(grid, np.float32) / 2
    assume(clear_of_the_limit(logits, sampling))
    noise = gumbel(np.random.default_rng(seed), len(logits), greedy=False)
    kept = logits >= logits[probabilities(logits, sampling) > 0].min()
    noisy = np.where(kept, logits / sampling.temperature + noise, -np.inf)
    assert choose(logits, sampling, noise) == noisy.argmax()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-9, 9), min_size=12, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12), samplings
)
def test_without_noise_the_best_penalised_score_wins_whatever_the_filters(grid, marks, sampling: Sampling) -> None:
    logits, seen = np.array(grid, np.float32) / 4, np.array(marks)
    scores = penalise(logits, np.flatnonzero(seen), sampling.repetition_penalty)
    second, first = np.sort(scores)[-2:]
    assume(first - second > 1e-5)
    assert choose(logits, sampling, np.zeros(12, np.float32), seen) == scores.argmax()


def test_without_noise_the_first_of_equal_best_scores_wins() -> None:
    logits = np.array([1.0, 3.0, 2.0, 3.0, 3.0], np.float32)
    assert choose(logits, Sampling(top_k=1), np.zeros(5, np.float32)) == 1
    assert choose(logits, Sampling(), np.zeros(5, np.float32)) == 1


def test_many_draws_follow_the_distribution() -> None:
    logits = np.array([2.0, 1.5, 1.0, 0.0, -1.0, 1.9, -3.0, 0.5], np.float32)
    sampling, rng, draws = Sampling(temperature=0.8, top_k=6, top_p=0.9), np.random.default_rng(0), 4000
    chosen = [choose(logits, sampling, gumbel(rng, 8, greedy=False)) for _ in range(draws)]
    expected = probabilities(logits, sampling) * draws
    found = np.bincount(chosen, minlength=8)
    assert not found[expected == 0].any()
    kept = expected > 0
    chi_squared = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_squared < 20  # 4 degrees of freedom: chance exceeds it once in 2000


def test_forced_codes_are_taken_and_the_free_ones_depend_on_them() -> None:
    taps = [logits_tap(depth) for depth in range(SHAPE.depths)]
    free = frame(0, taps)
    forced = free["codes"].copy()
    forced[0] = (forced[0] + 1) % SIZES[0]
    forced[1:] = -1
    given_first = frame(0, taps, forced=forced)
    assert given_first["codes"][0] == forced[0]
    np.testing.assert_array_equal(given_first[taps[0]], free[taps[0]])
    assert np.abs(given_first[taps[1]] - free[taps[1]]).max() > 1e-2


def test_the_row_is_that_of_the_frame_for_the_decoder_also_with_the_end_code() -> None:
    config = golden_config()
    books = config.audio_config.vq_config.codebook_sizes
    opened = golden_graphs(audio_head(config, "cpu"), embed_audio(config.decoder, books, "cpu"))
    codes = np.array([books[0], *(size - 1 for size in books[1:])])
    feeds = {**head_feeds(opened, books, hidden_state(0, config.decoder.hidden_size)), "forced": codes}
    row = opened.run("audio_head", feeds)["row"]
    np.testing.assert_allclose(row, opened.run("embed_audio", {"codes": codes[None]})["rows"], atol=1e-6)


def test_codes_of_a_frame_join_those_that_were_seen() -> None:
    before = np.zeros(COUNT, np.bool_)
    before[[0, COUNT - 1]] = True
    results = frame(3, seen=before)
    expected = before.copy()
    expected[starts() + results["codes"]] = True
    np.testing.assert_array_equal(results["seen_next"], expected)
    assert before.sum() == 2


def test_a_depth_is_not_disturbed_by_what_other_depths_are_given() -> None:
    """Scores of one codebook use that codebook's part of seen and noise only."""
    plain, taps = frame(5, [scores_tap(0)]), [scores_tap(0)]
    seen, noise = np.zeros(COUNT, np.bool_), np.zeros(COUNT, np.float32)
    seen[SIZES[0] :], noise[SIZES[0] :] = True, 9.0
    other = frame(5, taps, seen=seen, noise=noise, repetition_penalty=np.array(1.7, np.float32))
    np.testing.assert_array_equal(other[scores_tap(0)], plain[scores_tap(0)])
    assert other["codes"][0] == plain["codes"][0]


def test_inner_values_can_be_asked_for_at_every_depth() -> None:
    taps = [layer_tap(layer, depth) for layer in range(SHAPE.layers) for depth in range(SHAPE.depths)]
    taps += [headnorm_tap(depth) for depth in range(SHAPE.depths)]
    results = frame(0, taps)
    assert {results[tap].shape for tap in taps} == {(1, 1, SHAPE.hidden_size)}


@pytest.mark.parametrize(("profile", "tile"), [("cuda", 64), ("cpu", 16)])
def test_heads_are_padded_to_whole_tiles_and_the_padding_is_never_chosen(profile: Profile, tile: int) -> None:
    wide = random_graphs(unrolled(SHAPE, profile))[0]
    heads = [value for value in unrolled(SHAPE, profile).parameters() if "heads" in str(value.name)]
    assert {static_shape(value)[0] % tile for value in heads} == {0}
    uniform = {"temperature": np.array(100.0, np.float32)}
    for seed in range(20):
        noise = gumbel(np.random.default_rng(seed), COUNT, greedy=False)
        feeds = {**head_feeds(wide, SHAPE.codebook_sizes, hidden_state(seed)), **uniform, "noise": noise}
        codes = wide.run("audio_head", {**feeds, "top_k": np.array(0, np.int64)})["codes"]
        assert (codes < SIZES).all()


def test_fp16_weights_change_scores_by_less_than_a_hundredth() -> None:
    taps = [scores_tap(depth) for depth in range(SHAPE.depths)]
    narrow = random_graphs(unrolled(SHAPE, "cuda"))[0]
    for seed in range(5):
        exact = frame(seed, taps)
        feeds = {**head_feeds(narrow, SHAPE.codebook_sizes, hidden_state(seed)), "forced": exact["codes"]}
        rounded = narrow.run("audio_head", feeds, taps)
        for tap in taps:
            assert np.abs(rounded[tap] - exact[tap]).max() < 1e-2 * np.abs(exact[tap]).max()


def test_the_unused_biases_of_the_checkpoint_are_bound_to_nothing() -> None:
    graph = audio_head(golden_config(), "cpu")
    keys = {key for value in graph.parameters() for key in graph.source_of(value).keys}
    assert not [key for key in keys if key.endswith(("linear1.bias", "linear2.bias"))]
    assert "audio_head.transformer_layers.0.linear1.weight" in keys


@pytest.mark.parametrize("width", [64, 257, 515])
def test_a_width_that_cannot_be_split_into_heads_is_refused(width: int) -> None:
    with pytest.raises(CheckpointError, match=f"hidden_size is {width}"):
        unrolled(HeadShape(width, 1, (4, 4)), "cpu")


def test_the_real_model_reads_almost_five_times_fewer_weights() -> None:
    real = HeadShape(3584, 3, (8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024))
    assert weights_read(real, official=False) == pytest.approx(2.536e9, rel=1e-3)  # 8 x 154.1 M + 1233 M + 69.8 M
    assert weights_read(real, official=True) / weights_read(real, official=False) == pytest.approx(4.6, abs=0.05)
