"""A waveform into a file, in the format that the file's name ends in."""

from pathlib import Path

import soundfile

from runtime.audio import Wave, pcm16, write_wav
from runtime.errors import EdgeOmniError, MediaError

WRITTEN = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}  # the ending of a file -> libsndfile's names of its kind and coding


def writable() -> list[str]:
    """The endings of the files that this system's libsndfile writes."""
    known = soundfile.available_formats()
    return [
        ending
        for ending, (kind, coding) in WRITTEN.items()
        if kind in known and coding in soundfile.available_subtypes(kind)
    ]


def refuse_format(path: Path) -> None:
    """EdgeOmniError unless `write_audio` writes files that end as this name does."""
    if path.suffix.lower() not in writable():
        raise EdgeOmniError(f"speech cannot be written as {path}; give a name that ends in {', '.join(writable())}")


def write_audio(path: Path, wave: Wave, rate: int) -> None:
    """Write a mono wave [n] at `rate` Hz. EdgeOmniError for other formats; MediaError where it cannot be written."""
    refuse_format(path)
    kind, coding = WRITTEN[path.suffix.lower()]
    if kind == "WAV":
        return write_wav(path, wave, rate)
    try:
        return soundfile.write(path, pcm16(wave), rate, subtype=coding, format=kind)
    except (soundfile.SoundFileError, OSError) as error:
        raise MediaError(f"{path} cannot be written ({error}); check that its folder exists") from None
