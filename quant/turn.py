"""Turns to try a bundle on: one JSON object a line, in a file of one's own or the one that comes along."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from runtime.bundle import Manifest
from runtime.errors import EdgeOmniError

DEFAULT = Path(__file__).parent / "turns" / "default.jsonl"


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Line:
    """What a line of the file may say; paths are relative to the file, `answer` is one text or several."""

    text: str = ""
    audio: str | None = None
    image: str | None = None
    spoken: bool = False
    answer: str | list[str] | None = None


@dataclass(frozen=True)
class Turn:
    """What a user says and shows, whether the answer shall be heard, and texts of which a right answer holds one."""

    text: str
    audio: Path | None = None
    image: Path | None = None
    spoken: bool = False
    answers: tuple[str, ...] = ()


def read_turns(path: Path) -> tuple[Turn, ...]:
    """The turns of a JSON Lines file; EdgeOmniError says everything that is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeOmniError(f"the turns {path} cannot be read: {error}") from None
    problems: list[str] = []
    turns = [_turn(path, number, line, problems) for number, line in enumerate(lines, 1) if line.strip()]
    if not turns:
        problems.append('  no turn in it; expected lines like {"text": "What is a tram?"}')
    if problems:
        raise EdgeOmniError(f"the turns {path} cannot be used:\n" + "\n".join(problems))
    return tuple(turn for turn in turns if turn is not None)


def _turn(path: Path, number: int, line: str, problems: list[str]) -> Turn | None:
    try:
        said = _LINE.validate_json(line)
    except ValidationError as error:
        problems.extend(f"  line {number}: {problem}" for problem in _in_words(error))
        return None
    audio, image = (None if name is None else path.parent / name for name in (said.audio, said.image))
    media = [file for file in (audio, image) if file is not None]
    problems.extend(f"  line {number}: there is no file {file}" for file in media if not file.is_file())
    if not said.text.strip() and not media:
        problems.append(f"  line {number}: empty; give it a text, an audio or an image")
    answers = (said.answer,) if isinstance(said.answer, str) else tuple(said.answer or ())
    if not all(answer.strip() for answer in answers):
        problems.append(f"  line {number}: an empty answer is in every answer; leave it out")
    return Turn(said.text, audio, image, said.spoken, answers)


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
        (turn.image, manifest.image, "see"),
        (turn.spoken, manifest.speech, "speak"),
    )
    return tuple(what for asked, able, what in wanted if asked and not able)


def refuse_unfit(turns: Sequence[Turn], manifest: Manifest) -> None:
    """EdgeOmniError that names all turns which a bundle of this kind cannot take."""
    found = [(number, lacking(turn, manifest)) for number, turn in enumerate(turns, 1)]
    problems = [f"  turn {number}: needs a model that can {' and '.join(lacks)}" for number, lacks in found if lacks]
    if problems:
        raise EdgeOmniError(f"{manifest.family} cannot take {len(problems)} of the turns:\n" + "\n".join(problems[:20]))


_LINE = TypeAdapter(Line)
