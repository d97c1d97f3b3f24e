"""One alphabet of phones for all speech engines: the classes that the tokenizer's frame labels use."""

# Index 0 is silence; the order is part of a trained alignment head.
PHONES = (
    " ", "a", "æ", "ɑ", "ɔ", "ʌ", "ə", "ɛ", "e", "ɪ", "i", "ɒ", "ʊ", "u", "o", "ɚ", "b", "d", "ð", "f", "ɡ", "h", "j",
    "k", "l", "m", "n", "ŋ", "p", "ɹ", "s", "ʃ", "t", "θ", "v", "w", "z", "ʒ",
)  # fmt: skip
INDEX = {phone: i for i, phone in enumerate(PHONES)}

_SAME = {"ɐ": "ə", "ᵻ": "ɪ", "ɜ": "ɚ", "ɾ": "t", "ʔ": "t", "ɫ": "l", "ɬ": "l", "r": "ɹ", "x": "k", "g": "ɡ", "ç": "h"}
_SAME |= {"ʤ": "dʒ", "ʧ": "tʃ", "I": "aɪ", "W": "aʊ", "A": "eɪ", "O": "oʊ", "Y": "ɔɪ", "ᵊ": "ə", "T": "t", "ɘ": "ə"}
_ARPABET = {
    "aa": "ɑ", "ae": "æ", "ah": "ʌ", "ao": "ɔ", "aw": "aʊ", "ax": "ə", "ay": "aɪ", "b": "b", "ch": "tʃ", "d": "d",
    "dh": "ð", "eh": "ɛ", "er": "ɚ", "ey": "eɪ", "f": "f", "g": "ɡ", "hh": "h", "ih": "ɪ", "iy": "i", "jh": "dʒ",
    "k": "k", "l": "l", "m": "m", "n": "n", "ng": "ŋ", "ow": "oʊ", "oy": "ɔɪ", "p": "p", "r": "ɹ", "s": "s", "sh": "ʃ",
    "t": "t", "th": "θ", "uh": "ʊ", "uw": "u", "v": "v", "w": "w", "y": "j", "z": "z", "zh": "ʒ", "pau": " ",
}  # fmt: skip


def from_ipa(symbols: str) -> str:
    """Reduce IPA (or Kokoro's capitals) to our classes, one a phone; stress, length and unknown marks vanish."""
    joined = "".join(_SAME.get(c, c) for c in symbols)
    return "".join(c for c in joined if c in INDEX)


def from_arpabet(symbol: str) -> str:
    """One ARPAbet segment name (flite) in our classes; unknown names are silence."""
    return _ARPABET.get(symbol, " ")


def spread(start: float, end: float, phones: str) -> list[tuple[float, str]]:
    """Give each phone of a segment an equal share: [(start of phone, phone)]; an empty segment counts as nothing."""
    width = (end - start) / max(len(phones), 1)
    return [(start + i * width, phone) for i, phone in enumerate(phones)]
