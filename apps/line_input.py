"""The line that a person types at a terminal: its history, kept from day to day, and Tab for commands and paths."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apps.chat_settings import NAMES
from apps.typed import COMMANDS, WITH_PATHS, path_of
from runtime.errors import EdgeOmniError
from runtime.files import cache_folder

HISTORY = "chat_history"
LONGEST = 1000  # lines of it


@contextmanager
def editing() -> Iterator[None]:
    """Give input() its history and Tab, where Python has readline. The history is for this user's eyes alone.

    Without a place to keep it, or the right to write there, there is none.
    """
    try:
        import readline
    except ImportError:  # Windows, and Pythons that were built without it
        yield
        return
    bind = "bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete"
    readline.parse_and_bind(bind)
    readline.set_completer_delims("")  # a line is completed as a whole: names may hold blanks
    readline.set_completer(lambda text, number: dict(enumerate(candidates(text))).get(number))
    readline.set_history_length(LONGEST)
    place = _place()
    with suppress(OSError):
        if place is not None:
            readline.read_history_file(place)
    try:
        yield
    finally:
        if place is not None:
            with suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
                place.chmod(0o600)  # one that was there before
                readline.write_history_file(place)


def _place() -> Path | None:
    with suppress(EdgeOmniError):
        return cache_folder() / HISTORY
    return None


def candidates(line: str) -> list[str]:
    """What a line may be completed to: commands, the names behind /set, and paths."""
    first, blank, rest = line.partition(" ")
    if not blank and (found := [command for command in COMMANDS if line.startswith("/") and command.startswith(line)]):
        return [command + " " for command in found]
    if blank and first == "/set":
        return [f"/set {name} " for name in NAMES if name.startswith(rest)]
    if blank and first in (*WITH_PATHS, "/speak", "/save", "/load"):
        return [f"{first} {path}" for path in _paths(rest.lstrip())]
    return _paths(line) if line.startswith(("/", "~/", "./", "../")) else []


def _paths(typed: str) -> list[str]:
    """The files and folders that a path may become, spelled as it was begun; hidden ones only where a dot asks."""
    folder, slash, begun = typed.rpartition("/")
    try:
        found = sorted(path_of(folder + slash or ".").iterdir())
    except (OSError, ValueError):
        return []
    return [
        f"{folder}{slash}{path.name}{'/' * path.is_dir()}"
        for path in found
        if path.name.startswith(begun) and (begun or not path.name.startswith("."))
    ]
