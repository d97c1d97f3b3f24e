"""Stage 1: encoder, bridge and codebooks, so that codes say which phone is spoken and how the target voice sounds.

python -m export.nano.tokenizer_stage DATA_FOLDER RUN_FOLDER [--steps N]

Losses: cross-entropy of the phone at each 20 ms from the codes' vectors (weight 1) and from the encoder (.3); L1 of the
target voice's mel through audio decoder and prenet (1); commitment (.1). Quantization starts after `_CONTINUOUS` steps
with k-means codebooks that then follow running means (van den Oord et al. 2017, arXiv:1711.00937), unused codes being
moved onto current vectors; the gradient passes straight through the sum of all levels.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import resample_poly
from torch import Tensor, nn

from export.nano import augment, corpus, phones, training
from export.nano.audio_tokenizer import AudioBridge, Codebook, length_mask
from export.nano.config import read_config
from export.nano.corpus import Recording
from export.nano.features import HEARD_RATE, SPOKEN_RATE, heard_lengths, heard_mel, spoken_mel
from export.nano.model import AudioTokenizer

CONFIG = Path(__file__).with_name("checkpoint")
NOISE_LABEL = len(phones.PHONES)
LABELS = NOISE_LABEL + 1
_IGNORED = -100
_FRAME = HEARD_RATE // 50  # samples of one encoder frame
# Batches have few different lengths, each of whole codes: a product of a new shape costs its kernel's making.
_LENGTH_STEP = HEARD_RATE * 12 // 25
_SPEECH, _TARGET, _NOISE = 13, 6, 1  # clips of a batch
_CONTINUOUS = 400  # steps before quantization
_DECAY = 0.97
# How often each recording of a set is taken for one of the others: engines with few voices come oftener.
_QUESTIONS = {
    "questions_espeak": 1,
    "questions_flite": 4,
    "questions_piper": 3,
    "questions_kokoro": 8,
    "other_talk": 1,
}


@dataclass(frozen=True)
class Heard:
    """A padded batch: waves [batch, samples], sample counts, phone labels [batch, encoder frames]."""

    waves: Tensor
    samples: Tensor
    labels: Tensor


def frame_labels(alignment: list[tuple[int, str]], samples: int, frames: int) -> np.ndarray:
    """Label of each encoder frame [frames]: the phone under its centre; ignored past the end or without alignment."""
    labels = np.full(frames, _IGNORED)
    if not alignment:
        return labels
    inside = min(frames, samples // _FRAME + 1)
    centres = np.arange(inside) * _FRAME
    starts = np.array([start for start, _ in alignment])
    ids = np.array([phones.INDEX[phone] for _, phone in alignment])
    at = np.searchsorted(starts, centres, side="right") - 1
    labels[:inside] = np.where(at >= 0, ids[np.maximum(at, 0)], 0)
    return labels


def collate(waves: list[np.ndarray], alignments: list[list[tuple[int, str]]], noise: list[bool]) -> Heard:
    """Pad waves to a common length of whole steps and at least 400 samples of silence."""
    longest = -(-(max(map(len, waves)) + 400) // _LENGTH_STEP) * _LENGTH_STEP
    padded = np.zeros((len(waves), longest), np.float32)
    frames = longest // _FRAME + 1
    labels = np.full((len(waves), frames), _IGNORED)
    for i, (wave, alignment) in enumerate(zip(waves, alignments, strict=True)):
        padded[i, : len(wave)] = wave
        labels[i] = frame_labels(alignment, len(wave), frames)
        if noise[i]:
            labels[i, : len(wave) // _FRAME + 1] = NOISE_LABEL
    samples = torch.tensor([len(wave) for wave in waves])
    return Heard(torch.from_numpy(padded), samples, torch.from_numpy(labels))


def draw_heard(rng: Random, speech: list[Recording], noises: list[Recording], count: int, noisy: int) -> Heard:
    """`count` disturbed questions of similar length (speech is sorted by it) and `noisy` non-speech sounds."""
    start = rng.randrange(max(1, len(speech) - 4 * count))
    chosen = rng.sample(speech[start : start + 4 * count], count)
    pairs = [augment.disturb(r.wave(), rng, r.clip.alignment) for r in chosen]
    sounds = [r.wave() * 10 ** rng.uniform(-1.4, 0) for r in rng.sample(noises, noisy)]
    waves = [wave for wave, _ in pairs] + [sound[: 4 * HEARD_RATE] for sound in sounds]
    return collate(waves, [a for _, a in pairs] + [[] for _ in sounds], [False] * count + [True] * noisy)


def draw_target(rng: Random, target: list[Recording], count: int) -> tuple[Heard, Tensor]:
    """Clean clips of the target voice at random shifts, at 16 kHz with labels, and the same at 24 kHz."""
    start = rng.randrange(max(1, len(target) - 4 * count))
    return pair_target(rng, rng.sample(target[start : start + 4 * count], count))


def pair_target(rng: Random, chosen: list[Recording]) -> tuple[Heard, Tensor]:
    """As `draw_target`, of given clips."""
    code, step = SPOKEN_RATE * 2 // 25, _LENGTH_STEP * SPOKEN_RATE // HEARD_RATE
    # After `collate` has added its silence, too, the length is one of the steps.
    longest = (max(r.clip.samples for r in chosen) + code + 600) // step * step + step - 600
    spoken = np.zeros((len(chosen), longest), np.float32)
    alignments = []
    for i, recording in enumerate(chosen):
        shift = 3 * rng.randrange(code // 3)
        spoken[i, shift : shift + recording.clip.samples] = recording.wave()
        alignments.append([((s + shift) * 2 // 3, phone) for s, phone in recording.clip.alignment])
    # Digital silence would lie far below everything else in the log-mel.
    spoken += 1e-3 * np.random.default_rng(rng.getrandbits(63)).standard_normal(spoken.shape).astype(np.float32)
    heard = resample_poly(spoken, 2, 3, axis=1).astype(np.float32)
    return collate(list(heard), alignments, [False] * len(chosen)), torch.from_numpy(spoken)


class TokenizerTrainer(nn.Module):
    """The audio tokenizer with the two label heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        config = read_config(CONFIG)
        self.bins, self.pool = config.audio.num_mel_bins, config.audio.avg_pooler
        self.mel_bins = config.flow.in_channels
        self.tokenizer = AudioTokenizer(config)
        self.code_labels = nn.Linear(config.audio.bridge_dim, self.pool * LABELS)
        self.frame_labels = nn.Linear(config.audio.d_model, LABELS)

    def encode(self, heard: Heard, mask_bands: Random | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """-> encoder output [batch, T, d], vectors to quantize [batch, L, bridge], valid codes [batch, L]."""
        mel = heard_mel(heard.waves, self.bins)
        if mask_bands is not None:
            mel = masked(mel, mask_bands)
        mel_lengths, frames, codes = heard_lengths(heard.samples, self.pool)
        with training.mixed_precision(self.training):
            hidden = self.tokenizer.audio_model(mel, frames, mel_lengths)
            pooled = self.tokenizer.audio_bridge_model.pooled(hidden)
        return hidden.float(), pooled.float(), length_mask(codes, pooled.shape[1])

    def label_losses(self, heard: Heard, hidden: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropies from the code vectors and from the encoder, and the former's accuracy."""
        batch, codes, _ = quantized.shape
        logits = self.code_labels(quantized).view(batch, codes * self.pool, LABELS)
        labels = heard.labels[:, : logits.shape[1]]
        logits = logits[:, : labels.shape[1]]
        known = labels != _IGNORED
        early = self.frame_labels(hidden[:, : labels.shape[1]])
        accuracy = (logits[known].argmax(-1) == labels[known]).float().mean()
        return F.cross_entropy(logits[known], labels[known]), F.cross_entropy(early[known], labels[known]), accuracy

    def mel_loss(self, quantized: Tensor, spoken: Tensor) -> Tensor:
        """L1 of the prenet's mel against the recording's."""
        want = spoken_mel(spoken, self.mel_bins)
        bridge = self.tokenizer.audio_bridge_model
        with training.mixed_precision(self.training):
            hidden = self.tokenizer.audio_decoder(bridge.proj_decoder(quantized))
            got = self.tokenizer.audio_flow_matching_decoder.prenet(hidden).float().transpose(1, 2)
        frames = min(got.shape[2], want.shape[2])
        return F.l1_loss(got[..., :frames], want[..., :frames])


def masked(mel: Tensor, rng: Random) -> Tensor:
    """SpecAugment (Park et al. 2019, arXiv:1904.08779): two bands and two spans of each item set to 0."""
    mel = mel.clone()
    for item in mel:
        for _ in range(2):
            height, width = rng.randint(0, 12), rng.randint(0, 12)
            low, start = rng.randint(0, mel.shape[1] - height), rng.randint(0, mel.shape[2] - width)
            item[low : low + height] = 0
            item[:, start : start + width] = 0
    return mel


@torch.no_grad()
def start_codebooks(bridge: AudioBridge, vectors: Tensor, rounds: int = 10) -> None:
    """k-means of each level on what the levels before it leave over."""
    residual = vectors
    for book in bridge.codebooks:
        size = len(book.embed)
        book.embed.copy_(residual[torch.randperm(len(residual))[:size]] + 1e-4 * torch.randn_like(book.embed))
        for _ in range(rounds):
            counts, sums = _gather(book, residual)
            book.embed.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], book.embed))
        counts, _ = _gather(book, residual)
        book.cluster_size.copy_(counts.clamp(min=0.5))
        book.embed_avg.copy_(book.embed * book.cluster_size[:, None])
        residual = residual - book.embed[book.nearest(residual)]


def _gather(book: Codebook, x: Tensor) -> tuple[Tensor, Tensor]:
    """How many vectors fall to each code [size] and their sums [size, dim]."""
    index = book.nearest(x)
    counts = torch.bincount(index, minlength=len(book.embed)).float()
    return counts, torch.zeros_like(book.embed).index_add_(0, index, x)


@torch.no_grad()
def follow(book: Codebook, x: Tensor, index: Tensor) -> None:
    """Move the code vectors towards the running means of what falls to them; unused ones jump onto current vectors."""
    counts = torch.bincount(index, minlength=len(book.embed)).float()
    sums = torch.zeros_like(book.embed).index_add_(0, index, x)
    book.cluster_size.mul_(_DECAY).add_(counts, alpha=1 - _DECAY)
    book.embed_avg.mul_(_DECAY).add_(sums, alpha=1 - _DECAY)
    book.embed.copy_(book.embed_avg / book.cluster_size.clamp(min=1e-4)[:, None])
    usual = max(1.0, 0.5 * len(x) / len(book.embed))
    dead = book.cluster_size < 0.03 * usual
    fresh = x[torch.randint(len(x), (int(dead.sum()),))]
    book.embed[dead] = fresh
    book.cluster_size[dead] = usual
    book.embed_avg[dead] = fresh * usual


def quantize(bridge: AudioBridge, pooled: Tensor, valid: Tensor, learn: bool) -> tuple[Tensor, Tensor]:
    """-> straight-through vectors like `pooled` (zero where invalid) and the commitment loss."""
    vectors = pooled[valid]
    residual, total, commitment = vectors.detach(), torch.zeros_like(vectors), vectors.new_zeros(())
    for book in bridge.codebooks:
        index = book.nearest(residual)
        chosen = book.embed[index].clone()
        if learn:
            follow(book, residual, index)
        total = total + chosen
        commitment = commitment + F.mse_loss(vectors, total.detach())
        residual = residual - chosen
    out = torch.zeros_like(pooled)
    out[valid] = vectors + (total - vectors).detach()
    return out, commitment


def _by_length(recordings: list[Recording]) -> list[Recording]:
    return sorted(recordings, key=lambda r: r.clip.samples)


@dataclass(frozen=True)
class Data:
    """Recordings of the stage, each list sorted by length."""

    speech: list[Recording]
    noises: list[Recording]
    target: list[Recording]
    heldout: dict[str, list[Recording]]
    target_heldout: list[Recording]

    @classmethod
    def read(cls, folder: Path) -> "Data":
        """Whatever sets of `folder` exist by now."""
        speech = [r for name, times in _QUESTIONS.items() for r in corpus.recordings(folder / name) * times]
        tests = {name: corpus.recordings(folder / name)[:160] for name in ("test_espeak", "test_flite", "test_kokoro")}
        return cls(
            _by_length(speech),
            corpus.recordings(folder / "noises"),
            _by_length(corpus.recordings(folder / "answers")),
            {name: _by_length(clips) for name, clips in tests.items() if clips},
            _by_length(corpus.recordings(folder / "answers_heldout"))[:60],
        )


@torch.no_grad()
def evaluate(trainer: TokenizerTrainer, data: Data, quantizing: bool) -> dict[str, float]:
    """Label accuracy through the codes on held-out voices, and the held-out target mel's L1."""
    trainer.eval()
    bridge, figures = trainer.tokenizer.audio_bridge_model, {}
    for name, clips in data.heldout.items():
        scores = []
        for i in range(0, len(clips), 32):
            part = clips[i : i + 32]
            heard = collate([r.wave() for r in part], [r.clip.alignment for r in part], [False] * len(part))
            hidden, pooled, valid = trainer.encode(heard)
            vectors = quantize(bridge, pooled, valid, learn=False)[0] if quantizing else pooled
            scores.append(float(trainer.label_losses(heard, hidden, vectors)[2]))
        figures[name] = float(np.mean(scores))
    if data.target_heldout:
        heard, spoken = pair_target(Random(0), data.target_heldout)
        _, pooled, valid = trainer.encode(heard)
        vectors = quantize(bridge, pooled, valid, learn=False)[0] if quantizing else pooled
        figures["mel_heldout"] = float(trainer.mel_loss(vectors, spoken))
    trainer.train()
    return figures


def train_step(
    trainer: TokenizerTrainer, data: Data, rng: Random, quantizing: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, and its parts."""
    bridge = trainer.tokenizer.audio_bridge_model
    heard = draw_heard(rng, data.speech, data.noises, _SPEECH, _NOISE)
    spoken_heard, spoken = draw_target(rng, data.target, _TARGET)
    hidden, pooled, valid = trainer.encode(heard, rng)
    target_hidden, target_pooled, target_valid = trainer.encode(spoken_heard)
    if quantizing:
        # One call, so that the target voice has its share in every running mean.
        both = torch.cat([pooled[valid], target_pooled[target_valid]])
        every = torch.ones(1, len(both), dtype=torch.bool)
        flat, commitment = quantize(bridge, both[None], every, learn=True)
        pooled, target_pooled = pooled.clone(), target_pooled.clone()
        pooled[valid], target_pooled[target_valid] = flat[0].split([int(valid.sum()), int(target_valid.sum())])
    else:
        commitment = pooled.new_zeros(())
    late, early, accuracy = trainer.label_losses(heard, hidden, pooled)
    target_late, target_early, _ = trainer.label_losses(spoken_heard, target_hidden, target_pooled)
    mel = trainer.mel_loss(target_pooled, spoken)
    loss = late + 0.3 * early + 0.25 * (target_late + 0.3 * target_early) + mel + 0.1 * commitment
    return loss, {"phone": late, "phone_encoder": early, "accuracy": accuracy, "mel": mel, "commitment": commitment}


@torch.no_grad()
def collect_vectors(trainer: TokenizerTrainer, data: Data, rng: Random) -> Tensor:
    """Vectors of some twenty batches, half of them of the target voice, to start the codebooks from."""
    parts = []
    for _ in range(10):
        _, pooled, valid = trainer.encode(draw_heard(rng, data.speech, data.noises, _SPEECH, _NOISE))
        parts.append(pooled[valid])
        for _ in range(2):
            _, pooled, valid = trainer.encode(draw_target(rng, data.target, _TARGET)[0])
            parts.append(pooled[valid])
    return torch.cat(parts)


def train(folder: Path, run: Path, steps: int, every: int = 200) -> None:
    """Train to `steps`, going on from `run`/tokenizer.pt; new recordings are picked up at each evaluation."""
    trainer = TokenizerTrainer().train()
    optimizer = training.adamw(trainer.parameters(), 1e-3)
    step, log = 0, training.Log(run / "tokenizer.jsonl")
    if (state := training.load_state(run / "tokenizer.pt")) is not None:
        trainer.load_state_dict(state["model"])
        training.restore(optimizer, state)
        step = state["step"]
    data = Data.read(folder)
    while step < steps:
        rng = training.seed_step(1, step)
        if step == _CONTINUOUS:
            start_codebooks(trainer.tokenizer.audio_bridge_model, collect_vectors(trainer, data, rng))
        loss, parts = train_step(trainer, data, rng, step >= _CONTINUOUS)
        training.set_rate(optimizer, training.cosine_rate(step, steps, 1e-3))
        training.clipped_step(loss, optimizer, trainer.parameters())
        log.add(**parts)
        step += 1
        if step % every == 0 or step == steps:
            training.save_state(
                run / "tokenizer.pt", model=trainer.state_dict(), optimizer=optimizer.state_dict(), step=step
            )
            data = Data.read(folder)
            log.write(step, **evaluate(trainer, data, step > _CONTINUOUS), clips=len(data.speech))


def main() -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=9400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.folder, arguments.run, arguments.steps)


if __name__ == "__main__":
    main()
