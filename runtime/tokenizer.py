"""Text <-> ids with byte-level BPE, whole or piece by piece; a user's text can never name a special token."""

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from runtime.errors import BundleError, EdgeOmniError, PromptError


class Tokenizer:
    """The tokenizer of one bundle; its state never changes after it is made."""

    def __init__(self, path: Path):
        """Read a tokenizer.json; BundleError where it is missing, broken or not byte-level BPE."""
        try:
            self._bpe = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
        except Exception as error:  # tokenizers raises nothing more specific
            raise BundleError(f"{path} is not a readable tokenizer.json ({error}); export the bundle again") from None
        if not isinstance(self._bpe.decoder, tokenizers.decoders.ByteLevel):
            kind = type(self._bpe.decoder).__name__
            raise BundleError(f"{path} decodes by {kind}, expected ByteLevel; only byte-level BPE can be streamed")
        added = self._bpe.get_added_tokens_decoder()
        self._ids = {token.content: i for i, token in added.items()}
        self._hidden = frozenset(i for i, token in added.items() if token.special)
        self._split = _any_of(self._ids)
        _read_added_tokens_as_text(self._bpe, self._ids)

    def encode(self, text: str, special: bool) -> NDArray[np.int64]:
        """Ids [n] of a text; begin- and end-of-text ids are never put around it.

        With `special` (template strings), the added tokens that are spelled out become their ids, leftmost longest
        first. Without (whatever a user, a file or the model itself wrote), their characters are text like any
        other. PromptError where the text holds half of a surrogate pair.
        """
        ids: list[int] = []
        for part in self.parse(text) if special else [text]:
            ids += self._encode_text(part) if isinstance(part, str) else [part]
        return np.array(ids, np.int64)

    def parse(self, template: str) -> list[str | int]:
        """A template string as the texts and the ids of the added tokens that it spells out, in order."""
        parts = self._split.split(template)
        return [self._ids[part] if odd % 2 else part for odd, part in enumerate(parts) if part]

    def _encode_text(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X} at position {error.start}"
            raise PromptError(f"the text holds {found}, half of a surrogate pair and no character; remove it") from None
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD, ids that the tokenizer does not know become nothing."""
        shown = [int(i) for i in ids if not (skip_special and i in self._hidden)]
        return self._bpe.decode(shown, skip_special_tokens=False)

    def id_of(self, special: str) -> int:
        """Id of an added token such as "<|im_end|>"; EdgeOmniError where there is none of that name."""
        if special not in self._ids:
            raise EdgeOmniError(f"the tokenizer has no added token {special!r}; it has {', '.join(self._ids)}")
        return self._ids[special]

    def bytes_of(self, token: int, skip_special: bool = True) -> bytes:
        """Bytes that a token stands for, maybe only a part of a character; none for an id that is not known."""
        if skip_special and token in self._hidden:
            return b""
        written = self._bpe.id_to_token(token) or ""
        if all(c in BYTE_OF for c in written):
            return bytes(BYTE_OF[c] for c in written)
        return written.encode("utf-8")

    def stream(self, skip_special: bool = True) -> "TextStream":
        return TextStream(self, skip_special)


class TextStream:
    """Ids in one by one, text out as soon as it is certain: bytes of a character wait until it is complete.

    The pieces, the one from `flush` included, joined are what `Tokenizer.decode` gives for all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that has become certain by one more id; "" while a character is incomplete."""
        return self._utf8.decode(self._tokenizer.bytes_of(token, self._skip_special))

    def flush(self) -> str:
        """What was held back, as U+FFFD, at the end of the ids; the stream is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest first, as one group, so that `split` puts them at odd places."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _read_added_tokens_as_text(bpe: tokenizers.Tokenizer, added: Iterable[str]) -> None:
    """Make `bpe.encode` see plain characters where a text spells an added token."""
    # The switch below only covers tokens that are marked special, so all are marked, "<tool_call>" and its like too.
    bpe.add_special_tokens([tokenizers.AddedToken(a, special=True, normalized=False) for a in added])
    bpe.encode_special_tokens = True


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2, Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
