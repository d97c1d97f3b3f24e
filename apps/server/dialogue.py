"""A conversation as a client sends it, whatever the wire: what was asked, shown and answered, nothing encoded yet."""

from dataclasses import dataclass

from runtime.sampling import AS_BUNDLE, SamplingOptions


@dataclass(frozen=True)
class Said:
    text: str


@dataclass(frozen=True)
class Shown:
    """A picture file's bytes."""

    data: bytes


Given = Said | Shown


@dataclass(frozen=True)
class Asked:
    """A user's turn."""

    parts: tuple[Given, ...]


@dataclass(frozen=True)
class Answered:
    """An answer of the history."""

    text: str


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
