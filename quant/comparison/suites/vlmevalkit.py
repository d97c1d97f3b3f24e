"""VLMEvalKit's tables of questions about pictures: TSV with base64 or paths, options A, B, C, ..., and the answer."""

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from quant.comparison.suites.prompts import lettered
from quant.comparison.suites.rows import Found, Row, files_in, rows
from quant.media import Embedded, Media, pictures
from quant.turn import Turn

MAX_NEW = 64
REFERENCE = 64  # characters: what is no longer is not a picture but the index of the row that has it
CIRCULAR = 1_000_000  # rows whose index differs by it are one question with its options moved on, ...
ROTATED = ("mmbench", "ccbench", "circular", "mmcr")  # ... in tables of these names
GROUPS = ("l2-category", "category", "dataset", "source", "modality", "split")
# Told of a question, its picture or its answer, and shown to no model.
HARMLESS = frozenset(
    "id comment l2_category l3-category bench meta_info topic topic_difficulty subfield img_type question_type type "
    "subject skill grade explanation solution lecture task_type answer_type language origin data_id data_type "
    "difficulty capability department image_source original_index clue_path anatomy".split()
)
KNOWN = frozenset(
    ("index", "g_index", "question", "hint", "answer", "image", "image_path", *ascii_uppercase, *GROUPS, *HARMLESS)
)
_PLACE = re.compile(r"<image (\d+)>")

Place = tuple[int, int]  # bytes before the row, how many pictures it holds


def read(data: Path, found: Found) -> Iterator[Turn]:
    """Every row of a table, or of all in a folder, each table with a score of its own."""
    for path in files_in(data, (".tsv",), f"the suite {found.suite}"):
        yield from _table(path, found)


def read_medical(data: Path, found: Found) -> Iterator[Turn]:
    """OpenMM-Medical: OpenMMMedical.tsv, and the pictures of Images.zip, unpacked beside it."""
    table = data / "OpenMMMedical.tsv"
    return read(table if table.is_file() else data, found)


def _table(path: Path, found: Found) -> Iterator[Turn]:
    """Pictures are looked up once the whole table has been seen, since a row may name a later one's."""
    read: list[tuple[Row, str]] = []
    places: dict[str, Place] = {}
    left_out = 0
    for row in rows(path, ("index", "question", "answer"), found):
        found.refuse_unread(row, KNOWN)
        shown = str(row.fields.pop("image", "") or "")
        if len(shown) > REFERENCE:
            _check(row, shown, found)
            places[row.text("index")] = (row.offset, len(pictures(shown)))
            shown = row.text("index")
        if "image" in row.columns and not _said(shown) and not _told(row, "image_path"):
            left_out += 1  # as VLMEvalKit does
        else:
            read.append((row, _said(shown)))
    if left_out:
        found.notes.append(f"{path.name}: {left_out} of {left_out + len(read)} rows have no picture and are left out")
    yield from (turn for row, shown in read if (turn := _turn(row, shown, places, found)))


def _said(text: str) -> str:
    """A field's text; "nan" is what pandas writes for an empty one."""
    return "" if text.strip().casefold() == "nan" else text.strip()


def _told(row: Row, *names: str) -> str:
    return next(filter(None, (_said(row.text(name)) for name in names)), "")


def _check(row: Row, shown: str, found: Found) -> None:
    try:
        for picture in pictures(shown):
            base64.b64decode(picture[:64], validate=True)
    except binascii.Error as error:
        found.wrong(row, f"image is no base64 ({error})")


def _turn(row: Row, shown: str, places: dict[str, Place], found: Found) -> Turn | None:
    if found.lacks(row, "question", "answer"):
        return None
    options, answer = _options(row), row.text("answer")
    is_open = not any(options) and "A" in row.columns and (len(answer) > 1 or answer not in ascii_uppercase)
    letters = [letter for letter, option in zip(ascii_uppercase, options, strict=False) if option]
    if not is_open and answer not in letters:
        found.wrong(row, f"answer is {answer!r}, and the options are {', '.join(letters) or 'none'}")
        return None
    images = _images(row, shown, places)
    if not images:
        found.wrong(row, "has no picture; expected base64 or an index under image, or paths under image_path")
    laid = _laid_out(_prompt(row, options), len(images))
    if outside := [number + 1 for number in laid.numbers if number not in range(len(images))]:
        found.wrong(row, f"asks about <image {outside[0]}>, and has {len(images)} pictures")
        return None
    return Turn(
        text=laid.text,
        images=tuple(images[number] for number in laid.numbers),
        cuts=laid.cuts,
        answers=tuple(pictures(answer)) if is_open else (answer,),
        metric="contains" if is_open else "option",
        choices=options,
        suite=row.file.stem,
        item=_item(row),
        group=_told(row, *GROUPS),
        max_new=MAX_NEW,
    )


def _options(row: Row) -> tuple[str, ...]:
    """Their texts by letter; "" where a letter before the last is left out."""
    texts = [_told(row, letter) for letter in ascii_uppercase]
    return tuple(texts[: max((place + 1 for place, text in enumerate(texts) if text), default=0)])


def _item(row: Row) -> str:
    """What rows that ask one question in other orders have in common."""
    index, together = row.text("index"), _told(row, "g_index")
    circular = row.file.stem.lower()
    if together:
        return together
    return str(int(index) % CIRCULAR) if any(map(circular.__contains__, ROTATED)) and index.isdecimal() else index


@dataclass(frozen=True)
class LaidOut:
    """A prompt without the marks of its pictures, which picture is shown at each, and where: as in `Turn`."""

    text: str
    numbers: Sequence[int]
    cuts: tuple[int, ...] = ()


def _laid_out(prompt: str, count: int) -> LaidOut:
    """Pictures stand where MMMU's `<image n>` does, also in options, and others are not shown; else before the text."""
    pieces = _PLACE.split(prompt)
    if len(pieces) == 1:
        return LaidOut(prompt, range(count))
    texts, numbers = pieces[::2], [int(number) - 1 for number in pieces[1::2]]
    cuts = tuple(len("".join(texts[: place + 1])) for place in range(len(numbers)))
    return LaidOut("".join(texts), numbers, cuts)


def _images(row: Row, shown: str, places: dict[str, Place]) -> tuple[Media, ...]:
    """The pictures of the row whose index is `shown`, its own perhaps, or the files that it names."""
    place = places.get(shown)
    if place is not None:
        offset, count = place
        return tuple(Embedded(row.file, offset, row.columns.index("image"), number) for number in range(count))
    names = pictures(_told(row, "image_path"))
    return tuple(_found(row.file, name) for name in names if name)


def _found(table: Path, name: str) -> Path:
    """Where a picture lies: beside the table or in one of the folders that archives unpack to."""
    folders = ("", "Images", "images", f"images/{table.stem}")
    places = [table.parent / folder / name for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def _prompt(row: Row, options: Sequence[str]) -> str:
    """The prompt of ImageMCQDataset (vlmeval/dataset/image_mcq.py)."""
    hint = _told(row, "hint")
    asked = f"Hint: {hint}\n" if hint else ""
    asked += f"Question: {row.text('question')}\n"
    choose = "Please select the correct answer from the options above. \n"
    return f"{asked}Options:\n{lettered(options)}\n{choose}" if options else asked
