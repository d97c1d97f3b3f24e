"""Trains the voice activity detector on speech in rooms and noise against sounds that are no speech.

python -m export.nano.vad_stage DATA_FOLDER RUN_FOLDER [--steps N]

A scene of some seconds holds up to three clips of speech or non-speech with pauses, over a background from silence to
loud, at a random level. A hop is speech where the clean speech in it is within 35 dB of the scene's loudest. No label:
hops at an edge, where speech fills between a tenth and half, and speech drowned by the background.
"""

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.signal import lfilter
from torch import Tensor

from export.nano import augment, corpus, noises, training
from export.nano.corpus import Recording
from export.nano.split import read_split
from export.nano.vad import HOP, RATE, VAD, WEIGHTS

_SECONDS, _BATCH = 6, 16
_IGNORED = -1.0
_HIDDEN = 0.5  # speech that nobody could hear; becomes ignored
_TRAIN = ("questions_espeak", "questions_flite", "questions_piper", "questions_kokoro", "other_talk")
_TEST = ("test_espeak", "test_flite", "test_kokoro")


@dataclass(frozen=True)
class Sounds:
    """What scenes are made of."""

    speech: list[Recording]
    kinds: tuple[str, ...]


def speech_hops(clean: np.ndarray) -> np.ndarray:
    """Label of each hop of clean speech on silence: 1, 0, or -1 at an edge."""
    blocks = clean[: len(clean) // HOP * HOP].reshape(-1, 8, HOP // 8)
    power = (blocks * blocks).mean(2)
    loud = power > max(float(power.max()) * 10**-3.5, 1e-8)
    share = _smooth(loud.reshape(-1)).reshape(loud.shape).mean(1)
    return np.where(share >= 0.5, 1.0, np.where(share <= 0.1, 0.0, _IGNORED)).astype(np.float32)


def _smooth(loud: np.ndarray, gap: int = 50) -> np.ndarray:
    """Close pauses inside an utterance shorter than `gap` eighths of a hop (0.2 s)."""
    out, at = loud.copy(), np.flatnonzero(loud)
    for left, right in pairwise(at):
        if right - left <= gap:
            out[left:right] = True
    return out


def _place(scene: np.ndarray, wave: np.ndarray, start: int) -> None:
    piece = wave[: len(scene) - start]
    scene[start : start + len(piece)] += piece


def draw_scene(rng: Random, sounds: Sounds) -> tuple[np.ndarray, np.ndarray]:
    """-> (samples [6 s], labels [hops])."""
    length = _SECONDS * RATE // HOP * HOP
    clean, other = np.zeros(length, np.float32), np.zeros(length, np.float32)

    def speak() -> np.ndarray:
        return rng.choice(sounds.speech).wave()

    start = rng.randint(0, RATE * 3 // 2)
    while start < length - RATE // 4:
        gain = 10 ** rng.uniform(-1.2, 0)
        if rng.random() < 0.62:
            wave = speak()
            if rng.random() < 0.3:
                wave = augment.tilt(wave, rng.uniform(-0.5, 0.6))
            _place(clean, wave * gain, start)
        else:
            # Babble and reversed speech are speech to any detector of this size.
            kinds = [k for k in sounds.kinds if k not in ("babble", "reversed")]
            wave = noises.draw_noise(rng, kinds, speak, rng.uniform(0.3, 2.5))[1]
            _place(other, wave * gain, start)
        start += len(wave) + rng.randint(RATE // 3, 2 * RATE)
    peak = max(float(np.abs(clean + other).max()), 1e-4)
    clean, other = clean / peak, other / peak
    level = 10 ** rng.uniform(-4, -0.9) if rng.random() < 0.85 else 0.0
    other = other + _background(rng, length) * level
    labels = np.where(_audible(clean, other), speech_hops(clean), np.minimum(speech_hops(clean), _HIDDEN))
    scene = clean + other
    if rng.random() < 0.35:
        scene = augment.reverberate(scene, rng)
    scene *= 10 ** rng.uniform(-2.3, 0) / max(float(np.abs(scene).max()), 1e-6)
    return np.round(scene * 32767).astype(np.float32) / 32768, np.where(labels == _HIDDEN, _IGNORED, labels)


def _background(rng: Random, length: int) -> np.ndarray:
    """A steady background of unit power, white or falling with frequency."""
    floor = np.random.default_rng(rng.getrandbits(63)).standard_normal(length)
    if rng.random() < 0.7:
        floor = np.asarray(lfilter([1], [1, -rng.uniform(0.5, 0.98)], floor))
    return (floor / max(float(floor.std()), 1e-6)).astype(np.float32)


def _audible(clean: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Hops where speech, over a fifth of a second around them, is at most 3 dB weaker than everything else."""
    powers = [(part[: len(part) // HOP * HOP].reshape(-1, HOP) ** 2).mean(1) for part in (clean, other)]
    smooth = [np.convolve(power, np.ones(7) / 7, "same") for power in powers]
    return smooth[0] > 0.5 * smooth[1]


def draw_batch(rng: Random, sounds: Sounds, count: int) -> tuple[Tensor, Tensor]:
    """-> waves [count, samples] and labels [count, hops]."""
    waves, labels = zip(*(draw_scene(rng, sounds) for _ in range(count)), strict=True)
    return torch.from_numpy(np.stack(waves)).float(), torch.from_numpy(np.stack(labels)).float()


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a random speech hop scores above a random other one (Mann-Whitney)."""
    order = np.argsort(scores)
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    speech = labels == 1
    n = int(speech.sum())
    return float((ranks[speech].sum() - n * (n + 1) / 2) / max(1, n * (len(scores) - n)))


@torch.no_grad()
def evaluate(vad: VAD, sounds: Sounds, scenes: int = 200) -> dict[str, float]:
    """AUC, and precision, recall and F1 at 0.5, over the labelled hops of scenes drawn from a fixed seed."""
    vad.eval()
    scores, labels = [], []
    rng = Random(99)
    for _ in range(scenes // 20):
        waves, want = draw_batch(rng, sounds, 20)
        known = want != _IGNORED
        scores.append(torch.sigmoid(vad.logits(waves))[known].numpy())
        labels.append(want[known].numpy())
    vad.train()
    score, label = np.concatenate(scores), np.concatenate(labels)
    hit = float(((score > 0.5) & (label == 1)).sum())
    precision, recall = hit / max(1, int((score > 0.5).sum())), hit / max(1, int((label == 1).sum()))
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"auc": area_under_curve(score, label), "precision": precision, "recall": recall, "f1": f1}


def train(folder: Path, run: Path, steps: int, every: int = 100) -> None:
    """Train to `steps`, going on from `run`/vad.pt, and write the weights beside the module."""
    split = read_split()
    sounds = Sounds([r for name in _TRAIN for r in corpus.recordings(folder / name)], split.train_noises)
    heldout = Sounds([r for name in _TEST for r in corpus.recordings(folder / name)], split.heldout_noises)
    vad = VAD().train()
    optimizer = torch.optim.AdamW(vad.parameters(), lr=3e-3, weight_decay=0.01)
    step, log = 0, training.Log(run / "vad.jsonl")
    if (state := training.load_state(run / "vad.pt")) is not None:
        vad.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while step < steps:
        waves, labels = draw_batch(training.seed_step(2, step), sounds, _BATCH)
        logits, known = vad.logits(waves), labels != _IGNORED
        loss = F.binary_cross_entropy_with_logits(logits[known], labels[known])
        training.set_rate(optimizer, training.cosine_rate(step, steps, 3e-3, warmup=50))
        training.clipped_step(loss, optimizer, vad.parameters())
        log.add(loss=loss.detach())
        step += 1
        if step % every == 0 or step == steps:
            training.save_state(run / "vad.pt", model=vad.state_dict(), optimizer=optimizer.state_dict(), step=step)
            log.write(step, **evaluate(vad, heldout))
    save_file({name: tensor.contiguous() for name, tensor in vad.state_dict().items()}, WEIGHTS)


def main() -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.folder, arguments.run, arguments.steps)


if __name__ == "__main__":
    main()
