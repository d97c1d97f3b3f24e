"""HiFT vocoder: pitch from mel, a sine source that follows it, and convolutions that filter it into a waveform."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.checkpoint import fold_weight_norm
from export.config import VocoderConfig
from export.graph import FLOAT, Derived, Subgraph, author, constant, ints, scalar, static_shape, tap
from export.layers import Conv1d, Linear
from runtime.bundle import Port
from runtime.errors import CheckpointError

# What the constructor does not ask for (Li et al. 2023, "HiFTNet"; the official generator and F0 predictor).
F0_LAYERS, F0_KERNEL = 5, 3
OUTER_KERNEL = 7  # conv_pre and conv_post
FINAL_SLOPE = 0.01  # the default of leaky_relu; the levels use config.lrelu_slope
MAX_MAGNITUDE = 100.0
SNAKE_EPS = 1e-9
PREFIX = "hift"


class NormedConv1d(Conv1d):
    """A same-padded convolution whose checkpoint form is weight-normalised."""

    def __init__(self, n_in: int, n_out: int, kernel: int, dilation: int = 1):
        reach = (kernel - 1) // 2 * dilation
        super().__init__(n_in, n_out, kernel, padding=(reach, reach), dilation=dilation)


class NormedConvTranspose1d(nn.Module):
    """[1, in, T] -> [1, out, rate * T], weight [in, out, kernel], weight-normalised in the checkpoint."""

    def __init__(self, n_in: int, n_out: int, kernel: int, rate: int):
        super().__init__()
        self.attributes = {"strides": [rate], "pads": [(kernel - rate) // 2] * 2}
        self.weight = nn.Parameter([n_in, n_out, kernel], FLOAT)
        self.bias = nn.Parameter([n_out], FLOAT)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.ConvTranspose(x, self.weight, self.bias, **self.attributes)


def folded_weights(root: nn.Module, prefix: str) -> Mapping[str, Derived]:
    """How the plain weights below `root` are made from the `weight_g`, `weight_v` that the checkpoint holds."""
    derived = {}
    for path, module in root.named_modules(prefix):
        if isinstance(module, NormedConv1d | NormedConvTranspose1d):
            shape = static_shape(module.weight)
            keys = (f"{path}.weight_g", f"{path}.weight_v")
            derived[f"{path}.weight"] = Derived(keys, ((shape[0], 1, 1), shape), fold_weight_norm)
    return derived


class Elu(nn.Module):
    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.Elu(x)


class F0Predictor(nn.Module):
    """mel [1, mels, T] -> fundamental frequency of each frame [1, T] in Hz; never negative, not thresholded."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        widths = [config.in_channels, *[config.f0_cond_channels] * F0_LAYERS]
        self.condnet = nn.ModuleList(
            [layer for n_in, n_out in pairwise(widths) for layer in (NormedConv1d(n_in, n_out, F0_KERNEL), Elu())]
        )
        self.classifier = Linear(config.f0_cond_channels, 1)

    def forward(self, op: Any, mel: ir.Value) -> ir.Value:
        x = mel
        for layer in self.condnet:
            x = layer(op, x)
        x = self.classifier(op, op.Transpose(x, perm=[0, 2, 1]))  # [1, T, 1]
        return op.Abs(op.Squeeze(x, ints(op, 2)))


class Snake(nn.Module):
    """x + sin(a x)^2 / (a + eps), one a per channel (Ziyin et al. 2020)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter([channels], FLOAT)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        alpha = op.Unsqueeze(self.alpha, ints(op, 0, 2))
        inverse = op.Reciprocal(op.Add(alpha, scalar(op, SNAKE_EPS)))  # of a constant: folded when the graph is opened
        wave = op.Sin(op.Mul(x, alpha))
        return op.Add(x, op.Mul(op.Mul(wave, wave), inverse))


class ResBlock(nn.Module):
    """For each dilation: x + conv(snake(dilated conv(snake(x))))."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList([NormedConv1d(channels, channels, kernel, dilation) for dilation in dilations])
        self.convs2 = nn.ModuleList([NormedConv1d(channels, channels, kernel) for _ in dilations])
        self.activations1 = nn.ModuleList([Snake(channels) for _ in dilations])
        self.activations2 = nn.ModuleList([Snake(channels) for _ in dilations])

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        layers = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for snake1, conv1, snake2, conv2 in layers:
            x = op.Add(x, conv2(op, snake2(op, conv1(op, snake1(op, x)))))
        return x


class SourceLinear(nn.Module):
    """[1, harmonics, samples] -> [1, 1, samples]."""

    def __init__(self, harmonics: int):
        super().__init__()
        self.weight = nn.Parameter([1, harmonics], FLOAT)
        self.bias = nn.Parameter([1], FLOAT)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.Add(op.MatMul(self.weight, x), self.bias)


class Source(nn.Module):
    """Sines at the harmonics of F0 where it is voiced and noise everywhere, summed (Wang et al. 2019, NSF)."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        self.l_linear = SourceLinear(config.nb_harmonics + 1)

    def forward(self, op: Any, f0: ir.Value, cycles: ir.Value, noise: ir.Value) -> ir.Value:
        """f0 [1, T]; cycles [1, harmonics, T] at frame starts; noise [1, harmonics, samples] -> [1, 1, samples]."""
        config, harmonics = self.config, self.config.nb_harmonics + 1
        f0 = op.Unsqueeze(f0, ints(op, 1, 3))  # [1, 1, T, 1]
        voiced = op.Greater(f0, scalar(op, config.nsf_voiced_threshold))
        # A sample's phase counts its own step, as a running sum does: the first of a frame is one step after its start.
        steps = np.outer(np.arange(1, harmonics + 1), np.arange(1, config.samples_per_frame + 1)) / config.sampling_rate
        steps = steps.reshape(1, harmonics, 1, config.samples_per_frame).astype(np.float32)
        turns = op.Add(op.Unsqueeze(cycles, ints(op, 3)), op.Mul(f0, constant(op, steps, "source.steps")))
        turns = op.Sub(turns, op.Floor(turns))  # sin() of a small angle keeps all its digits
        sines = op.Mul(op.Sin(op.Mul(turns, scalar(op, 2 * np.pi))), scalar(op, config.nsf_alpha))
        loudness = op.Where(voiced, scalar(op, config.nsf_sigma), scalar(op, config.nsf_alpha / 3))
        noise = op.Mul(op.Reshape(noise, ints(op, 0, 0, -1, config.samples_per_frame)), loudness)
        sines = op.Add(op.Where(voiced, sines, scalar(op, 0.0)), noise)
        sines = tap(op.Reshape(sines, ints(op, 1, harmonics, -1)), "hift.m_source.sines")
        return tap(op.Tanh(self.l_linear(op, sines)), "hift.m_source.out")


def hann(size: int) -> np.ndarray:
    """Periodic Hann window, float64 [size]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)


def fourier_basis(size: int) -> tuple[np.ndarray, np.ndarray]:
    """cos, -sin [size / 2 + 1, size] of the real Fourier transform."""
    angle = 2 * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(size)) / size
    return np.cos(angle), -np.sin(angle)


def stft(op: Any, wave: ir.Value, size: int, hop: int) -> ir.Value:
    """[1, 1, samples] -> [1, size + 2, samples / hop + 1]: real parts, then imaginary ones; centred, reflected ends.

    A convolution with the windowed Fourier basis: the STFT operator has no CUDA kernel.
    """
    basis = (np.concatenate(fourier_basis(size)) * hann(size))[:, None].astype(np.float32)
    padded = op.Pad(wave, ints(op, 0, 0, size // 2, 0, 0, size // 2), mode="reflect")
    return op.Conv(padded, constant(op, basis, "stft.basis"), strides=[hop])


def inverse_stft(op: Any, spectrum: ir.Value, size: int, hop: int) -> ir.Value:
    """[1, size + 2, frames] -> [1, 1, hop * (frames - 1)], the inverse of `stft`.

    Overlap-add is a transposed convolution; so is the sum of squared windows by which it is divided. That sum differs
    from its inner value only near the ends, where fewer windows overlap.
    """
    cos, sin = fourier_basis(size)
    fold = np.full((size // 2 + 1, 1), 2.0)
    fold[[0, -1]] = 1.0  # these two bins have no mirror image; the sines of both are zero
    sin[[0, -1]] = 0.0
    basis = (np.concatenate([fold * cos, fold * sin]) * hann(size) / size)[:, None].astype(np.float32)
    squares = (hann(size) ** 2)[None, None].astype(np.float32)
    place: dict[str, Any] = {"strides": [hop], "pads": [size // 2] * 2}
    frames = op.Slice(op.Shape(spectrum), ints(op, 2), ints(op, 3))
    ones = op.Expand(scalar(op, 1.0), op.Concat(ints(op, 1, 1), frames, axis=0))
    summed = op.ConvTranspose(ones, constant(op, squares, "istft.squares"), **place)
    return op.Div(op.ConvTranspose(spectrum, constant(op, basis, "istft.basis"), **place), summed)


def source_downs(config: VocoderConfig) -> list[tuple[int, int, int]]:
    """(kernel, stride, padding) that bring the source's spectrum to the rate of each level."""
    rates = [int(np.prod(config.upsample_rates[level + 1 :], dtype=int)) for level in range(len(config.upsample_rates))]
    return [(1, 1, 0) if rate == 1 else (2 * rate, rate, rate // 2) for rate in rates]


class HiFT(nn.Module):
    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        widths = [config.base_channels >> level for level in range(len(config.upsample_rates) + 1)]
        bins = config.istft_n_fft + 2
        self.m_source = Source(config)
        self.conv_pre = NormedConv1d(config.in_channels, widths[0], OUTER_KERNEL)
        ups = zip(widths, widths[1:], config.upsample_kernel_sizes, config.upsample_rates, strict=False)
        self.ups = nn.ModuleList([NormedConvTranspose1d(*up) for up in ups])
        downs = zip(widths[1:], source_downs(config), strict=True)
        self.source_downs = nn.ModuleList([Conv1d(bins, w, k, stride, (pad, pad)) for w, (k, stride, pad) in downs])
        shapes = (config.source_resblock_kernel_sizes, config.source_resblock_dilation_sizes)
        self.source_resblocks = nn.ModuleList([ResBlock(*block) for block in zip(widths[1:], *shapes, strict=True)])
        shapes = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
        self.resblocks = nn.ModuleList([ResBlock(width, *shape) for width in widths[1:] for shape in shapes])
        self.conv_post = NormedConv1d(widths[-1], bins, OUTER_KERNEL)

    def forward(self, op: Any, mel: ir.Value, f0: ir.Value, cycles: ir.Value, noise: ir.Value) -> ir.Value:
        config = self.config
        source = self.m_source(op, f0, cycles, noise)
        source = tap(stft(op, source, config.istft_n_fft, config.istft_hop), "hift.source.stft")
        x = tap(self.conv_pre(op, mel), "hift.conv_pre.out")  # [1, base, T]
        for level in range(len(self.ups)):
            x = self.level(op, level, x, source)
        x = self.conv_post(op, op.LeakyRelu(x, alpha=FINAL_SLOPE))
        wave = self.synthesise(op, tap(x, "hift.conv_post.out"))
        return op.Clip(op.Squeeze(wave, ints(op, 1)), scalar(op, -config.audio_limit), scalar(op, config.audio_limit))

    def level(self, op: Any, level: int, x: ir.Value, source: ir.Value) -> ir.Value:
        """[1, c, t] -> [1, c / 2, rate * t], the source's spectrum added; the last level gains one column."""
        x = self.ups[level](op, op.LeakyRelu(x, alpha=self.config.lrelu_slope))
        tap(x, f"hift.ups.{level}.out")
        if level == len(self.ups) - 1:
            x = op.Pad(x, ints(op, 0, 0, 1, 0, 0, 0), mode="reflect")
        down = tap(self.source_downs[level](op, source), f"hift.source_downs.{level}.out")
        x = op.Add(x, tap(self.source_resblocks[level](op, down), f"hift.source_resblocks.{level}.out"))
        count = len(self.config.resblock_kernel_sizes)
        filtered = op.Sum(*[block(op, x) for block in list(self.resblocks)[level * count : (level + 1) * count]])
        return op.Div(tap(filtered, f"hift.levels.{level}.resblocks_sum"), scalar(op, count))

    def synthesise(self, op: Any, x: ir.Value) -> ir.Value:
        """Log-magnitudes and phases [1, n_fft + 2, frames] -> samples [1, 1, hop * (frames - 1)]."""
        half = self.config.istft_n_fft // 2 + 1
        log_magnitude, phase = op.Split(x, ints(op, half, half), axis=1, _outputs=2)
        magnitude = op.Min(op.Exp(log_magnitude), scalar(op, MAX_MAGNITUDE))
        phase = op.Sin(phase)  # not an angle taken from the net, but its sine: within one radian
        spectrum = op.Concat(op.Mul(magnitude, op.Cos(phase)), op.Mul(magnitude, op.Sin(phase)), axis=1)
        return inverse_stft(op, spectrum, self.config.istft_n_fft, self.config.istft_hop)


def vocoder_f0(config: VocoderConfig) -> Subgraph:
    """mel [1, mels, T] -> f0 [1, T] in Hz. fp32 in every profile."""
    root = F0Predictor(config)
    prefix = f"{PREFIX}.f0_predictor"
    inputs = [Port("mel", "float32", (1, config.in_channels, "frames"))]
    outputs = [Port("f0", "float32", (1, "frames"))]
    return author("vocoder_f0", root, inputs, outputs, prefix, folded_weights(root, prefix))


def vocoder(config: VocoderConfig) -> Subgraph:
    """mel and its source -> wave [1, samples], |wave| <= audio_limit. fp32 in every profile.

    `f0` in Hz; `cycles` is the phase of each harmonic at the start of each frame, in turns from 0 to 1 (the running
    sum of F0 needs float64, which is the caller's); `noise` is standard normal. CheckpointError names everything in
    `config` that contradicts itself.
    """
    problems = list(contradictions(config))
    if problems:
        raise CheckpointError("the vocoder's constructor arguments contradict each other:\n" + "\n".join(problems))
    root, harmonics = HiFT(config), config.nb_harmonics + 1
    inputs = [
        Port("mel", "float32", (1, config.in_channels, "frames")),
        Port("f0", "float32", (1, "frames")),
        Port("cycles", "float32", (1, harmonics, "frames")),
        Port("noise", "float32", (1, harmonics, "samples")),
    ]
    outputs = [Port("wave", "float32", (1, "samples"))]
    return author("vocoder", root, inputs, outputs, PREFIX, folded_weights(root, PREFIX))


def contradictions(config: VocoderConfig) -> Iterator[str]:
    """What would make the levels' shapes disagree, one line each."""
    levels, n_fft = len(config.upsample_rates), config.istft_n_fft
    for name in ("upsample_kernel_sizes", "source_resblock_kernel_sizes", "source_resblock_dilation_sizes"):
        if len(getattr(config, name)) != levels:
            yield f"  {name}: {len(getattr(config, name))} entries for {levels} upsample_rates"
    if len(config.resblock_dilation_sizes) != len(config.resblock_kernel_sizes):
        yield f"  resblock_dilation_sizes: {len(config.resblock_dilation_sizes)} entries, as many kernels are expected"
    for kernel, rate in zip(config.upsample_kernel_sizes, config.upsample_rates, strict=False):
        if kernel < rate or (kernel - rate) % 2:
            yield f"  upsample_kernel_sizes: {kernel} must exceed its rate {rate} by an even number"
    if any(kernel % 2 == 0 for kernel in (*config.resblock_kernel_sizes, *config.source_resblock_kernel_sizes)):
        yield "  resblock_kernel_sizes, source_resblock_kernel_sizes: all must be odd"
    if config.base_channels % 2**levels:
        yield f"  base_channels: {config.base_channels} cannot be halved {levels} times"
    if n_fft % 2 or n_fft < 2 * config.istft_hop:
        yield f"  istft_n_fft: {n_fft} must be even and at least two hops of {config.istft_hop}"


Span = tuple[int, int]  # first and last index


def receptive_frames(config: VocoderConfig) -> tuple[int, int]:
    """Mel frames on either side that (F0 of a frame, the samples of a frame) depend on.

    Follows the samples of frame 0 back through every layer, to mel frames and, by each level's share of the source,
    to the frames whose F0 shaped it.
    """
    size, hop, frame = config.istft_n_fft, config.istft_hop, config.samples_per_frame
    span = _before_outer(_before_transposed((0, frame - 1), size, hop, size // 2))
    reached: list[Span] = []
    for level in reversed(range(len(config.upsample_rates))):
        span = _widened(span, zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
        reached.append(_source_frames(config, level, span))
        if level == len(config.upsample_rates) - 1:
            span = (span[0] - 1, span[1] - 1)  # the column that the reflection puts in front
        rate, kernel = config.upsample_rates[level], config.upsample_kernel_sizes[level]
        span = _before_transposed(span, kernel, rate, (kernel - rate) // 2)
    reached.append(_before_outer(span))
    return F0_LAYERS * (F0_KERNEL // 2), max(max(-first, last) for first, last in reached)


def _source_frames(config: VocoderConfig, level: int, span: Span) -> Span:
    shape = (config.source_resblock_kernel_sizes[level], config.source_resblock_dilation_sizes[level])
    columns = _before_conv(_widened(span, [shape]), *source_downs(config)[level])
    first, last = _before_conv(columns, config.istft_n_fft, config.istft_hop, config.istft_n_fft // 2)
    return first // config.samples_per_frame, last // config.samples_per_frame


def _widened(span: Span, blocks: Iterable[tuple[int, tuple[int, ...]]]) -> Span:
    """Before the widest of parallel residual blocks, given as (kernel, dilations)."""
    reach = max((kernel - 1) // 2 * (sum(dilations) + len(dilations)) for kernel, dilations in blocks)
    return span[0] - reach, span[1] + reach


def _before_outer(span: Span) -> Span:
    return _before_conv(span, OUTER_KERNEL, 1, OUTER_KERNEL // 2)


def _before_conv(span: Span, kernel: int, stride: int, padding: int) -> Span:
    return span[0] * stride - padding, span[1] * stride - padding + kernel - 1


def _before_transposed(span: Span, kernel: int, stride: int, padding: int) -> Span:
    return -((kernel - 1 - padding - span[0]) // stride), (span[1] + padding) // stride
