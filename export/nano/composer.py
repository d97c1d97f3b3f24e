"""Draws the language model's training sequences from the recordings' codes, the grammar and the pictures."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from export.nano import corpus, domain, pictures, vocabulary
from export.nano.codes import CodedSet, load_codes
from export.nano.config import ModelConfig
from export.nano.corpus import Recording
from export.nano.sequences import Batch, Sequence, Writer, pack
from export.nano.split import read_split

CONFIG = vocabulary.FOLDER
# How often each kind of sequence is drawn.
MIX: dict[str, float] = {
    "ask": 14,
    "transcribe": 7,
    "follow": 4,
    "noise": 6,
    "typed": 18,
    "look": 26,
    "conversation": 9,
}
SPEECH_MIX: dict[str, float] = {"read": 5, "reply": 7, "look_aloud": 3, "follow_aloud": 2, "conversation_aloud": 3}
ROW, _ROWS = 512, 6  # tokens of a row, rows of a batch
_MISSES = 3  # sequences that found no room before a batch is full enough
_RARE, _RARE_SHARE = ("kokoro/", "piper/", "flite/"), 0.45  # engines with few recordings, and how often they ask
_TYPED_SHARE = 0.15  # of the turns of a conversation
_QUESTIONS = 6  # at most about one picture
_SPOKEN_SHARE = 0.4  # of those that were recorded
_LONGEST_TURN = 140  # tokens of a question with a picture and its spoken answer
_POLITE = ("please {}", "hey nano {}", "nano {}", "{} please", "{} thank you", "ok {}", "so {}", "can you tell me {}")


@dataclass(frozen=True)
class Coded:
    """One clip with the codes of its versions."""

    recording: Recording
    coded: CodedSet
    index: int

    def codes(self, rng: Random) -> Tensor:
        """One version, [L, levels]."""
        return self.coded.of(self.index, rng.randrange(self.coded.variants))


@dataclass
class Library:
    """Everything the sequences are made of."""

    questions: list[Coded] = field(default_factory=list)
    rare: list[Coded] = field(default_factory=list)  # those of the questions that engines with few recordings ask
    pairs: list[tuple[Coded, Coded]] = field(default_factory=list)  # a question and its follow-up
    noises: list[Coded] = field(default_factory=list)
    target: list[Coded] = field(default_factory=list)
    by_answer: dict[str, list[Coded]] = field(default_factory=dict)  # the target voice's recordings by text
    about_pictures: dict[str, list[Coded]] = field(default_factory=dict)  # spoken questions by text

    def add(self, recordings: list[Recording], coded: CodedSet) -> None:
        """Sort the clips of one set into the lists."""
        items = [Coded(r, coded, i) for i, r in enumerate(recordings[: len(coded)])]
        for before, item in zip([None, *items], items, strict=False):
            clip = item.recording.clip
            if clip.intent == "noise":
                self.noises.append(item)
            elif clip.intent == "read":
                self.target.append(item)
                self.by_answer.setdefault(clip.text, []).append(item)
            elif clip.turn == 1 and before is not None:
                self.pairs.append((before, item))
            else:
                self.questions.append(item)
                if clip.voice.startswith(_RARE):
                    self.rare.append(item)
            if clip.intent == "look":
                self.about_pictures.setdefault(clip.text, []).append(item)


def read_library(folder: Path, run: Path, names: tuple[str, ...]) -> Library:
    """The named sets, as far as they are coded."""
    library = Library()
    for name in names:
        if (coded := load_codes(run, name)) is not None:
            library.add(corpus.recordings(folder / name), coded)
    return library


class Composer:
    """Draws training sequences of each kind."""

    def __init__(
        self, stock: Library, config: ModelConfig, typed_share: float = _TYPED_SHARE, questions: int = _QUESTIONS
    ) -> None:
        """`typed_share` of the turns of a conversation are typed instead of spoken; up to `questions` are asked about
        one picture."""
        self.stock, self.config, self.typed_share, self.questions = stock, config, typed_share, questions
        self.writer = Writer(CONFIG, config.codebook_sizes)
        self.split = read_split()

    def draw(self, rng: Random, kind: str, cells: tuple[int, int] = (4, 4)) -> tuple[Sequence, list[pictures.Picture]]:
        """One sequence, and the pictures in it, which become `cells` rows and columns of tokens."""
        sequence = Sequence()
        if kind in ("transcribe", "read"):
            return (self._transcribe if kind == "transcribe" else self._read)(rng, sequence), []
        self.writer.system(sequence, rng.choices((None, 0, 1), (5, 4, 1))[0])
        self.writer.text(sequence, "<C_Q>")
        match kind:
            case "ask":
                item = self._question(rng)
                self.writer.hear(sequence, item.codes(rng))
                self.writer.answer(sequence, self._spaced(item.recording.clip.answer))
            case "follow" | "follow_aloud":
                self._follow(rng, sequence, aloud=kind == "follow_aloud")
            case "noise":
                self.writer.hear(sequence, rng.choice(self.stock.noises).codes(rng))
                self.writer.refuse(sequence, spoken=rng.random() < 0.5)
            case "typed":
                question, answer = self._typed(rng)
                self.writer.text(sequence, question)
                self.writer.answer(sequence, self._spaced(answer))
            case "reply":
                self._reply(rng, sequence)
            case "look":
                return sequence, [self._look(rng, sequence, cells)]
            case "look_aloud":
                return sequence, [self._look_aloud(rng, sequence, cells)]
            case _:
                return sequence, self._converse(rng, sequence, cells, aloud=kind == "conversation_aloud")
        return sequence, []

    @staticmethod
    def _spaced(text: str) -> str:
        """Every word of an answer has its token with a space in front."""
        return " " + text

    def _question(self, rng: Random) -> Coded:
        rare = self.stock.rare and rng.random() < _RARE_SHARE
        return rng.choice(self.stock.rare if rare else self.stock.questions)

    def _transcribe(self, rng: Random, sequence: Sequence) -> Sequence:
        noise = rng.random() < 0.12
        item = rng.choice(self.stock.noises) if noise else self._question(rng)
        self.writer.text(sequence, vocabulary.TRANSCRIBE)
        self.writer.hear(sequence, item.codes(rng))
        words = vocabulary.NOISE_MARKER if noise else self._spaced(item.recording.clip.text)
        self.writer.text(sequence, words + vocabulary.EOS, learn=True)
        return sequence

    def _read(self, rng: Random, sequence: Sequence) -> Sequence:
        item = rng.choice(self.stock.target)
        # A person's text comes without the space in front.
        text = item.recording.clip.text if rng.random() < 0.7 else self._spaced(item.recording.clip.text)
        self.writer.text(sequence, text + "<audiogen_start_baichuan>")
        self.writer.say(sequence, item.codes(rng))
        self.writer.text(sequence, vocabulary.EOS, learn=True)
        return sequence

    def _follow(self, rng: Random, sequence: Sequence, aloud: bool) -> None:
        """Two turns; `aloud`: both answers are spoken, where recordings of both are found."""
        pair = rng.choice(self.stock.pairs)
        recorded = self._recorded(pair)
        while aloud and not all(recorded) and rng.random() < 0.95:  # about twenty tries
            pair = rng.choice(self.stock.pairs)
            recorded = self._recorded(pair)
        for item, spoken, last in zip(pair, recorded, (False, True), strict=True):
            if rng.random() < self.typed_share:
                self.writer.text(sequence, item.recording.clip.text)
            else:
                self.writer.hear(sequence, item.codes(rng))
            codes = rng.choice(spoken).codes(rng) if aloud and spoken and all(recorded) else None
            self.writer.answer(sequence, self._spaced(item.recording.clip.answer), codes, last, learn=last)
            if not last:
                self.writer.text(sequence, "<C_Q>")

    def _recorded(self, items: tuple[Coded, Coded]) -> list[list[Coded]]:
        """The target voice's recordings of each answer."""
        return [self.stock.by_answer.get(item.recording.clip.answer, []) for item in items]

    def _typed(self, rng: Random) -> tuple[str, str]:
        if rng.random() < 0.4:
            turn = domain.draw_turn(rng)
            while turn.intent not in ("add", "sub", "mul", "half"):
                turn = domain.draw_turn(rng)
            assert turn.key is not None
            return turn.key, turn.answer
        turn = domain.draw_stray(rng) if rng.random() < 0.05 else self._sentence(rng)
        return _as_typed(rng, turn.question), turn.answer

    def _reply(self, rng: Random, sequence: Sequence) -> None:
        """A question with a recorded answer, heard or typed; where none is found, a repetition."""
        for _ in range(20):
            item = self._question(rng)
            spoken = self.stock.by_answer.get(item.recording.clip.answer)
            if spoken:
                break
        else:
            item, spoken = None, [rng.choice(self.stock.target)]
        answer = rng.choice(spoken)
        if item is not None and rng.random() < 0.8:
            self.writer.hear(sequence, item.codes(rng))
        else:
            self.writer.text(
                sequence, item.recording.clip.text if item else f"repeat after me {answer.recording.clip.text}"
            )
        self.writer.answer(sequence, self._spaced(answer.recording.clip.text), answer.codes(rng))

    def _converse(self, rng: Random, sequence: Sequence, cells: tuple[int, int], aloud: bool) -> list[pictures.Picture]:
        """Two to eight turns on whatever subjects, typed, spoken and seen; each answer is learnt."""
        seen: list[pictures.Picture] = []
        before: domain.Turn | None = None
        turns = rng.randint(2, 8)
        for i in range(turns):
            last = i == turns - 1 or len(sequence.ids) > ROW - _LONGEST_TURN
            turn = self._next_turn(rng, sequence, before, seen, cells)
            spoken = self.stock.by_answer.get(turn.answer) if aloud else None
            codes = rng.choice(spoken).codes(rng) if spoken else None
            self.writer.answer(sequence, self._spaced(turn.answer), codes, last)
            if last:
                return seen
            self.writer.text(sequence, "<C_Q>")
            before = turn
        return seen

    def _next_turn(
        self,
        rng: Random,
        sequence: Sequence,
        before: domain.Turn | None,
        seen: list[pictures.Picture],
        cells: tuple[int, int],
    ) -> domain.Turn:
        """Write the user's side of one turn of a conversation; a new picture joins those that were `seen`."""
        draw = rng.random()
        if draw < 0.2:
            picture = None
            if not seen or rng.random() < 0.6:
                picture = pictures.draw_picture(rng, cells=cells)
                seen.append(picture)
            question, answer = rng.choice(pictures.draw_questions(rng, pictures.questions(seen[-1]), 1))
            self._ask(rng, sequence, question, picture)
            return domain.Turn(question, answer, "look", None)
        if draw < 0.4:
            turn = self._going_on(rng, before)
        elif draw < 0.6:
            turn = self._sentence(rng)
        else:
            item = self._question(rng)
            turn = self._as_turn(item)
            if turn.intent != "look" or not seen:
                self.writer.hear(sequence, item.codes(rng))
                return turn
            turn = self._sentence(rng)
        if turn.intent == "look" and seen:
            turn = domain.Turn(*pictures.draw_question(rng, pictures.questions(seen[-1])), "look", None)
        self.writer.text(sequence, _as_typed(rng, turn.question))
        return turn

    def _going_on(self, rng: Random, before: domain.Turn | None) -> domain.Turn:
        """What follows from the turn before, or something that would, had there been another one before."""
        then = domain.draw_follow_up(rng, before) if before is not None else None
        if then is not None and not self._heldout(then):
            return then
        if before is None or before.intent in ("chat", "day", "opposite", "outside", "word"):
            return domain.draw_stray(rng)
        return self._sentence(rng)

    def _sentence(self, rng: Random) -> domain.Turn:
        """A whole question of the domain that is not held out."""
        turn = domain.draw_turn(rng)
        while self._heldout(turn):
            turn = domain.draw_turn(rng)
        return turn

    def _heldout(self, turn: domain.Turn) -> bool:
        return turn.key is not None and self.split.sentence_is_heldout(turn.key)

    @staticmethod
    def _as_turn(item: Coded) -> domain.Turn:
        clip = item.recording.clip
        return domain.Turn(clip.text, clip.answer, clip.intent, clip.key)

    def _look(self, rng: Random, sequence: Sequence, cells: tuple[int, int]) -> pictures.Picture:
        """Questions about one picture, one after the other."""
        picture = pictures.draw_picture(rng, cells=cells)
        asked = pictures.draw_questions(rng, pictures.questions(picture), rng.randint(1, self.questions))
        for i, (question, answer) in enumerate(asked):
            if i > 0:
                self.writer.text(sequence, "<C_Q>")
            self._ask(rng, sequence, question, picture if i == 0 else None)
            self.writer.answer(sequence, self._spaced(answer), last=i == len(asked) - 1)
        return picture

    def _look_aloud(self, rng: Random, sequence: Sequence, cells: tuple[int, int]) -> pictures.Picture:
        """A question about a picture whose answer was recorded, if one of a few pictures has such."""
        picture, tries = pictures.draw_picture(rng, cells=cells), 1
        while not (recorded := self._answers_recorded(picture)) and tries < 5:
            picture, tries = pictures.draw_picture(rng, cells=cells), tries + 1
        question, answer = pictures.draw_question(rng, recorded or pictures.questions(picture))
        self._ask(rng, sequence, question, picture)
        recordings = self.stock.by_answer.get(answer)
        self.writer.answer(sequence, self._spaced(answer), rng.choice(recordings).codes(rng) if recordings else None)
        return picture

    def _answers_recorded(self, picture: pictures.Picture) -> list[tuple[str, str]]:
        """The questions about it whose answers the target voice has said."""
        return [pair for pair in pictures.questions(picture) if pair[1] in self.stock.by_answer]

    def _ask(self, rng: Random, sequence: Sequence, question: str, picture: pictures.Picture | None) -> None:
        """The question, spoken or typed, beside the picture if there is one to show."""
        spoken = self.stock.about_pictures.get(question)
        if spoken and rng.random() < _SPOKEN_SHARE:
            ask = partial(self.writer.hear, sequence, rng.choice(spoken).codes(rng))
        else:
            spoken, ask = None, partial(self.writer.text, sequence, question)
        parts = [ask]
        if picture is not None:
            vision = self.config.vision
            rows = torch.from_numpy(pictures.patches(picture.pixels, vision.image_mean, vision.image_std)).float()
            height, width, _ = picture.pixels.shape
            show = partial(self.writer.see, sequence, rows, (height // pictures.CELL, width // pictures.CELL))
            # A person may speak before or after the picture is there; typed words always follow it.
            parts = [ask, show] if spoken and rng.random() < 0.5 else [show, ask]
        for part in parts:
            part()

    def batch(self, rng: Random, mix: dict[str, float]) -> tuple[Batch, list[pictures.Picture]]:
        """Full rows of sequences, their kinds drawn by the weights of `mix`; the pictures in the order of the batch."""
        rows: list[list[tuple[Sequence, list[pictures.Picture]]]] = [[] for _ in range(_ROWS)]
        room, misses, cells = [ROW] * _ROWS, 0, pictures.draw_grid(rng)
        while misses < _MISSES:
            kind = rng.choices(list(mix), list(mix.values()))[0]
            drawn = self.draw(rng, kind, cells)
            at = next((i for i, left in enumerate(room) if left >= len(drawn[0].ids)), None)
            if at is None:
                misses += 1
                continue
            rows[at].append(drawn)
            room[at] -= len(drawn[0].ids)
        pad = self.writer.token(vocabulary.EOS)
        sequences = [[sequence for sequence, _ in row] for row in rows]
        batch = pack(sequences, ROW, pad, len(self.config.codebook_sizes))
        return batch, [picture for row in rows for _, seen in row for picture in seen]


def _as_typed(rng: Random, question: str) -> str:
    """Now and then with the words that people put around a request; a word alone stays alone."""
    return rng.choice(_POLITE).format(question) if " " in question and rng.random() < 0.12 else question
