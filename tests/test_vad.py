"""The voice activity detector's graph against its definition in float64, with weights drawn at random and trained."""

import importlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.kernels import lint
from export.vad import WEIGHTS, VADConfig, vad, vad_tensors
from export.weights import WeightStore
from runtime.audio import load_mono
from runtime.session import Carried, Session
from tests.tiny import describe

CONFIG = VADConfig()
SMALL = VADConfig(hop=160, context=32, frame=96, stride=48, bins=47, bands=9, inputs=12, hidden=10)


def random_weights(config: VADConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    angles = 2 * np.pi * np.outer(np.arange(config.frame), np.arange(1, config.bins + 1)) / config.frame
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.frame) / config.frame)
    bands = rng.uniform(0, 1 / config.frame, (config.bins, config.bands))
    wave = {"window": window, "cosines": np.cos(angles), "sines": np.sin(angles), "bands": bands}
    return {
        **{name: table.astype(np.float32) for name, table in wave.items()},
        "inputs.weight": draw(config.inputs, 3 * config.bands),
        "inputs.bias": draw(config.inputs),
        "cell.weight_ih": 3 * draw(3 * config.hidden, config.inputs),
        "cell.weight_hh": 3 * draw(3 * config.hidden, config.hidden),
        "cell.bias_ih": draw(3 * config.hidden),
        "cell.bias_hh": draw(3 * config.hidden),
        "output.weight": 2 * draw(1, config.hidden),
        "output.bias": draw(1),
    }


def opened(folder: Path, weights: Path, config: VADConfig = CONFIG) -> Carried:
    graph = vad(config)
    return Carried(Session(folder, describe(graph, WeightStore(folder, vad_tensors(weights)).write(graph))))


def listen(detector: Carried, wave: np.ndarray, hop: int) -> np.ndarray:
    """The probability of each whole hop, from the start state."""
    detector.reset()
    hops = wave[: len(wave) // hop * hop].reshape(-1, 1, hop).astype(np.float32)
    return np.array([detector.run(samples=samples)["probability"].item() for samples in hops])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def definition(wave: np.ndarray, weights: dict[str, np.ndarray], config: VADConfig) -> np.ndarray:
    """The whole wave in float64, not streamed: every hop sees the samples before it."""
    w = {name: table.astype(np.float64) for name, table in weights.items()}
    padded = np.concatenate([np.zeros(config.context), wave])
    level, hidden, answers = np.full(config.bands, np.log(1e-6)), np.zeros(config.hidden), []
    for start in range(0, len(wave) - config.hop + 1, config.hop):
        x = padded[start : start + config.context + config.hop]
        energies = []
        for at in range(0, len(x) - config.frame + 1, config.stride):
            framed = x[at : at + config.frame] * w["window"]
            power = (framed @ w["cosines"]) ** 2 + (framed @ w["sines"]) ** 2
            energies.append(np.log(power @ w["bands"] + 1e-6))
        mean = np.mean(energies, axis=0)
        level = 0.995 * level + 0.005 * mean
        features = np.concatenate([mean, np.max(energies, axis=0), mean - level]) * 0.2
        h = np.maximum(w["inputs.weight"] @ features + w["inputs.bias"], 0)
        i, j = w["cell.weight_ih"] @ h + w["cell.bias_ih"], w["cell.weight_hh"] @ hidden + w["cell.bias_hh"]
        n = config.hidden
        reset, keep = sigmoid(i[:n] + j[:n]), sigmoid(i[n : 2 * n] + j[n : 2 * n])
        hidden = (1 - keep) * np.tanh(i[2 * n :] + reset * j[2 * n :]) + keep * hidden
        answers.append(sigmoid(w["output.weight"] @ hidden + w["output.bias"]).item())
    return np.array(answers)


def sounds(samples: int, seed: int = 0) -> np.ndarray:
    """Noise that swells, over a hum, with a stretch of silence in it."""
    rng, t = np.random.default_rng(seed), np.arange(samples)
    wave = 0.3 * rng.standard_normal(samples) * np.sin(t / 4000) ** 2 + 0.1 * np.sin(t / 9)
    wave[samples // 3 : samples // 2] = 0
    return wave.astype(np.float32)


@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=["trained size", "another size"])
def test_hop_after_hop_equals_the_definition_over_the_whole_wave(tmp_path, config):
    weights = random_weights(config)
    save_file(weights, tmp_path / "vad.safetensors")
    wave = sounds(60 * config.hop)
    ours = listen(opened(tmp_path, tmp_path / "vad.safetensors", config), wave, config.hop)
    expected = definition(wave, weights, config)
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_reset_detector_remembers_nothing(tmp_path):
    save_file(random_weights(CONFIG), tmp_path / "vad.safetensors")
    detector, wave = opened(tmp_path, tmp_path / "vad.safetensors"), sounds(20 * CONFIG.hop)
    first = listen(detector, wave, CONFIG.hop)
    assert np.array_equal(listen(detector, wave, CONFIG.hop), first)
    assert not np.array_equal([detector.run(samples=wave[None, : CONFIG.hop])["probability"].item()], first[:1])


def test_every_node_has_a_kernel_on_both_providers():
    assert lint(vad().model, "cpu") == []
    assert lint(vad().model, "cuda") == []


@pytest.fixture
def trained(tmp_path) -> Carried:
    return opened(tmp_path, WEIGHTS)


def test_the_trained_weights_fill_the_graph_and_none_is_left():
    used = {key for value in vad().parameters() for key in vad().source_of(value).keys}
    assert used == set(vad_tensors())


def test_the_trained_detector_follows_the_definition(trained):
    wave = sounds(200 * CONFIG.hop)
    expected = definition(wave, load_file(WEIGHTS), CONFIG)
    np.testing.assert_allclose(listen(trained, wave, CONFIG.hop), expected, atol=5e-5)


@pytest.mark.oracle
def test_the_trained_detector_equals_its_torch_model_over_the_whole_wave(trained):
    torch, reference = pytest.importorskip("torch"), importlib.import_module("export.nano.vad")
    wave = sounds(200 * CONFIG.hop)
    with torch.no_grad():
        expected = torch.sigmoid(reference.load_vad().logits(torch.from_numpy(wave)[None]))[0].numpy()
    np.testing.assert_allclose(listen(trained, wave, CONFIG.hop), expected, atol=1e-4)


@pytest.mark.parametrize("loudness", [0.0, 0.001, 0.01, 0.1])
def test_silence_and_steady_noise_are_not_speech(trained, loudness):
    noise = loudness * np.random.default_rng(0).standard_normal(200 * CONFIG.hop)
    assert (listen(trained, noise, CONFIG.hop)[5:] > 0.5).mean() < 0.05


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng to speak")
def test_a_spoken_sentence_is_speech_and_the_pauses_around_it_are_not(trained, tmp_path):
    words = "The quick brown fox jumps over the lazy dog and runs away"
    subprocess.run(["espeak-ng", "-v", "en", "-w", tmp_path / "said.wav", words], check=True)
    said = load_mono(tmp_path / "said.wav", 16000)
    pause = np.zeros(32 * CONFIG.hop, np.float32)
    wave = np.concatenate([pause, said, pause])
    wave += 0.001 * np.random.default_rng(0).standard_normal(len(wave), np.float32)
    heard = listen(trained, wave, CONFIG.hop) > 0.5
    end = 32 + len(said) // CONFIG.hop
    assert heard[32:end].mean() > 0.8
    assert heard[:31].mean() == 0
    assert heard[end + 16 :].mean() == 0
