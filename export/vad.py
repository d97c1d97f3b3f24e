"""Voice activity detector: a hop of samples and a carried state -> the probability that somebody speaks.

Ours, trained by `export.nano`: overlapping frames of a hop, log energies of mel-spaced bands, a slow estimate of the
background under each band, and a gated recurrent unit (Cho et al. 2014, in torch's form).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.graph import FLOAT, Derived, Subgraph, author, carried, ints, scalar
from export.lazy_tensor import LazyTensor
from export.safetensors_file import read_safetensors
from runtime.bundle import Port

WEIGHTS = Path(__file__).parent / "nano" / "vad.safetensors"
PREFIX = "vad"
SILENCE = 1e-6  # power that is added to every band: log(SILENCE) is what silence measures
FOLLOW = 0.005  # a hop's share in the background's level
SCALE = 0.2  # brings the features to the size of one


@dataclass(frozen=True)
class VADConfig:
    """Sizes in samples at 16 kHz, and widths."""

    hop: int = 512
    context: int = 64  # samples of the hop before that the first frame begins with
    frame: int = 192
    stride: int = 128
    bins: int = 95
    bands: int = 20
    inputs: int = 32
    hidden: int = 40

    @property
    def frames(self) -> int:
        return (self.context + self.hop - self.frame) // self.stride + 1


class Dense(nn.Module):
    """y = x W^T + b on rows, the weight as torch stores it, [out, in]."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter([n_out, n_in], FLOAT)
        self.bias = nn.Parameter([n_out], FLOAT)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.Gemm(x, self.weight, self.bias, transB=1)


class GRUCell(nn.Module):
    """r, z = sigmoid(.), n = tanh(W x + b + r * (U h + c)), h' = (1 - z) n + z h; rows of the weights are [r; z; n]."""

    def __init__(self, n_in: int, width: int):
        super().__init__()
        self.width = width
        self.weight_ih = nn.Parameter([3 * width, n_in], FLOAT)
        self.weight_hh = nn.Parameter([3 * width, width], FLOAT)
        self.bias_ih = nn.Parameter([3 * width], FLOAT)
        self.bias_hh = nn.Parameter([3 * width], FLOAT)

    def forward(self, op: Any, x: ir.Value, hidden: ir.Value) -> ir.Value:
        """x [1, n_in], hidden [1, width] -> [1, width]."""
        sizes: dict[str, Any] = {"axis": 1, "_outputs": 2}
        gates, new = op.Split(op.Gemm(x, self.weight_ih, self.bias_ih, transB=1), self._parts(op), **sizes)
        gates_h, new_h = op.Split(op.Gemm(hidden, self.weight_hh, self.bias_hh, transB=1), self._parts(op), **sizes)
        reset, keep = op.Split(op.Sigmoid(op.Add(gates, gates_h)), num_outputs=2, axis=1, _outputs=2)
        new = op.Tanh(op.Add(new, op.Mul(reset, new_h)))
        return op.Add(new, op.Mul(keep, op.Sub(hidden, new)))

    def _parts(self, op: Any) -> ir.Value:
        return ints(op, 2 * self.width, self.width)


class VAD(nn.Module):
    def __init__(self, config: VADConfig):
        super().__init__()
        self.config = config
        self.fourier = nn.Parameter([config.frame, 2 * config.bins], FLOAT)
        self.bands = nn.Parameter([config.bins, config.bands], FLOAT)
        self.inputs = Dense(3 * config.bands, config.inputs)
        self.cell = GRUCell(config.inputs, config.hidden)
        self.output = Dense(config.hidden, 1)

    def forward(self, op: Any, samples: ir.Value, context: ir.Value, level: ir.Value, hidden: ir.Value) -> Any:
        x = op.Concat(context, samples, axis=1)  # [1, context + hop]
        energies = self.band_energies(op, x)
        mean = op.ReduceMean(energies, ints(op, 0), keepdims=1)  # [1, bands]
        largest = op.ReduceMax(energies, ints(op, 0), keepdims=1)
        # The background is carried relative to silence, so that a state of zeros is the state before the first hop.
        heard = op.Mul(op.Sub(mean, scalar(op, math.log(SILENCE))), scalar(op, FOLLOW))
        level = op.Add(op.Mul(level, scalar(op, 1 - FOLLOW)), heard)
        above = op.Sub(op.Sub(mean, scalar(op, math.log(SILENCE))), level)
        features = op.Mul(op.Concat(mean, largest, above, axis=1), scalar(op, SCALE))
        hidden = self.cell(op, op.Relu(self.inputs(op, features)), hidden)
        probability = op.Squeeze(op.Sigmoid(self.output(op, hidden)), ints(op, 1))
        tail = op.Slice(x, ints(op, self.config.hop), ints(op, self.config.hop + self.config.context), ints(op, 1))
        return probability, tail, level, hidden

    def band_energies(self, op: Any, x: ir.Value) -> ir.Value:
        """[1, context + hop] -> [frames, bands]: log of the power in each band, windowed."""
        config = self.config
        starts = [frame * config.stride for frame in range(config.frames)]
        pieces = [op.Slice(x, ints(op, at), ints(op, at + config.frame), ints(op, 1)) for at in starts]
        spectrum = op.MatMul(op.Concat(*pieces, axis=0), self.fourier)
        real, imaginary = op.Split(spectrum, num_outputs=2, axis=1, _outputs=2)
        power = op.Add(op.Mul(real, real), op.Mul(imaginary, imaginary))
        return op.Log(op.Add(op.MatMul(power, self.bands), scalar(op, SILENCE)))


def windowed_basis(window: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """window [frame], cosines and sines [frame, bins] -> [frame, 2 * bins]."""
    return np.concatenate([cosines, sines], axis=1) * window[:, None]


def vad(config: VADConfig = VADConfig()) -> Subgraph:
    """samples [1, hop] at 16 kHz in [-1, 1] and the state -> probability [1] and the next state. fp32 everywhere."""
    states = [
        Port("context", "float32", (1, config.context)),
        Port("level", "float32", (1, config.bands)),
        Port("hidden", "float32", (1, config.hidden)),
    ]
    inputs = [Port("samples", "float32", (1, config.hop)), *carried("past", states)]
    outputs = [Port("probability", "float32", (1,)), *carried("present", states)]
    stored = ("window", "cosines", "sines")
    shapes = ((config.frame,), (config.frame, config.bins), (config.frame, config.bins))
    basis = Derived(tuple(f"{PREFIX}.{name}" for name in stored), shapes, windowed_basis)
    return author("vad", VAD(config), inputs, outputs, PREFIX, {f"{PREFIX}.fourier": basis})


def vad_tensors(path: Path = WEIGHTS) -> Mapping[str, LazyTensor]:
    """The detector's trained weights, under the names that its graph uses."""
    return {f"{PREFIX}.{key}": replace(tensor, key=f"{PREFIX}.{key}") for key, tensor in read_safetensors(path).items()}
