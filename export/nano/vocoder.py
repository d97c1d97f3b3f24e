"""HiFT: mel at 50 Hz to a 24 kHz waveform, a harmonic source filtered by a convolutional network and an inverse STFT.

After HiFTNet (Li et al. 2023, arXiv:2309.09493) in CosyVoice 2's sizes. Attribute names are the keys of hift.pt, where
every convolution but the source's is weight-normalised in the two-tensor form (weight_g, weight_v).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.config import VocoderConfig


class NormedConv(nn.Module):
    """Convolution whose weight is g * v / |v|, the norm over everything but dimension 0."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1, transposed_stride: int = 0) -> None:
        super().__init__()
        self.dilation, self.stride = dilation, transposed_stride
        self.padding = (kernel - transposed_stride) // 2 if transposed_stride else dilation * (kernel - 1) // 2
        shape = (inputs, outputs, kernel) if transposed_stride else (outputs, inputs, kernel)
        v = torch.randn(shape) * (1.0 / math.sqrt(inputs * kernel))
        self.weight_v = nn.Parameter(v)
        self.weight_g = nn.Parameter(v.flatten(1).norm(dim=1)[:, None, None].clone())
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.weight_v.flatten(1).norm(dim=1)[:, None, None]
        weight = self.weight_g * self.weight_v / norm
        if self.stride:
            return F.conv_transpose1d(x, weight, self.bias, self.stride, self.padding)
        return F.conv1d(x, weight, self.bias, padding=self.padding, dilation=self.dilation)


class Snake(nn.Module):
    """x + sin^2(a x) / a, a per channel (Ziyin et al. 2020, arXiv:2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        a = self.alpha[:, None].to(x.dtype)
        return x + torch.sin(a * x).pow(2) * (1 / (a + 1e-9))


class ResBlock(nn.Module):
    """Residual pairs of a dilated and a plain convolution."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(NormedConv(channels, channels, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(NormedConv(channels, channels, kernel) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for snake1, conv1, snake2, conv2 in zip(
            self.activations1, self.convs1, self.activations2, self.convs2, strict=True
        ):
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


class F0Predictor(nn.Module):
    """Mel [batch, bins, T] -> fundamental frequency [batch, T] in Hz."""

    def __init__(self, bins: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(5):
            layers += [NormedConv(bins if i == 0 else channels, channels, 3), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel: Tensor) -> Tensor:
        return self.classifier(self.condnet(mel).transpose(1, 2)).squeeze(-1).abs()


class Source(nn.Module):
    """Sines at the harmonics of F0 plus noise, mixed into one excitation signal."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.l_linear = nn.Linear(config.nb_harmonics + 1, 1)

    def sines(self, f0: Tensor, phase: Tensor, noise: Tensor) -> Tensor:
        """F0 [batch, T], phases [batch, harmonics + 1, 1], noise [batch, harmonics + 1, samples] -> like the noise."""
        c = self.config
        f0 = f0.repeat_interleave(c.samples_per_frame, 1)[:, None]
        harmonics = torch.arange(1, c.nb_harmonics + 2, device=f0.device)[None, :, None]
        # Float32 would lose the phase of the high harmonics after some seconds.
        cycles = torch.cumsum((f0 * harmonics / c.sampling_rate).double(), -1)
        turn = (2 * math.pi * (cycles % 1)).to(f0.dtype)
        voiced = (f0 > c.nsf_voiced_threshold).to(f0.dtype)
        strength = voiced * c.nsf_sigma + (1 - voiced) * c.nsf_alpha / 3
        # The fundamental always starts at phase 0.
        phase = torch.cat([torch.zeros_like(phase[:, :1]), phase[:, 1:]], 1)
        return c.nsf_alpha * torch.sin(turn + phase) * voiced + strength * noise

    def forward(self, f0: Tensor, phase: Tensor, noise: Tensor) -> Tensor:
        """-> [batch, 1, samples]."""
        return torch.tanh(self.l_linear(self.sines(f0, phase, noise).transpose(1, 2))).transpose(1, 2)


class HiFT(nn.Module):
    """Mel [batch, bins, T] -> waveform [batch, samples_per_frame * T]."""

    window: Tensor

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        base, spectrum = config.base_channels, config.istft_n_fft + 2
        widths = [base // 2**i for i in range(len(config.upsample_rates) + 1)]
        self.m_source = Source(config)
        self.conv_pre = NormedConv(config.in_channels, base, 7)
        self.ups = nn.ModuleList(
            NormedConv(widths[i], widths[i + 1], kernel, transposed_stride=rate)
            for i, (kernel, rate) in enumerate(zip(config.upsample_kernel_sizes, config.upsample_rates, strict=True))
        )
        self.source_downs = nn.ModuleList(
            _source_down(spectrum, widths[i + 1], math.prod(config.upsample_rates[i + 1 :]))
            for i in range(len(config.upsample_rates))
        )
        self.source_resblocks = nn.ModuleList(
            ResBlock(width, kernel, dilations)
            for width, kernel, dilations in zip(
                widths[1:], config.source_resblock_kernel_sizes, config.source_resblock_dilation_sizes, strict=True
            )
        )
        pairs = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
        self.resblocks = nn.ModuleList(ResBlock(width, k, d) for width in widths[1:] for k, d in pairs)
        self.conv_post = NormedConv(widths[-1], spectrum, 7)
        self.f0_predictor = F0Predictor(config.in_channels, config.f0_cond_channels)
        self.register_buffer("window", torch.hann_window(config.istft_n_fft), persistent=False)

    def source_spectrum(self, source: Tensor) -> Tensor:
        """[batch, 1, samples] -> [batch, n_fft + 2, frames]: real parts, then imaginary parts."""
        c = self.config
        s = torch.stft(source[:, 0], c.istft_n_fft, c.istft_hop, window=self.window, return_complex=True)
        return torch.cat([s.real, s.imag], 1)

    def spectrum(self, mel: Tensor, source: Tensor) -> Tensor:
        """Log-magnitudes and phases before the inverse STFT, [batch, n_fft + 2, frames]."""
        c, stft, blocks = self.config, self.source_spectrum(source), len(self.config.resblock_kernel_sizes)
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, c.lrelu_slope))
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")
            x = x + self.source_resblocks[i](self.source_downs[i](stft))
            x = torch.stack([block(x) for block in self.resblocks[i * blocks : (i + 1) * blocks]]).mean(0)
        return self.conv_post(F.leaky_relu(x))

    def waveform(self, spectrum: Tensor) -> Tensor:
        """Inverse STFT of exp(first half) at angles sin(second half), limited."""
        c, half = self.config, self.config.istft_n_fft // 2 + 1
        magnitude, angle = torch.exp(spectrum[:, :half]).clamp(max=100), torch.sin(spectrum[:, half:])
        complex_ = torch.complex(magnitude * torch.cos(angle), magnitude * torch.sin(angle))
        wave = torch.istft(complex_, c.istft_n_fft, c.istft_hop, window=self.window)
        return wave.clamp(-c.audio_limit, c.audio_limit)

    def forward(self, mel: Tensor, phase: Tensor, noise: Tensor, f0: Tensor | None = None) -> Tensor:
        """`phase` and `noise` as in Source.sines; `f0` [batch, T] replaces the predicted one."""
        f0 = self.f0_predictor(mel) if f0 is None else f0
        return self.waveform(self.spectrum(mel, self.m_source(f0, phase, noise)))

    def draw(self, mel: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Random phases and noise for a mel."""
        rows, samples = self.config.nb_harmonics + 1, mel.shape[2] * self.config.samples_per_frame
        phase = (torch.rand(mel.shape[0], rows, 1, generator=generator) * 2 - 1) * math.pi
        return phase, torch.randn(mel.shape[0], rows, samples, generator=generator)


def _source_down(spectrum: int, channels: int, factor: int) -> nn.Conv1d:
    """Brings the source's spectrum to the rate of one stage."""
    if factor == 1:
        return nn.Conv1d(spectrum, channels, 1)
    return nn.Conv1d(spectrum, channels, 2 * factor, stride=factor, padding=factor // 2)
