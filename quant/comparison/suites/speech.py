"""Recordings and what is said in them: a manifest in JSON Lines or TSV."""

from dataclasses import replace
from pathlib import Path

from quant.comparison.suites.prompts import write_down
from quant.comparison.suites.rows import Found, Row, files_in, rows
from quant.turn import Turn

AUDIO = ("audio", "audio_filepath", "path", "wav")
TEXT = ("text", "sentence", "transcript")
MAX_NEW = 256  # tokens: half a minute of quick speech


def read(data: Path) -> tuple[Turn, ...]:
    """Paths are relative to the manifest; each recording is asked for in a user's turn."""
    found, turns = Found(f"the suite asr at {data}"), []
    for path in files_in(data, (".jsonl", ".tsv"), "the suite asr"):
        turns += [turn for row in rows(path, (), found) if (turn := _turn(row, found))]
    found.refuse()
    return tuple(turns)


def read_transcribe(data: Path) -> tuple[Turn, ...]:
    """The same, asked with the bundle's own prompt for transcription."""
    return tuple(replace(turn, transcribe=True, text="") for turn in read(data))


def _turn(row: Row, found: Found) -> Turn | None:
    audio, text = row.text(*AUDIO), row.text(*TEXT)
    for said, names in ((audio, AUDIO), (text, TEXT)):
        if not said:
            found.wrong(row, f"says nothing under {' or '.join(names)}; it has {', '.join(row.fields) or 'nothing'}")
    if not audio or not text:
        return None
    return Turn(
        text=write_down(text),
        audio=row.file.parent / audio,
        answers=(text,),
        metric="wer",
        item=row.text("id") or audio,
        max_new=MAX_NEW,
    )
