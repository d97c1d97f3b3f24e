"""Draws the language model's training sequences from the recordings' codes, the grammar and the pictures."""

from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from export.nano import corpus, domain, pictures, vocabulary
from export.nano.codes import CodedSet, load_codes
from export.nano.config import ModelConfig
from export.nano.corpus import Recording
from export.nano.sequences import Batch, Sequence, Writer, collate
from export.nano.split import read_split

CONFIG = vocabulary.FOLDER
_IMAGE_TOKENS = (pictures.SIZE // pictures.CELL) ** 2
# Sequences of each kind in a batch.
MIX = {"ask": 14, "transcribe": 6, "follow": 4, "noise": 3, "typed": 8, "look": 6}
SPEECH_MIX = {"read": 4, "reply": 3, "look_aloud": 2}
_LENGTH_SPREAD = 400  # clips of similar length to choose a batch's questions from


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

    questions: list[Coded] = field(default_factory=list)  # sorted by length
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
            if clip.intent == "look":
                self.about_pictures.setdefault(clip.text, []).append(item)

    def ready(self) -> "Library":
        """Sort the questions by length."""
        self.questions.sort(key=lambda item: item.recording.clip.samples)
        return self


def read_library(folder: Path, run: Path, names: tuple[str, ...]) -> Library:
    """The named sets, as far as they are coded."""
    library = Library()
    for name in names:
        if (coded := load_codes(run, name)) is not None:
            library.add(corpus.recordings(folder / name), coded)
    return library.ready()


class Composer:
    """Draws training sequences of each kind."""

    def __init__(self, stock: Library, config: ModelConfig) -> None:
        self.stock, self.config = stock, config
        self.writer = Writer(CONFIG, config.codebook_sizes)
        self.split = read_split()

    def draw(self, rng: Random, kind: str, near: int = 0) -> tuple[Sequence, pictures.Picture | None]:
        """One sequence, and the picture in it if there is one."""
        sequence = Sequence()
        if kind in ("transcribe", "read"):
            return (self._transcribe if kind == "transcribe" else self._read)(rng, sequence, near), None
        self.writer.system(sequence, rng.choices((None, 0, 1), (5, 4, 1))[0])
        self.writer.text(sequence, "<C_Q>")
        match kind:
            case "ask":
                item = self._question(rng, near)
                self.writer.hear(sequence, item.codes(rng))
                self.writer.answer(sequence, self._spaced(item.recording.clip.answer))
            case "follow":
                self._follow(rng, sequence)
            case "noise":
                self.writer.hear(sequence, rng.choice(self.stock.noises).codes(rng))
                self.writer.answer(sequence, vocabulary.NOISE_MARKER)
            case "typed":
                question, answer = self._typed(rng)
                self.writer.text(sequence, question)
                self.writer.answer(sequence, self._spaced(answer))
            case "reply":
                self._reply(rng, sequence)
            case _:
                return sequence, self._look(rng, sequence, aloud=kind == "look_aloud")
        return sequence, None

    @staticmethod
    def _spaced(text: str) -> str:
        """Every word of an answer has its token with a space in front."""
        return " " + text

    def _question(self, rng: Random, near: int) -> Coded:
        questions = self.stock.questions
        return questions[min(near + rng.randrange(_LENGTH_SPREAD), len(questions) - 1)]

    def _transcribe(self, rng: Random, sequence: Sequence, near: int) -> Sequence:
        noise = rng.random() < 0.12
        item = rng.choice(self.stock.noises) if noise else self._question(rng, near)
        self.writer.text(sequence, vocabulary.TRANSCRIBE)
        self.writer.hear(sequence, item.codes(rng))
        words = vocabulary.NOISE_MARKER if noise else self._spaced(item.recording.clip.text)
        self.writer.text(sequence, words + vocabulary.EOS, learn=True)
        return sequence

    def _read(self, rng: Random, sequence: Sequence, near: int) -> Sequence:
        item = rng.choice(self.stock.target)
        # A person's text comes without the space in front.
        text = item.recording.clip.text if rng.random() < 0.7 else self._spaced(item.recording.clip.text)
        self.writer.text(sequence, text + "<audiogen_start_baichuan>")
        self.writer.say(sequence, item.codes(rng))
        self.writer.text(sequence, vocabulary.EOS, learn=True)
        return sequence

    def _follow(self, rng: Random, sequence: Sequence) -> None:
        first, then = rng.choice(self.stock.pairs)
        self.writer.hear(sequence, first.codes(rng))
        self.writer.answer(sequence, self._spaced(first.recording.clip.answer), last=False)
        self.writer.text(sequence, "<C_Q>")
        self.writer.hear(sequence, then.codes(rng))
        self.writer.answer(sequence, self._spaced(then.recording.clip.answer))

    def _typed(self, rng: Random) -> tuple[str, str]:
        if rng.random() < 0.5:
            turn = domain.draw_turn(Random(f"sum/{rng.random()}"))
            while turn.intent not in ("add", "sub", "mul", "half"):
                turn = domain.draw_turn(rng)
            assert turn.key is not None
            return turn.key, turn.answer
        turn = domain.draw_turn(rng)
        while turn.key is not None and self.split.sentence_is_heldout(turn.key):
            turn = domain.draw_turn(rng)
        return turn.question, turn.answer

    def _reply(self, rng: Random, sequence: Sequence) -> None:
        """A question with a recorded answer, heard or typed; where none is found, a repetition."""
        for _ in range(20):
            item = rng.choice(self.stock.questions)
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

    def _look(self, rng: Random, sequence: Sequence, aloud: bool) -> pictures.Picture:
        """A question about a picture; `aloud`: one whose answer was recorded, if one of a few pictures has such."""
        picture = pictures.draw_picture(rng)
        choices = pictures.questions(picture)
        for _ in range(4 if aloud else 0):
            if recorded := [pair for pair in choices if pair[1] in self.stock.by_answer]:
                choices = recorded
                break
            picture = pictures.draw_picture(rng)
            choices = pictures.questions(picture)
        question, answer = pictures.draw_question(rng, choices)
        vision = self.config.vision
        rows = pictures.patches(picture.pixels, vision.image_mean, vision.image_std)
        self.writer.see(sequence, torch.from_numpy(rows).float(), _IMAGE_TOKENS)
        spoken = self.stock.about_pictures.get(question)
        if spoken and rng.random() < 0.6:
            self.writer.hear(sequence, rng.choice(spoken).codes(rng))
        else:
            self.writer.text(sequence, question)
        recordings = self.stock.by_answer.get(answer, []) if aloud else []
        self.writer.answer(sequence, self._spaced(answer), rng.choice(recordings).codes(rng) if recordings else None)
        return picture

    def batch(self, rng: Random, mix: dict[str, int]) -> tuple[Batch, list[pictures.Picture]]:
        """A batch of the given kinds; its questions are of similar length."""
        near = rng.randrange(max(1, len(self.stock.questions) - _LENGTH_SPREAD))
        drawn = [self.draw(rng, kind, near) for kind, count in mix.items() for _ in range(count)]
        pad = self.writer.token(vocabulary.EOS)
        batch = collate([sequence for sequence, _ in drawn], pad, len(self.config.codebook_sizes))
        return batch, [picture for _, picture in drawn if picture is not None]
