"""How much of each answer is made when a bundle is measured."""

from dataclasses import dataclass, replace

from runtime.bundle import Manifest, Step


@dataclass(frozen=True)
class Limits:
    """How much of each answer is made and measured."""

    max_new: int = 48  # text tokens of an answer
    max_frames: int = 64  # audio frames of a spoken answer
    seed: int = 0

    def of(self, manifest: Manifest) -> Manifest:
        """The manifest with no step longer than the limits."""
        made = manifest.generation
        steps = {name: _cut(getattr(made, name), self.max_new) for name in ("text", "first_text", "later_text")}
        return replace(manifest, generation=replace(made, **steps, audio=_cut(made.audio, self.max_frames)))


def _cut(step: Step | None, most: int) -> Step | None:
    return None if step is None else replace(step, max_new=min(step.max_new, most))
