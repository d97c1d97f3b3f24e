"""Text <-> ids with BPE over bytes or over SentencePiece's pieces; a user's text can never name a special token."""

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray

from runtime.bundle import BLANK, pieces_of
from runtime.errors import BundleError, EdgeOmniError, PromptError

# What a text stands behind: nothing, a special token, or other text that has been encoded.
Behind = Literal["start", "token", "text"]
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # a piece that stands for a byte which no other piece has


class Tokenizer:
    """The tokenizer of one bundle; its state never changes after it is made."""

    def __init__(self, path: Path):
        """Read a tokenizer.json; BundleError where it is missing, broken or its texts cannot be streamed."""
        try:
            text = path.read_text("utf-8")
            self._bpe = tokenizers.Tokenizer.from_str(text)
            document = json.loads(text)
        except Exception as error:  # tokenizers raises nothing more specific
            raise BundleError(f"{path} is not a readable tokenizer.json ({error}); export the bundle again") from None
        self.pieces = pieces_of(document, str(path))
        added = self._bpe.get_added_tokens_decoder()
        self._ids = {token.content: i for i, token in added.items()}
        self._hidden = frozenset(i for i, token in added.items() if token.special)
        self._eats_before = frozenset(i for i, token in added.items() if token.lstrip)
        self._eats_behind = frozenset(i for i, token in added.items() if token.rstrip)
        self._split = _any_of(self._ids)
        _read_added_tokens_as_text(self._bpe, self._ids)
        self._at = {behind: _without_prefix(self._bpe, document, behind) for behind in BEHIND}

    def encode(self, text: str, special: bool) -> NDArray[np.int64]:
        """Ids [n] of a text; begin- and end-of-text ids are never put around it.

        With `special` (template strings), the added tokens that are spelled out become their ids, leftmost longest
        first. Without (whatever a user, a file or the model itself wrote), their characters are text like any
        other. PromptError where the text holds half of a surrogate pair.
        """
        ids: list[int] = []
        parts: list[str | int] = self.parse(text) if special else [text]
        for index, part in enumerate(parts):
            if isinstance(part, str):
                before, after = (next((p for p in near if isinstance(p, int)), None) for near in _beside(parts, index))
                ids += self.encode_run(part, "token" if index else "start", before, after)
            else:
                ids.append(part)
        return np.array(ids, np.int64)

    def encode_run(self, text: str, behind: Behind, before: int | None, after: int | None) -> list[int]:
        """Ids of all the text between two special tokens, whose ids are given where there are such.

        SentencePiece puts a blank in front of a text, depending on what it stands behind; and some tokens take the
        blanks beside them for their own. PromptError where the text holds half of a surrogate pair.
        """
        text = text.lstrip() if before in self._eats_behind else text
        text = text.rstrip() if after in self._eats_before else text
        return self._encode_text(text, behind)

    def parse(self, template: str) -> list[str | int]:
        """A template string as the texts and the ids of the added tokens that it spells out, in order."""
        parts = self._split.split(template)
        return [self._ids[part] if odd % 2 else part for odd, part in enumerate(parts) if part]

    def _encode_text(self, text: str, behind: Behind) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X} at position {error.start}"
            raise PromptError(f"the text holds {found}, half of a surrogate pair and no character; remove it") from None
        return self._at[behind].encode(text, add_special_tokens=False).ids

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
        if self.pieces is not None:
            found = BYTE_PIECE.fullmatch(written)
            return bytes.fromhex(found[1]) if found else written.replace(BLANK, " ").encode("utf-8")
        if all(c in BYTE_OF for c in written):
            return bytes(BYTE_OF[c] for c in written)
        return written.encode("utf-8")

    def is_byte(self, token: int) -> bool:
        """Whether a token is one of the 256 that stand for a byte beside a vocabulary of whole characters."""
        return self.pieces is not None and BYTE_PIECE.fullmatch(self._bpe.id_to_token(token) or "") is not None

    def stream(self, skip_special: bool = True) -> "TextStream | PieceStream":
        return TextStream(self, skip_special) if self.pieces is None else PieceStream(self, self.pieces, skip_special)


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


class PieceStream:
    """As TextStream, of SentencePiece's pieces: blanks at the very beginning are dropped, and a row of byte pieces
    waits for its end, for it is a text as a whole or, where that is no UTF-8, one U+FFFD a byte.
    """

    def __init__(self, tokenizer: Tokenizer, blanks: int, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._blanks = self._left = blanks  # of those at the beginning, how many are dropped
        self._row = b""

    def push(self, token: int) -> str:
        """Text that has become certain by one more id; "" within a row of bytes."""
        piece = self._tokenizer.bytes_of(token, self._skip_special)
        if not piece:  # hidden or unknown: the row of bytes goes on behind it
            return ""
        if self._tokenizer.is_byte(token):
            self._row += piece
            return ""
        return self._begun(self._row_as_text() + piece.decode("utf-8"))

    def flush(self) -> str:
        """The row of bytes that was held back at the end of the ids; the stream is then as new."""
        rest = self._begun(self._row_as_text())
        self._left = self._blanks
        return rest

    def _row_as_text(self) -> str:
        row, self._row = self._row, b""
        try:
            return row.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(row)

    def _begun(self, text: str) -> str:
        while self._left and text:
            self._left = self._left - 1 if text[0] == " " else 0
            text = text[1:] if text[0] == " " else text
        return text


BEHIND: tuple[Behind, ...] = ("start", "token", "text")


def _without_prefix(bpe: tokenizers.Tokenizer, document: Mapping[str, Any], behind: Behind) -> tokenizers.Tokenizer:
    """The tokenizer as it treats a text at that place: the same one, or one that puts no blank in front."""
    normalizers = _steps(document.get("normalizer"), "normalizers")
    steps = _steps(document.get("pre_tokenizer"), "pretokenizers")
    kept = [step for step in normalizers if step.get("type") != "Prepend" or behind != "text"]
    plain = [_plain(step, behind) for step in steps]
    if behind == "start" or (kept == normalizers and plain == steps):
        return bpe
    changed = json.loads(bpe.to_str())
    changed["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": plain} if plain else None
    without = tokenizers.Tokenizer.from_str(json.dumps(changed))
    without.encode_special_tokens = True
    return without


def _plain(step: dict[str, Any], behind: Behind) -> dict[str, Any]:
    """A step of the pre-tokenizer, without the blank that it would put in front of a text at that place."""
    if step.get("type") == "Metaspace" and (behind == "text" or step.get("prepend_scheme") == "first"):
        return step | {"prepend_scheme": "never"}
    if step.get("type") == "ByteLevel" and behind == "text":
        return step | {"add_prefix_space": False}
    return step


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or such in tokenizer.json, which is a Sequence of them, a single one or none."""
    return list(part.get(inner, [part])) if part else []


def _beside(parts: list[str | int], index: int) -> tuple[list[str | int], list[str | int]]:
    return parts[max(0, index - 1) : index], parts[index + 1 : index + 2]


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
