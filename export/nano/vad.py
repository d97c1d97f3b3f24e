"""A small voice activity detector: one 32 ms hop of 16 kHz audio and a carried state in, the probability of speech out.

The maths of one hop, all in float32 (B = batch, usually 1):

1.  x = concat(context [B, 64], hop [B, 512]) -> [B, 576]; the next context is the last 64 samples of x.
2.  Four frames of 192 samples, 128 apart: f_i = x[:, 128 i : 128 i + 192] -> f [B, 4, 192]; times `window` [192].
3.  re = f @ `cosines` [192, 95], im = f @ `sines` [192, 95]; p = re^2 + im^2. Column k is (k + 1) * 16000 / 192 Hz.
4.  band = log(p @ `bands` [95, 20] + 1e-6) -> [B, 4, 20]; mean and largest over the four frames, both [B, 20].
5.  level = 0.995 * level + 0.005 * mean; features = concat(mean, largest, mean - level) * 0.2 -> [B, 60].
6.  h = relu(features @ `inputs.weight`.T + `inputs.bias`) -> [B, 32].
7.  A GRU cell as torch has it, with `cell.weight_ih` [120, 32], `cell.weight_hh` [120, 40] and both biases,
    rows [r; z; n]: r = sigmoid(i_r + h_r), z = sigmoid(i_z + h_z), n = tanh(i_n + r * h_n);
    hidden = (1 - z) * n + z * hidden.
8.  probability = sigmoid(hidden @ `output.weight`.T + `output.bias`) -> [B, 1].

The carried state is one tensor [B, 124] = concat(context 64, level 20, hidden 40). At the start it is zero but for
the level, which is `QUIET` = log(1e-6), what step 4 gives for silence. `window` (periodic Hann), `cosines`, `sines` and
`bands` are stored in the weight file, so that a re-implementation multiplies by what was trained with.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

HOP, CONTEXT, FRAME, STRIDE, BINS, BANDS, HIDDEN = 512, 64, 192, 128, 95, 20, 40
RATE = 16000
QUIET = math.log(1e-6)
STATE = CONTEXT + BANDS + HIDDEN
WEIGHTS = Path(__file__).with_name("vad.safetensors")


def _frequencies() -> Tensor:
    return torch.arange(1, BINS + 1) * RATE / FRAME


def band_matrix() -> Tensor:
    """Overlapping triangles [95, 20], equally wide on the mel scale (2595 log10(1 + f / 700)) from 60 to 8000 Hz."""
    highest, lowest = (2595 * math.log10(1 + f / 700) for f in (8000, 60))
    edges = 700 * (10 ** (torch.linspace(lowest, highest, BANDS + 2) / 2595) - 1)
    # A band narrower than a bin still hears the bin next to it.
    width = torch.maximum(edges.diff(), torch.tensor(RATE / FRAME))
    distance = _frequencies()[:, None] - edges[1:-1]
    triangles = (1 - torch.where(distance < 0, -distance / width[:-1], distance / width[1:])).clamp(min=0)
    return triangles / triangles.sum(0, keepdim=True) / FRAME


class VAD(nn.Module):
    """See the module's docstring for every step and shape."""

    window: Tensor
    cosines: Tensor
    sines: Tensor
    bands: Tensor

    def __init__(self) -> None:
        super().__init__()
        angles = 2 * math.pi * torch.outer(torch.arange(FRAME), _frequencies()) / RATE
        self.register_buffer("window", torch.hann_window(FRAME))
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())
        self.register_buffer("bands", band_matrix())
        self.inputs = nn.Linear(3 * BANDS, 32)
        self.cell = nn.GRUCell(32, HIDDEN)
        self.output = nn.Linear(HIDDEN, 1)

    def band_levels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Steps 2 to 4 on [..., 576] -> mean and largest, [..., 20] each."""
        frames = x.unfold(-1, FRAME, STRIDE) * self.window
        power = (frames @ self.cosines).square() + (frames @ self.sines).square()
        band = (power @ self.bands + 1e-6).log()
        return band.mean(-2), band.amax(-2)

    def front(self, mean: Tensor, largest: Tensor, level: Tensor) -> Tensor:
        """Steps 5 and 6 -> [..., 32]."""
        return F.relu(self.inputs(torch.cat([mean, largest, mean - level], -1) * 0.2))

    def forward(self, hop: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 512] and [B, 124] -> probability [B, 1] and the next state [B, 124]."""
        context, level, hidden = state.split([CONTEXT, BANDS, HIDDEN], 1)
        x = torch.cat([context, hop], 1)
        mean, largest = self.band_levels(x)
        level = _follow(level, mean)
        hidden = self.cell(self.front(mean, largest, level), hidden)
        return torch.sigmoid(self.output(hidden)), torch.cat([x[:, -CONTEXT:], level, hidden], 1)

    def logits(self, waves: Tensor) -> Tensor:
        """Whole recordings [B, hops * 512] -> logits [B, hops], equal to hop after hop from the start state."""
        mean, largest = self.band_levels(F.pad(waves, (CONTEXT, 0)).unfold(1, CONTEXT + HOP, HOP))
        level, hidden = torch.full_like(mean[:, 0], QUIET), mean.new_zeros(len(waves), HIDDEN)
        levels, outputs = [], []
        for now in mean.unbind(1):
            level = _follow(level, now)
            levels.append(level)
        for now in self.front(mean, largest, torch.stack(levels, 1)).unbind(1):
            hidden = self.cell(now, hidden)
            outputs.append(hidden)
        return self.output(torch.stack(outputs, 1)).squeeze(-1)


def _follow(level: Tensor, mean: Tensor) -> Tensor:
    return 0.995 * level + 0.005 * mean


def start_state(batch: int = 1) -> Tensor:
    """The state before the first hop, [batch, 124]."""
    state = torch.zeros(batch, STATE)
    state[:, CONTEXT : CONTEXT + BANDS] = QUIET
    return state


def load_vad(path: Path = WEIGHTS) -> VAD:
    """The trained detector."""
    vad = VAD()
    vad.load_state_dict(load_file(path))
    return vad.eval()
