"""A checkpoint in full precision with everything that asks it: codes, greedy tokens, greedy speech, a judge's ear."""

from collections.abc import Iterable
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from export.nano import codes, corpus, vocabulary
from export.nano.corpus import Recording
from export.nano.judge import Judge
from export.nano.language import Cache
from export.nano.language_stage import LanguageTrainer, Predicted, predict
from export.nano.model import load_checkpoint
from export.nano.sequences import Sequence, Writer, collate

_LONGEST_TEXT, _LONGEST_SPEECH = 24, 80  # tokens, frames


class Examiner:
    """The checkpoint with everything that asks it."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.omni, self.hift = load_checkpoint(checkpoint)
        self.config = self.omni.config
        self.writer = Writer(checkpoint, self.config.codebook_sizes)
        self.trainer = LanguageTrainer(None).eval()
        self.trainer.omni = self.omni
        self.judge: Judge | None = None

    def predict(self, sequences: list[Sequence]) -> Predicted:
        """The likeliest tokens and the right ones where one is due."""
        return predict(self.trainer, sequences, self.writer.token(vocabulary.EOS))

    def encode(self, recording: Recording) -> Tensor:
        """Codes of a recording, as `encode_wave` gives them."""
        return self.encode_wave(recording.wave())

    def encode_wave(self, wave: np.ndarray) -> Tensor:
        """Codes [L, levels] of samples at 16 kHz with 50 ms of silence around them."""
        return codes.encode_waves(self.omni.audio_tokenizer, [np.pad(wave, 800)], self.config.audio.num_mel_bins)[0]

    def vocode(self, mel: Tensor) -> np.ndarray:
        """Mel [bins, T] -> samples at 24 kHz."""
        phase, noise = self.hift.draw(mel[None], torch.Generator().manual_seed(0))
        with torch.no_grad():
            return self.hift(mel[None], phase, noise)[0].numpy()

    def speak(self, spoken: Tensor) -> np.ndarray:
        """Codes [L, levels] -> samples at 24 kHz."""
        with torch.no_grad():
            mu = self.omni.audio_tokenizer.condition(spoken[None])
            noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(0))
            mel = self.omni.audio_tokenizer.audio_flow_matching_decoder.sample(mu, noise)
        return self.vocode(mel[0])

    @torch.no_grad()
    def start(self, sequence: Sequence) -> tuple[Tensor, Cache]:
        """Prefill: hidden states [1, T, hidden] and the cache."""
        batch = collate([sequence], 0, len(self.config.codebook_sizes))
        seen = None
        if len(batch.pictures):
            merge = self.config.vision.spatial_merge_size
            grid = merge * batch.cells[0], merge * batch.cells[1]
            seen = self.omni.model.embed_images(batch.pictures, [grid]).flatten(0, 1)
        rows = self.omni.model.embed(batch.ids, batch.codes if len(batch.codes) else None, seen)
        return self.omni.model(rows, torch.arange(1, rows.shape[1] + 1))

    @torch.no_grad()
    def follow(self, row: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """One more row [hidden]."""
        return self.omni.model(row[None, None], torch.tensor([past[0][0].shape[2] + 1]), past)

    @torch.no_grad()
    def write(self, sequence: Sequence, stops: tuple[str, ...]) -> tuple[list[int], Tensor, Cache]:
        """Greedy text without its stop token; the hidden state after that token has been read, and the cache."""
        ends = [self.writer.token(stop) for stop in stops]
        hidden, past = self.start(sequence)
        out: list[int] = []
        while True:
            token = int(self.omni.lm_head(hidden[0, -1]).argmax())
            hidden, past = self.follow(self.omni.model.embed_tokens(torch.tensor(token)), past)
            if token in ends or len(out) >= _LONGEST_TEXT:
                return out, hidden[0, -1], past
            out.append(token)

    @torch.no_grad()
    def utter(self, hidden: Tensor, past: Cache) -> Tensor:
        """Greedy frames [L, levels] from the hidden state of audiogen_start."""
        frames: list[Tensor] = []
        while len(frames) < _LONGEST_SPEECH:
            frame = self.omni.greedy_frame(hidden)
            if int(frame[0]) == self.config.codebook_sizes[0]:
                break
            frames.append(frame)
            states, past = self.follow(self.omni.model.embed_audio(frame), past)
            hidden = states[0, -1]
        return torch.stack(frames) if frames else torch.zeros(0, len(self.config.codebook_sizes), dtype=torch.long)

    def clips(self, name: str) -> list[Recording]:
        """A held-out set in random order, for the parts of a figure to be alike."""
        found = corpus.recordings(self.folder / name)
        Random(1).shuffle(found)
        return found

    def errors(self, spoken: Iterable[tuple[np.ndarray, int, str]]) -> np.ndarray:
        """Wrong words, and words in all, of each clip by the judge: [n, 2]."""
        self.judge = self.judge or Judge(self.folder)
        return self.judge.errors(spoken)
