"""Stage 5: the vision tower and its projector learn to see before the language model asks them.

python -m export.nano.vision_stage RUN_FOLDER [--steps N]

Every drawn picture has dense labels: kind, colour and size of the shape whose centre lies under each token, and the
digit or word of the whole picture. From the answers to questions alone a tower stays at guessing the commonest answer
for long. The pictures come easy first: one large object each, then as many as the questions ask about.
"""

import argparse
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.nano import domain, pictures, training, vocabulary
from export.nano.config import ModelConfig, read_config
from export.nano.vision import VisionModel, VisualBridge

_BATCH = 64
_PEAK, _ADAM_SHARE = 5e-3, 0.2


class PictureLabels(nn.Module):
    """Reads labels from token embeddings [pictures, tokens, hidden]; only training needs it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = nn.Linear(width, len(pictures.KINDS))
        self.colors = nn.Linear(width, 1 + len(domain.COLORS))
        self.sizes = nn.Linear(width, 1)
        self.digits = nn.Linear(width, 10)
        self.signs = nn.Linear(width, len(domain.SIGNS))

    def loss(self, seen: Tensor, drawn: list[pictures.Picture]) -> Tensor:
        """Cross-entropies of kind and colour under each token and of the picture's digit or word, error of sizes."""
        kinds, colors, radii = (torch.from_numpy(np.stack(part)).flatten(1) for part in self._cells(drawn))
        loss = F.cross_entropy(self.kinds(seen).flatten(0, 1), kinds.flatten())
        loss = loss + F.cross_entropy(self.colors(seen).flatten(0, 1), colors.flatten())
        sizes = self.sizes(seen)[..., 0]
        loss = loss + F.smooth_l1_loss(sizes[radii > 0], radii[radii > 0]) if (radii > 0).any() else loss
        whole = seen.mean(1)
        digits = [(i, p.digit) for i, p in enumerate(drawn) if p.digit is not None]
        signs = [(i, domain.SIGNS.index(p.sign)) for i, p in enumerate(drawn) if p.sign is not None]
        for head, known in ((self.digits, digits), (self.signs, signs)):
            if known:
                at, value = (torch.tensor(part) for part in zip(*known, strict=True))
                loss = loss + 0.5 * F.cross_entropy(head(whole[at]), value)
        return loss

    @staticmethod
    def _cells(drawn: list[pictures.Picture]) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        cells = [picture.cells() for picture in drawn]
        return [c[0] for c in cells], [c[1] for c in cells], [c[2] for c in cells]

    def right(self, seen: Tensor, drawn: list[pictures.Picture]) -> dict[str, list[bool]]:
        """Per picture: are all kinds right, all colours, the digit, the word?"""
        kinds, colors = self.kinds(seen).argmax(-1), self.colors(seen).argmax(-1)
        digits, signs = self.digits(seen.mean(1)).argmax(-1), self.signs(seen.mean(1)).argmax(-1)
        out: dict[str, list[bool]] = {"kinds": [], "colors": [], "digits": [], "signs": []}
        for i, picture in enumerate(drawn):
            if picture.digit is not None:
                out["digits"].append(int(digits[i]) == picture.digit)
            elif picture.sign is not None:
                out["signs"].append(domain.SIGNS[int(signs[i])] == picture.sign)
            else:
                kind, color, _ = (torch.from_numpy(cells).flatten() for cells in picture.cells())
                out["kinds"].append(bool((kinds[i] == kind).all()))
                out["colors"].append(bool((colors[i] == color).all()))
        return out


class VisionTrainer(nn.Module):
    """Tower, projector and label heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.vision
        self.visual_model = VisionModel(config.vision)
        self.visual_bridge_model = VisualBridge(config.vision)
        self.labels = PictureLabels(config.vision.hidden_size)

    def forward(self, drawn: list[pictures.Picture]) -> Tensor:
        """Pictures of one size -> token embeddings [pictures, tokens, hidden]."""
        mean, std = self.config.image_mean, self.config.image_std
        height, width, _ = drawn[0].pixels.shape
        grid = height // self.config.patch_size, width // self.config.patch_size
        patches = torch.from_numpy(np.stack([pictures.patches(p.pixels, mean, std) for p in drawn]))
        with training.mixed_precision(self.training):
            return self.visual_bridge_model(self.visual_model(patches, [grid])).float()


@torch.no_grad()
def evaluate(trainer: VisionTrainer, count: int = 256) -> dict[str, float]:
    """Shares of pictures with every label right; digits are held-out ones."""
    trainer.eval()
    rng = Random(99)
    drawn = [pictures.draw_picture(rng, heldout=True) for _ in range(count)]
    right = trainer.labels.right(trainer(drawn), drawn)
    trainer.train()
    return {name: sum(found) / max(1, len(found)) for name, found in right.items()}


def train(run: Path, steps: int, rate: float = _PEAK, every: int = 250) -> None:
    """Train to `steps` at the peak learning rate `rate`, going on from `run`/vision.pt."""
    trainer = VisionTrainer(read_config(vocabulary.FOLDER)).train()
    optimizer = training.MuonAdamW(trainer, r"visual_(model\.blocks|bridge_model)\.", rate, _ADAM_SHARE)
    step, log = 0, training.Log(run / "vision.jsonl")
    if (state := training.load_state(run / "vision.pt")) is not None:
        trainer.load_state_dict(state["model"])
        training.restore(optimizer, state)
        step = state["step"]
    while step < steps:
        rng = training.seed_step(6, step)
        easy = max(0.0, 1 - 4 * step / steps)
        cells = pictures.draw_grid(rng)
        drawn = [
            pictures.draw_shapes(rng, 1, cells) if rng.random() < easy else pictures.draw_picture(rng, cells=cells)
            for _ in range(_BATCH)
        ]
        loss = trainer.labels.loss(trainer(drawn), drawn)
        training.set_rate(optimizer, training.cosine_rate(step, steps, rate))
        training.clipped_step(loss, optimizer, trainer.parameters())
        log.add(labels=loss.detach())
        step += 1
        if step % every == 0 or step == steps:
            training.save_state(
                run / "vision.pt", model=trainer.state_dict(), optimizer=optimizer.state_dict(), step=step
            )
            log.write(step, **evaluate(trainer))


def main() -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--rate", type=float, default=_PEAK, help="peak learning rate")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.run, arguments.steps, arguments.rate)


if __name__ == "__main__":
    main()
