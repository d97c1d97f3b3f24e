"""Stages 2 and 3: codes of the target voice to mel, first the audio decoder and prenet, then flow matching.

python -m export.nano.decoder_stage DATA_FOLDER RUN_FOLDER [--steps N] [--flow-steps N]

The encoder and its codes stay as they are. The prenet's mel mu is trained by its L1; the flow network by conditional
flow matching (Lipman et al. 2022, arXiv:2210.02747) on mu of the finished prenet, with the condition dropped in a fifth
of the batches for classifier-free guidance. The flow network starts close to the identity: from a usual start it does
not learn to pass eighty channels of white noise through and stays at the loss of knowing nothing.
"""

import argparse
import math
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.nano import corpus, training
from export.nano.codes import SHIFTS, CodedSet, load_codes, load_tokenizer, target_wave
from export.nano.corpus import Recording
from export.nano.features import spoken_mel
from export.nano.flow_matching import ConditionalDecoder
from export.nano.model import AudioTokenizer

_BATCH = 16
_CROP = 64  # mel frames of a flow-matching item, but in the last quarter, which sees whole clips
SAMPLED, PREDICTED = 600, "predicted.pt"  # mels that are kept for the vocoder, of the first clips of `answers`
_DROPPED = 0.2  # share of flow batches without condition
_QUIET = -1.0  # normalised log-mel below which a frame is silence


class TargetCodes:
    """Clips of the target voice with their codes' set and place in it, grouped by the number of codes at each shift."""

    def __init__(self, clips: list[tuple[Recording, CodedSet, int]], bins: int) -> None:
        self.clips, self.bins = clips, bins
        self._groups: dict[int, list[tuple[int, int]]] = {}
        for clip, (_, coded, index) in enumerate(clips):
            for shift in range(SHIFTS):
                self._groups.setdefault(len(coded.of(index, shift)), []).append((clip, shift))
        self._lengths = sorted(self._groups)
        self._weights = [len(self._groups[n]) for n in self._lengths]

    def draw(self, rng: Random, count: int) -> tuple[Tensor, Tensor]:
        """Codes [batch, L, levels] of equal length and the mel [batch, bins, 4 L - 1] they should become."""
        group = self._groups[rng.choices(self._lengths, self._weights)[0]]
        return self.batch(rng, rng.sample(group, min(count, len(group))))

    def batch(self, rng: Random, chosen: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """As `draw`, of given (clip, shift) pairs of one length."""
        codes = torch.stack([self.clips[clip][1].of(self.clips[clip][2], shift) for clip, shift in chosen])
        draws = np.random.default_rng(rng.getrandbits(63))
        frames = 4 * codes.shape[1] - 1
        waves = [target_wave(self.clips[clip][0], shift, draws) for clip, shift in chosen]
        mels = [spoken_mel(torch.from_numpy(wave)[None], self.bins)[0, :, :frames] for wave in waves]
        return codes, torch.stack([F.pad(mel, (0, frames - mel.shape[1])) for mel in mels])


def _coded(folder: Path, run: Path, names: tuple[str, ...]) -> list[tuple[Recording, CodedSet, int]]:
    """Every recording of some sets with the codes of its set and its place among them."""
    found = []
    for name in names:
        if (coded := load_codes(run, name)) is not None:
            found += [(r, coded, i) for i, r in enumerate(corpus.recordings(folder / name)[: len(coded)])]
    return found


def mel_loss(mu: Tensor, mel: Tensor) -> Tensor:
    """L1, with silence counting a fifth."""
    weight = 0.2 + 0.8 * (mel.amax(1, keepdim=True) > _QUIET).float()
    return ((mu - mel).abs() * weight).mean() / weight.mean()


@torch.no_grad()
def near_identity(network: ConditionalDecoder) -> None:
    """Let x and mu ride through the U-Net nearly unchanged: skips and causal convolutions start as the identity plus a
    little noise, every other branch starts at a tenth of its usual size."""
    down, *_, up = network.stages
    for stage in network.stages:
        _identity(stage.resnet.res_conv)
        stage.resnet.block2.block[2].get_parameter("weight").mul_(0.1)
        for block in stage.blocks:
            for linear in (block.attn1.to_out[0], block.ff.net[2]):
                linear.get_parameter("weight").mul_(0.1)
                linear.get_parameter("bias").zero_()
    for conv in (down.conv, up.conv, network.final_block.block[0]):
        _identity(conv)


def _identity(conv: nn.Module) -> None:
    """Weights at a twentieth, plus the identity on the last tap."""
    assert isinstance(conv, nn.Conv1d) and conv.bias is not None
    conv.weight.mul_(0.05)
    conv.bias.zero_()
    channels = torch.arange(min(conv.weight.shape[:2]))
    conv.weight[channels, channels, -1] += 1


def flow_loss(network: ConditionalDecoder, mel: Tensor, mu: Tensor, generator: Random) -> Tensor:
    """Mean square error of the predicted velocity at a random time of the cosine schedule."""
    t = 1 - torch.cos(torch.rand(len(mel)) * 0.5 * math.pi)
    noise = torch.randn_like(mel)
    at = t[:, None, None]
    if generator.random() < _DROPPED:
        mu = torch.zeros_like(mu)
    with training.mixed_precision():
        velocity = network((1 - at) * noise + at * mel, mu, t)
    return F.mse_loss(velocity.float(), mel - noise)


class DecoderTrainer:
    """The tokenizer's speaking half and the two optimizers, with the step that they are at."""

    def __init__(self, run: Path) -> None:
        self.path = run / "decoder.pt"
        self.tokenizer: AudioTokenizer = load_tokenizer(run)
        bridge, flow = self.tokenizer.audio_bridge_model, self.tokenizer.audio_flow_matching_decoder
        self.network = flow.conditional_decoder
        near_identity(self.network)
        self.speaking = nn.ModuleList([bridge.proj_decoder, self.tokenizer.audio_decoder, flow.prenet])
        self.optimizer = training.adamw(self.speaking.parameters(), 6e-4)
        self.flow_optimizer = training.adamw(self.network.parameters(), 1e-3, decay=0.0)
        self.step = 0
        if (state := training.load_state(self.path)) is not None:
            self.speaking.load_state_dict(state["speaking"])
            self.network.load_state_dict(state["network"])
            training.restore(self.optimizer, state)
            training.restore(self.flow_optimizer, state, "flow_optimizer")
            self.step = state["step"]

    def save(self) -> None:
        """Keep everything."""
        parts = {"speaking": self.speaking, "network": self.network}
        parts |= {"optimizer": self.optimizer, "flow_optimizer": self.flow_optimizer}
        training.save_state(self.path, step=self.step, **{name: part.state_dict() for name, part in parts.items()})

    def prenet_step(self, codes: Tensor, mel: Tensor) -> dict[str, Tensor]:
        """One step of decoder and prenet."""
        with training.mixed_precision():
            mu = self.tokenizer.condition(codes)
        loss = mel_loss(mu.float(), mel)
        training.clipped_step(loss, self.optimizer, self.speaking.parameters())
        return {"mel": loss.detach()}

    def flow_step(self, codes: Tensor, mel: Tensor, rng: Random, crop: int) -> dict[str, Tensor]:
        """One step of the flow network on crops of `crop` frames."""
        with torch.no_grad(), training.mixed_precision():
            mu = self.tokenizer.condition(codes).float()
        start = rng.randint(0, max(0, mel.shape[2] - crop))
        mel, mu = mel[..., start : start + crop], mu[..., start : start + crop]
        loss = flow_loss(self.network, mel, mu, rng)
        training.clipped_step(loss, self.flow_optimizer, self.network.parameters())
        return {"flow": loss.detach()}


@torch.no_grad()
def evaluate(trainer: DecoderTrainer, target: TargetCodes, with_flow: bool) -> dict[str, float]:
    """Losses of mu, and of sampled mels, on batches drawn from a fixed seed."""
    rng, figures = Random(7), {"mel_heldout": 0.0} | ({"sampled_heldout": 0.0} if with_flow else {})
    for _ in range(6):
        codes, mel = target.draw(rng, 8)
        mu = trainer.tokenizer.condition(codes)
        figures["mel_heldout"] += float(mel_loss(mu, mel)) / 6
        if with_flow:
            sampled = trainer.tokenizer.audio_flow_matching_decoder.sample(mu, torch.randn_like(mu))
            figures["sampled_heldout"] += float(mel_loss(sampled, mel)) / 6
    return figures


@torch.no_grad()
def sample_mels(trainer: DecoderTrainer, clips: list[tuple[Recording, CodedSet, int]]) -> list[Tensor]:
    """What flow matching makes of each clip's codes, unshifted: [bins, 4 L - 1], for the vocoder to get used to."""
    generator, mels = torch.Generator().manual_seed(0), []
    for _, coded, index in clips:
        mu = trainer.tokenizer.condition(coded.of(index, 0)[None])
        noise = torch.randn(mu.shape, generator=generator)
        mels.append(trainer.tokenizer.audio_flow_matching_decoder.sample(mu, noise)[0].half())
    return mels


def train(folder: Path, run: Path, steps: int, flow_steps: int, every: int = 200) -> None:
    """Train decoder and prenet to `steps`, then the flow network for `flow_steps`, going on from `run`/decoder.pt."""
    trainer = DecoderTrainer(run)
    bins = trainer.network.final_proj.out_channels
    clips = _coded(folder, run, ("answers", "answers_more"))
    spoken = TargetCodes(clips, bins)
    heldout = TargetCodes(_coded(folder, run, ("answers_heldout",)), bins)
    log = training.Log(run / "decoder.jsonl")
    while trainer.step < steps + flow_steps:
        step, rng = trainer.step, training.seed_step(3, trainer.step)
        codes, mel = spoken.draw(rng, _BATCH)
        if step < steps:
            training.set_rate(trainer.optimizer, training.cosine_rate(step, steps, 6e-4))
            log.add(**trainer.prenet_step(codes, mel))
        else:
            training.set_rate(trainer.flow_optimizer, training.cosine_rate(step - steps, flow_steps, 1e-3))
            crop = _CROP if step - steps < flow_steps * 3 // 4 else mel.shape[2]
            log.add(**trainer.flow_step(codes, mel, rng, crop))
        trainer.step += 1
        if trainer.step % every == 0 or trainer.step == steps + flow_steps:
            trainer.save()
            log.write(trainer.step, **evaluate(trainer, heldout, trainer.step > steps))
    kept = training.load_state(run / PREDICTED)
    if kept is None or kept["step"] != trainer.step:
        training.save_state(run / PREDICTED, step=trainer.step, mels=sample_mels(trainer, clips[:SAMPLED]))


def main() -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--flow-steps", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.folder, arguments.run, arguments.steps, arguments.flow_steps)


if __name__ == "__main__":
    main()
