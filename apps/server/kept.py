"""Contexts of conversations that were answered: the next request of one continues from what was read already.

A request brings its whole conversation again. What stands at its beginning in one of these contexts, id by id and for
pictures and sound value by value, need not be read once more.
"""

from collections.abc import Callable

import numpy as np

from runtime.bundle import Manifest
from runtime.context import Context, placed
from runtime.prompt import Prompt


class KeptContexts:
    """Contexts that nobody uses at present, the newest last, of `most` bytes together; the newest is always kept.

    For one thread.
    """

    def __init__(self, manifest: Manifest, most: int):
        self._manifest, self._most = manifest, most
        self._contexts: list[Context] = []

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def nbytes(self) -> int:
        return sum(context.cache.nbytes for context in self._contexts)

    def take(self, prompt: Prompt, fresh: Callable[[], Context]) -> tuple[Context, int]:
        """A context that holds the beginning of a prompt, and how many positions that are: never the last, whose
        hidden state is wanted. The context is the caller's then.
        """
        media = dict(placed(prompt, self._manifest))
        shared = [self._same(context, prompt, media) for context in self._contexts]
        same = max(shared, default=0)
        if not same:
            return fresh(), 0
        index = len(shared) - 1 - shared[::-1].index(same)
        if 2 * same >= len(self._contexts[index].ids):  # more is gone with another beginning than with a copy
            context = self._contexts.pop(index)
            context.truncate(same)
        else:
            context = fresh()
            context.take_over(self._contexts[index], same, 0)
        return context, same

    def keep(self, context: Context) -> None:
        self._contexts.append(context)
        while len(self._contexts) > 1 and self.nbytes > self._most:
            del self._contexts[0]

    def _same(self, context: Context, prompt: Prompt, media: dict[int, np.ndarray]) -> int:
        """Positions at the beginning of both that the context has read."""
        most = min(context.cache.length, len(prompt) - 1)
        differ = np.flatnonzero(np.array(context.ids[:most], np.int64) != prompt.ids[:most])
        same = int(differ[0]) if len(differ) else most
        return min((at for at in media if at < same and not _equal(context.media.get(at), media[at])), default=same)


def _equal(ours: np.ndarray | None, theirs: np.ndarray) -> bool:
    return ours is not None and np.array_equal(ours, theirs)


def behind(prompt: Prompt, start: int, manifest: Manifest) -> Prompt:
    """A prompt without its first `start` positions."""
    before = [at for at, _ in placed(prompt, manifest) if at < start]
    codes = int(np.count_nonzero(prompt.ids[before] == manifest.tokens.audio_pad)) if before else 0
    return Prompt(prompt.ids[start:], prompt.codes[codes:], prompt.rows[len(before) - codes :])
