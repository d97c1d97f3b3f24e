"""Recipes that were tried on one reference, and which of them no other beats in both bytes and divergence."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tried:
    """What one candidate weighs and loses; None where its turns had no choices of that kind."""

    name: str
    folder: str  # of its report; "" for the one at hand
    weight_bytes: int
    bits_per_weight: float
    text_kl: float | None
    text_top1: float | None
    codes_kl: float | None
    codes_top1: float | None

    @property
    def losses(self) -> tuple[float, ...]:
        """Divergences, which are to be small; what is not finite beats nothing."""
        return tuple(kl for kl in (self.text_kl, self.codes_kl) if kl is not None)


def beaten_by(one: Tried, every: Sequence[Tried]) -> Tried | None:
    """The smallest that weighs no more and loses no more than `one`, and one of both less; None on the front."""
    return min((other for other in every if _beats(other, one)), key=lambda other: other.weight_bytes, default=None)


def _beats(a: Tried, b: Tried) -> bool:
    if len(a.losses) != len(b.losses) or not a.losses:
        return False
    no_worse = a.weight_bytes <= b.weight_bytes and all(x <= y for x, y in zip(a.losses, b.losses, strict=True))
    return no_worse and (a.weight_bytes, a.losses) != (b.weight_bytes, b.losses)


def front(every: Sequence[Tried]) -> list[Tried]:
    """Those that none beats, the smallest first."""
    return sorted((one for one in every if beaten_by(one, every) is None), key=lambda one: one.weight_bytes)
