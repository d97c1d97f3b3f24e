"""One conversation as the decoder sees it: every position's id, how far the cache has read, and the unread tail."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Manifest
from runtime.generate import PIECE, Decoder
from runtime.kv_cache import KVCache
from runtime.prompt import Prompt
from runtime.session import Session

Rows = NDArray[np.floating]


class Context:
    """`ids` are all positions; the last `len(tail)` of them are not in the cache yet, so they may still be changed.

    While an answer is generated the tail holds one position: what was chosen last is read when the next is asked for.
    `media` holds the codes or the row of each position that is a placeholder, so that a part can be read once more.
    """

    def __init__(self, manifest: Manifest, decoder: Session, embed_tokens: Session, embed_audio: Session | None):
        self.manifest, self.embed_tokens, self.embed_audio = manifest, embed_tokens, embed_audio
        self.cache = KVCache(manifest.cache)
        self.decoder = Decoder(decoder, manifest, self.cache)
        self.ids: list[int] = []
        self.tail: list[Rows] = []  # rows [hidden]
        self.media: dict[int, np.ndarray] = {}
        self._last: Rows | None = None  # hidden state of the last position, where that has been read

    def append(self, prompt: Prompt) -> None:
        """Put a piece of prompt behind what is there. PromptError if the model's context cannot hold it."""
        self.cache.reserve(len(self.tail) + len(prompt))
        self.tail.extend(self.embed(prompt))
        self.media |= {len(self.ids) + at: value for at, value in placed(prompt, self.manifest)}
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
        self.media.pop(len(self.ids), None)

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        unread = len(self.ids) - len(self.tail)
        del self.tail[max(0, length - unread) :]
        if length < self.cache.length:
            self._last = None
            self.cache.truncate(length)
        for position in range(length, len(self.ids)):
            self.media.pop(position, None)
        del self.ids[length:]

    def read(self, keep: int = 0, piece: int = PIECE) -> Iterator[Rows]:
        """Read the tail but for its last `keep` positions, a piece at a time; yields the hidden state [1, hidden]."""
        rows = self.tail[: len(self.tail) - keep]
        for hidden in self.decoder.prefill(np.stack(rows), piece) if rows else ():
            del self.tail[: self.cache.length + len(self.tail) - len(self.ids)]
            self._last = hidden.copy()
            yield hidden

    def hidden(self) -> Rows:
        """The hidden state of the last position, [1, hidden]; reads what of the tail has not been read."""
        if len(self.tail) == 1:
            self._last = self.decoder.decode_step(self.tail[0][None]).copy()
            self.tail.clear()
        else:
            for _ in self.read():
                pass
        assert self._last is not None, "nothing was read since the end was forgotten"
        return self._last

    def take_over(self, other: "Context", length: int, same: int) -> None:
        """Become what another context is up to `length`; of its read positions the first `same` are here already."""
        read = min(length, other.cache.length)
        self.cache.copy_rows(other.cache, min(same, read), read)
        self.ids, self.tail = other.ids[:length], other.tail[: length - read]
        self.media = {position: value for position, value in other.media.items() if position < length}
        self._last = None

    def prompt(self, start: int, end: int) -> Prompt:
        """The positions from `start` to `end` as a piece of prompt, so that another context can read them."""
        kinds = {i: self._kind(self.ids[i]) for i in range(start, end) if i in self.media}
        codes = [self.media[i] for i, kind in kinds.items() if kind == "codes"]
        rows = [self.media[i] for i, kind in kinds.items() if kind == "rows"]
        books = len(self.manifest.audio.codebook_sizes) if self.manifest.audio else 0
        return Prompt(
            np.array(self.ids[start:end], np.int64),
            np.array(codes, np.int64).reshape(len(codes), -1 if codes else books),
            np.array(rows, np.float32).reshape(len(rows), self.manifest.hidden_size),
        )

    def _kind(self, token: int) -> str:
        return "codes" if token == self.manifest.tokens.audio_pad else "rows"

    @property
    def room(self) -> int:
        """Positions that still fit."""
        return self.cache.layout.max_positions - len(self.ids)

    def embed(self, prompt: Prompt) -> Rows:
        """Rows [L, hidden] of a prompt: token embeddings, with media rows in place of the placeholders."""
        return embed(prompt, self.manifest, self.embed_tokens, self.embed_audio)

    def _rows_of(self, ids: object) -> Rows:
        return self.embed_tokens.run(ids=np.asarray(ids, np.int64))["rows"]


def placed(prompt: Prompt, manifest: Manifest) -> Iterator[tuple[int, np.ndarray]]:
    """The placeholders of a prompt: where each stands, and its codes [codebooks] or its row [hidden]."""
    yield from zip(np.flatnonzero(prompt.ids == manifest.tokens.audio_pad).tolist(), prompt.codes, strict=True)
    yield from zip(np.flatnonzero(_pictured(prompt, manifest)).tolist(), prompt.rows, strict=True)


def selected(prompt: Prompt, keep: NDArray[np.bool_], manifest: Manifest) -> Prompt:
    """The positions [L] of a prompt that are to be kept, with their codes and rows."""
    heard, seen = prompt.ids == manifest.tokens.audio_pad, _pictured(prompt, manifest)
    return replace(prompt, ids=prompt.ids[keep], codes=prompt.codes[keep[heard]], rows=prompt.rows[keep[seen]])


def _pictured(prompt: Prompt, manifest: Manifest) -> NDArray[np.bool_]:
    tokens = manifest.tokens
    return np.isin(prompt.ids, [i for i in (tokens.img_pad, tokens.video_place) if i is not None])


def embed(prompt: Prompt, manifest: Manifest, embed_tokens: Session, embed_audio: Session | None) -> Rows:
    """Rows [L, hidden] of a prompt: token embeddings, with media rows in place of the placeholders."""
    tokens, rows = manifest.tokens, embed_tokens.run(ids=prompt.ids)["rows"]
    if len(prompt.codes):
        assert embed_audio is not None
        rows[prompt.ids == tokens.audio_pad] = embed_audio.run(codes=prompt.codes)["rows"]
    if len(prompt.rows):
        rows[_pictured(prompt, manifest)] = prompt.rows
    return rows
