"""Texts compared as words: how they are normalised, and how many edits lie between two of them.

The normaliser is one for all languages: Unicode NFKC, case folded, apostrophes dropped, every other punctuation mark
and symbol a space. Numbers, contractions and spellings stay as they are, unlike with Whisper's English normaliser, so
that rates compare between two bundles, but with published tables only where those were normalised alike.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

# Scripts that are written without spaces: each character counts as a word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")


@dataclass(frozen=True)
class Edits:
    """The fewest edits (Levenshtein 1966) that turn a reference of `count` words or characters into what was said."""

    substitutions: int
    insertions: int
    deletions: int
    count: int

    @property
    def total(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """WER or CER of this pair; above 1 where much was inserted, and of an empty reference every word is an error.

        The rate of many pairs is the sum of their edits over the sum of their counts.
        """
        return self.total / max(1, self.count)


def word_errors(reference: str, said: str) -> Edits:
    """Edits between the `words` of two texts: word error rate, in Chinese and Japanese that of characters."""
    return _edits(words(reference), words(said))


def character_errors(reference: str, said: str) -> Edits:
    """Edits between the characters of two normalised texts, spaces left out."""
    return _edits(*(normalised(text).replace(" ", "") for text in (reference, said)))


def _edits(reference: Sequence[str], said: Sequence[str]) -> Edits:
    found = jiwer.process_words(" ".join(reference), " ".join(said))
    return Edits(found.substitutions, found.insertions, found.deletions, len(reference))


def words(text: str) -> list[str]:
    """Words of a normalised text; a Chinese or Japanese character is a word (mixed error rate)."""
    return _WORDS.findall(normalised(text))


def normalised(text: str) -> str:
    """NFKC, lower case, every punctuation mark and symbol a space, runs of space one space; apostrophes vanish."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "")
    plain = "".join(" " if unicodedata.category(mark)[0] in "PS" else mark for mark in folded)
    return " ".join(plain.split())


def contains_answer(text: str, answer: str) -> bool:
    """Whether the words of `answer`, of which there must be some, stand in a row in the text, both normalised."""
    found, wanted = words(text), words(answer)
    return bool(wanted) and any(
        found[start : start + len(wanted)] == wanted for start in range(len(found) - len(wanted) + 1)
    )
