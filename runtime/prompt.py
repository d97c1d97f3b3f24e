"""A conversation's turns as what the model reads: token ids, codes of what it heard and rows of what it saw.

A prompt is built in pieces, so that a key/value cache which holds the earlier ones needs only the next.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import TODAY, Manifest, PromptTemplate, SpecialTokens
from runtime.errors import PromptError
from runtime.tokenizer import Behind, Tokenizer

Codes = NDArray[np.int64]  # [L, n_q]: one row every position, one column every codebook
Rows = NDArray[np.float32]  # [n, hidden]: projector output, one row every position

MARKS = ":,;!?、，。；：！？"  # a text to read aloud may be cut behind any of these


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True, eq=False)
class Audio:
    """What was heard, already encoded."""

    codes: Codes


@dataclass(frozen=True, eq=False)
class Image:
    rows: Rows


@dataclass(frozen=True, eq=False)
class Video:
    """Each frame stands in the prompt as an image of its own."""

    frames: tuple[Rows, ...]


@dataclass(frozen=True, eq=False)
class Spoken:
    """A piece of an answer: its text, then the codes of the same words aloud."""

    text: str
    codes: Codes


Part = Text | Audio | Image | Video
Turn = str | Part | Iterable[str | Part]  # a turn as it is said to a conversation; a string is one text
Answer = Text | Spoken
P = TypeVar("P")


def parts_of(said: Turn) -> tuple[Part, ...]:
    """The parts of a turn. PromptError for what is neither text nor an input that was encoded."""
    if isinstance(said, Iterable) and not isinstance(said, str | bytes | Mapping | Set):
        return tuple(map(_part_of, said))
    return (_part_of(said),)


def _part_of(said: object) -> Part:
    if isinstance(said, Part):
        return said
    if isinstance(said, str):
        return Text(said)
    raise PromptError(
        f"a turn holds {type(said).__name__}; give text, and what `hear`, `look` and `watch` of an open bundle return"
    )


@dataclass(frozen=True, eq=False)
class Prompt:
    """Ids, and what goes where they are placeholders.

    `codes` belong, in order, to the positions whose id is audio_pad, generated audio included; `rows`, in order, to
    those whose id is img_pad or video_place. `run` is text at its end that is not encoded yet: it waits for a piece
    that may begin with text, since the tokens of the two are those of one text. `ends` is what stands before the run.
    """

    ids: NDArray[np.int64]  # [L]
    codes: Codes
    rows: Rows
    run: str = ""
    ends: Behind = "text"
    keeps_blanks: bool = False  # that the next text begins with, whatever the template does with a turn's

    def __len__(self) -> int:
        return len(self.ids)


def concat(pieces: Sequence[Prompt]) -> Prompt:
    """Pieces of which none waits, one after the other as one prompt; at least one."""
    assert not any(piece.run for piece in pieces), "a piece whose text waits is to be continued, not put beside another"
    return Prompt(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.codes for piece in pieces]),
        np.concatenate([piece.rows for piece in pieces]),
    )


def continued_by(first: Prompt, then: Prompt) -> Prompt:
    """Two pieces as one, of which the first does not wait and the second may."""
    assert not first.run, "a piece whose text waits is to be continued, not put beside another"
    media = {"codes": [first.codes, then.codes], "rows": [first.rows, then.rows]}
    joined = {name: np.concatenate([part for part in parts if len(part)] or parts[:1]) for name, parts in media.items()}
    return replace(then, ids=np.concatenate([first.ids, then.ids]), **joined)


@dataclass(frozen=True)
class PromptFormat:
    """How one bundle spells a conversation. Template strings name special tokens; the texts in between never do."""

    tokenizer: Tokenizer
    template: PromptTemplate
    tokens: SpecialTokens
    codebook_sizes: tuple[int, ...]
    hidden_size: int

    # The three pieces of a conversation: each may be put `behind` another and be made to wait for the next, so that
    # its last text and the next one's first are encoded as the one text that they are in the model's chat template.

    def open_conversation(
        self, system: str | None = None, *, waits: bool = False, now: datetime | None = None
    ) -> Prompt:
        """The first piece. `system` None: the bundle's default, if it has one; "": no system prompt.

        `now` is the time, for models that are told the date. PromptError for a system prompt where the model takes
        none.
        """
        draft = _Draft(self)
        before, text, after = self._system(system)
        draft.template(self._dated(self.template.begin + before, now))
        draft.text(text)
        draft.template(self._dated(after, now))
        return replace(draft.prompt(waits), keeps_blanks=bool(text) and self.template.blanks_behind_system)

    def user_turn(self, said: Turn, spoken: bool, *, behind: Prompt | None = None, waits: bool = False) -> Prompt:
        """What the user said and showed, up to where the answer begins; `spoken`: the answer shall be heard.

        It `waits` for an answer that is given, and is otherwise to be answered. Raises PromptError for a turn without
        text and media or with anything else, for media that the bundle does not take or whose arrays have another
        shape than it expects, and where it cannot speak.
        """
        parts = parts_of(said)
        if not any(part.text.strip() if isinstance(part, Text) else True for part in parts):
            raise PromptError("the turn is empty: give it a text, an audio, an image or a video")
        draft = _continued(self, behind, "start")
        before, after = self.template.user
        draft.template(before)
        keeps_blanks = behind is not None and behind.keeps_blanks
        for part in _trimmed(parts, keeps_blanks) if "user" in self.template.trimmed else parts:
            draft.part(part)
        draft.template(after)
        draft.template(self._assistant(spoken)[0] + ("" if waits else self.template.opens_answer))
        return draft.prompt(waits)

    def close_assistant(
        self,
        answer: Sequence[Answer] = (),
        *,
        spoken: bool,
        within_audio: bool = False,
        behind: Prompt | None = None,
        waits: bool = False,
    ) -> Prompt:
        """What ends an answer, so that the next user turn may follow.

        `answer` is what of it the cache does not hold: all of an answer from a history, nothing after generation.
        `within_audio`: the cache stops inside an audio segment, which is ended first.
        """
        draft = _continued(self, behind, "text")
        if within_audio:
            draft.place("audiogen_end")
        if answer:
            draft.template(self.template.given_answer)
        kept = [self._remembered(part) for part in answer]
        for part in _trimmed(kept) if "assistant" in self.template.trimmed else kept:
            draft.answer(part)
        draft.template(self._assistant(spoken)[1])
        return draft.prompt(waits)

    def closed(self, piece: Prompt) -> Prompt:
        """A piece that waits, as if nothing but a special token came behind it."""
        return _continued(self, piece, "text").prompt()

    def open_user(self) -> Prompt:
        """The beginning of a user turn that comes in pieces."""
        draft = _Draft(self)
        draft.template(self.template.user[0])
        return draft.prompt()

    def show(self, image: Image) -> Prompt:
        """A picture by itself, within a user turn that comes in pieces."""
        draft = _Draft(self)
        draft.part(image)
        return draft.prompt()

    def sound(self, codes: Codes, *, opens: bool, closes: bool) -> Prompt:
        """A piece of an audio, within such a turn: its codes [L, n_q], the tag before its first and behind its last."""
        draft = _Draft(self)
        draft.sound(codes, opens=opens, closes=closes)
        return draft.prompt()

    def close_user(self, spoken: bool | None, text: str = "") -> Prompt:
        """The end of such a turn, behind a text, and the beginning of its answer; `spoken` None: nobody answers it."""
        draft = _Draft(self)
        draft.text(text)
        draft.template(self.template.user[1])
        if spoken is not None:
            draft.template(self._assistant(spoken)[0])
        return draft.prompt()

    def transcribe(self, audio: Audio) -> Prompt:
        """The whole prompt that asks for the words of an audio. PromptError where the bundle has no such prompt."""
        if self.template.transcribe is None:
            raise PromptError("this bundle has no prompt for transcription; use one whose model was trained for it")
        draft = _Draft(self)
        before, _, after = self.template.transcribe.partition("{audio}")
        draft.template(self.template.begin + before)
        draft.part(audio)
        draft.template(after)
        return draft.prompt()

    def speak(self, text: str, *, within_audio: bool = False) -> Prompt:
        """The whole prompt that asks for a text aloud, or its continuation by a further piece of the text.

        `within_audio`: the cache holds the pieces before this one and stops inside the audio of the last.
        PromptError for a blank text, and where the bundle has no such prompt.
        """
        if self.template.speak is None:
            raise PromptError("this bundle has no prompt for reading a text aloud; use one whose model can speak")
        if not text.strip():
            raise PromptError("there is no text to read aloud")
        draft = _Draft(self)
        before, _, after = self.template.speak.partition("{text}")
        if within_audio:
            draft.place("audiogen_end")
        else:
            draft.template(self.template.begin)
        draft.template(before)
        draft.text(text)
        draft.template(after)
        return draft.prompt()

    def _system(self, system: str | None) -> tuple[str, str, str]:
        """What stands before the first turn: the template's string, the text, and the template's string behind it."""
        default = self.template.default_system
        text = default if system is None else system
        if text is None or not (text or default == ""):
            return self.template.no_system, "", ""
        if self.template.system is None:
            raise PromptError("this model's chat template takes no system prompt; leave it out")
        before, after = self.template.system
        return before, text.strip() if "system" in self.template.trimmed else text, after

    def _remembered(self, part: Answer) -> Answer:
        if self.template.forgets is None or isinstance(part, Spoken):
            return part
        return Text(part.text.split(self.template.forgets)[-1])

    def _dated(self, string: str, now: datetime | None) -> str:
        if self.template.today is None:
            return string
        return string.replace(TODAY, (now or datetime.now()).strftime(self.template.today))

    def _assistant(self, spoken: bool) -> tuple[str, str]:
        around = self.template.spoken_assistant if spoken else self.template.assistant
        if around is None:
            raise PromptError("this bundle answers in text only; ask for a text answer, or use one that can speak")
        return around


def _trimmed(parts: Sequence[P], keeps_ahead: bool = False) -> list[P | Text]:
    """The parts of a turn without the blanks that it begins and ends with; those ahead stay if that is asked for."""
    kept: list[P | Text] = list(parts)
    while kept and not keeps_ahead and isinstance(first := kept[0], Text):
        kept[0] = Text(first.text.lstrip())
        if kept[0].text:
            break
        del kept[0]
    while kept and isinstance(last := kept[-1], Text):
        kept[-1] = Text(last.text.rstrip())
        if kept[-1].text:
            break
        del kept[-1]
    return kept


def prompt_format(manifest: Manifest, tokenizer: Tokenizer) -> PromptFormat:
    layout = manifest.audio or manifest.speech
    sizes = layout.codebook_sizes if layout else ()
    return PromptFormat(tokenizer, manifest.template, manifest.tokens, sizes, manifest.hidden_size)


@dataclass
class _Draft:
    """A prompt being written. Plain text is encoded in runs as long as they get, as if it had been one string."""

    format: PromptFormat
    ends: Behind = "start"  # what the run stands behind
    run: str = ""
    ids: list[int] = field(default_factory=list)
    codes: list[Codes] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)

    def text(self, text: str) -> None:
        self.run += text

    def template(self, string: str) -> None:
        for part in self.format.tokenizer.parse(string):
            if isinstance(part, str):
                self.text(part)
            else:
                self._append([part])

    def part(self, part: Part) -> None:
        match part:
            case Text(text):
                self.text(text)
            case Audio(codes):
                if not len(codes):
                    raise PromptError("an audio is too short for a single code; give a longer one")
                self._audio("audio_start", codes, "audio_end")
            case Image(rows):
                self._image(rows, "img_pad")
            case Video(frames):
                if not frames:
                    raise PromptError("a video without frames was given; give at least one")
                for rows in frames:
                    self._image(rows, "video_place")

    def answer(self, part: Answer) -> None:
        self.text(part.text)
        if isinstance(part, Spoken):
            self._audio("audiogen_start", part.codes, "audiogen_end")

    def place(self, name: str, times: int = 1) -> None:
        """A special token by its name in SpecialTokens, so many times."""
        token = getattr(self.format.tokens, name)
        if token is None:
            raise PromptError(f"this bundle has no {name} token, so its model takes no such input; leave it out")
        self._append([token] * times)

    def prompt(self, waits: bool = False) -> Prompt:
        if not waits:
            self._append([])
        no_codes = np.empty((0, len(self.format.codebook_sizes)), np.int64)
        no_rows = np.empty((0, self.format.hidden_size), np.float32)
        return Prompt(
            np.array(self.ids, np.int64),
            np.concatenate([no_codes, *self.codes], dtype=np.int64),
            np.concatenate([no_rows, *self.rows], dtype=np.float32),
            self.run,
            self.ends,
        )

    def _append(self, ids: list[int]) -> None:
        before = self.ids[-1] if self.ends == "token" and self.ids else None
        self.ids += self.format.tokenizer.encode_run(self.run, self.ends, before, ids[0] if ids else None)
        self.ids += ids
        self.ends = "token" if ids else "text" if self.run else self.ends
        self.run = ""

    def sound(self, codes: Codes, *, opens: bool, closes: bool) -> None:
        if opens:
            self.place("audio_start")
        self.place("audio_pad", len(codes))
        if closes:
            self.place("audio_end")
        self.codes.append(_checked_codes(codes, self.format.codebook_sizes))

    def _audio(self, start: str, codes: Codes, end: str) -> None:
        self.place(start)
        self.place("audio_pad", len(codes))
        self.place(end)
        self.codes.append(_checked_codes(codes, self.format.codebook_sizes))

    def _image(self, rows: Rows, placeholder: str) -> None:
        self.place("img_start")
        self.place(placeholder, len(rows))
        self.place("img_end")
        self.rows.append(_checked_rows(rows, self.format.hidden_size))


def _continued(form: PromptFormat, behind: Prompt | None, ends: Behind) -> _Draft:
    """A draft that goes on where a piece ended; where none is given, it begins at a place that `ends` says."""
    if behind is None:
        return _Draft(form, ends)
    return _Draft(form, behind.ends, behind.run, behind.ids.tolist(), [behind.codes], [behind.rows])


def _checked_codes(codes: Codes, sizes: tuple[int, ...]) -> Codes:
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not np.issubdtype(codes.dtype, np.integer):
        found = f"{codes.dtype} {list(codes.shape)}"
        raise PromptError(f"the codes of an audio are {found}, expected int64 [positions, {len(sizes)}]")
    if (codes < 0).any() or (codes >= sizes).any():
        raise PromptError(f"the codes of an audio lie outside their codebooks, whose sizes are {list(sizes)}")
    return codes


def _checked_rows(rows: Rows, hidden_size: int) -> Rows:
    if rows.ndim != 2 or rows.shape[1] != hidden_size or not len(rows):
        raise PromptError(f"the rows of an image are {list(rows.shape)}, expected [one or more, {hidden_size}]")
    return rows


def split_at_punctuation(text: str) -> list[str]:
    """Parts of a text that each end behind a mark, the last one perhaps without; joined they are the text."""
    return re.findall(f"[^{MARKS}]*[{MARKS}]|[^{MARKS}]+", text)


def split_for_speech(text: str) -> list[str]:
    """Pieces of a long text to read aloud one by one: parts, joined until a piece has more than 10 characters.

    The last piece may be shorter. Joined they are the text (web_demo/base_tts_demo.py of the official code).
    """
    pieces: list[str] = []
    for part in split_at_punctuation(text):
        if pieces and len(pieces[-1]) <= 10:
            pieces[-1] += part
        else:
            pieces.append(part)
    return pieces
