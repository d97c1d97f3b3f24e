"""Codes of every recording by the trained encoder, computed once and kept beside the run.

python -m export.nano.codes DATA_FOLDER RUN_FOLDER [SET ...]

Questions are coded clean and after random disturbances, more of them where recordings are few; the target voice at four
shifts of 20 ms, so that the same words meet the codes' 80 ms grid in every phase. Behind some questions the assistant's
own voice speaks, as where a person interrupts it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from export.nano import augment, corpus, training
from export.nano.audio_tokenizer import length_mask
from export.nano.corpus import Recording
from export.nano.features import SPOKEN_HOP, heard_lengths, heard_mel
from export.nano.model import AudioTokenizer
from export.nano.tokenizer_stage import TokenizerTrainer

QUESTIONS = (
    "questions_espeak",
    "questions_flite",
    "questions_piper",
    "questions_kokoro",
    "other_talk",
    "other_talk_flite",
    "other_talk_piper",
    "other_talk_kokoro",
    "noises",
)
TESTS = (
    "test_espeak",
    "test_espeak_seen",
    "test_flite",
    "test_festival",
    "test_kokoro",
    "test_other_talk",
    "test_noises",
)
TARGETS = ("answers", "answers_more", "answers_heldout")
SHIFTS = 4
_MANY = ("questions_espeak", "noises", "other_talk")
_TALKED_OVER = 0.25  # share of the disturbed questions
_BATCH = 32


@dataclass(frozen=True)
class CodedSet:
    """Codes [frames, levels] of `variants` versions of each clip: clip i in version v is span `i * variants + v`."""

    codes: Tensor
    starts: Tensor
    variants: int

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.variants

    def of(self, clip: int, variant: int) -> Tensor:
        """Codes [L, levels] of one version of one clip."""
        at = clip * self.variants + variant
        return self.codes[self.starts[at] : self.starts[at + 1]].long()


def load_tokenizer(run: Path) -> AudioTokenizer:
    """The audio tokenizer of stage 1, its codebooks rounded to bfloat16 as they ship; FileNotFoundError before it."""
    state = training.load_state(run / "tokenizer.pt")
    if state is None:
        raise FileNotFoundError(f"{run / 'tokenizer.pt'} is missing; run export.nano.tokenizer_stage first")
    trainer = TokenizerTrainer()
    trainer.load_state_dict(state["model"])
    for book in trainer.tokenizer.audio_bridge_model.codebooks:
        book.embed.copy_(book.embed.bfloat16().float())
    return trainer.tokenizer.eval()


def target_wave(recording: Recording, shift: int, generator: np.random.Generator) -> np.ndarray:
    """A target clip at 24 kHz, `shift` mel frames late, dithered, padded to whole codes."""
    code = 4 * SPOKEN_HOP
    wave = np.pad(recording.wave(), (shift * SPOKEN_HOP, 0))
    wave = np.pad(wave, (0, -len(wave) % code))
    return (wave + 1e-3 * generator.standard_normal(len(wave))).astype(np.float32)


def heard_version(wave: np.ndarray) -> np.ndarray:
    """24 kHz -> 16 kHz."""
    return resample_poly(wave, 2, 3).astype(np.float32)


@torch.no_grad()
def encode_waves(tokenizer: AudioTokenizer, waves: list[np.ndarray], bins: int, fast: bool = False) -> list[Tensor]:
    """Codes [L, levels] of 16 kHz waves, each as if encoded alone; `fast` in bfloat16, where some codes are others."""
    longest = max(map(len, waves)) + 400
    padded = torch.zeros(len(waves), longest + -longest % 3200)
    for row, wave in zip(padded, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    lengths = heard_lengths(torch.tensor([len(w) for w in waves]), tokenizer.pool)
    mel = heard_mel(padded, bins)
    with training.mixed_precision(fast):
        hidden = tokenizer.audio_model(mel, lengths[1], lengths[0])
        pooled = tokenizer.audio_bridge_model.pooled(hidden).float()
    valid = length_mask(lengths[2], pooled.shape[1])
    codes = tokenizer.audio_bridge_model.encode(pooled[valid])
    return list(codes.split(lengths[2].tolist()))


def versions(recording: Recording, name: str, index: int, others: list[Recording]) -> list[np.ndarray]:
    """The 16 kHz waves of a clip that are coded; one of `others`, at 24 kHz, speaks behind some of the disturbed."""
    rng = Random(f"{name}/{index}")
    if name in TARGETS:
        draws = np.random.default_rng(rng.getrandbits(63))
        return [heard_version(target_wave(recording, shift, draws)) for shift in range(SHIFTS)]
    clean = np.pad(recording.wave(), (800, 800))
    if name in TESTS:
        return [clean]
    disturbed = 1 if name in _MANY else 3
    waves = [clean]
    for _ in range(disturbed):
        talking = bool(others) and recording.clip.intent != "noise" and rng.random() < _TALKED_OVER
        behind = heard_version(rng.choice(others).wave()) if talking else None
        waves.append(augment.disturb(recording.wave(), rng, [], behind)[0])
    return waves


def encode_set(
    tokenizer: AudioTokenizer, recordings: list[Recording], name: str, bins: int, others: list[Recording]
) -> CodedSet:
    """Code every version of every clip."""
    waves = [wave for i, recording in enumerate(recordings) for wave in versions(recording, name, i, others)]
    order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
    coded: list[Tensor] = [torch.zeros(0)] * len(waves)
    for i in range(0, len(order), _BATCH):
        part = order[i : i + _BATCH]
        # What is only listened to may as well be heard with some rounding.
        fast = name in QUESTIONS
        for at, codes in zip(part, encode_waves(tokenizer, [waves[j] for j in part], bins, fast), strict=True):
            coded[at] = codes
    starts = torch.tensor([0, *(len(c) for c in coded)]).cumsum(0)
    return CodedSet(torch.cat(coded).to(torch.int16), starts, len(waves) // len(recordings))


def load_codes(run: Path, name: str) -> CodedSet | None:
    """What `main` has kept of a set."""
    state = training.load_state(run / "codes" / f"{name}.pt")
    return None if state is None else CodedSet(**state)


def main() -> None:
    """Code every set that exists and is not coded yet, or has grown since."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("sets", nargs="*", help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(arguments.run)
    bins = tokenizer.audio_model.conv1.in_channels
    others = corpus.recordings(arguments.folder / "answers")  # its own voice, which a microphone hears as well
    for name in arguments.sets or (*TARGETS, *TESTS, *QUESTIONS):
        recordings = corpus.recordings(arguments.folder / name)
        kept = load_codes(arguments.run, name)
        if recordings and (kept is None or len(kept) != len(recordings)):
            coded = encode_set(tokenizer, recordings, name, bins, others)
            training.save_state(
                arguments.run / "codes" / f"{name}.pt", codes=coded.codes, starts=coded.starts, variants=coded.variants
            )
            print(f"{name}: {len(recordings)} clips, {len(coded.codes)} frames", flush=True)


if __name__ == "__main__":
    main()
