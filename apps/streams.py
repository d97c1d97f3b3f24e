"""The three streams of the program, whatever the terminal's encoding is: no character that it lacks is an error."""

import json
import os
import sys
from contextlib import suppress
from io import TextIOWrapper, UnsupportedOperation
from typing import Any, TextIO


def accept_any_encoding() -> None:
    """Show `?` for what the terminal cannot, and let bytes in that are no text there: file names may hold them."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            with suppress(UnsupportedOperation):  # whoever started us has read from it already
                stream.reconfigure(errors=errors)


def json_text(record: Any, indent: int | None = None, allow_nan: bool = True) -> str:
    """JSON with characters as they are, or escaped where stdout cannot hold one of them."""
    text = json.dumps(record, ensure_ascii=False, indent=indent, allow_nan=allow_nan)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(record, indent=indent, allow_nan=allow_nan)
    return text


def dim(text: str, stream: TextIO) -> str:
    """The text in a fainter colour, where a person reads the stream on a terminal that has one."""
    plain = os.environ.get("TERM", "dumb") == "dumb" or bool(os.environ.get("NO_COLOR"))
    return text if plain or not stream.isatty() else f"\x1b[2m{text}\x1b[0m"
