"""OmniBench (Li et al. 2024) as its repository holds it: dataset/*.jsonl, mm_data/audio and mm_data/image."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from quant.comparison.suites.prompts import lettered
from quant.comparison.suites.rows import Found, Row, files_in, rows
from quant.turn import Turn

MAX_NEW = 64
NEEDED = ("index", "question", "options", "answer", "audio type", "audio_path", "image_path")
# What kind of question it is, and whatever a copy of the data set holds of the media that the paths name.
KNOWN = frozenset((*NEEDED, "audio content", "image content", "task type", "split", "audio", "image"))
_LETTERED = re.compile(r"A\.(.*?)B\.(.*?)C\.(.*?)D\.(.*)", re.DOTALL)
_ASK = "Please answer the following question based on the given {given}:\n{texts}{question}.\n"
_CHOOSE = "Please choose only one answer from the following options:\n{options}."


@dataclass(frozen=True)
class Context:
    """What a model is given of a question: the media themselves, or texts in their place."""

    suite: str
    given: str  # as the published prompt says it
    audio: bool
    image: bool

    def read(self, data: Path, found: Found) -> Iterator[Turn]:
        folder = data / "dataset" if (data / "dataset").is_dir() else data
        needed = (*NEEDED, *(() if self.audio else ("audio content",)), *(() if self.image else ("image content",)))
        for path in files_in(folder, (".jsonl",), f"the suite {found.suite}"):
            for row in rows(path, needed, found):
                if turn := self._turn(row, found):
                    yield turn

    def _turn(self, row: Row, found: Found) -> Turn | None:
        found.refuse_unread(row, KNOWN)
        texts, answer = _options(row.fields["options"]), _plain(row.text("answer"))
        if answer not in (plain := [_plain(text) for text in texts]):
            found.wrong(row, f"answer {row.text('answer')!r} is none of the options {row.fields['options']!r}")
            return None
        media = _media(row.file)
        return Turn(
            text=self._prompt(row, texts),
            audio=media / "audio" / row.text("audio_path") if self.audio else None,
            images=(media / "image" / row.text("image_path"),) if self.image else (),
            answers=(ascii_uppercase[plain.index(answer)],),
            metric="omnibench",
            choices=tuple(texts),
            item=row.text("index"),
            group=row.text("audio type"),
            max_new=MAX_NEW,
        )

    def _prompt(self, row: Row, options: list[str]) -> str:
        texts = "" if self.audio else f"Audio Content: {row.text('audio content')} "
        texts += "" if self.image else f"Image Content: {row.text('image content')} "
        ask = _ASK.format(given=self.given, texts=texts, question=row.text("question"))
        return ask + _CHOOSE.format(options=lettered(options))


def _options(found: object) -> list[str]:
    """A list, or as older versions of the file have it one text: A. ... B. ... C. ... D. ..."""
    if isinstance(found, list):
        return [str(option).strip() for option in found]
    parts = _LETTERED.fullmatch(str(found).strip())
    return [part.strip() for part in parts.groups()] if parts else []


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def _media(file: Path) -> Path:
    """mm_data lies beside the folder dataset, or beside the file."""
    beside = file.parent / "mm_data"
    return beside if beside.is_dir() else file.parent.parent / "mm_data"


CONTEXTS = (
    Context("omnibench", "image and audio", audio=True, image=True),
    Context("omnibench-caption", "caption of an image and an audio", audio=True, image=False),
    Context("omnibench-transcript", "an image and transcript of an audio", audio=False, image=True),
    Context("omnibench-text", "caption of an image and transcript of an audio", audio=False, image=False),
)
