"""What every training stage shares: a learning-rate schedule, checkpoints to go on from, a log of JSON lines."""

import json
import math
import os
import random
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# oneDNN builds a kernel for each shape of a product; the default cache of 1024 is too small for batches of ten lengths.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


@contextmanager
def mixed_precision(enabled: bool = True) -> Iterator[None]:
    """Matrix products in bfloat16 on float32 weights, several times as fast where the processor has AMX or
    AVX512-BF16. Attention becomes plain products: torch's fused one is slower than those in bfloat16 on a CPU."""
    if not enabled:
        yield
        return
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # concerns the CPU as well, in spite of its name
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def adamw(parameters: Iterable[nn.Parameter], rate: float, decay: float = 0.01) -> torch.optim.AdamW:
    """The optimizer of most stages."""
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)


class MuonAdamW:
    """Muon (Jordan et al. 2024) on the inner weights, AdamW at `share` of the rate on all else, as one optimizer.

    Muon makes the momentum of each matrix orthogonal before it is applied. After 600 steps from nothing the vision
    tower named all kinds in .119 of its pictures, with AdamW alone in .078. A convolution's weight counts as the matrix
    [outputs, inputs x taps].
    """

    def __init__(self, module: nn.Module, inner: str, rate: float, share: float, decay: float = 0.01) -> None:
        """`inner`: pattern of the names whose weights, neither embeddings nor output layers, Muon trains."""
        named = dict(module.named_parameters())
        self._weights = [p for name, p in named.items() if p.dim() >= 2 and re.match(inner, name)]
        self._matrices = [weight.detach().flatten(1) for weight in self._weights]  # share the weights' memory
        rest = [p for name, p in named.items() if not (p.dim() >= 2 and re.match(inner, name))]
        muon = torch.optim.Muon(self._matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, adamw(rest, share * rate, decay))
        self.parts[1].param_groups[0]["share"] = share

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self._weights:
            weight.grad = None
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """Apply the gradients."""
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)


Optimizer = torch.optim.Optimizer | MuonAdamW


def cosine_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a thirtieth of the peak."""
    rising = min(1.0, (step + 1) / warmup)
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * rising * (falling * 29 / 30 + 1 / 30)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate, or its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)


def save_state(path: Path, **state: Any) -> None:
    """Write atomically: a run that is killed leaves the file before or the file after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.rename(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """What `save_state` wrote, or None where there is nothing yet. Only tensors and plain values are read."""
    return torch.load(path, weights_only=True) if path.exists() else None


def restore(optimizer: Optimizer, state: dict[str, Any], name: str = "optimizer") -> None:
    """Give an optimizer its moments back, if `state` keeps them (one from a finished checkpoint does not)."""
    if name in state:
        optimizer.load_state_dict(state[name])


class Log:
    """Means of named figures since the last line, written as one JSON line and shown."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[str, float] = {}
        self._count = 0
        self._start = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **figures: float | Tensor) -> None:
        """Take in the figures of one step."""
        self._count += 1
        for name, value in figures.items():
            plain = value.item() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + plain

    def write(self, step: int, **more: float) -> None:
        """Write the means and `more`; start over."""
        means = {name: total / max(self._count, 1) for name, total in self._sums.items()}
        pace = (time.monotonic() - self._start) / max(self._count, 1)
        line = {"step": step, "seconds_a_step": pace, **means, **more}
        text = json.dumps({name: round(value, 4) for name, value in line.items()})
        with self._path.open("a") as file:
            file.write(text + "\n")
        print(text, flush=True)
        self._sums, self._count, self._start = {}, 0, time.monotonic()


def seed_step(seed: int, step: int) -> random.Random:
    """The random source of one step, so that a resumed run draws what an uninterrupted one would; seeds torch too."""
    torch.manual_seed(seed * 1_000_003 + step)
    return random.Random(f"{seed}/{step}")


def clipped_step(loss: Tensor, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Backward, clip the gradient's norm to 1, step."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(parameters), 1.0)
    optimizer.step()
