"""Flow matching: recorded values of the official code, chunks against the whole, time tables, and other shapes."""

from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.audio_decoder import audio_decoder
from export.checkpoint import open_checkpoint
from export.config import CFMParams
from export.families.baichuan_omni_1_5 import speech_layout, tensors
from export.flow_matching import flow_estimator, flow_prenet
from export.graph import author
from export.layers import Stage, mish
from export.parity.graphs import Graphs
from export.parity.replay import judge
from export.parity.speech_out import FLOW, UNCOVERED, replay_flow
from export.unet import DECODER, PREFIX, time_embedding, time_steps, unfold
from runtime.bundle import Port, Profile
from runtime.errors import CheckpointError
from runtime.session import Carried
from tests.tiny import CHECKPOINT, GOLDEN, golden_config, golden_graphs, random_graphs

CONFIG = golden_config().flow_matching_config
ODD = replace(  # no width is a multiple of 8; two levels of blocks, four steps
    CONFIG,
    prenet_in_dim=10,
    prenet_d_model=18,
    prenet_attention_heads=3,
    prenet_ffn_dim=21,
    prenet_nlayers=1,
    prenet_out_dim=5,
    in_channels=5,
    channels=(14,),
    n_blocks=1,
    num_mid_blocks=1,
    num_heads=3,
    attention_head_dim=6,
    diffusion_steps=4,
)
FULL = replace(CONFIG, channels=(256,), n_blocks=4, num_mid_blocks=12, num_heads=8, attention_head_dim=64)
ARRAYS = {f"{FLOW}/{name}": array for name, array in GOLDEN.arrays(FLOW).items()}


@cache
def graphs(profile: Profile = "cpu") -> Graphs:
    config = golden_config()
    return golden_graphs(
        audio_decoder(config.audio_config, profile), flow_prenet(CONFIG, profile), flow_estimator(CONFIG, profile)
    )


@cache
def odd_graphs() -> Graphs:
    return random_graphs(flow_prenet(ODD, "cpu"), flow_estimator(ODD, "cpu"))[0]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def euler_step(carried: Carried, x: np.ndarray, mu: np.ndarray, step: int = 1) -> np.ndarray:
    return carried.run(x=x, mu=mu, step=np.array(step))["x_next"]


def test_every_recorded_array_is_replayed_within_its_tolerance():
    layout = speech_layout(golden_config(), tensors(open_checkpoint(CHECKPOINT)))
    verdicts = [judge(replayed, ARRAYS[replayed.name]) for replayed in replay_flow(GOLDEN, graphs(), layout)]
    assert [verdict for verdict in verdicts if not verdict.passed] == []
    left = ARRAYS.keys() - {verdict.name for verdict in verdicts}
    assert [name for name in left if not any(fnmatch(name, pattern) for pattern in UNCOVERED)] == []


def test_the_half_precision_profile_stays_near_the_recorded_mel():
    x, mu = ARRAYS[f"{FLOW}/long.z"], ARRAYS[f"{FLOW}/long.mu"]
    for step in range(CONFIG.diffusion_steps):
        x = euler_step(Carried(graphs("cuda").session("flow_estimator")), x, mu, step)
    expected = ARRAYS[f"{FLOW}/long.mel"]
    assert np.abs(x.transpose(0, 2, 1) - expected).max() < 5e-3 * np.abs(expected).max()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=6))
@pytest.mark.parametrize("size", ["golden", "odd"])
def test_the_prenet_streamed_equals_the_prenet_of_the_whole(size, lengths):
    session = (graphs() if size == "golden" else odd_graphs()).session("flow_prenet")
    hidden = random(1, sum(lengths), (CONFIG if size == "golden" else ODD).prenet_in_dim)
    whole, carried = Carried(session).run(hidden=hidden)["mu"], Carried(session)
    pieces = [carried.run(hidden=piece)["mu"] for piece in np.split(hidden, np.cumsum(lengths)[:-1], axis=1)]
    assert np.allclose(np.concatenate(pieces, axis=1), whole, atol=2e-5)


def test_the_prenet_norms_small_states_with_an_epsilon_of_a_millionth():
    layer = f"{PREFIX}.prenet.transformer_layers.0"  # adds nothing to the small states, without these weights
    shapes = {
        f"{layer}.self_attn.out_proj.weight": (18, 18),
        f"{layer}.self_attn.out_proj.bias": (18,),
        f"{layer}.fc2.weight": (18, 21),
        f"{layer}.fc2.bias": (18,),
        f"{PREFIX}.prenet.in_mlp.0.bias": (72,),
        f"{PREFIX}.prenet.in_mlp.2.bias": (18,),
    }
    still = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    small, weights = random_graphs(flow_prenet(ODD, "cpu"), tensors=still)
    feeds = {"hidden": 1e-3 * random(1, 6, ODD.prenet_in_dim), **Carried(small.session("flow_prenet")).state}
    results = small.run("flow_prenet", feeds, (f"{layer}.out",))
    x = results[f"{layer}.out"]
    assert 1e-8 < np.square(x).mean() < 1e-5
    normal = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)
    expected = normal * weights[f"{PREFIX}.prenet.final_norm.weight"] @ weights[f"{PREFIX}.prenet.out_proj.weight"].T
    assert np.allclose(results["mu"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[100, 200], [200], [100], [100, 200, 300]])
@pytest.mark.parametrize("size", ["golden", "odd"])
def test_runs_that_end_where_chunks_end_equal_one_run_over_the_whole(size, cuts):
    session = (graphs() if size == "golden" else odd_graphs()).session("flow_estimator")
    config, frames = (CONFIG if size == "golden" else ODD), 317
    x, mu = random(1, config.in_channels, frames), random(1, frames, config.prenet_out_dim, seed=1)
    whole, carried = euler_step(Carried(session), x, mu), Carried(session)
    pieces = zip(np.split(x, cuts, axis=2), np.split(mu, cuts, axis=1), strict=True)
    streamed = np.concatenate([euler_step(carried, *piece) for piece in pieces], axis=2)
    assert np.allclose(streamed, whole, atol=2e-5)


def changed_frames(frames: int, at: int) -> list[int]:
    """Frames of the result that a change of frame `at` of the condition reaches."""
    session = odd_graphs().session("flow_estimator")
    x, mu = random(1, ODD.in_channels, frames), random(1, frames, ODD.prenet_out_dim, seed=1)
    other = mu.copy()
    other[:, at] += 1
    difference = euler_step(Carried(session), x, mu) - euler_step(Carried(session), x, other)
    return np.flatnonzero(np.abs(difference).max(axis=(0, 1)) > 1e-7).tolist()


def test_a_frame_reaches_all_of_its_own_chunk_and_what_comes_later_but_no_chunk_before():
    assert changed_frames(250, at=150) == list(range(100, 250))
    assert changed_frames(250, at=99) == list(range(250))


def test_a_run_inside_an_open_chunk_sees_everything_before_it():
    session = odd_graphs().session("flow_estimator")
    x, mu = random(1, ODD.in_channels, 130), random(1, 130, ODD.prenet_out_dim, seed=1)
    results = []
    for shift in (0, 1):
        carried = Carried(session)
        first = mu[:, :110].copy()
        first[:, 3] += shift
        euler_step(carried, x[:, :, :110], first)
        results.append(euler_step(carried, x[:, :, 110:], mu[:, 110:]))
    assert np.all(np.abs(results[0] - results[1]).max(axis=(0, 1)) > 1e-7)


def test_the_time_embedding_is_the_recorded_one():
    stored = tensors(open_checkpoint(CHECKPOINT))
    linears = [stored[f"{DECODER}.time_mlp.{part}"].read().astype(np.float32) for part in (
        "linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")]  # fmt: skip
    ours = time_embedding(time_steps(CONFIG)[:1], *linears)
    expected = ARRAYS[f"{FLOW}/one.time_emb0"]
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


def test_times_run_from_nothing_to_one_with_small_steps_first_or_evenly():
    cosine = time_steps(CONFIG)
    assert cosine[0] == 0 and abs(cosine[-1] - 1) < 1e-6
    assert np.all(np.diff(cosine, 2) > -1e-6) and np.argmax(np.diff(cosine)) == CONFIG.diffusion_steps - 1
    even = time_steps(replace(ODD, cfm_params=CFMParams(0.7, t_scheduler="linear")))
    assert np.allclose(even, [0, 0.25, 0.5, 0.75, 1])


def test_each_step_is_as_long_as_the_schedule_says():
    session = odd_graphs().session("flow_estimator")
    x, mu = random(1, ODD.in_channels, 8), random(1, 8, ODD.prenet_out_dim, seed=1)
    lengths = np.diff(time_steps(ODD))
    graph = odd_graphs()
    for step in range(ODD.diffusion_steps):
        feeds = {"x": x, "mu": mu, "step": np.array(step), **Carried(session).state}
        results = graph.run("flow_estimator", feeds, (f"{DECODER}.out",))
        v = (1.7 * results[f"{DECODER}.out"][0] - 0.7 * results[f"{DECODER}.out"][1]).T
        assert np.allclose(results["x_next"][0] - x[0], lengths[step] * v, atol=1e-5)


def test_a_convolution_unfolded_is_a_product_with_frames_side_by_side():
    weight, x = random(4, 3, 3), random(10, 3, seed=1)
    padded = np.pad(x, ((2, 0), (0, 0)))
    side_by_side = np.concatenate([padded[:-2], padded[1:-1], padded[2:]], axis=1)
    expected = [sum(weight[:, :, k] @ padded[t + k] for k in range(3)) for t in range(len(x))]
    assert np.allclose(side_by_side @ unfold(weight).T, expected, atol=1e-5)


def test_mish_is_exact_far_from_zero_too():
    port = ("float32", ("n",))
    subgraph = author("mish", Stage(mish), [Port("x", *port)], [Port("y", *port)])
    x = np.concatenate([np.linspace(-90, 90, 1001), np.linspace(-3, 3, 1001)]).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(subgraph.model).SerializeToString())
    exact = x * np.tanh(np.logaddexp(0, x.astype(np.float64)))
    assert np.allclose(np.asarray(session.run(None, {"x": x})[0]), exact, rtol=2e-6, atol=1e-9)


def test_at_full_size_nothing_transposes_but_the_mel_on_its_way_in_and_out():
    subgraph = flow_estimator(FULL, "cpu")
    kinds = Counter(node.op_type for node in subgraph.model.graph)
    assert kinds["Transpose"] == 2 and kinds["Conv"] == 0
    states = Counter(port.name.split(".")[1] == "tail" for port in subgraph.inputs if port.name.startswith("past."))
    assert states == {True: 31, False: 2 * 56}


def test_what_cannot_be_exported_is_refused_with_every_reason():
    with pytest.raises(CheckpointError, match=r"solver 'heun', expected 'euler'; t_scheduler 'sway'"):
        flow_estimator(replace(CONFIG, cfm_params=CFMParams(0.7, t_scheduler="sway", solver="heun")), "cpu")
    with pytest.raises(CheckpointError, match="use_hidden_states_before_dconv2 is false"):
        flow_prenet(replace(CONFIG, use_hidden_states_before_dconv2=False), "cpu")
