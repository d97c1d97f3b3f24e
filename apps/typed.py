"""What a person types or drops into the terminal: commands, paths as file managers spell them, or plain text."""

import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from runtime.errors import EdgeOmniError
from runtime.files import exists, is_file

WITH_PATHS = ("/audio", "/image", "/video")
# What follows one of the first makes it a sentence: "/quit smoking: how?"
ALONE = ("/quit", "/exit", "/help", "/reset", "/retry")
COMMANDS = (*ALONE, "/speak", "/set", "/system", "/save", "/load", *WITH_PATHS)
WORDS = ("quit", "exit")  # that leave, at a terminal


def command_of(line: str, *, strict: bool) -> tuple[str | None, str]:
    """The command that a line begins with and its argument, or None and the line where it is something to answer.

    `strict`, for a person at a terminal: a lone word that looks like a command is a mistake, and EdgeOmniError.
    """
    first, _, rest = line.replace("\t", " ", 1).partition(" ") if line.startswith("/") else (line, "", "")
    argument = rest.strip()
    if strict and line.strip() in WORDS:
        return "/quit", ""
    if first in COMMANDS and not (argument and first in ALONE):
        return first, argument
    if strict and re.fullmatch(r"/[A-Za-z]+", first) and first not in ALONE:
        raise EdgeOmniError(f"there is no command {first}; /help lists them, and a space before it makes it a text")
    return None, line


def refuse_bytes(line: str) -> None:
    """EdgeOmniError where a line holds bytes that are no text in the encoding of the input."""
    odd = next((c for c in line if "\udc80" <= c <= "\udcff"), None)
    if odd is not None:
        raise EdgeOmniError(
            f"a line holds the byte 0x{ord(odd) - 0xDC00:02X} at character {line.index(odd) + 1}, which is no text in "
            "the encoding of this input; save it as UTF-8, and set a locale (LANG) of that kind"
        )


MEDIA = {
    "/audio": (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff"),
    "/image": (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".avif"),
    "/video": (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"),
}  # the command that a file dropped into the terminal stands for
WORD = re.compile(r"""\s*((?:'[^']*'|"(?:[^"\\]|\\.)*"|\\.|[^\s'"\\])+)""", re.DOTALL)  # as a shell reads one


def dropped(line: str) -> tuple[list[tuple[str, Path]], str]:
    """The media files that a line begins with, each with the command that it stands for, and the text behind them.

    They are spelled as file managers do: in quotes, with backslashes or as file://. Only what is a file counts.
    """
    if medium := _medium(path_of(line.strip())):
        return [medium], ""
    found, rest = [], line
    while word := WORD.match(rest):
        medium = next((medium for spelled in _unquoted(word[1]) if (medium := _medium(path_of(spelled)))), None)
        if medium is None:
            break
        found.append(medium)
        rest = rest[word.end() :]
    return found, rest.strip() if found else line


def _unquoted(word: str) -> list[str]:
    try:
        return [word, *shlex.split(word)]
    except ValueError:  # a quote that is not closed is part of a name
        return [word]


def _medium(path: Path) -> tuple[str, Path] | None:
    command = next((command for command, ends in MEDIA.items() if path.suffix.lower() in ends), None)
    return (command, path) if command is not None and is_file(path) else None


def paths_of(argument: str) -> list[Path]:
    """The paths that follow a command: one as it stands, or quoted, backslashed, as file:// or several of these.

    Only what exists is taken to be several; a single one may be missing, and is told by the name that was meant.
    """
    if not argument:
        raise EdgeOmniError("the name of a file is missing; give it behind the command")
    whole = path_of(argument)
    if exists(whole):
        return [whole]
    try:
        words = [path_of(word) for word in shlex.split(argument)]
    except ValueError:  # a quote that is not closed is part of a name
        return [whole]
    if len(words) == 1 or (words and all(map(exists, words))):
        return words
    return [whole]


def path_of(spelled: str) -> Path:
    """A path with ~ and file:// resolved; a ~ that names nobody is part of the name."""
    if spelled.startswith("file://"):
        spelled = "/" + unquote(spelled.removeprefix("file://").partition("/")[2])  # without the name of a machine
    try:
        return Path(spelled).expanduser()
    except (RuntimeError, ValueError):  # nobody of that name, or a character that no name may hold
        return Path(spelled)
