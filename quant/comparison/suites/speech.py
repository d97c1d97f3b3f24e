"""Recordings and what is said in them: a manifest in JSON Lines or TSV, as the data sets of speech bring one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from quant.comparison.suites.prompts import write_down
from quant.comparison.suites.rows import Form, Found, Row, files_in, rows
from quant.turn import Turn

# NeMo, Common Voice, WeNet (key, wav, txt) and the folders and data sets of Hugging Face name them so.
AUDIO = ("audio", "audio_filepath", "path", "wav", "file_name", "audio_file_name", "file")
TEXT = ("text", "sentence", "transcript", "transcription", "txt")
PARTS = ("offset", "start", "start_time", "end", "end_time")  # of a recording that holds more than what is said here
SUFFIXES = (".jsonl", ".tsv", ".list", "metadata.csv", "manifest.json")
MAX_NEW = 256  # tokens: half a minute of quick speech

# They tell of the speaker, the recording or the sentence, and change nothing of what is heard or said.
HARMLESS = frozenset(
    "id key utt_id utt client_id speaker speaker_id spk spk_id chapter_id gender sex age accent accents dialect "
    "variant locale lang language lang_id lang_group_id sentence_id sentence_domain domain up_votes down_votes votes "
    "segment split subset duration num_samples sampling_rate sample_rate text_len snr source index raw_text "
    "raw_transcription normalized_text".split()
)
KNOWN = frozenset((*AUDIO, *TEXT, *PARTS, *HARMLESS))
# Without quotation: Common Voice writes a mark of it as it stands, also one that nothing closes.
TABLE = Form(quoted=False)


def read(data: Path, found: Found) -> Iterator[Turn]:
    """Paths are relative to the manifest; each recording is asked for in a user's turn."""
    for path in _manifests(data, found):
        for row in rows(path, (), found, TABLE if path.suffix == ".tsv" else Form()):
            if turn := _turn(row, found):
                yield turn


def read_transcribe(data: Path, found: Found) -> Iterator[Turn]:
    """The same, asked with the bundle's own prompt for transcription."""
    return (replace(turn, transcribe=True, text="") for turn in read(data, found))


def _manifests(data: Path, found: Found) -> list[Path]:
    """A Common Voice folder has a table for each split and more tables about them: its test.tsv is what counts."""
    test = data / "test.tsv"
    if (data / "clips").is_dir() and test.is_file():
        found.notes.append(f"{found.what}: of Common Voice's tables only test.tsv is read; name another with --data")
        return [test]
    return files_in(data, SUFFIXES, f"the suite {found.suite}")


def _turn(row: Row, found: Found) -> Turn | None:
    before = len(found.problems)
    found.refuse_unread(row, KNOWN)
    audio, text = _path(row, found), row.text(*TEXT)
    for said, names in ((audio, AUDIO), (text, TEXT)):
        if not said and len(found.problems) == before:
            found.wrong(row, f"says nothing under {' or '.join(names)}; it has {', '.join(row.fields) or 'nothing'}")
    for name in PARTS:
        if row.text(name) not in ("", "0", "0.0"):
            found.wrong(row, f"{name} is {row.text(name)}, and a part of a recording is not read; cut it out first")
    if not audio or not text:
        return None
    return Turn(
        text=write_down(text),
        audio=_beside(row.file.parent, audio),
        answers=(text,),
        metric="wer",
        item=row.text("id", "key") or audio,
        max_new=MAX_NEW,
    )


def _path(row: Row, found: Found) -> str:
    """The recording's path; a data set of Hugging Face has it in an object, beside what was decoded from it."""
    held = row.fields.get("audio")
    if not isinstance(held, dict):
        return row.text(*AUDIO)
    path = str(held.get("path") or "").strip() or row.text(*AUDIO[1:])
    if not path:
        found.wrong(row, f"audio holds {', '.join(held) or 'nothing'} and no path; write the recording to a file")
    return path


def _beside(folder: Path, name: str) -> Path:
    """Where a recording lies: beside the manifest, or as in Common Voice in clips/ beside it."""
    places = (folder / name, folder / "clips" / name)
    return next((place for place in places if place.is_file()), places[0])
