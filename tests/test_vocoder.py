"""The vocoder: recorded values of the official code, streamed against whole, and the reach of its layers."""

from dataclasses import replace
from fnmatch import fnmatch
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import GraphBuilder

from export.checkpoint import open_checkpoint
from export.config import VocoderConfig
from export.families import baichuan_omni_1_5
from export.parity.graphs import Graphs
from export.parity.vocoder import GROUP, UNCOVERED, replay_clips
from export.vocoder import inverse_stft, receptive_frames, source_downs, stft, vocoder, vocoder_f0
from runtime.bundle import SpeechLayout
from runtime.errors import CheckpointError
from runtime.vocoder import WaveStream, harmonic_cycles
from tests.tiny import CHECKPOINT, GOLDEN, golden_config, golden_graphs

CONFIG = golden_config().vocoder
FULL = VocoderConfig()
ARRAYS = GOLDEN.arrays(GROUP)


@cache
def graphs() -> Graphs:
    return golden_graphs(vocoder_f0(CONFIG), vocoder(CONFIG))


def layout(config: VocoderConfig = CONFIG) -> SpeechLayout:
    f0_context, wave_context = receptive_frames(config)
    return SpeechLayout(
        codebook_sizes=(4,),
        frames_per_code=4,
        frames_short=1,
        mel_bins=config.in_channels,
        sampling_rate=config.sampling_rate,
        samples_per_frame=config.samples_per_frame,
        time_steps=(0.0, 1.0),
        chunk_frames=100,
        harmonics=config.nb_harmonics + 1,
        f0_context=f0_context,
        wave_context=wave_context,
        max_frames=1000,
        overlap_samples=240,
    )


def random_mel(frames: int, seed: int = 0) -> np.ndarray:
    shape = (1, CONFIG.in_channels, frames)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class PitchInMel:
    """F0 that is read off each mel column alone: the same to the last bit however the mel is cut.

    The predictor's own F0 differs in its last bits between windows of different length (other blocks of the same
    product), and the source integrates that over time.
    """

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        return {"f0": 150 + 80 * feeds["mel"][:, 0]}


def stream(seed: int | None = 0, contexts: SpeechLayout | None = None, predicted: bool = False) -> WaveStream:
    rng = None if seed is None else np.random.default_rng(seed)
    pitch = graphs().session("vocoder_f0") if predicted else PitchInMel()
    return WaveStream(pitch, graphs().session("vocoder"), contexts or layout(), rng)


def streamed(mel: np.ndarray, cuts: list[int], **kwargs) -> np.ndarray:
    waves = stream(**kwargs)
    return np.concatenate([*(waves.push(piece) for piece in np.split(mel, cuts, axis=2)), waves.finish()])


def frame_peaks(wave: np.ndarray) -> np.ndarray:
    return np.abs(wave).reshape(-1, CONFIG.samples_per_frame).max(axis=1)


def test_every_recorded_array_is_replayed_within_its_tolerance():
    seen = set()
    for replayed in replay_clips(GOLDEN, graphs(), layout()):
        expected = ARRAYS[replayed.name.removeprefix(f"{GROUP}/")].astype(np.float32)
        seen.add(replayed.name)
        assert replayed.ours.shape == expected.shape, replayed.name
        error = np.abs(replayed.ours - expected).max() / np.abs(expected).max()
        assert error <= replayed.tolerance, f"{replayed.name}: {error:.1e}"
    missing = {f"{GROUP}/{name}" for name in ARRAYS} - seen
    assert all(any(fnmatch(name, pattern) for pattern in UNCOVERED) for name in missing), missing


def test_the_graphs_take_their_weights_from_the_vocoder_s_checkpoint_and_leave_none_of_it():
    stored = {key for key in baichuan_omni_1_5.tensors(open_checkpoint(CHECKPOINT)) if key.startswith("hift.")}
    used = {
        key
        for subgraph in (vocoder_f0(CONFIG), vocoder(CONFIG))
        for parameter in subgraph.parameters()
        for key in subgraph.source_of(parameter).keys
    }
    assert used == stored


def test_the_source_follows_the_definition_in_float64():
    clip = {name.split(".", 1)[1]: array for name, array in ARRAYS.items() if name.startswith("noisy.")}
    f0 = np.repeat(clip["f0"], CONFIG.samples_per_frame, axis=1).astype(np.float64)
    order = np.arange(1, CONFIG.nb_harmonics + 2)[:, None]
    phases = clip["phase"][0].astype(np.float64)
    phases[0] = 0
    voiced = f0 > CONFIG.nsf_voiced_threshold
    angle = 2 * np.pi * np.cumsum(order * f0 / CONFIG.sampling_rate, axis=1) + phases
    loudness = np.where(voiced, CONFIG.nsf_sigma, CONFIG.nsf_alpha / 3)
    sines = CONFIG.nsf_alpha * np.sin(angle) * voiced + loudness * clip["noise"][0].astype(np.float64)
    cycles, _ = harmonic_cycles(0.0, clip["f0"], phases[:, 0] / (2 * np.pi), layout())
    noise = clip["noise"].astype(np.float32)
    feeds = {"mel": clip["mel"], "f0": clip["f0"], "cycles": cycles, "noise": noise}
    ours = graphs().run("vocoder", feeds, ["hift.m_source.sines"])["hift.m_source.sines"][0]
    assert voiced.any() and not voiced.all()
    np.testing.assert_allclose(ours, sines, atol=2e-5 * np.abs(sines).max())


def test_phases_stay_exact_after_minutes_of_speech():
    f0 = np.random.default_rng(0).uniform(80, 400, (1, 15_000)).astype(np.float32)  # five minutes
    cycles, end = harmonic_cycles(0.0, f0, np.zeros(9), layout())
    steps = [int(value * 2**20) for value in f0[0].astype(np.float64)]  # float32 from 64 up: whole multiples of 2^-17
    per_turn = CONFIG.sampling_rate * 2**20
    start = sum(steps[:-1]) * CONFIG.samples_per_frame
    exact = [order * start % per_turn / per_turn for order in range(1, 10)]
    np.testing.assert_allclose(np.abs((cycles[0, :, -1] - exact + 0.5) % 1 - 0.5), 0, atol=1e-6)
    assert end == pytest.approx((start + steps[-1] * CONFIG.samples_per_frame) % per_turn / per_turn, abs=1e-9)


@settings(deadline=None, max_examples=12)
@given(frames=st.integers(1, 60), data=st.data())
def test_streamed_equals_whole_however_the_mel_is_cut(frames, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, frames), max_size=8)))
    mel = random_mel(frames, seed=frames)
    whole = streamed(mel, [])
    assert len(whole) == frames * CONFIG.samples_per_frame
    np.testing.assert_allclose(streamed(mel, cuts), whole, atol=2e-6)


def test_one_frame_at_a_time_equals_one_run_of_the_graphs_over_the_whole():
    mel, waves = random_mel(48), stream(predicted=True)
    pieces = [waves.push(mel[:, :, i : i + 1]) for i in range(48)]
    delay = sum(receptive_frames(CONFIG))
    assert [len(piece) // CONFIG.samples_per_frame for piece in pieces] == [0] * delay + [1] * (48 - delay)
    f0 = graphs().run("vocoder_f0", {"mel": mel})["f0"]
    cycles, noise = stream().source.extend(f0)
    whole = graphs().run("vocoder", {"mel": mel, "f0": f0, "cycles": cycles, "noise": noise})["wave"][0]
    np.testing.assert_allclose(np.concatenate([*pieces, waves.finish()]), whole, atol=1e-3)


def test_f0_is_the_same_in_every_window_to_float_rounding():
    frames = sum(receptive_frames(CONFIG))  # so many that none is final, nor forgotten
    mel, waves = random_mel(frames), stream(predicted=True)
    for i in range(frames):
        waves.push(mel[:, :, i : i + 1])
    known = frames - receptive_frames(CONFIG)[0]
    assert waves._f0.shape == (1, known)
    whole = graphs().run("vocoder_f0", {"mel": mel})["f0"]
    np.testing.assert_allclose(waves._f0, whole[:, :known], rtol=1e-5)


def test_a_long_stream_keeps_no_more_frames_than_a_later_one_needs():
    waves, context = stream(), sum(receptive_frames(CONFIG)) + receptive_frames(CONFIG)[1]
    for start in range(0, 300, 50):
        waves.push(random_mel(50, seed=start))
        assert waves._mel.shape[2] <= context
        assert waves._noise.shape[2] == waves._f0.shape[1] * CONFIG.samples_per_frame


def test_seeds_change_the_wave_and_no_generator_means_no_noise():
    mel = random_mel(30)
    first, again, other, silent = (streamed(mel, [], seed=seed) for seed in (0, 0, 1, None))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.array_equal(silent, streamed(mel, [], seed=None))


def test_finishing_an_empty_stream_gives_no_samples():
    waves = stream()
    assert len(waves.push(random_mel(30)[:, :, :0])) == 0
    assert len(waves.finish()) == 0


def poisoned(port: str, frame: int, frames: int) -> np.ndarray:
    """Frames whose conv_post a NaN in one frame of `port` reaches: NaN survives every weight, however small."""
    feeds = {
        "mel": random_mel(frames),
        "f0": np.full((1, frames), 150, np.float32),
        "cycles": np.zeros((1, CONFIG.nb_harmonics + 1, frames), np.float32),
        "noise": np.zeros((1, CONFIG.nb_harmonics + 1, frames * CONFIG.samples_per_frame), np.float32),
    }
    feeds[port][..., frame] = np.nan
    reached = np.isnan(graphs().run("vocoder", feeds, ["hift.conv_post.out"])["hift.conv_post.out"][0, 0])
    # An output sample reads the columns of the n_fft samples around it.
    size, hop = CONFIG.istft_n_fft, CONFIG.istft_hop
    samples = [
        s for column in np.flatnonzero(reached) for s in (column * hop - size // 2, column * hop + size // 2 - 1)
    ]
    return np.array(samples) // CONFIG.samples_per_frame - frame


def test_the_wave_context_is_as_far_as_a_perturbed_frame_reaches_and_no_farther():
    frames = 45
    reached = np.concatenate([poisoned("mel", 22, frames), poisoned("cycles", 22, frames)])
    assert max(-reached.min(), reached.max()) == receptive_frames(CONFIG)[1]


def test_the_f0_context_is_as_far_as_a_perturbed_frame_reaches_and_no_farther():
    mel = random_mel(31)
    mel[..., 15] = np.nan
    reached = np.flatnonzero(np.isnan(graphs().run("vocoder_f0", {"mel": mel})["f0"][0])) - 15
    assert max(-reached.min(), reached.max()) == receptive_frames(CONFIG)[0]


def test_too_little_context_is_audible_in_the_numbers():
    mel = random_mel(60)
    contexts = replace(layout(), wave_context=6)
    error = np.abs(streamed(mel, [30], contexts=contexts) - streamed(mel, []))
    assert error.max() > 1e-5


def test_contexts_of_the_published_size_are_those_of_the_small_one():
    assert receptive_frames(FULL) == receptive_frames(CONFIG)


def test_contexts_follow_the_kernels():
    wide = replace(FULL, resblock_kernel_sizes=(3, 7, 15))
    assert receptive_frames(wide)[1] > receptive_frames(FULL)[1]


def test_each_level_meets_the_source_s_spectrum_at_its_own_rate():
    assert source_downs(FULL) == [(30, 15, 7), (6, 3, 1), (1, 1, 0)]


@pytest.mark.parametrize("size,hop", [(16, 4), (20, 5), (32, 8)])
def test_the_fourier_pair_in_convolutions_equals_numpy_and_inverts(size, hop):
    wave = np.random.default_rng(0).standard_normal((1, 1, 40 * hop)).astype(np.float32)
    spectrum, back = fourier_pair(wave, size, hop)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    padded = np.pad(wave[0, 0], size // 2, mode="reflect")
    frames = np.stack([np.fft.rfft(padded[i : i + size] * window) for i in range(0, 40 * hop + 1, hop)], axis=1)
    np.testing.assert_allclose(spectrum[0], np.concatenate([frames.real, frames.imag]), atol=2e-5)
    np.testing.assert_allclose(back, wave, atol=2e-5)


def fourier_pair(wave: np.ndarray, size: int, hop: int) -> tuple[np.ndarray, np.ndarray]:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="pair")
    builder = GraphBuilder(graph)
    x = builder.input("wave", ir.DataType.FLOAT, [1, 1, "samples"])
    spectrum = stft(builder.op, x, size, hop)
    builder.add_output(spectrum, "spectrum")
    builder.add_output(inverse_stft(builder.op, spectrum, size, hop), "back")
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    spectrum, back = ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {"wave": wave})
    return np.asarray(spectrum), np.asarray(back)


def test_contradictory_constructor_arguments_are_all_named_at_once():
    wrong = replace(FULL, upsample_kernel_sizes=(16, 10), base_channels=100, istft_n_fft=6)
    with pytest.raises(CheckpointError) as error:
        vocoder(wrong)
    for name in (
        "upsample_kernel_sizes: 2 entries",
        "10 must exceed its rate 5",
        "base_channels: 100",
        "istft_n_fft: 6",
    ):
        assert name in str(error.value)
