"""Stages 5 to 7: the language model over text, codes and pictures, with the vision tower and the audio head.

python -m export.nano.language_stage DATA_FOLDER RUN_FOLDER [--steps N] [--speech-from STEP]

One batch mixes spoken and typed questions, follow-ups, transcriptions, non-questions (answered by the noise marker),
questions about pictures drawn on the spot and, from a step on, reading aloud and spoken answers. The vision tower also
learns dense labels, the kind and colour of the shape whose centre lies under each token; without them it stays at the
prior for long. Typed arithmetic covers all pairs of numbers, bare ("two plus three"), the held-out ones too: a fact
cannot be derived; the sentences with them are never heard in training.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.nano import codes, corpus, domain, pictures, training, vocabulary
from export.nano.codes import CodedSet, load_codes, load_tokenizer
from export.nano.config import ModelConfig, read_config
from export.nano.corpus import Recording
from export.nano.model import Omni
from export.nano.sequences import Batch, Sequence, Writer, collate
from export.nano.split import read_split

CONFIG = Path(__file__).with_name("checkpoint")
_GRID = [(pictures.SIZE // 14, pictures.SIZE // 14)]
_IMAGE_TOKENS = (pictures.SIZE // pictures.CELL) ** 2
_MASKED = 0.05  # share of heard frames whose embedding is dropped
_DROPOUT = 0.1
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

    def __init__(self, library: Library, config: ModelConfig) -> None:
        self.library, self.config = library, config
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
                self.writer.hear(sequence, rng.choice(self.library.noises).codes(rng))
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
        questions = self.library.questions
        return questions[min(near + rng.randrange(_LENGTH_SPREAD), len(questions) - 1)]

    def _transcribe(self, rng: Random, sequence: Sequence, near: int) -> Sequence:
        noise = rng.random() < 0.12
        item = rng.choice(self.library.noises) if noise else self._question(rng, near)
        self.writer.text(sequence, vocabulary.TRANSCRIBE)
        self.writer.hear(sequence, item.codes(rng))
        words = vocabulary.NOISE_MARKER if noise else self._spaced(item.recording.clip.text)
        self.writer.text(sequence, words + vocabulary.EOS, learn=True)
        return sequence

    def _read(self, rng: Random, sequence: Sequence, near: int) -> Sequence:
        item = rng.choice(self.library.target)
        # A person's text comes without the space in front.
        text = item.recording.clip.text if rng.random() < 0.7 else self._spaced(item.recording.clip.text)
        self.writer.text(sequence, text + "<audiogen_start_baichuan>")
        self.writer.say(sequence, item.codes(rng))
        self.writer.text(sequence, vocabulary.EOS, learn=True)
        return sequence

    def _follow(self, rng: Random, sequence: Sequence) -> None:
        first, then = rng.choice(self.library.pairs)
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
            item = rng.choice(self.library.questions)
            spoken = self.library.by_answer.get(item.recording.clip.answer)
            if spoken:
                break
        else:
            item, spoken = None, [rng.choice(self.library.target)]
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
            if recorded := [pair for pair in choices if pair[1] in self.library.by_answer]:
                choices = recorded
                break
            picture = pictures.draw_picture(rng)
            choices = pictures.questions(picture)
        question, answer = pictures.draw_question(rng, choices)
        vision = self.config.vision
        rows = pictures.patches(picture.pixels, vision.image_mean, vision.image_std)
        self.writer.see(sequence, torch.from_numpy(rows).float(), _IMAGE_TOKENS)
        spoken = self.library.about_pictures.get(question)
        if spoken and rng.random() < 0.6:
            self.writer.hear(sequence, rng.choice(spoken).codes(rng))
        else:
            self.writer.text(sequence, question)
        recordings = self.library.by_answer.get(answer, []) if aloud else []
        self.writer.answer(sequence, self._spaced(answer), rng.choice(recordings).codes(rng) if recordings else None)
        return picture

    def batch(self, rng: Random, mix: dict[str, int]) -> tuple[Batch, list[pictures.Picture]]:
        """A batch of the given kinds; its questions are of similar length."""
        near = rng.randrange(max(1, len(self.library.questions) - _LENGTH_SPREAD))
        drawn = [self.draw(rng, kind, near) for kind, count in mix.items() for _ in range(count)]
        pad = self.writer.token(vocabulary.EOS)
        batch = collate([sequence for sequence, _ in drawn], pad, len(self.config.codebook_sizes))
        return batch, [picture for _, picture in drawn if picture is not None]


class LanguageTrainer(nn.Module):
    """The decoder, audio head and vision tower, with the heads for the dense picture labels."""

    def __init__(self, run: Path | None) -> None:
        super().__init__()
        self.config = read_config(CONFIG)
        whole = Omni(self.config)
        self.omni = whole
        del whole.audio_tokenizer  # codes are computed beforehand
        width = self.config.vision.hidden_size
        self.kinds = nn.Linear(width, len(pictures.KINDS))
        self.colors = nn.Linear(width, 1 + len(domain.COLORS))
        self.digits = nn.Linear(width, 10)
        self._start(run)

    @torch.no_grad()
    def _start(self, run: Path | None) -> None:
        """Small weights everywhere in the decoder; code embeddings start as a random projection of the code vectors."""
        for name, parameter in self.omni.named_parameters():
            if parameter.dim() == 2 and "visual" not in name:
                parameter.normal_(0, 0.02)
        if run is None:
            return
        books = [book.embed for book in load_tokenizer(run).audio_bridge_model.codebooks]
        dim = books[0].shape[1]
        projection = torch.randn(dim, self.config.decoder.hidden_size) / dim**0.5
        for layer, book in zip(self.omni.model.audio_embed_layers, books, strict=True):
            layer.get_parameter("weight")[: len(book)] = 0.35 * book @ projection

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Input rows [batch, T, hidden], and the picture rows [pictures, tokens, hidden] among them."""
        model = self.omni.model
        rows = model.embed_tokens(batch.ids)
        if len(batch.codes):
            heard = model.embed_audio(batch.codes)
            if self.training:
                kept = torch.rand(len(heard)) > _MASKED * batch.heard.float()
                heard = heard * kept[:, None]
            rows = rows.masked_scatter((batch.ids == self.config.audio.audio_pad_token_id)[..., None], heard)
        if not len(batch.pictures):
            return rows, None
        seen = model.embed_images(batch.pictures, _GRID)
        places = batch.ids == self.config.vision.image_pad_token_id
        return rows.masked_scatter(places[..., None], seen.flatten(0, 1)), seen

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Normalised hidden states [batch, T, hidden], and the picture rows."""
        rows, seen = self.rows(batch)
        positions = torch.arange(1, rows.shape[1] + 1)
        return self.omni.model(rows, positions, dropout=_DROPOUT)[0], seen

    def picture_loss(self, seen: Tensor, drawn: list[pictures.Picture]) -> Tensor:
        """Cross-entropies of kind and colour under each token and of the digit of the whole picture."""
        cells = [picture.cells() for picture in drawn]
        kinds = torch.stack([torch.from_numpy(kind).flatten() for kind, _ in cells])
        colors = torch.stack([torch.from_numpy(color).flatten() for _, color in cells])
        loss = F.cross_entropy(self.kinds(seen).flatten(0, 1), kinds.flatten())
        loss = loss + F.cross_entropy(self.colors(seen).flatten(0, 1), colors.flatten())
        digits = [(i, p.digit) for i, p in enumerate(drawn) if p.digit is not None]
        if digits:
            at, value = (torch.tensor(part) for part in zip(*digits, strict=True))
            loss = loss + F.cross_entropy(self.digits(seen.mean(1))[at], value)
        return loss

    def losses(self, batch: Batch, drawn: list[pictures.Picture]) -> dict[str, Tensor]:
        """Cross-entropy of text, mean cross-entropy of the code levels, dense picture loss; whichever apply."""
        hidden, seen = self.hidden(batch)
        learnt = batch.labels >= 0
        parts = {"text": F.cross_entropy(self.omni.lm_head(hidden[learnt]), batch.labels[learnt])}
        if len(batch.frames):
            parts["speech"] = self.speech_losses(hidden, batch).mean()
        if seen is not None:
            parts["picture"] = self.picture_loss(seen, drawn)
        return parts

    def speech_losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each level [levels]; the end frame counts on level 0 only."""
        at = hidden[batch.frame_at[:, 0], batch.frame_at[:, 1]]
        ends = batch.frames[:, 0] == self.config.codebook_sizes[0]
        logits = self.omni.frame_logits(at, batch.frames)
        first = F.cross_entropy(logits[0], batch.frames[:, 0])
        later = [F.cross_entropy(x[~ends], batch.frames[~ends, i]) for i, x in enumerate(logits) if i > 0]
        return torch.stack([first, *later])


def exact(trainer: LanguageTrainer, sequences: list[Sequence], pad: int) -> list[bool]:
    """Whether greedy decoding would give each sequence's labels exactly: every label is the argmax where it is due."""
    right: list[bool] = []
    levels = len(trainer.config.codebook_sizes)
    with torch.no_grad():
        for i in range(0, len(sequences), 32):
            batch = collate(sequences[i : i + 32], pad, levels)
            best = trainer.omni.lm_head(trainer.hidden(batch)[0]).argmax(-1)
            right += ((best == batch.labels) | (batch.labels < 0)).all(1).tolist()
    return right


def test_sequences(composer: Composer, library: Library, task: str, most: int) -> list[Sequence]:
    """Sequences of a held-out set: `ask` and `transcribe` of unseen sentences, `follow`, `noise`."""
    rng, out = Random(11), []
    heldout = composer.split.sentence_is_heldout
    unseen = [q for q in library.questions if q.recording.clip.key and heldout(q.recording.clip.key)]
    rng.shuffle(unseen)
    count = {"follow": len(library.pairs), "noise": len(library.noises)}.get(task, len(unseen))
    for i in range(min(most, count)):
        only = Library(unseen[i : i + 1], library.pairs[i : i + 1], library.noises[i : i + 1])
        if task == "transcribe":
            sequence = Sequence()
            composer.writer.text(sequence, vocabulary.TRANSCRIBE)
            composer.writer.hear(sequence, only.questions[0].codes(rng))
            composer.writer.text(sequence, " " + only.questions[0].recording.clip.text + vocabulary.EOS, learn=True)
            out.append(sequence)
        else:
            out.append(Composer(only, composer.config).draw(rng, task)[0])
    return out


def evaluate(trainer: LanguageTrainer, composer: Composer, tests: dict[str, Library], most: int) -> dict[str, float]:
    """Share of exactly right answers on each held-out set and task, and on fresh pictures."""
    trainer.eval()
    pad, figures = composer.writer.token(vocabulary.EOS), {}
    for name, library in tests.items():
        for task in ("noise",) if library.noises else ("ask", "transcribe", "follow"):
            sequences = test_sequences(composer, library, task, most)
            if sequences:
                right = exact(trainer, sequences, pad)
                figures[f"{name.removeprefix('test_')}_{task}"] = sum(right) / len(right)
    rng = Random(13)
    right = exact(trainer, [composer.draw(rng, "look")[0] for _ in range(most)], pad)
    trainer.train()
    return figures | {"look": sum(right) / len(right)}


def train(folder: Path, run: Path, steps: int, speech_from: int, every: int = 250) -> None:
    """Train to `steps`, going on from `run`/language.pt."""
    trainer = LanguageTrainer(run).train()
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    step, log = 0, training.Log(run / "language.jsonl")
    if (state := training.load_state(run / "language.pt")) is not None:
        trainer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    composer = Composer(read_library(folder, run, (*codes.QUESTIONS, "answers", "answers_more")), trainer.config)
    tests = {name: read_library(folder, run, (name,)) for name in codes.TESTS if load_codes(run, name) is not None}
    while step < steps:
        rng = training.seed_step(5, step)
        batch, drawn = composer.batch(rng, MIX | (SPEECH_MIX if step >= speech_from else {}))
        parts = trainer.losses(batch, drawn)
        loss = torch.stack([value * (0.3 if name == "picture" else 1.0) for name, value in parts.items()]).sum()
        training.set_rate(optimizer, training.cosine_rate(step, steps, 1e-3))
        training.clipped_step(loss, optimizer, trainer.parameters())
        log.add(**{name: value.detach() for name, value in parts.items()})
        step += 1
        if step % every == 0 or step == steps:
            training.save_state(
                run / "language.pt", model=trainer.state_dict(), optimizer=optimizer.state_dict(), step=step
            )
            log.write(step, **evaluate(trainer, composer, tests, 200))


def main() -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--speech-from", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.folder, arguments.run, arguments.steps, arguments.speech_from)


if __name__ == "__main__":
    main()
