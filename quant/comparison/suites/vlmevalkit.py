"""VLMEvalKit's tables of questions about pictures: TSV with base64 or paths, options A, B, C, ..., and the answer."""

import base64
import binascii
from pathlib import Path
from string import ascii_uppercase

from quant.comparison.suites.prompts import lettered
from quant.comparison.suites.rows import Found, Row, files_in, rows
from quant.media import Embedded, Media, pictures
from quant.turn import Turn

MAX_NEW = 64
REFERENCE = 64  # characters: what is no longer is not a picture but the index of the row that has it
CIRCULAR = 1_000_000  # MMBench and CCBench: rows that differ by it are one question with its options moved on
GROUPS = ("l2-category", "category", "dataset", "source", "modality", "split")

Place = tuple[int, int]  # bytes before the row, how many pictures it holds


def read(data: Path, suite: str = "vlmevalkit") -> tuple[Turn, ...]:
    """Every row of a table, or of all in a folder, each table with a score of its own."""
    found, turns = Found(f"the suite {suite} at {data}"), []
    for path in files_in(data, (".tsv",), f"the suite {suite}"):
        turns += _table(path, found)
    found.refuse()
    return tuple(turns)


def read_medical(data: Path) -> tuple[Turn, ...]:
    """OpenMM-Medical: OpenMMMedical.tsv, and the pictures of Images.zip, unpacked beside it."""
    table = data / "OpenMMMedical.tsv"
    return read(table if table.is_file() else data, "openmm-medical")


def _table(path: Path, found: Found) -> list[Turn]:
    """Pictures are looked up once the whole table has been seen, since a row may name a later one's."""
    read, places = [], {}
    for row in rows(path, ("index", "question", "answer"), found):
        shown = str(row.fields.pop("image", "") or "")
        if len(shown) > REFERENCE:
            _check(row, shown, found)
            places[row.text("index")] = (row.offset, len(pictures(shown)))
            shown = row.text("index")
        read.append((row, shown))
    circular = path.stem.lower().startswith(("mmbench", "ccbench"))
    return [turn for row, shown in read if (turn := _turn(row, shown, places, circular, found))]


def _check(row: Row, shown: str, found: Found) -> None:
    try:
        for picture in pictures(shown):
            base64.b64decode(picture[:64], validate=True)
    except binascii.Error as error:
        found.wrong(row, f"image is no base64 ({error})")


def _turn(row: Row, shown: str, places: dict[str, Place], circular: bool, found: Found) -> Turn | None:
    options = {letter: text for letter in ascii_uppercase if (text := row.text(letter))}
    if found.lacks(row, "question", "answer"):
        return None
    if list(options) != list(ascii_uppercase[: len(options)]) or row.text("answer") not in options:
        found.wrong(row, f"answer is {row.text('answer')!r}, and the options are {', '.join(options) or 'none'}")
        return None
    images = _images(row, shown, places)
    if not images:
        found.wrong(row, "has no picture; expected base64 or an index under image, or paths under image_path")
    index = row.text("index")
    return Turn(
        text=_prompt(row, options),
        images=images,
        answers=(row.text("answer"),),
        metric="option",
        choices=tuple(options.values()),
        suite=row.file.stem,
        item=str(int(index) % CIRCULAR) if circular and index.isdecimal() else index,
        group=row.text(*GROUPS),
        max_new=MAX_NEW,
    )


def _images(row: Row, shown: str, places: dict[str, Place]) -> tuple[Media, ...]:
    """The pictures of the row whose index is `shown`, its own perhaps, or the files that it names."""
    place = places.get(shown)
    if place is not None:
        offset, count = place
        return tuple(Embedded(row.file, offset, row.columns.index("image"), number) for number in range(count))
    names = pictures(row.text("image_path"))
    return tuple(_found(row.file, name) for name in names if name)


def _found(table: Path, name: str) -> Path:
    """Where a picture lies: beside the table or in one of the folders that archives unpack to."""
    folders = ("", "Images", "images", f"images/{table.stem}")
    places = [table.parent / folder / name for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def _prompt(row: Row, options: dict[str, str]) -> str:
    """The prompt of ImageMCQDataset (vlmeval/dataset/image_mcq.py)."""
    hint = f"Hint: {row.text('hint')}\n" if row.text("hint") else ""
    choose = "Please select the correct answer from the options above. \n"
    return f"{hint}Question: {row.text('question')}\nOptions:\n{lettered(list(options.values()))}\n{choose}"
