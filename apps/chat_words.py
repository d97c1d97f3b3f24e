"""What the words behind `edgeomni chat` are: a bundle, a sentence, or a name that is neither."""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.errors import EdgeOmniError

NAME = re.compile(r"[A-Za-z0-9._-]*[A-Za-z0-9_-]")  # as folders are called: no mark at its end, no other script
NEAR = 0.6  # of difflib's ratio, above which a word is taken for another that was spelled wrongly


def bundle_and_text(words: Sequence[str], names_bundle: Callable[[str], bool]) -> tuple[str | None, str | None]:
    """The bundle, None where none is named, and what is to be said, None where nothing is.

    Words that a shell has split are one sentence. EdgeOmniError for a word that would be a bundle and is none: a lone
    one, one before a sentence in quotes, and one that is spelled nearly as a bundle that lies here.
    """
    if not words:
        return None, None
    first, *others = words
    if names_bundle(first):
        return first, " ".join(others) if others else None
    alone = not others or any(re.search(r"\s", word) for word in others)
    if NAME.fullmatch(first) and (alone or near(first)):
        raise EdgeOmniError(_no_bundle(first))
    return None, " ".join(words)


def near(name: str) -> list[str]:
    """Bundles in the working folder that are called nearly so."""
    try:
        here = sorted(path.name for path in Path().iterdir() if (path / "manifest.json").is_file())
    except OSError:
        here = []
    return difflib.get_close_matches(name, here, cutoff=NEAR)


def _no_bundle(name: str) -> str:
    found = near(name)
    meant = f"did you mean {' or '.join(found)}? " if found else "`edgeomni export` makes one. "
    return f"{name} is no bundle, and a single word is no sentence; {meant}To say it, put a mark behind it: '{name}!'"
