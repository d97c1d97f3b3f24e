"""Which scripts a text is written in, to notice an answer in another language than the one that was expected.

A language that shares its script with the expected one is not noticed: English for French, or Chinese for Japanese that
is written in Han characters alone. Digits, punctuation and formulas count for nothing.
"""

import unicodedata
from collections import Counter

# By how Unicode names its letters; what is written in several of them is one script here.
JOINT = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "HANGUL": "Hangul"}
FEWEST = 4  # letters from which a language is told; one is enough of Han and Hangul, where it is a word or a syllable
DENSE = {"Han", "Kana", "Hangul"}


def scripts(text: str) -> dict[str, float]:
    """Share of a text's letters in each script, "Han", "Latin", "Cyrillic" and so on; {} for a text without letters."""
    letters = Counter(script_of(mark) for mark in unicodedata.normalize("NFKC", text) if mark.isalpha())
    total = sum(letters.values())
    return {name: count / total for name, count in letters.most_common()}


def script_of(letter: str) -> str:
    """The script of one letter, from the first word of its Unicode name."""
    first = unicodedata.name(letter, "unknown").replace("FULLWIDTH ", "").replace("HALFWIDTH ", "").split()[0]
    return JOINT.get(first, first.capitalize())


def foreign(expected: str, found: str) -> str:
    """How a text differs in script from what was expected, "Latin for Han"; "" where it does not, or none can tell.

    It differs where less than half of its letters are in scripts that the other text has in equal share.
    """
    if not (enough(expected) and enough(found)):
        return ""
    ours, theirs = scripts(expected), scripts(found)
    if sum(min(ours.get(name, 0.0), share) for name, share in theirs.items()) >= 0.5:
        return ""
    return f"{next(iter(theirs))} for {next(iter(ours))}"


def enough(text: str) -> bool:
    """Whether a text has letters enough to tell its language."""
    letters = [mark for mark in text if mark.isalpha()]
    return len(letters) >= FEWEST or any(script_of(mark) in DENSE for mark in letters)
