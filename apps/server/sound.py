"""Speech as bytes of a format, whole or as it comes."""

import io
from struct import pack
from typing import Literal

import numpy as np
import soundfile

from runtime.audio import Wave, pcm16

Format = Literal["wav", "pcm16", "flac", "opus", "mp3"]
KINDS: dict[Format, str] = {
    "wav": "audio/wav",
    "pcm16": "audio/pcm",
    "flac": "audio/flac",
    "opus": "audio/ogg",
    "mp3": "audio/mpeg",
}
CODECS: dict[str, tuple[str, str]] = {
    "flac": ("FLAC", "PCM_16"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}  # libsndfile's names
UNKNOWN = 0xFFFFFFFF  # a length that is not known yet, in a WAV header
QUIET = 0.1  # seconds behind the end of what Opus encodes, without which a loud end clicks


def whole(wave: Wave, rate: int, kind: Format) -> bytes:
    """A wave [n] as a file, lengths in its header included; raw samples for pcm16."""
    samples = pcm16(wave)
    if kind in CODECS:
        file = io.BytesIO()
        with _codec(file, rate, kind) as codec:
            codec.write(samples)
            _end(codec, kind)
        return file.getvalue()
    content = samples.astype("<i2").tobytes()
    return content if kind == "pcm16" else wav_header(rate, len(content)) + content


class Encoder:
    """Waves [n] at `rate` in, bytes out as soon as the format has them; `finish` gives the rest."""

    def __init__(self, kind: Format, rate: int):
        self._kind: Format = kind
        self._file, self._sent = io.BytesIO(), 0
        self._codec = _codec(self._file, rate, kind) if kind in CODECS else None
        if kind == "wav":
            self._file.write(wav_header(rate, UNKNOWN))

    def push(self, wave: Wave) -> bytes:
        if self._codec is not None:
            self._codec.write(pcm16(wave))
        else:
            self._file.write(pcm16(wave).astype("<i2").tobytes())
        return self._grown()

    def finish(self) -> bytes:
        if self._codec is not None:
            _end(self._codec, self._kind)
            self._codec.close()
        return self._grown()

    def _grown(self) -> bytes:
        """What has been added. Lengths that a codec writes into its beginning at the end are lost; none needs them."""
        new = bytes(self._file.getbuffer()[self._sent :])
        self._sent += len(new)
        return new


def _codec(file: io.BytesIO, rate: int, kind: Format) -> soundfile.SoundFile:
    container, subtype = CODECS[kind]
    if kind != "mp3":
        return soundfile.SoundFile(file, "w", rate, 1, subtype, format=container)
    # Readers guess the length of a streamed MP3 file from its first frame, so that all must be alike; soundfile heeds
    # the mode only beside a level.
    how = {"compression_level": 0.5, "bitrate_mode": "CONSTANT"}
    return soundfile.SoundFile(file, "w", rate, 1, subtype, format=container, **how)


def _end(codec: soundfile.SoundFile, kind: Format) -> None:
    if kind == "opus":
        codec.write(np.zeros(int(QUIET * codec.samplerate), np.int16))


def wav_header(rate: int, nbytes: int) -> bytes:
    """Of 16-bit samples of one channel."""
    shape = pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    return b"RIFF" + pack("<I", min(nbytes + 36, UNKNOWN)) + b"WAVEfmt " + shape + b"data" + pack("<I", nbytes)
