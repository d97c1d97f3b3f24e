"""What a video file says of itself and OpenCV does not pass on: how long the picture lasts, mirroring, lost bytes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import error as StructError
from struct import unpack
from typing import BinaryIO

Matrix = tuple[int, int, int, int]  # a, b, c, d: a stored point (x, y) is shown at (a x + c y, b x + d y)

MP4_BEGINS = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"}
EBML, SEGMENT = 0x1A45DFA3, 0x18538067
MATROSKA_SOUND = re.compile(rb"\x86.A_(OPUS|VORBIS|AAC|MPEG|AC3|EAC3|FLAC|PCM)", re.DOTALL)  # CodecID of a track
AVI_SOUND = re.compile(rb"strh....auds", re.DOTALL)
TRACKS_TOLD = 1 << 16  # bytes
MOST_BOXES = 100_000  # of a file; more are made to keep a reader busy


@dataclass(frozen=True)
class Container:
    """`seconds`: of the picture alone, None where the file does not say. `matrix`: signs only, None if it is upright.

    `counts`: its number of frames is of the picture; elsewhere it is guessed from the length of the whole file.
    `cut`: the file is shorter than it says. `sound`: there is a track of sound, too.
    """

    seconds: float | None = None
    matrix: Matrix | None = None
    counts: bool = False
    cut: bool = False
    sound: bool = False


def read_container(path: Path) -> Container:
    """What the file's own headers say; nothing where they are of another kind, or broken. OSError: not readable."""
    with path.open("rb") as file:
        size = path.stat().st_size
        beginning = file.read(12)
        try:
            if beginning[4:8] in MP4_BEGINS:
                return _mp4(file, size)
            if beginning[:4] == EBML.to_bytes(4, "big"):
                return Container(cut=_matroska_end(file, size) > size, sound=_names(file, MATROSKA_SOUND))
        except (StructError, ValueError, IndexError, OverflowError):
            return Container()
        riff = beginning[:4] == b"RIFF"
        return Container(counts=riff, sound=riff and _names(file, AVI_SOUND))


def _mp4(file: BinaryIO, size: int) -> Container:
    tracks, scale, cut, sound = [], 0, False, False
    for kind, start, end in _boxes(file, 0, size):
        cut |= kind in (b"mdat", b"moov", b"moof") and end > size
        if kind == b"moov":
            inside = list(_boxes(file, start, end))
            scale = next((_header(file, at)[0] for name, at, _ in inside if name == b"mvhd"), 0)
            places = [(at, until) for name, at, until in inside if name == b"trak"]
            tracks = [_track(file, at, until, scale) for at, until in places]
            sound = any(_kind(file, at, until) == b"soun" for at, until in places)
    seconds, matrix = next((track for track in tracks if track is not None), (None, None))
    return Container(seconds, matrix, counts=True, cut=cut, sound=sound)


def _names(file: BinaryIO, pattern: re.Pattern[bytes]) -> bool:
    """Whether what tells of the tracks, near the beginning, holds this."""
    file.seek(0)
    return pattern.search(file.read(TRACKS_TOLD)) is not None


def _kind(file: BinaryIO, start: int, end: int) -> bytes:
    """What a track of an mp4 file holds: b"vide", b"soun" or others."""
    media = next(((at, until) for kind, at, until in _boxes(file, start, end) if kind == b"mdia"), (end, end))
    handler = next((at for kind, at, _ in _boxes(file, *media) if kind == b"hdlr"), None)
    return b"" if handler is None else _read(file, handler + 8, 4)


def _track(file: BinaryIO, start: int, end: int, scale: int) -> tuple[float | None, Matrix | None] | None:
    """Length and matrix of a video track; None for another kind of track."""
    boxes = {kind: (at, until) for kind, at, until in _boxes(file, start, end)}
    media = {kind: at for kind, at, _ in _boxes(file, *boxes.get(b"mdia", (end, end)))}
    if b"tkhd" not in boxes or _kind(file, start, end) != b"vide":
        return None
    at = boxes[b"tkhd"][0]
    wide = _read(file, at, 1) == b"\x01"
    shown = unpack(">Q", _read(file, at + 28, 8))[0] if wide else unpack(">I", _read(file, at + 20, 4))[0]
    a, b, _, c, d = unpack(">5i", _read(file, at + (52 if wide else 40), 20))
    lengths = [(shown, scale), _header(file, media[b"mdhd"])[::-1]] if b"mdhd" in media else [(shown, scale)]
    # An edit list shows a part of what is stored; a careless writer states the length of the whole film.
    known = [length / units for length, units in lengths if units and 0 < length < (2**64 if wide else 2**32) - 1]
    signs = (_sign(a), _sign(b), _sign(c), _sign(d))
    return (min(known) if known else None), (None if signs == (1, 0, 0, 1) else signs)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _header(file: BinaryIO, at: int) -> tuple[int, int]:
    """Units a second and length in them, of an mvhd or mdhd box."""
    if _read(file, at, 1) == b"\x01":
        return unpack(">IQ", _read(file, at + 20, 12))
    return unpack(">II", _read(file, at + 12, 8))


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of what each box between two places holds; the last may end after the file does."""
    for _ in range(MOST_BOXES):
        if start + 8 > end:
            return
        size, kind = unpack(">I4s", _read(file, start, 8))
        inside = start + 8
        if size == 1:
            size, inside = unpack(">Q", _read(file, start + 8, 8))[0], start + 16
        elif size == 0:  # up to the end
            size = end - start
        if size < inside - start:
            return
        yield kind, inside, start + size
        start += size


def _matroska_end(file: BinaryIO, size: int) -> int:
    """Where the file says that it ends; 0 where it leaves that open, as live recordings do."""
    at = 0
    for _ in range(2):
        head = _read(file, at, min(12, size - at))
        name = int.from_bytes(head[:4], "big")
        length, places = _variable(head[4:])
        at += 4 + places + length
        if name == SEGMENT:
            return 0 if length == 2 ** (7 * places) - 1 else at
    return 0


def _variable(content: bytes) -> tuple[int, int]:
    """A number of EBML and how many bytes it takes: the zeros before its first bit say that."""
    places = 9 - content[0].bit_length()
    return int.from_bytes(content[:places], "big") & (2 ** (7 * places) - 1), places


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    content = file.read(count)
    if len(content) < count:
        raise ValueError("the file ends here")
    return content
