"""The items of a realtime conversation: what each says on the wire, and what the model is asked of all of them."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from apps.server.dialogue import Answered, Asked, Dialogue, Given, Heard, Said, Shown
from apps.server.failures import ApiError, refused
from apps.server.media import decoded, decoded_url
from apps.server.realtime_wire import Content
from apps.server.realtime_wire import Item as GivenItem
from apps.server.sound import wav_header
from runtime.bundle import SpeechLayout
from runtime.live.heard import ReplyLog
from runtime.prompt import Answer, Spoken, Text


@dataclass
class Item:
    """`given` of a user or of the system, `pieces` of an assistant; `spoken` tells whether that was heard."""

    role: str
    content: list[dict[str, Any]]
    given: tuple[Given, ...] = ()
    pieces: tuple[Answer, ...] = ()
    spoken: bool = False
    id: str = field(default_factory=lambda: new_id("item"))
    status: str = "completed"

    @property
    def record(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            "status": self.status,
            "role": self.role,
            "content": [dict(part) for part in self.content],
        }

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def truncate(self, heard_ms: float, layout: SpeechLayout) -> None:
        """Let it be what was heard of it: its sound up to there, and as much of its words."""
        log = ReplyLog(layout)
        for piece in self.pieces:
            log.text += piece.text
            if isinstance(piece, Spoken):
                for _ in piece.codes:
                    log.frame(sum(segment.frames for segment in log.segments))
                log.end_segment()
        self.pieces = tuple(_cut(self.pieces, log.position(heard_ms) or 0))
        self.content = [{"type": "output_audio", "transcript": log.heard_text(heard_ms)}]


def _cut(pieces: tuple[Answer, ...], frames: int) -> Iterator[Answer]:
    """The first `frames` of the sound; the words of a clause stay with it, since the model reads them before it."""
    for piece in pieces:
        if frames <= 0 or not isinstance(piece, Spoken):
            return
        yield replace(piece, codes=piece.codes[:frames])
        frames -= len(piece.codes)


class Items:
    """In the order of the conversation. ApiError for an id that is not there, or is there already."""

    def __init__(self, most: int) -> None:
        self._items: list[Item] = []
        self._most = most

    def find(self, name: str) -> Item:
        found = next((item for item in self._items if item.id == name), None)
        if found is None:
            raise refused("there is no item of this id", "item_id", "item_not_found")
        return found

    def put(self, item: Item, behind: str | None = None) -> str | None:
        """Behind the item of that id, at the beginning for "root", at the end for None; the id before it."""
        if any(other.id == item.id for other in self._items):
            raise refused("there is an item of this id already", "item.id", "item_exists")
        if len(self._items) >= self._most:
            raise refused(f"a conversation has at most {self._most} items; delete some", "item")
        at = len(self._items)
        if behind is not None:
            at = 0 if behind == "root" else self._items.index(self.find(behind)) + 1
        if item.role == "system" and any(other.role != "system" for other in self._items[:at]):
            raise refused("a system message may stand at the beginning only, since the model reads it there", "item")
        self._items.insert(at, item)
        return self._items[at - 1].id if at else None

    def delete(self, name: str) -> None:
        self._items.remove(self.find(name))

    def dialogue(self, instructions: str | None) -> Dialogue:
        """ApiError where it does not end with a user's message."""
        system = [instructions] if instructions else []
        turns: list[Asked | Answered] = []
        for item in self._items:
            match item.role:
                case "system":
                    system += [part.text for part in item.given if isinstance(part, Said)]
                case "user" if turns and isinstance(turns[-1], Asked):
                    turns[-1] = Asked((*turns[-1].parts, *item.given))
                case "user":
                    turns.append(Asked(item.given))
                case "assistant" if item.pieces and turns:
                    _answer(turns, item)
        if not turns or not isinstance(turns[-1], Asked):
            raise refused("there is nothing to answer; create a user's item, or commit audio", code="nothing_to_answer")
        return Dialogue("\n\n".join(system) if system else None, tuple(turns))


def _answer(turns: list[Asked | Answered], item: Item) -> None:
    """Two answers in a row are one, in text unless both were heard."""
    aloud = item.pieces if item.spoken else None
    if isinstance(before := turns[-1], Answered):
        aloud = before.aloud + aloud if before.aloud is not None and aloud is not None else None
        turns[-1] = Answered(f"{before.text}\n{item.text}", aloud)
    else:
        turns.append(Answered(item.text, aloud))


def read_item(given: GivenItem) -> Item:
    """An item that a client creates. ApiError where its content does not fit its role, or cannot be used."""
    parts = [_part(part, given.role, f"item.content[{i}]") for i, part in enumerate(given.content)]
    content = [one.model_dump(exclude_unset=True, exclude={"audio", "image_url"}) for one in given.content]
    name = given.id or new_id("item")
    if given.role == "assistant":
        pieces = tuple(Text(part.text) for part in parts if isinstance(part, Said))
        return Item(given.role, content, pieces=pieces, id=name)
    return Item(given.role, content, given=tuple(parts), id=name)


def _part(part: Content, role: str, at: str) -> Given:
    match part.type, role:
        case ("input_text", "user" | "system") | ("output_text" | "text", "assistant") if part.text is not None:
            return Said(part.text)
        case "input_image", "user" if part.image_url is not None:
            return Shown(decoded_url(part.image_url, f"{at}.image_url"))
        case "input_audio", "user" if part.audio is not None:
            return Heard(pcm_file(decoded(part.audio, f"{at}.audio")))
    raise refused(f"a message of the {role} has no content of the type {part.type} like this", at)


def pcm_file(samples: bytes) -> bytes:
    """16-bit samples at 24 kHz as a WAV file."""
    if len(samples) % 2:
        raise ApiError(400, "the audio ends within a sample of 16 bits", "invalid_audio")
    return wav_header(24_000, len(samples)) + samples


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"
