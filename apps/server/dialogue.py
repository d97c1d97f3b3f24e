"""A conversation as a client sends it, whatever the wire: what was asked, shown and answered, nothing encoded yet."""

from dataclasses import dataclass

from runtime.audio import Wave
from runtime.prompt import Answer
from runtime.sampling import AS_BUNDLE, SamplingOptions


@dataclass(frozen=True)
class Said:
    text: str


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture file's bytes."""

    data: bytes


@dataclass(frozen=True, eq=False)
class Heard:
    """An audio file's bytes, or a wave [n] at the bundle's rate."""

    data: bytes | Wave


Given = Said | Shown | Heard


@dataclass(frozen=True)
class Asked:
    """A user's turn."""

    parts: tuple[Given, ...]


@dataclass(frozen=True)
class Answered:
    """An answer of the history; `aloud`: its pieces, where it was one in speech and is remembered."""

    text: str
    aloud: tuple[Answer, ...] | None = None


@dataclass(frozen=True)
class Dialogue:
    """`system` None: the bundle's default prompt; "": none. The turns alternate and end with what is to be answered."""

    system: str | None
    turns: tuple[Asked | Answered, ...]


@dataclass(frozen=True)
class How:
    """How an answer is wanted; None: as the bundle has it."""

    max_new: int | None = None  # tokens
    stop: tuple[str, ...] = ()  # the answer ends before any of these
    sampling: SamplingOptions = AS_BUNDLE
    seed: int | None = None
    spoken: bool = False  # in speech, with its text
