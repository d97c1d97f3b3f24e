"""Stage 6: the language model over text, codes and pictures, with the audio head; the vision tower learns on.

python -m export.nano.language_stage DATA_FOLDER RUN_FOLDER [--steps N] [--speech-from STEP]

One batch mixes spoken and typed questions, follow-ups, transcriptions, non-questions (answered by the noise marker),
questions about pictures drawn on the spot and, from a step on, reading aloud and spoken answers. The vision tower also
learns dense labels, the kind and colour of the shape whose centre lies under each token; without them it stays at the
prior for long. Typed arithmetic covers all pairs of numbers, bare ("two plus three"), the held-out ones too: a fact
cannot be derived; the sentences with them are never heard in training.
"""

import argparse
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.nano import codes, pictures, training, vocabulary
from export.nano.codes import load_codes, load_tokenizer
from export.nano.composer import CONFIG, MIX, SPEECH_MIX, Composer, Library, read_library
from export.nano.config import read_config
from export.nano.model import Omni
from export.nano.sequences import Batch, Sequence, collate
from export.nano.vision_stage import GRID, PictureLabels, VisionTrainer

_MASKED = 0.05  # share of heard frames whose embedding is dropped


class LanguageTrainer(nn.Module):
    """The decoder, audio head and vision tower, with the heads for the dense picture labels."""

    def __init__(self, run: Path | None) -> None:
        super().__init__()
        self.config = read_config(CONFIG)
        whole = Omni(self.config)
        self.omni = whole
        del whole.audio_tokenizer  # codes are computed beforehand
        self.labels = PictureLabels(self.config.vision.hidden_size)
        self._start(run)

    @torch.no_grad()
    def _start(self, run: Path | None) -> None:
        """Small weights everywhere in the decoder; code embeddings start as a random projection of the code vectors."""
        for name, parameter in self.omni.named_parameters():
            if parameter.dim() == 2 and "visual" not in name:
                parameter.normal_(0, 0.02)
        if run is None:
            return
        if (seeing := training.load_state(run / "vision.pt")) is not None:
            vision = VisionTrainer(self.config)
            vision.load_state_dict(seeing["model"])
            self.omni.model.visual_model, self.omni.model.visual_bridge_model = (
                vision.visual_model,
                vision.visual_bridge_model,
            )
            self.labels = vision.labels
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
            rows = rows.masked_scatter((batch.ids == self.config.audio.audio_pad_token_id)[..., None], heard.to(rows.dtype))
        if not len(batch.pictures):
            return rows, None
        seen = model.embed_images(batch.pictures, GRID)
        places = batch.ids == self.config.vision.image_pad_token_id
        return rows.masked_scatter(places[..., None], seen.flatten(0, 1).to(rows.dtype)), seen

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Normalised hidden states [batch, T, hidden], and the picture rows."""
        with training.mixed_precision(self.training):
            rows, seen = self.rows(batch)
            hidden = self.omni.model(rows, batch.positions, bias=batch.bias().to(rows.dtype))[0]
        return hidden, seen

    def losses(self, batch: Batch, drawn: list[pictures.Picture]) -> dict[str, Tensor]:
        """Cross-entropy of text, mean cross-entropy of the code levels, dense picture loss; whichever apply."""
        hidden, seen = self.hidden(batch)
        learnt = batch.labels >= 0
        parts = {"text": F.cross_entropy(self.omni.lm_head(hidden[learnt]), batch.labels[learnt])}
        if len(batch.frames):
            parts["speech"] = self.speech_losses(hidden, batch).mean()
        if seen is not None:
            parts["picture"] = self.labels.loss(seen.float(), drawn)
        return parts

    def speech_losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each level [levels]; the end frame counts on level 0 only."""
        at = hidden[batch.frame_at[:, 0], batch.frame_at[:, 1]]
        ends = batch.frames[:, 0] == self.config.codebook_sizes[0]
        with training.mixed_precision(self.training):
            logits = [level.float() for level in self.omni.frame_logits(at, batch.frames)]
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
        only = Library(unseen[i : i + 1], [], library.pairs[i : i + 1], library.noises[i : i + 1])
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


def train(folder: Path, run: Path, steps: int, speech_from: int, every: int = 500) -> None:
    """Train to `steps`, going on from `run`/language.pt."""
    trainer = LanguageTrainer(run).train()
    optimizer = training.adamw(trainer.parameters(), 1e-3, decay=0.05)
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
            log.write(step, **evaluate(trainer, composer, tests, 100))


def main() -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--speech-from", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.folder, arguments.run, arguments.steps, arguments.speech_from)


if __name__ == "__main__":
    main()
