"""Stage 4: the vocoder, from the target voice's mel to its waveform.

python -m export.nano.vocoder_stage DATA_FOLDER RUN_FOLDER [--steps N] [--adversarial N] [--pitch-steps N]

The first N steps minimise log-magnitude distances at four STFT resolutions, of bins and of mel bands; F0 comes from a
pitch tracker, and the F0 predictor learns beside it from the same figures. Then a multi-resolution discriminator (Jang
et al. 2021, arXiv:2106.07889) joins for the adversarial steps, half of the batches start from the mels that the decoder
stage has left, if it has run, and in half the F0 is the predicted one. At the end the F0 predictor learns on alone,
from larger batches than the waveform's losses have time for.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
_PEAK, _ADVERSARIAL_PEAK, _ADAM_SHARE = 2e-3, 1e-3, 0.3
_PITCH_BATCH, _PITCH_CROP, _PITCH_PEAK = 32, 40, 1e-3
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


class ResolutionDiscriminator(nn.Module):
    """2-D convolutions on one log-spectrogram; returns every layer's output, the last being the score."""

    def __init__(self, n_fft: int, hop: int, channels: int = 16) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        sizes = [(1, channels, (1, 1)), *[(channels, channels, (2, 1))] * 3, (channels, channels, (1, 1))]
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(i, o, (5, 3), stride=s, padding=(2, 1)))
            for i, o, s in sizes
        )
        self.score = nn.utils.parametrizations.weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> list[Tensor]:
        x, outputs = log_spectrum(wave, self.n_fft, self.hop)[:, None], []
        with training.mixed_precision():
            for layer in self.layers:
                x = F.leaky_relu(layer(x), 0.1)
                outputs.append(x)
            outputs.append(self.score(x))
        return [output.float() for output in outputs]


class Discriminator(nn.Module):
    """Three resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(ResolutionDiscriminator(n, h) for n, h in _RESOLUTIONS[1:])

    def forward(self, wave: Tensor) -> list[list[Tensor]]:
        return [part(wave) for part in self.parts]


def discriminator_loss(real: list[list[Tensor]], made: list[list[Tensor]]) -> Tensor:
    """Least squares (Mao et al. 2016, arXiv:1611.04076): real to 1, made to 0."""
    scores = zip(real, made, strict=True)
    return torch.stack([(1 - r[-1]).square().mean() + m[-1].square().mean() for r, m in scores]).sum()


def generator_loss(real: list[list[Tensor]], made: list[list[Tensor]]) -> Tensor:
    """Made to 1, and inner outputs like those of the real wave."""
    total = torch.zeros(())
    for r, m in zip(real, made, strict=True):
        alike = torch.stack([F.l1_loss(b, a.detach()) for a, b in zip(r[:-1], m[:-1], strict=True)]).mean()
        total = total + (1 - m[-1]).square().mean() + 2 * alike
    return total


class VocoderTrainer:
    """Vocoder, discriminator, their optimizers and the step they are at."""

    def __init__(self, run: Path) -> None:
        self.path = run / "vocoder.pt"
        config = read_config(CONFIG)
        self.bins = config.vocoder.in_channels
        self.hift, self.judge = HiFT(config.vocoder), Discriminator()
        with torch.no_grad():
            # Start at a speaking pitch instead of creeping up to it from 0 Hz.
            self.hift.f0_predictor.classifier.weight.mul_(60)
            self.hift.f0_predictor.classifier.bias.fill_(120.0)
        # The output layer and the source are left to AdamW, as is the F0 predictor.
        inner = r"(ups|resblocks|source_resblocks)\..*weight_v"
        self.optimizer = training.MuonAdamW(self.hift, inner, _PEAK, _ADAM_SHARE)
        self.judge_optimizer = torch.optim.AdamW(self.judge.parameters(), lr=3e-4, betas=(0.8, 0.99), fused=True)
        self.pitch_optimizer = training.adamw(self.hift.f0_predictor.parameters(), _PITCH_PEAK)
        self.step = 0
        if (state := training.load_state(self.path)) is not None:
            self.hift.load_state_dict(state["model"])
            self.judge.load_state_dict(state.get("judge", self.judge.state_dict()))
            training.restore(self.optimizer, state)
            training.restore(self.judge_optimizer, state, "judge_optimizer")
            training.restore(self.pitch_optimizer, state, "pitch_optimizer")
            self.step = state["step"]

    def save(self) -> None:
        """Keep everything."""
        states = {"judge": self.judge, "optimizer": self.optimizer, "judge_optimizer": self.judge_optimizer}
        states["pitch_optimizer"] = self.pitch_optimizer
        kept = {name: part.state_dict() for name, part in states.items()}
        training.save_state(self.path, model=self.hift.state_dict(), step=self.step, **kept)

    def losses(self, piece: Piece, predicted_f0: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The waveform, from the predicted F0 or the given one, and the parts of the loss but the adversarial one."""
        phase, noise = self.hift.draw(piece.mel)
        f0 = self.hift.f0_predictor(piece.mel)
        source = self.hift.m_source(f0.detach() if predicted_f0 else piece.f0, phase, noise)
        with training.mixed_precision():
            spectrum = self.hift.spectrum(piece.mel, source)
        made = self.hift.waveform(spectrum.float())
        mel = F.l1_loss(spoken_mel(made, self.bins), spoken_mel(piece.wave, self.bins))
        bins, bands = spectral_loss(made, piece.wave)
        return made, {"spectrum": bins, "bands": bands, "mel": mel, "pitch": pitch_loss(f0, piece.f0)}

    def train_step(self, piece: Piece, adversarial: bool, predicted_f0: bool = False) -> dict[str, Tensor]:
        """One step of the vocoder, and of the discriminator once it has joined."""
        made, parts = self.losses(piece, predicted_f0)
        loss = parts["spectrum"] + 2 * parts["bands"] + 2 * parts["mel"] + parts["pitch"]
        if adversarial:
            parts["judge"] = discriminator_loss(self.judge(piece.wave), self.judge(made.detach()))
            training.clipped_step(parts["judge"], self.judge_optimizer, self.judge.parameters())
            parts["fooling"] = generator_loss(self.judge(piece.wave), self.judge(made))
            loss = loss + 0.15 * parts["fooling"]
        training.clipped_step(loss, self.optimizer, self.hift.parameters())
        self.step += 1
        return {name: part.detach() for name, part in parts.items()}

    def pitch_step(self, piece: Piece) -> dict[str, Tensor]:
        """One step of the F0 predictor alone."""
        with training.mixed_precision():
            f0 = self.hift.f0_predictor(piece.mel)
        loss = pitch_loss(f0.float(), piece.f0)
        training.clipped_step(loss, self.pitch_optimizer, self.hift.f0_predictor.parameters())
        self.step += 1
        return {"pitch": loss.detach()}


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


def train(folder: Path, run: Path, steps: int, adversarial: int, pitch_steps: int, every: int = 200) -> None:
    """Train to `steps`, then `adversarial` more, then the F0 predictor for `pitch_steps`; goes on from
    `run`/vocoder.pt."""
    trainer = VocoderTrainer(run)
    voice = TargetVoice(corpus.recordings(folder / "answers"), run / "f0.npz", trainer.bins)
    heldout = TargetVoice(corpus.recordings(folder / "answers_heldout"), run / "f0_heldout.npz", trainer.bins)
    log, predicted = training.Log(run / "vocoder.jsonl"), training.load_state(run / PREDICTED)
    spoken = steps + adversarial
    while trainer.step < spoken + pitch_steps:
        step = trainer.step
        rng = training.seed_step(4, step)
        if step >= spoken:
            training.set_rate(trainer.pitch_optimizer, training.cosine_rate(step - spoken, pitch_steps, _PITCH_PEAK))
            log.add(**trainer.pitch_step(voice.draw(rng, _PITCH_BATCH, _PITCH_CROP)))
        else:
            second = step >= steps
            at = (step - steps, adversarial, _ADVERSARIAL_PEAK) if second else (step, steps, _PEAK)
            training.set_rate(trainer.optimizer, training.cosine_rate(*at))
            if second and predicted is not None and rng.random() < 0.5:
                piece = voice.draw_predicted(rng, predicted["mels"], _BATCH)  # what it will really be given
            else:
                piece = voice.draw(rng, _BATCH)
            log.add(**trainer.train_step(piece, second, predicted_f0=second and rng.random() < 0.5))
        if trainer.step % every == 0 or trainer.step == spoken + pitch_steps:
            trainer.save()
            log.write(trainer.step, **(evaluate(trainer, heldout) if heldout.recordings else {}))


def main() -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--adversarial", type=int, default=2000)
    parser.add_argument("--pitch-steps", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    train(given.folder, given.run, given.steps, given.adversarial, given.pitch_steps)


if __name__ == "__main__":
    main()
