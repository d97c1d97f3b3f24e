"""Stage 4: the vocoder, from the target voice's mel to its waveform.

python -m export.nano.vocoder_stage DATA_FOLDER RUN_FOLDER [--steps N]

The steps minimise log-magnitude distances at four STFT resolutions, of bins and of mel bands. F0 comes from a pitch
tracker, and the F0 predictor learns beside it; in the second half the F0 is now and then the predicted one, and some
batches start from the mels that the decoder stage has left, if it has run: what the vocoder will really be given. A
discriminator (2,000 steps with one of three resolutions) made nothing more intelligible.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.nano import corpus, training
from export.nano.config import read_config
from export.nano.corpus import Recording
from export.nano.decoder_stage import PREDICTED
from export.nano.features import SPOKEN_HOP, SPOKEN_RATE, mel_filters, spoken_mel
from export.nano.pitch import frame_f0
from export.nano.vocoder import HiFT

CONFIG = Path(__file__).with_name("checkpoint")
_CROP = 20  # mel frames of a training piece
_BATCH = 8
_RESOLUTIONS = ((256, 64), (512, 128), (1024, 256), (2048, 512))  # (n_fft, hop)
_BANDS = (20, 40, 80, 120)  # mel bands of each resolution
_PEAK, _ADAM_SHARE = 2e-3, 0.3
_SAMPLED, _PREDICTED_F0 = 0.2, 0.3  # shares of the batches of the second half
_VOICED = 10.0  # Hz, the vocoder's own threshold


@dataclass(frozen=True)
class Piece:
    """Aligned crops: mel [batch, bins, T], F0 [batch, T] in Hz, waveform [batch, 480 T]."""

    mel: Tensor
    f0: Tensor
    wave: Tensor


class TargetVoice:
    """Clips of the target voice with F0 (tracked once, kept in the run's folder)."""

    def __init__(self, recordings: list[Recording], cache: Path, bins: int) -> None:
        self.recordings, self.bins = recordings, bins
        known = dict(np.load(cache)) if cache.exists() else {}
        key = "f0_{0.text}_{0.samples}".format
        missing = [r for r in recordings if key(r.clip) not in known]
        known |= {key(r.clip): frame_f0(r.wave(), SPOKEN_RATE, SPOKEN_HOP) for r in missing}
        if missing:
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.savez(cache, **known)
        self.f0 = [known[key(r.clip)] for r in recordings]

    def crop(self, rng: Random, index: int, start: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Waveform and F0 of a piece; a short clip is padded with faint noise."""
        wave, f0 = self.recordings[index].wave(), self.f0[index]
        out = 1e-3 * np.random.default_rng(rng.getrandbits(63)).standard_normal(frames * SPOKEN_HOP)
        piece = wave[start * SPOKEN_HOP : (start + frames) * SPOKEN_HOP]
        out[: len(piece)] += piece
        pitch = np.zeros(frames)
        pitch[: len(f0[start : start + frames])] = f0[start : start + frames]
        return out.astype(np.float32), pitch.astype(np.float32)

    def draw(self, rng: Random, count: int, frames: int = _CROP) -> Piece:
        """Random pieces."""
        wave, f0 = self._pieces(rng, self._places(rng, count, frames), frames)
        return Piece(spoken_mel(wave, self.bins), f0, wave)

    def draw_predicted(self, rng: Random, mels: list[Tensor], count: int, frames: int = _CROP) -> Piece:
        """Random pieces of the first clips, whose mels [bins, T] are not the recording's own but given."""
        places = self._places(rng, count, frames, [mel.shape[1] for mel in mels])
        wave, f0 = self._pieces(rng, places, frames)
        cut = [mels[index][:, start : start + frames].float() for index, start in places]
        return Piece(torch.stack([F.pad(mel, (0, frames - mel.shape[1]), value=-1.0) for mel in cut]), f0, wave)

    def _places(self, rng: Random, count: int, frames: int, lengths: list[int] | None = None) -> list[tuple[int, int]]:
        """Random (clip, first frame) pairs; with `lengths` of the first clips only, which may be shorter."""
        lengths = [len(f0) for f0 in self.f0] if lengths is None else lengths
        clips = [rng.randrange(len(lengths)) for _ in range(count)]
        return [(clip, rng.randint(0, max(0, min(lengths[clip], len(self.f0[clip])) - frames))) for clip in clips]

    def _pieces(self, rng: Random, places: list[tuple[int, int]], frames: int) -> tuple[Tensor, Tensor]:
        pairs = [self.crop(rng, clip, start, frames) for clip, start in places]
        wave, f0 = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        return wave, f0


def log_spectrum(wave: Tensor, n_fft: int, hop: int) -> Tensor:
    """Log-magnitudes [batch, bins, frames]."""
    window = torch.hann_window(n_fft)
    return torch.stft(wave, n_fft, hop, window=window, return_complex=True).abs().clamp(min=1e-4).log()


def spectral_loss(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Means over resolutions: L1 of log-magnitudes plus the relative L2 of magnitudes; L1 of log-mel bands in nats.

    Noise never falls into the same bins twice, but into the same bands: these say what a listener can tell apart.
    """
    bins, bands = got.new_zeros(()), got.new_zeros(())
    for (n_fft, hop), count in zip(_RESOLUTIONS, _BANDS, strict=True):
        a, b = log_spectrum(got, n_fft, hop), log_spectrum(want, n_fft, hop)
        x, y = a.exp(), b.exp()
        bins = bins + F.l1_loss(a, b) + (x - y).norm() / y.norm()
        filters = mel_filters(SPOKEN_RATE, n_fft, count, SPOKEN_RATE / 2)
        bands = bands + F.l1_loss((filters @ x).clamp(min=1e-5).log(), (filters @ y).clamp(min=1e-5).log())
    return bins / len(_RESOLUTIONS), bands / len(_RESOLUTIONS)


def pitch_loss(predicted: Tensor, f0: Tensor) -> Tensor:
    """Relative error where voiced; where unvoiced, what lies above the voicing threshold counts."""
    voiced = f0 > 0
    error = torch.where(voiced, (predicted - f0).abs() / 100, (predicted - _VOICED / 2).abs() / 100)
    return error.mean()


class VocoderTrainer:
    """Vocoder, its optimizer and the step it is at."""

    def __init__(self, run: Path) -> None:
        self.path = run / "vocoder.pt"
        config = read_config(CONFIG)
        self.bins = config.vocoder.in_channels
        self.hift = HiFT(config.vocoder)
        with torch.no_grad():
            # Start at a speaking pitch instead of creeping up to it from 0 Hz.
            self.hift.f0_predictor.classifier.weight.mul_(60)
            self.hift.f0_predictor.classifier.bias.fill_(120.0)
        # The output layer and the source are left to AdamW, as is the F0 predictor.
        inner = r"(ups|resblocks|source_resblocks)\..*weight_v"
        self.optimizer = training.MuonAdamW(self.hift, inner, _PEAK, _ADAM_SHARE)
        self.step = 0
        if (state := training.load_state(self.path)) is not None:
            self.hift.load_state_dict(state["model"])
            training.restore(self.optimizer, state)
            self.step = state["step"]

    def save(self) -> None:
        """Keep everything."""
        training.save_state(
            self.path, model=self.hift.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step
        )

    def losses(self, piece: Piece, predicted_f0: bool = False) -> dict[str, Tensor]:
        """The parts of the loss of a waveform that is made from the predicted F0 or the given one."""
        phase, noise = self.hift.draw(piece.mel)
        f0 = self.hift.f0_predictor(piece.mel)
        source = self.hift.m_source(f0.detach() if predicted_f0 else piece.f0, phase, noise)
        with training.mixed_precision():
            spectrum = self.hift.spectrum(piece.mel, source)
        made = self.hift.waveform(spectrum.float())
        mel = F.l1_loss(spoken_mel(made, self.bins), spoken_mel(piece.wave, self.bins))
        bins, bands = spectral_loss(made, piece.wave)
        return {"spectrum": bins, "bands": bands, "mel": mel, "pitch": pitch_loss(f0, piece.f0)}

    def train_step(self, piece: Piece, predicted_f0: bool = False) -> dict[str, Tensor]:
        """One step; returns the parts of the loss."""
        parts = self.losses(piece, predicted_f0)
        loss = parts["spectrum"] + 2 * parts["bands"] + 2 * parts["mel"] + parts["pitch"]
        training.clipped_step(loss, self.optimizer, self.hift.parameters())
        self.step += 1
        return {name: part.detach() for name, part in parts.items()}


@torch.no_grad()
def evaluate(trainer: VocoderTrainer, voice: TargetVoice) -> dict[str, float]:
    """Losses on held-out clips with predicted F0, which is what inference uses."""
    piece = voice.draw(Random(5), 24, 60)
    phase, noise = trainer.hift.draw(piece.mel)
    f0 = trainer.hift.f0_predictor(piece.mel)
    made = trainer.hift(piece.mel, phase, noise, f0)
    voiced = piece.f0 > 0
    bins, bands = spectral_loss(made, piece.wave)
    return {
        "spectrum_heldout": float(bins),
        "bands_heldout": float(bands),
        "mel_heldout": float(F.l1_loss(spoken_mel(made, trainer.bins), piece.mel)),
        "f0_error_hz": float((f0 - piece.f0)[voiced].abs().mean()),
        "voicing": float(((f0 > _VOICED) == voiced).float().mean()),
    }


def train(folder: Path, run: Path, steps: int, every: int = 200) -> None:
    """Train to `steps`, going on from `run`/vocoder.pt."""
    trainer = VocoderTrainer(run)
    voice = TargetVoice(corpus.recordings(folder / "answers"), run / "f0.npz", trainer.bins)
    heldout = TargetVoice(corpus.recordings(folder / "answers_heldout"), run / "f0_heldout.npz", trainer.bins)
    log, sampled = training.Log(run / "vocoder.jsonl"), training.load_state(run / PREDICTED)
    while trainer.step < steps:
        rng, late = training.seed_step(4, trainer.step), trainer.step >= steps / 2
        training.set_rate(trainer.optimizer, training.cosine_rate(trainer.step, steps, _PEAK))
        if late and sampled is not None and rng.random() < _SAMPLED:
            piece = voice.draw_predicted(rng, sampled["mels"], _BATCH)
        else:
            piece = voice.draw(rng, _BATCH)
        log.add(**trainer.train_step(piece, late and rng.random() < _PREDICTED_F0))
        if trainer.step % every == 0 or trainer.step == steps:
            trainer.save()
            log.write(trainer.step, **(evaluate(trainer, heldout) if heldout.recordings else {}))


def main() -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=7000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    train(given.folder, given.run, given.steps)


if __name__ == "__main__":
    main()
