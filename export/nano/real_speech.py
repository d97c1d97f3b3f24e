"""A real woman's recordings of words of the small world, for evaluation only: Debian's asterisk-core-sounds-en-g722
(CC BY-SA 3.0; the texts come with asterisk-core-sounds-en). Numbers, days and a few more words; sums are joined of
them.
"""

import gzip
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from export.nano import domain

SOUNDS = Path("/usr/share/asterisk/sounds/en")
_TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
RATE = 16000
_PACKAGES = "asterisk-core-sounds-en asterisk-core-sounds-en-g722 ffmpeg"


@dataclass(frozen=True)
class Spoken:
    """What is said, and its samples in [-1, 1] at 16 kHz."""

    text: str
    wave: np.ndarray


def words() -> list[Spoken]:
    """Every recording whose words are all of the world, in the order of the list of texts.

    Raises:
        FileNotFoundError: the packages are not installed.
    """
    if not _TEXTS.exists() or not SOUNDS.is_dir():
        raise FileNotFoundError(f"the recordings of a real speaker are missing: apt-get install {_PACKAGES}")
    known, found = _known(), []
    with gzip.open(_TEXTS, "rt") as lines:
        for line in lines:
            name, _, text = line.partition(":")
            path = SOUNDS / f"{name}.g722"
            said = re.sub(r"[^a-z' ]", " ", text.lower()).split()
            if said and known.issuperset(said) and path.exists():
                found.append(Spoken(" ".join(said), _decoded(path)))
    return found


def _known() -> set[str]:
    """Words of questions and answers, those aside that only lie outside the world."""
    rng, known = Random(0), set()
    for turn in (domain.draw_turn(rng) for _ in range(20000)):
        if turn.intent != "outside":
            known |= {*turn.question.split(), *turn.answer.split()}
    return known


def _decoded(path: Path) -> np.ndarray:
    """G.722 to samples, without the silence around them."""
    command = ["ffmpeg", "-v", "error", "-f", "g722", "-i", str(path), "-f", "f32le", "-ar", str(RATE), "-ac", "1", "-"]
    wave = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.float32)
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    return wave[max(0, loud[0] - RATE // 20) : loud[-1] + RATE // 20]


def joined(parts: list[np.ndarray], rng: Random) -> np.ndarray:
    """Words one after another with 20 to 140 ms between them."""
    out = [parts[0]]
    for part in parts[1:]:
        out += [np.zeros(rng.randint(RATE // 50, RATE // 7), np.float32), part]
    return np.concatenate(out)


def sums(count: int) -> list[tuple[Spoken, str]]:
    """Additions and subtractions of the world, joined word by word, with their answers."""
    rng, by_word = Random(3), {spoken.text: spoken.wave for spoken in words()}
    made: list[tuple[Spoken, str]] = []
    while len(made) < count:
        turn = domain.draw_turn(rng)
        if turn.intent in ("add", "sub") and turn.key and by_word.keys() >= set(turn.key.split()):
            wave = joined([by_word[word] for word in turn.key.split()], rng)
            made.append((Spoken(turn.key, wave), turn.answer))
    return made


def strings(count: int) -> list[Spoken]:
    """Two to four of the words, joined."""
    rng, found = Random(5), words()
    drawn = [rng.sample(found, rng.randint(2, 4)) for _ in range(count)]
    return [Spoken(" ".join(s.text for s in some), joined([s.wave for s in some], rng)) for some in drawn]
