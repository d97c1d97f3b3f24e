"""What a conversation forgets when its context fills up: oldest pictures first, then oldest whole turns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.bundle import Manifest
from runtime.events import Forgotten

KEPT_SHARE = 0.5  # of the context: what is kept, so that the next turns fit without forgetting again

Span = tuple[int, int]  # positions from, to


@dataclass(frozen=True)
class Said:
    """A conversation: its ids, of which the first `pinned` (the system prompt) always stay, and where turns begin."""

    ids: Sequence[int]
    pinned: int
    starts: Sequence[int]


@dataclass(frozen=True)
class Plan:
    """The positions that are kept, in order, and what goes."""

    kept: tuple[Span, ...]
    pictures: int
    turns: int
    length: int  # of the conversation before
    full: bool  # the context was; else only turns that are too old go

    @property
    def positions(self) -> int:
        return sum(end - start for start, end in self.kept)

    @property
    def forgotten(self) -> Forgotten:
        return Forgotten(self.pictures, self.turns, self.length, self.positions)

    def moved(self, starts: Sequence[int]) -> list[int]:
        """Where the turns that are kept begin once the others are gone."""
        moved, before = [], 0
        for start, end in self.kept:
            moved += [at - start + before for at in starts if start <= at < end]
            before += end - start
        return moved


def plan(said: Said, manifest: Manifest, reserve: int, remember: int | None = None) -> Plan | None:
    """What to keep so that `reserve` more positions fit, and no more than `remember` turns; None if all may stay.

    The newest turn and its pictures go last; a picture goes with its tags.
    """
    length, most, starts = len(said.ids), manifest.cache.max_positions, said.starts
    old = 0 if remember is None else max(0, len(starts) - remember)
    full = length + reserve > most
    if not starts or not (full or old):
        return None
    goal = max(said.pinned, min(most - reserve, int(KEPT_SHARE * most))) if full else length
    turns = list(zip(starts, [*starts[1:], length], strict=True))
    gone = _forget(turns, old, pictures(said.ids, manifest, starts[old] if old < len(starts) else length), goal)
    turned = [span for span in gone if span in turns]
    return Plan(tuple(_kept(length, gone)), len(gone) - len(turned), len(turned), length, full)


def _forget(turns: Sequence[Span], old: int, seen: Sequence[Span], goal: int) -> list[Span]:
    """What goes: the first `old` turns, then as many pictures and turns as have to."""
    newest, length = turns[-1][0], turns[-1][1]
    order = [span for span in seen if span[0] < newest] + list(turns[old:-1])
    order += [span for span in seen if span[0] >= newest] + list(turns[max(old, len(turns) - 1) :])
    gone = list(turns[:old])
    for span in order:
        if _size(_kept(length, gone)) <= goal:
            break
        gone.append(span)
    return gone


def _kept(length: int, gone: Sequence[Span]) -> list[Span]:
    keep = np.ones(length + 2, np.bool_)
    keep[0] = keep[-1] = False
    for start, end in gone:
        keep[start + 1 : end + 1] = False
    edges = np.flatnonzero(keep[1:] != keep[:-1])
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _size(spans: Sequence[Span]) -> int:
    return sum(end - start for start, end in spans)


def pictures(ids: Sequence[int], manifest: Manifest, start: int) -> list[Span]:
    """Each picture from position `start` on, its tags included."""
    tokens, found, begin = manifest.tokens, [], None
    for position in range(start, len(ids)):
        if ids[position] == tokens.img_start:
            begin = position
        elif ids[position] == tokens.img_end and begin is not None:
            found.append((begin, position + 1))
            begin = None
    return found
