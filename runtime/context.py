"""One conversation as the decoder sees it: every position's id, how far the cache has read, and the unread tail."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Manifest
from runtime.generate import Decoder
from runtime.kv_cache import KVCache
from runtime.prompt import Prompt
from runtime.session import Session

Rows = NDArray[np.floating]


class Context:
    """`ids` are all positions; the last `len(tail)` of them are not in the cache yet, so they may still be changed.

    While an answer is generated the tail holds one position: what was chosen last is read when the next is asked for.
    """

    def __init__(self, manifest: Manifest, decoder: Session, embed_tokens: Session, embed_audio: Session | None):
        self.manifest, self.embed_tokens, self.embed_audio = manifest, embed_tokens, embed_audio
        self.cache = KVCache(manifest.cache)
        self.decoder = Decoder(decoder, manifest, self.cache)
        self.ids: list[int] = []
        self.tail: list[Rows] = []  # rows [hidden]

    def append(self, prompt: Prompt) -> None:
        """Put a piece of prompt behind what is there. PromptError if the model's context cannot hold it."""
        self.cache.reserve(len(self.tail) + len(prompt))
        self.tail.extend(self.embed(prompt))
        self.ids.extend(prompt.ids.tolist())

    def push(self, token: int, row: Rows | None = None) -> None:
        """Put one position behind what is there: a token, or a placeholder whose row is given."""
        self.ids.append(token)
        self.tail.append(self._rows_of([token])[0] if row is None else row)

    def replace_last(self, token: int) -> None:
        """Change the last position, which the cache has not read, to a token."""
        self.drop_last()
        self.push(token)

    def drop_last(self) -> None:
        self.ids.pop()
        self.tail.pop()

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        unread = len(self.ids) - len(self.tail)
        del self.tail[max(0, length - unread) :]
        del self.ids[length:]
        self.cache.truncate(min(length, self.cache.length))

    def read(self, keep: int = 0) -> Iterator[Rows]:
        """Read the tail but for its last `keep` positions, a piece at a time; yields the hidden state [1, hidden]."""
        rows = self.tail[: len(self.tail) - keep]
        for hidden in self.decoder.prefill(np.stack(rows)) if rows else ():
            del self.tail[: self.cache.length + len(self.tail) - len(self.ids)]
            yield hidden

    def hidden(self) -> Rows:
        """Read the whole tail and return the hidden state of the last position, [1, hidden]."""
        if len(self.tail) == 1:
            hidden = self.decoder.decode_step(self.tail[0][None])
            self.tail.clear()
            return hidden
        return list(self.read())[-1]

    @property
    def room(self) -> int:
        """Positions that still fit."""
        return self.cache.layout.max_positions - len(self.ids)

    def embed(self, prompt: Prompt) -> Rows:
        """Rows [L, hidden] of a prompt: token embeddings, with media rows in place of the placeholders."""
        return embed(prompt, self.manifest, self.embed_tokens, self.embed_audio)

    def _rows_of(self, ids: object) -> Rows:
        return self.embed_tokens.run(ids=np.asarray(ids, np.int64))["rows"]


def embed(prompt: Prompt, manifest: Manifest, embed_tokens: Session, embed_audio: Session | None) -> Rows:
    """Rows [L, hidden] of a prompt: token embeddings, with media rows in place of the placeholders."""
    tokens, rows = manifest.tokens, embed_tokens.run(ids=prompt.ids)["rows"]
    if len(prompt.codes):
        assert embed_audio is not None
        rows[prompt.ids == tokens.audio_pad] = embed_audio.run(codes=prompt.codes)["rows"]
    if len(prompt.rows):
        rows[np.isin(prompt.ids, [i for i in (tokens.img_pad, tokens.video_place) if i is not None])] = prompt.rows
    return rows
