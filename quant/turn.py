"""Turns to try a bundle on: one JSON object a line, in a file of one's own or the one that comes along."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from quant.media import Media
from runtime.bundle import Manifest
from runtime.errors import EdgeOmniError

DEFAULT = Path(__file__).parent / "turns" / "default.jsonl"
LISTED = 20  # mistakes that are told one by one

# How an answer is judged (quant/comparison/score.py). "judge": only by another model, so not here.
Metric = Literal["contains", "exists", "prefix", "letter", "option", "omnibench", "wer", "cer", "judge"]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Line:
    """What a line of the file may say; paths are relative to the file, `answer` is one text or several."""

    text: str = ""
    audio: str | None = None
    image: str | list[str] | None = None
    spoken: bool = False
    answer: str | list[str] | None = None


@dataclass(frozen=True)
class Turn:
    """What a user says and shows, whether the answer shall be heard, and what a right answer is.

    `cuts` says before which character of the text each picture stands; without it they all stand before the text.
    `answers` are texts of which a right one holds one, the letter of the right option, or what is said in the audio.
    """

    text: str
    audio: Path | None = None
    images: tuple[Media, ...] = ()
    spoken: bool = False
    answers: tuple[str, ...] = ()
    metric: Metric = "contains"
    choices: tuple[str, ...] = ()  # the texts of the options A, B, C, ...; "" where a letter is left out
    suite: str = ""  # the data set or file that it is from, where there are several
    item: str = ""  # which one of it; those of one name count as one and are right together
    group: str = ""  # what the suite's authors report apart
    max_new: int = 0  # tokens that its answer needs, where that is more than for other turns
    transcribe: bool = False  # to be asked with the bundle's own prompt for transcription
    cuts: tuple[int, ...] = ()  # of the text, where the pictures stand in it


def json_lines(path: Path, blank: bool = False) -> Iterator[str]:
    """Lines of a JSON Lines file, which end at \\n alone: JSON texts may hold the other line separators of Unicode.

    Blank ones are left out or, to be counted, kept. OSError, and UnicodeDecodeError where the file is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file):
            text = line.decode("utf-8" if number else "utf-8-sig")
            if blank or text.strip():
                yield text.rstrip("\n")


def read_turns(path: Path, suite: str = "") -> tuple[Turn, ...]:
    """The turns of a JSON Lines file; EdgeOmniError says everything that is wrong with it."""
    try:
        lines = list(json_lines(path, blank=True))
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeOmniError(f"the turns {path} cannot be read: {error}") from None
    problems: list[str] = []
    turns = [_turn(path, number, line, problems) for number, line in enumerate(lines, 1) if line.strip()]
    if not turns:
        problems.append('  no turn in it; expected lines like {"text": "What is a tram?"}')
    if problems:
        raise EdgeOmniError(f"the turns {path} cannot be used:\n" + "\n".join(problems))
    return tuple(replace(turn, suite=suite, item=str(number)) for number, turn in enumerate(turns, 1) if turn)


def _turn(path: Path, number: int, line: str, problems: list[str]) -> Turn | None:
    try:
        said = _LINE.validate_json(line)
    except ValidationError as error:
        problems.extend(f"  line {number}: {problem}" for problem in _in_words(error))
        return None
    audio = None if said.audio is None else path.parent / said.audio
    images = tuple(path.parent / name for name in several(said.image))
    media = [*([] if audio is None else [audio]), *images]
    problems.extend(f"  line {number}: there is no file {file}" for file in media if not file.is_file())
    if not said.text.strip() and not media:
        problems.append(f"  line {number}: empty; give it a text, an audio or an image")
    answers = several(said.answer)
    if not all(answer.strip() for answer in answers):
        problems.append(f"  line {number}: an empty answer is in every answer; leave it out")
    return Turn(said.text, audio, images, said.spoken, answers)


def shown_in(text: str, cuts: Sequence[int]) -> Iterator[str | int]:
    """A turn's pieces in their order: its text as it lies between pictures, and the number of each picture."""
    begin = 0
    for number, cut in enumerate(cuts):
        if text[begin:cut]:
            yield text[begin:cut]
        yield number
        begin = cut
    if text[begin:]:
        yield text[begin:]


def several(found: str | list[str] | None) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else tuple(found or ())


def _in_words(error: ValidationError) -> Iterator[str]:
    known = ", ".join(Line.__dataclass_fields__)
    for mistake in error.errors():
        place = ".".join(map(str, mistake["loc"])) or "the line"
        unknown = mistake["type"] == "unexpected_keyword_argument"
        yield f"{place}: " + (f"unknown; expected {known}" if unknown else mistake["msg"])


def lacking(turn: Turn, manifest: Manifest) -> tuple[str, ...]:
    """What a bundle must be able to do for this turn, and is not."""
    wanted = (
        (turn.audio, manifest.audio, "listen"),
        (turn.images, manifest.image, "see"),
        (turn.spoken, manifest.speech, "speak"),
        (turn.transcribe, manifest.template.transcribe, "transcribe"),
    )
    return tuple(what for asked, able, what in wanted if asked and not able)


def refuse_unfit(turns: Sequence[Turn], manifest: Manifest) -> None:
    """EdgeOmniError that names the turns which a bundle of this kind cannot take."""
    unfit = [
        f"  {name_of(turn, number)}: needs a model that can {' and '.join(lacks)}"
        for number, turn in enumerate(turns, 1)
        if (lacks := lacking(turn, manifest))
    ]
    if unfit:
        raise EdgeOmniError(f"{manifest.family} cannot take {len(unfit)} of the turns:\n" + listed(unfit))


def name_of(turn: Turn, number: int) -> str:
    return f"{turn.suite} {turn.item}" if turn.suite else f"turn {number}"


def listed(lines: Sequence[str]) -> str:
    """The first of many mistakes, and how many more there are."""
    more = [f"  ... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join([*lines[:LISTED], *more])


_LINE = TypeAdapter(Line)
