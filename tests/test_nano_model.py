"""The trainer's model is the official model: it loads the golden checkpoint strictly and reproduces its stages."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.numpy import load_file  # noqa: E402

from export.nano.model import HiFT, Omni, load_checkpoint  # noqa: E402

pytestmark = pytest.mark.oracle
GOLDEN = Path(__file__).parent / "golden" / "a"


@cache
def model() -> Omni:
    return load_checkpoint(GOLDEN / "checkpoint")[0]


@cache
def vocoder() -> HiFT:
    return load_checkpoint(GOLDEN / "checkpoint")[1]


def golden(stage: str) -> dict:
    (path,) = GOLDEN.glob(f"{stage}_*.safetensors")
    return {name: torch.from_numpy(array.copy()) for name, array in load_file(path).items()}


def assert_close(got, want, limit: float = 2e-4) -> None:
    assert tuple(got.shape) == tuple(want.shape)
    largest = float(want.float().abs().max())
    assert float((got.float() - want.float()).abs().max()) <= limit * largest


def encode(features, lengths):
    tokenizer = model().audio_tokenizer
    hidden = tokenizer.audio_model(features, lengths)
    return hidden, tokenizer.audio_bridge_model.pooled(hidden)


@torch.no_grad()
@pytest.mark.parametrize("name", ["w0", "w1", "w2", "w4"])
def test_recordings_become_the_official_hidden_states_and_codes(name):
    mel = golden("g01")[f"{name}.seg0.logmel"]
    want = golden("g02")
    hidden, pooled = encode(mel[None], torch.tensor([(mel.shape[1] - 1) // 2 + 1]))
    assert_close(hidden, want[f"{name}.seg0.encoder_out"])
    assert_close(pooled, want[f"{name}.seg0.bridge_out"])
    assert torch.equal(model().audio_tokenizer.encode(mel), want[f"{name}.seg0.codes"])


@torch.no_grad()
def test_a_padded_batch_is_encoded_as_the_official_code_does():
    want = golden("g02")
    hidden, pooled = encode(want["batch.features"], want["batch.encoder_length"])
    assert_close(hidden, want["batch.encoder_out"])
    assert_close(pooled, want["batch.bridge_out"])
    rows = [row[:n] for row, n in zip(pooled, want["batch.bridge_length"].tolist(), strict=True)]
    assert torch.equal(model().audio_tokenizer.audio_bridge_model.encode(torch.cat(rows)), want["batch.codes"])


@torch.no_grad()
def test_with_mel_lengths_a_padded_recording_is_encoded_as_if_it_were_alone():
    want, alone = golden("g02"), golden("g02")["w2.seg0.encoder_out"][0]
    encoder = model().audio_tokenizer.audio_model
    frames = golden("g01")["w2.seg0.logmel"].shape[1]
    lengths = torch.tensor([frames, want["batch.features"].shape[2]])
    hidden = encoder(want["batch.features"], want["batch.encoder_length"], lengths)
    assert_close(hidden[0, : len(alone)], alone)


@torch.no_grad()
@pytest.mark.parametrize("name", ["i0", "i2", "i4"])
def test_pictures_become_the_official_features(name):
    want = golden("g03")
    rows, columns, _ = want[f"{name}.resized_rgb"].shape
    patches, grids = want[f"{name}.patches"], [(rows // 14, columns // 14)]
    features = model().model.visual_model(patches, grids)
    assert_close(features, want[f"{name}.vit_out"])
    assert_close(model().model.embed_images(patches, grids), want[f"{name}.projector_out"])


@torch.no_grad()
def test_pictures_of_one_call_do_not_see_each_other():
    want = golden("g03")
    grids = [(h, w) for _, h, w in want["multi.grid_thw"].tolist()][:3]
    patches = torch.cat([want[f"{name}.patches"] for name in ("i0", "i4", "f0")])
    rows = model().model.embed_images(patches, grids)
    assert_close(rows, want["multi.projector_out"][: len(rows)])


def prompt_pictures(name: str):
    """The projector rows of the `mixed` prompt: two images, then the frames of the video."""
    ids = golden("g04")[f"{name}.input_ids"][0]
    return golden("g04")[f"{name}.embeds"][0][torch.isin(ids, torch.tensor(model().config.picture_tokens))]


@torch.no_grad()
@pytest.mark.parametrize("name", ["text", "mixed", "history", "asr"])
def test_prompts_of_every_kind_give_the_official_hidden_states(name):
    want, omni = golden("g04"), model()
    ids = want[f"{name}.input_ids"]
    rows = omni.model.embed(ids, want.get(f"{name}.audio_codes"), prompt_pictures(name) if name == "mixed" else None)
    assert_close(rows, want[f"{name}.embeds"])
    hidden, kept = omni.model(rows, torch.arange(1, ids.shape[1] + 1))
    assert_close(hidden, want[f"{name}.hidden"])
    if f"{name}.prefill_k1" in want:
        assert_close(kept[1][0], want[f"{name}.prefill_k1"])
        assert_close(kept[1][1], want[f"{name}.prefill_v1"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["text", "mixed", "history", "asr"])
def test_greedy_decoding_with_a_cache_gives_the_official_tokens(name):
    want, omni = golden("g04"), model()
    hidden, kept = omni.model(want[f"{name}.embeds"], torch.arange(1, want[f"{name}.embeds"].shape[1] + 1))
    tokens = [int(omni.lm_head(hidden[:, -1]).argmax())]
    logits = []
    for _ in range(6):
        position = torch.tensor([kept[0][0].shape[2] + 1])
        hidden, kept = omni.model(omni.model.embed(torch.tensor([[tokens[-1]]])), position, kept)
        logits.append(omni.lm_head(hidden[0, -1]))
        tokens.append(int(logits[-1].argmax()))
    assert tokens == want[f"{name}.greedy_tokens"].tolist()
    assert_close(torch.stack(logits), want[f"{name}.decode_logits"])


@torch.no_grad()
def test_the_audio_head_gives_the_official_logits():
    want, omni = golden("g05"), model()
    for level, logits in enumerate(omni.frame_logits(want["tf.hidden"], want["tf.codes"])):
        assert_close(logits, want[f"tf.logits{level}"])
    assert_close(omni.model.embed_audio(want["tf.codes"]), want["tf.frame_embed"])


@torch.no_grad()
def test_greedy_frames_are_the_official_ones():
    want, omni = golden("g05"), model()
    rows = omni.model.embed(want["greedy4.input_ids"])
    hidden, kept = omni.model(rows, torch.arange(1, rows.shape[1] + 1))
    for frame in want["greedy4.codes"][:-1]:
        codes = omni.greedy_frame(hidden[0, -1])
        assert torch.equal(codes, frame)
        position = torch.tensor([kept[0][0].shape[2] + 1])
        hidden, kept = omni.model(omni.model.embed_audio(codes)[None, None], position, kept)


@torch.no_grad()
@pytest.mark.parametrize("name", ["one", "long"])
def test_codes_become_the_official_hidden_states_and_condition(name):
    want, tokenizer = golden("g07"), model().audio_tokenizer
    codes = want[f"{name}.codes"][None]
    hidden = tokenizer.hidden(codes)
    assert_close(hidden[0], want[f"{name}.hidden_before_dconv2"])
    mu = tokenizer.condition(codes)
    assert_close(mu.transpose(1, 2), golden("g08")[f"{name}.mu"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["one", "long"])
def test_the_unused_mel_branch_is_the_official_one_too(name):
    want, decoder = golden("g07"), model().audio_tokenizer.audio_decoder
    hidden = want[f"{name}.hidden_before_dconv2"][None]
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
    rate = config["vocoder_config"]["sampling_rate"] / config["vocoder_config"]["hop_length"]
    coarse = decoder.dconv2(hidden).transpose(1, 2)
    frames = int(coarse.shape[2] * rate / 100)
    coarse = torch.nn.functional.interpolate(coarse, size=frames, mode="nearest").transpose(1, 2)
    assert_close(coarse, want[f"{name}.coarse_mel_interp"])
    assert_close(decoder.post_net(coarse), want[f"{name}.refined_mel"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["one", "long", "pair"])
def test_flow_matching_gives_the_official_mel(name):
    want, flow = golden("g08"), model().audio_tokenizer.audio_flow_matching_decoder
    mu = want[f"{name}.mu"].transpose(1, 2)
    mel = flow.sample(mu, want[f"{name}.z"], want[f"{name}.mel_length"]).transpose(1, 2)
    for item, length in enumerate(want[f"{name}.mel_length"].tolist()):
        assert_close(mel[item, :length], want[f"{name}.mel"][item, :length])


@torch.no_grad()
def test_one_evaluation_of_the_flow_network_is_the_official_one():
    want, network = golden("g08"), model().audio_tokenizer.audio_flow_matching_decoder.conditional_decoder
    mu, x = want["one.mu"].transpose(1, 2), want["one.x_steps"]
    assert_close(network.time_mlp(want["one.t"][:1]), want["one.time_emb0"])
    assert_close(network(x[0], mu, want["one.t"][:1]), want["one.v_cond0"])
    assert_close(network(x[0], torch.zeros_like(mu), want["one.t"][:1]), want["one.v_uncond0"])
    assert_close(network(x[-1], mu, want["one.t"][-1:]), want["one.v_cond_last"])


@torch.no_grad()
def test_the_vocoder_gives_the_official_waveform_from_a_given_f0():
    want, hift = golden("g09"), vocoder()
    phase, noise = want["noisy.phase"].float(), want["noisy.noise"].float()
    assert_close(hift.m_source.sines(want["noisy.f0"], phase, noise)[..., :2400], want["noisy.sines"])
    assert_close(hift(want["noisy.mel"], phase, noise, want["noisy.f0"]), want["noisy.wave"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["silent_noise", "frommel"])
def test_the_vocoder_predicts_f0_and_speaks_without_noise(name):
    want, hift = golden("g09"), vocoder()
    mel = want[f"{name}.mel"]
    assert_close(hift.f0_predictor(mel), want[f"{name}.f0"])
    quiet = (torch.zeros_like(part) for part in hift.draw(mel))
    assert_close(hift(mel, *quiet), want[f"{name}.wave"], limit=2e-2)


def test_every_tensor_of_the_checkpoint_is_a_parameter_or_buffer_and_nothing_more_is_expected():
    names = set(json.loads((GOLDEN / "checkpoint" / "model.safetensors.index.json").read_text())["weight_map"])
    assert set(model().state_dict()) == names
    assert not [name for name, value in model().state_dict().items() if not np.isfinite(value.numpy()).all()]
