"""Nothing is tied to one size: checkpoints of other dimensions, exported, compute what the torch model computes."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.convert import export
from export.parity.golden import RECOMPUTED_F0
from runtime.bundle import SpeechLayout
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.events import AudioChunk
from runtime.image import patches, rotary_positions
from runtime.prompt import Text
from runtime.vocoder import harmonic_cycles
from tests.tiny import CHECKPOINT, GOLDEN

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from export.nano.config import read_config  # noqa: E402
from export.nano.model import HiFT, Omni  # noqa: E402

pytestmark = pytest.mark.oracle

TOWER = {"depth": 3, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 2, "patch_size": 16, "hidden_size": 256}
# What differs from golden set A's config.json: six codebooks, other poolings, patches, heads, widths, layers, steps.
WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "audio_config": {
        "d_model": 96, "encoder_layers": 3, "encoder_attention_heads": 6, "encoder_ffn_dim": 128, "num_mel_bins": 80,
        "avg_pooler": 3, "max_audio_seconds": 10, "decoder_layers": 1, "decoder_attention_heads": 3,
        "decoder_ffn_dim": 64, "audio_head_transformer_layers": 1,
        "vq_config": {"codebook_sizes": [40, 24, 24, 12, 12, 12]},
    },
    "visual_config": TOWER,
    "video_config": TOWER,
    "flow_matching_config": {
        "prenet_in_dim": 96, "prenet_d_model": 48, "prenet_attention_heads": 3, "prenet_ffn_dim": 80,
        "prenet_nlayers": 1, "channels": [48], "n_blocks": 1, "num_mid_blocks": 1, "num_heads": 2,
        "attention_head_dim": 24, "diffusion_steps": 6, "cfm_params": {"inference_cfg_rate": 0.4},
    },
}  # fmt: skip
# Codes whose frames overlap: the kernel of the audio decoder's transposed convolution is longer than its stride.
OVERLAPPING: dict[str, Any] = {
    "audio_config": {"avg_pooler": 2, "decoder_kernel_size": 3},
    "flow_matching_config": {"diffusion_steps": 4},
}
VOCODER = {"base_channels": 32, "f0_cond_channels": 16, "nb_harmonics": 6}


@dataclass(frozen=True)
class Pair:
    """One checkpoint twice: the torch model, and the bundle that was exported from it."""

    omni: Omni
    hift: HiFT
    engine: Engine

    @property
    def layout(self) -> SpeechLayout:
        assert self.engine.manifest.speech is not None
        return self.engine.manifest.speech


@pytest.fixture(scope="module", params=[WIDE, OVERLAPPING], ids=["wide", "overlapping"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("dimensions")
    checkpoint = write_checkpoint(folder / "checkpoint", request.param)
    export(checkpoint, folder / "bundle", random=True)
    omni, hift = random_model(checkpoint)
    return Pair(omni, hift, Engine(folder / "bundle"))


def write_checkpoint(folder: Path, changes: dict[str, Any]) -> Path:
    """Golden set A's tokenizer and config with `changes`, and random weights for them."""
    folder.mkdir()
    for file in CHECKPOINT.glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, folder)
    config = merged(json.loads((folder / "config.json").read_text()), changes)
    (folder / "config.json").write_text(json.dumps(config))
    vocoder = {**json.loads((folder / "hift_config.json").read_text()), **VOCODER}
    (folder / "hift_config.json").write_text(json.dumps(vocoder))
    omni, hift = random_model(folder)
    save_file({name: tensor.contiguous() for name, tensor in omni.state_dict().items()}, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in hift.state_dict().items()}, folder / "hift.safetensors")
    return folder


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**config, **{k: merged(config[k], v) if isinstance(v, dict) else v for k, v in changes.items()}}


def random_model(folder: Path) -> tuple[Omni, HiFT]:
    """torch's own initialisation with a seed, and norms and codebooks that are not 1, 0 or empty."""
    torch.manual_seed(0)
    config = read_config(folder)
    omni, hift = Omni(config).eval(), HiFT(config.vocoder).eval()
    with torch.no_grad():
        for name, tensor in [*omni.state_dict().items(), *hift.state_dict().items()]:
            if "norm" in name or name.endswith((".embed", "bias", "alpha")):
                tensor.add_(torch.randn_like(tensor) * (1.0 if name.endswith(".embed") else 0.1))
    return omni, hift


def assert_close(ours: np.ndarray, theirs: Any, tolerance: float = 2e-4) -> None:
    expected = theirs.detach().numpy()
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def random_codes(pair: Pair, count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, pair.layout.codebook_sizes, (count, len(pair.layout.codebook_sizes)))


@torch.no_grad()
@pytest.mark.parametrize("frames", [97, 100])
def test_codes_of_a_recording(pair: Pair, frames: int) -> None:
    bins = pair.engine.manifest.audio.num_mel_bins  # type: ignore[union-attr]
    mel = np.random.default_rng(0).standard_normal((bins, frames)).astype(np.float32)
    ours = pair.engine.session("audio_encoder").run(mel=mel[None])["codes"]
    np.testing.assert_array_equal(ours, pair.omni.audio_tokenizer.encode(torch.from_numpy(mel)).numpy())


@torch.no_grad()
def test_rows_of_a_picture(pair: Pair) -> None:
    front = pair.engine.manifest.image
    assert front is not None
    image = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    cut, (_, rows, columns) = patches(image, front)
    encoder, projector = pair.engine.session("vision_encoder"), pair.engine.session("vision_projector")
    features = encoder.run(patches=cut, positions=rotary_positions((1, rows, columns), front.merge_size))["features"]
    theirs = pair.omni.model.embed_images(torch.from_numpy(cut), [(rows, columns)])
    assert_close(projector.run(features=features)["rows"], theirs)


@torch.no_grad()
def test_hidden_states_and_logits_of_a_prompt(pair: Pair) -> None:
    engine, ids = pair.engine, np.arange(40) % 300
    context = engine.context()
    prompt = engine.format.user_turn([Text("hello there")], spoken=True)
    context.append(prompt)
    rows = pair.omni.model.embed(torch.from_numpy(prompt.ids[None]))
    hidden, _ = pair.omni.model(rows, torch.arange(1, len(prompt) + 1))
    ours = context.hidden()
    assert_close(ours, hidden[0, -1:])
    assert_close(engine.session("lm_head").run(hidden=ours)["logits"], pair.omni.lm_head(hidden[0, -1:]))
    assert len(ids) == 40


@torch.no_grad()
def test_codes_of_greedy_frames(pair: Pair) -> None:
    voice, rng = pair.engine.voice(greedy=True), np.random.default_rng(0)
    voice._settings["repetition_penalty"] = np.array(1.0, np.float32)
    for _ in range(5):
        hidden = rng.standard_normal((1, pair.engine.manifest.hidden_size)).astype(np.float32)
        codes, row = voice.frame(hidden, rng)
        np.testing.assert_array_equal(codes, pair.omni.greedy_frame(torch.from_numpy(hidden[0])).numpy())
        assert_close(row, pair.omni.model.embed_audio(torch.from_numpy(codes)))


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 9, 60])
def test_mel_of_codes_and_the_wave_of_that_mel(pair: Pair, count: int) -> None:
    codes, graph = random_codes(pair, count), pair.engine.session
    carried = {port.name: np.zeros([0 if isinstance(d, str) else d for d in port.shape], port.dtype)
               for port in graph("audio_decoder").graph.inputs if port.name.startswith("past.")}  # fmt: skip
    frames = np.array(pair.layout.frames_per_code * count - pair.layout.frames_short)
    hidden = graph("audio_decoder").run(codes=codes, frames=frames, **carried)["hidden"]
    assert_close(hidden, pair.omni.audio_tokenizer.hidden(torch.from_numpy(codes[None])))
    mel = np.concatenate(list(_mel(pair, codes)), axis=2)
    assert_close(mel, pair.omni.audio_tokenizer.mel(torch.from_numpy(codes[None]), torch.zeros(mel.shape)))
    _assert_same_wave(pair, mel)


def _mel(pair: Pair, codes: np.ndarray) -> Any:
    from runtime.mel_stream import MelStream

    stream = MelStream(pair.engine.session, pair.layout)
    yield from stream.mel(stream.hidden(codes, last=True), last=True)


def _assert_same_wave(pair: Pair, mel: np.ndarray) -> None:
    length, layout = mel.shape[2], pair.layout
    f0 = np.full((1, length), 150.0, np.float32)
    cycles, _ = harmonic_cycles(0.0, f0, np.zeros(layout.harmonics), layout)
    noise = np.zeros((1, layout.harmonics, length * layout.samples_per_frame), np.float32)
    ours = pair.engine.session("vocoder").run(mel=mel, f0=f0, cycles=cycles, noise=noise)["wave"]
    quiet = [torch.zeros_like(part) for part in pair.hift.draw(torch.from_numpy(mel))]
    assert_close(ours, pair.hift(torch.from_numpy(mel), *quiet, torch.from_numpy(f0)), RECOMPUTED_F0)


def test_a_spoken_answer_streams_to_its_end(pair: Pair) -> None:
    turn = [pair.engine.hear(GOLDEN.input("inputs/w0.wav")), Text("well?")]
    events = list(Conversation.open(pair.engine, seed=0).reply(turn, Choices(spoken=True)))
    chunks = [event.samples for event in events if isinstance(event, AudioChunk)]
    assert all(np.isfinite(chunk).all() for chunk in chunks)
