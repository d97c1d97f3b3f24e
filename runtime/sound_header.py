"""Sound files whose headers say less than they hold: recordings cut off or sent as a stream, joined files, some MP3."""

import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from struct import pack, unpack_from

READ = "wav, flac, mp3 or ogg"  # what is spoken of; libsndfile knows some more
UNREAD = {
    rb"....ftyp": "an mp4 or m4a file",
    rb"\x1aE\xdf\xa3": "a webm or mkv file",
    rb"\xff[\xf0\xf1\xf8\xf9]": "raw AAC",
    rb"0&\xb2u": "a wma file",
    rb"#!AMR": "an AMR file",
    rb"FLV\x01": "an flv file",
    rb"wvpk": "a WavPack file",
    rb"MAC ": "a Monkey's Audio file",
    rb"RIFF....AVI ": "an avi file",
}  # how what libsndfile does not read begins -> what it is
AT_ONCE = 1 << 16  # bytes that are looked at for the chunks of a WAV file
LONGEST = 1 << 29  # bytes that are searched for what they hold; that is some hours
NO_MP3 = (b"FORM", b".snd", b"caff", b"riff")  # other kinds that libsndfile reads under any name
TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN")  # what may follow the last frame
UNKNOWN = 0xFFFFFFFF  # of a size, up to the end of the file

# kbit/s of MPEG-1 and MPEG-2 by layer, 1 to 3
RATES_1 = (
    (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
RATES_2 = (
    (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    *((8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),) * 2,
)
HERTZ = (44100, 48000, 32000)  # of MPEG-1; MPEG-2 has halves, 2.5 quarters


@dataclass(frozen=True)
class Mp3Frame:
    """Its kind, which is the same for all frames of a stream: version bits, layer and rate; its length in bytes."""

    kind: tuple[int, int, int]
    length: int


Source = Path | io.BytesIO  # a file, or what would be its content


def whole_sound(path: Source) -> list[Source]:
    """The file, or its content under a header that tells of all of it; in parts where several were joined.

    OSError where it cannot be read.
    """
    beginning = _beginning(path, AT_ONCE)
    if beginning[:4] in (b"RIFF", b"RF64") and beginning[8:12] == b"WAVE":
        return [_whole_wav(path, beginning)]
    if beginning[:4] == b"fLaC" and len(beginning) >= 42 and not _flac_total(beginning):
        return [_counted_flac(path)]
    if beginning[:4] == b"OggS":
        return _ogg_streams(path)
    if beginning[:3] == b"ID3" or mp3_frame(beginning, 0) is not None or _is_called_mp3(path):
        return [_whole_mp3(path)]
    return [path]


def unread_kind(path: Source) -> str | None:
    """What a file is that libsndfile does not read; None where it may."""
    beginning = _beginning(path, 64)
    found = (name for pattern, name in UNREAD.items() if re.match(pattern, beginning, re.DOTALL))
    return next(found, None)


def _beginning(path: Source, count: int) -> bytes:
    if isinstance(path, io.BytesIO):
        return bytes(path.getbuffer()[:count])
    with path.open("rb") as file:
        return file.read(count)


def _content(path: Source) -> bytes:
    return path.getvalue() if isinstance(path, io.BytesIO) else path.read_bytes()


def _length(path: Source) -> int:
    return len(path.getbuffer()) if isinstance(path, io.BytesIO) else path.stat().st_size


def _is_called_mp3(path: Source) -> bool:
    return isinstance(path, Path) and path.suffix.lower() == ".mp3"


def conversion(path: str | Path) -> str:
    """The command that makes a WAV file beside this very file."""
    source = Path(path)
    name = f"{source.stem}.wav" if source.suffix.lower() != ".wav" else f"{source.stem}-converted.wav"
    spelled = [shlex.quote(f"./{p}" if str(p).startswith("-") else str(p)) for p in (source, source.with_name(name))]
    return f"ffmpeg -i {spelled[0]} {spelled[1]}"


# WAV: sizes are written when a recording ends, and stay 0 where it never did.


def _whole_wav(path: Source, beginning: bytes) -> Source:
    at = 12
    while at + 8 <= len(beginning):
        kind, size = beginning[at : at + 4], int.from_bytes(beginning[at + 4 : at + 8], "little")
        if kind == b"data":
            if size or _length(path) <= at + 8:
                return path
            content = bytearray(_content(path))
            content[4:8], content[at + 4 : at + 8] = _size(len(content) - 8), _size(len(content) - at - 8)
            return io.BytesIO(content)
        at += 8 + size + size % 2
    return path


def _size(count: int) -> bytes:
    return min(count, UNKNOWN).to_bytes(4, "little")


# FLAC: what comes through a pipe states 0 samples; its last frame knows how many came before.


def _flac_total(content: bytes) -> int:
    return int.from_bytes(content[21:26], "big") & (1 << 36) - 1


def _counted_flac(path: Source) -> Source:
    content = bytearray(_content(path))
    at = len(content)
    while (at := content.rfind(b"\xff", 42, at)) >= 0:
        total = _samples_until(content, at)
        if total:
            content[21:26] = (int.from_bytes(content[21:26], "big") | total).to_bytes(5, "big")
            return io.BytesIO(content)
    return path


def _samples_until(content: bytearray, at: int) -> int:
    """Samples up to the end of the FLAC frame that begins there; 0 where none does."""
    if at + 6 > len(content) or content[at + 1] & 0xFE != 0xF8:
        return 0
    ones = 8 - (content[at + 4] ^ 0xFF).bit_length()  # as in UTF-8: how many bytes the number takes
    code, end = content[at + 2] >> 4, at + 4 + max(1, ones)
    if ones in (1, 8) or code == 0:
        return 0
    number = content[at + 4] & (0x7F >> ones)
    for byte in content[at + 5 : end]:
        number = number << 6 | byte & 63
    stated = {6: 1, 7: 2}.get(code, 0)
    powers = 192 if code == 1 else 576 << (code - 2) if code < 6 else 256 << max(0, code - 8)
    block = int.from_bytes(content[end : end + stated], "big") + 1 if stated else powers
    end += stated + {12: 1, 13: 2, 14: 2}.get(content[at + 2] & 15, 0)
    if end >= len(content) or _crc8(content[at:end]) != content[end]:
        return 0
    each = 1 if content[at + 1] & 1 else int.from_bytes(content[8:10], "big")  # the number counts samples, or frames
    return number * each + block


def _crc8(content: bytearray) -> int:
    check = 0
    for byte in content:
        check ^= byte
        for _ in range(8):
            check = (check << 1 ^ (0x07 if check & 0x80 else 0)) & 0xFF
    return check


# Ogg: files may be put one after the other; libsndfile reads the first.


def _ogg_streams(path: Source) -> list[Source]:
    if _length(path) > LONGEST:
        return [path]
    content = _content(path)
    starts = _ogg_starts(content)
    if len(starts) < 2:
        return [path]
    return [io.BytesIO(content[start:end]) for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]


def _ogg_starts(content: bytes) -> list[int]:
    """Where a stream begins after pages of sound; several that begin at once are one."""
    starts, at, begun = [0], 0, True
    while content[at : at + 4] == b"OggS" and at + 27 <= len(content):
        begins, segments = bool(content[at + 5] & 2), content[at + 26]
        if begins and not begun:
            starts.append(at)
        begun = begins
        at += 27 + segments + sum(content[at + 27 : at + 27 + segments])
    return starts


# MP3: a file has no length of its own; one is guessed from the first frame, or told by a Xing header in its place.


def _whole_mp3(path: Source) -> Source:
    if _length(path) > LONGEST:
        return path
    content = _content(path)
    ranges, lengths = _mp3_frames(content)
    if not ranges:
        if content.startswith(NO_MP3) or mp3_frame(content, _after_tags(content)) is not None:  # layer 1 or 2
            return path
        raise ValueError("no frame of sound")  # mpg123 would search, and print what it meets
    told = _told_frames(content, ranges[0][0])
    first = ranges[0][0] + (lengths[0] if told is not None else 0)
    frames = len(lengths) - (told is not None)
    varies = max(lengths) - min(lengths) > 4  # the padding of layer 1
    if len(ranges) == 1 and (abs(frames - told) <= 1 if told is not None else not varies):
        start, end = ranges[0]
        tagged = content[end:].startswith(TAGS)
        return path if tagged or end == len(content) else io.BytesIO(_ended(content, start, end))
    pieces = [content[first : ranges[0][1]], *(content[start:end] for start, end in ranges[1:])]
    return io.BytesIO(_xing(content[first : first + 4], frames) + b"".join(pieces))


def mp3_frame(content: bytes, at: int) -> Mp3Frame | None:
    """The frame whose header stands there, if one does; None also for a free bit rate."""
    if at + 4 > len(content) or content[at] != 0xFF or content[at + 1] < 0xE0:
        return None
    version, layer = content[at + 1] >> 3 & 3, 4 - (content[at + 1] >> 1 & 3)
    rate, hertz, padding = content[at + 2] >> 4, content[at + 2] >> 2 & 3, content[at + 2] >> 1 & 1
    if version == 1 or layer == 4 or rate in (0, 15) or hertz == 3:
        return None
    bits = 1000 * (RATES_1 if version == 3 else RATES_2)[layer - 1][rate - 1]
    samples_a_second = HERTZ[hertz] >> (0 if version == 3 else 1 if version == 2 else 2)
    if layer == 1:
        return Mp3Frame((version, layer, hertz), (12 * bits // samples_a_second + padding) * 4)
    slots = 72 if layer == 3 and version != 3 else 144
    return Mp3Frame((version, layer, hertz), slots * bits // samples_a_second + padding)


def _mp3_frames(content: bytes) -> tuple[list[tuple[int, int]], list[int]]:
    """Where frames of layer 3 follow each other without a gap, and the length of each."""
    ranges: list[tuple[int, int]] = []
    lengths: list[int] = []
    at, kind = _after_tags(content), None
    while (start := _next_pair(content, at, kind)) is not None:
        at = start
        while (frame := mp3_frame(content, at)) is not None and at + frame.length <= len(content):
            if kind not in (None, frame.kind):
                break
            kind = frame.kind
            lengths.append(frame.length)
            at += frame.length
        ranges.append((start, at))
    return ranges, lengths


def _after_tags(content: bytes) -> int:
    at = 0
    while content[at : at + 3] == b"ID3" and len(content) >= at + 10:
        size = 0
        for byte in content[at + 6 : at + 10]:
            size = size << 7 | byte & 127
        at += 10 + size
    return at


def _next_pair(content: bytes, at: int, kind: tuple[int, int, int] | None) -> int | None:
    """Where two frames of layer 3 (and of the kind, if there is one) begin that follow each other."""
    while (at := content.find(b"\xff", at)) >= 0:
        frame = mp3_frame(content, at)
        if frame is not None and frame.kind[1] == 3 and kind in (None, frame.kind):
            following = mp3_frame(content, at + frame.length)
            if following is not None and following.kind == frame.kind:
                return at
        at += 1
    return None


def _info_at(header: bytes) -> int:
    """Where in the frame of this header a Xing header stands: after the side information."""
    mono, first = header[3] >> 6 == 3, header[1] >> 3 & 3 == 3
    return 4 + ((17 if mono else 32) if first else (9 if mono else 17))


def _told_frames(content: bytes, at: int) -> int | None:
    """How many frames follow, as the first one tells; None where it is a frame of sound."""
    info = at + _info_at(content[at : at + 4])
    if content[info : info + 4] in (b"Xing", b"Info"):
        has_count = content[info + 7] & 1
        return unpack_from(">I", content, info + 8)[0] if has_count else 0
    if content[at + 36 : at + 40] == b"VBRI":
        return unpack_from(">I", content, at + 50)[0]
    return None


def _ended(content: bytes, start: int, end: int) -> bytes:
    """The content up to `end`, with a Xing header that tells so where it tells of bytes."""
    ended, info = bytearray(content[:end]), start + _info_at(content[start : start + 4])
    if ended[info : info + 4] in (b"Xing", b"Info") and ended[info + 7] & 3 == 3:
        ended[info + 12 : info + 16] = pack(">I", end - start)
    return bytes(ended)


def _xing(header: bytes, frames: int) -> bytes:
    """A frame without sound that tells how many follow."""
    rate = 9 if header[1] >> 3 & 3 == 3 else 8  # 128 or 64 kbit/s: room for what it tells
    plain = bytes((0xFF, header[1] | 1, rate << 4 | header[2] & 0x0C, header[3]))
    frame = mp3_frame(plain, 0)
    assert frame is not None
    told = plain.ljust(_info_at(plain), b"\0") + b"Xing" + pack(">II", 1, frames)
    return told.ljust(frame.length, b"\0")
