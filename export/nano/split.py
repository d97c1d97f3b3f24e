"""What is held out of training: voices, engines, noise kinds and sentences, fixed in heldout.json beforehand."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PATH = Path(__file__).with_name("heldout.json")


@dataclass(frozen=True)
class Split:
    """The committed split; a voice is written `engine/name`, an espeak voice `espeak/accent+variant`."""

    salt: str
    modulus: int
    residue: int
    train_voices: tuple[str, ...]
    heldout_voices: tuple[str, ...]
    train_noises: tuple[str, ...]
    heldout_noises: tuple[str, ...]
    heldout_digit: tuple[int, int]

    def sentence_is_heldout(self, key: str) -> bool:
        """Whether the sentence with this content (carrier words removed, see `domain`) may never be trained on."""
        digest = hashlib.md5(f"{self.salt}:{key}".encode(), usedforsecurity=False).hexdigest()
        return int(digest, 16) % self.modulus == self.residue

    def voice_is_heldout(self, voice: str) -> bool:
        """Whether the voice is of the held-out list (a held-out espeak accent or variant is enough)."""
        return voice in self.heldout_voices


def _espeak_voices(table: dict) -> tuple[list[str], list[str]]:
    """Training voices pair trained accents with trained variants; held-out ones have a held-out accent or variant."""
    accents, variants = sorted(set(table["train_accents"])), table["train_variants"]
    # The order of accents repeats the commoner ones, so that a uniform draw speaks American most often.
    train = [f"espeak/{a}+{v}" for a in table["train_accents"] for v in variants]
    held = [f"espeak/{a}+{v}" for a in accents for v in table["heldout_variants"]]
    held += [f"espeak/{a}+{v}" for a in table["heldout_accents"] for v in table["heldout_variants"]]
    return train, held


@cache
def read_split() -> Split:
    """Read the committed split."""
    table = json.loads(_PATH.read_text())
    train, held = _espeak_voices(table["espeak"])
    for engine in ("flite", "festival", "kokoro", "piper"):
        train += [f"{engine}/{v}" for v in table[engine]["train_voices"]]
        held += [f"{engine}/{v}" for v in table[engine]["heldout_voices"]]
    return Split(
        salt=table["salt"],
        modulus=table["sentence_modulus"],
        residue=table["sentence_residue"],
        train_voices=tuple(train),
        heldout_voices=tuple(held),
        train_noises=tuple(table["noise"]["train_kinds"]),
        heldout_noises=tuple(table["noise"]["heldout_kinds"]),
        heldout_digit=(table["digits"]["heldout_modulus"], table["digits"]["heldout_residue"]),
    )
