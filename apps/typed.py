"""What a person types or drops into the terminal: commands, paths as file managers spell them, or plain text."""

import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from runtime.errors import EdgeOmniError
from runtime.files import exists

WITH_PATHS = ("/audio", "/image", "/video")
COMMANDS = ("/quit", "/exit", "/help", "/reset", "/speak", "/set", *WITH_PATHS)
ALONE = ("/quit", "/exit", "/help", "/reset")  # what follows one of these makes it a sentence: "/quit smoking: how?"


def command_of(line: str, *, strict: bool) -> tuple[str | None, str]:
    """The command that a line begins with and its argument, or None and the line where it is something to answer.

    `strict`, for a person at a terminal: a lone word that looks like a command is a mistake, and EdgeOmniError.
    """
    first, _, rest = line.replace("\t", " ", 1).partition(" ") if line.startswith("/") else (line, "", "")
    argument = rest.strip()
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
    except RuntimeError:
        return Path(spelled)
