"""Stage 6: the language model over text, codes and pictures, with the audio head; the vision tower learns on.

python -m export.nano.language_stage DATA_FOLDER RUN_FOLDER [--steps N] [--speech-from STEP] [--pictures-from STEP]

One batch mixes spoken and typed questions, follow-ups, transcriptions and non-questions (answered by the noise marker);
from a step on also reading aloud and spoken answers; from another on questions about pictures drawn on the spot, when
the vision stage's tower is taken over, which goes on learning its dense labels. Typed arithmetic covers all pairs of
numbers, bare ("two plus three"), the held-out ones too: a fact cannot be derived; the sentences with them are never
heard in training. Conversations put turns on different subjects behind each other, typed, spoken and seen.
"""

import argparse
from collections.abc import Iterator
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
from export.nano.vision_stage import PictureLabels, VisionTrainer

_MASKED = 0.05  # share of heard frames whose embedding is dropped
_PEAK, _ADAM_SHARE = 3e-3, 1 / 3
# What Muon trains; embeddings, output layers and the audio head are left to AdamW.
_INNER = r"omni\.model\.(layers|visual_model\.blocks|visual_bridge_model)\."


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
        books = [book.embed for book in load_tokenizer(run).audio_bridge_model.codebooks]
        dim = books[0].shape[1]
        projection = torch.randn(dim, self.config.decoder.hidden_size) / dim**0.5
        for layer, book in zip(self.omni.model.audio_embed_layers, books, strict=True):
            layer.get_parameter("weight")[: len(book)] = 0.35 * book @ projection

    def open_eyes(self, run: Path) -> None:
        """Take over the vision tower, its projector and label heads from their own stage.

        Raises:
            FileNotFoundError: that stage has not run.
        """
        state = training.load_state(run / "vision.pt")
        if state is None:
            raise FileNotFoundError(f"{run / 'vision.pt'} is missing; run export.nano.vision_stage first")
        trained = VisionTrainer(self.config)
        trained.load_state_dict(state["model"])
        model = self.omni.model
        for mine, theirs in (
            (model.visual_model, trained.visual_model),
            (model.visual_bridge_model, trained.visual_bridge_model),
            (self.labels, trained.labels),
        ):
            mine.load_state_dict(theirs.state_dict())

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Input rows [batch, T, hidden], and the picture rows [pictures, tokens, hidden] among them."""
        model = self.omni.model
        rows = model.embed_tokens(batch.ids)
        if len(batch.codes):
            heard = model.embed_audio(batch.codes)
            if self.training:
                kept = torch.rand(len(heard)) > _MASKED * batch.heard.float()
                heard = heard * kept[:, None]
            rows = rows.masked_scatter(
                (batch.ids == self.config.audio.audio_pad_token_id)[..., None], heard.to(rows.dtype)
            )
        if not len(batch.pictures):
            return rows, None
        merge = self.config.vision.spatial_merge_size
        seen = model.embed_images(batch.pictures, [(merge * batch.cells[0], merge * batch.cells[1])])
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


Predicted = list[tuple[list[int], list[int]]]  # of each sequence: the likeliest tokens where one is due, and the right


@torch.no_grad()
def predict(trainer: LanguageTrainer, sequences: list[Sequence], pad: int) -> Predicted:
    """The likeliest token at every label, the right ones standing before it.

    Where all are right, greedy decoding gives exactly the labels, and the other way round.
    """
    out: list[tuple[list[int], list[int]]] = [([], [])] * len(sequences)
    for part in _alike(sequences, 32):
        batch = collate([sequences[i] for i in part], pad, len(trainer.config.codebook_sizes))
        best = trainer.omni.lm_head(trainer.hidden(batch)[0]).argmax(-1)
        for i, tokens, labels in zip(part, best, batch.labels, strict=True):
            due = labels >= 0
            out[i] = tokens[due].tolist(), labels[due].tolist()
    return out


def _alike(sequences: list[Sequence], most: int) -> Iterator[list[int]]:
    """Places of up to `most` sequences at a time whose pictures are of one size."""
    groups: dict[tuple[int, int] | None, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(sequence.cells, []).append(i)
    for group in groups.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]


def exact(predicted: Predicted) -> list[bool]:
    """Which sequences greedy decoding gives exactly."""
    return [tokens == labels for tokens, labels in predicted]


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
            out.append(Composer(only, composer.config, typed_share=0).draw(rng, task)[0])
    return out


def evaluate(trainer: LanguageTrainer, composer: Composer, tests: dict[str, Library], most: int) -> dict[str, float]:
    """Share of exactly right answers on each held-out set and task, and on fresh pictures."""
    trainer.eval()
    pad, figures = composer.writer.token(vocabulary.EOS), {}
    for name, library in tests.items():
        for task in ("noise",) if library.noises else ("ask", "transcribe", "follow"):
            sequences = test_sequences(composer, library, task, most)
            if sequences:
                right = exact(predict(trainer, sequences, pad))
                figures[f"{name.removeprefix('test_')}_{task}"] = sum(right) / len(right)
    rng = Random(13)
    looker = Composer(Library(), composer.config, questions=1)
    right = exact(predict(trainer, [looker.draw(rng, "look")[0] for _ in range(4 * most)], pad))
    trainer.train()
    return figures | {"look": sum(right) / len(right)}


def _mix(step: int, speech_from: int, pictures_from: int) -> dict[str, float]:
    """Weights of the kinds of sequences at a step."""
    mix = MIX | (SPEECH_MIX if step >= speech_from else {})
    if step >= pictures_from:
        return mix
    return {kind: weight for kind, weight in mix.items() if not kind.startswith(("look", "conversation"))}


def train(
    folder: Path, run: Path, steps: int, speech_from: int, pictures_from: int, rate: float = _PEAK, every: int = 500
) -> None:
    """Train to `steps` at the peak learning rate `rate`, going on from `run`/language.pt."""
    trainer = LanguageTrainer(run).train()
    optimizer = training.MuonAdamW(trainer, _INNER, rate, _ADAM_SHARE, decay=0.05)
    step, log = 0, training.Log(run / "language.jsonl")
    if (state := training.load_state(run / "language.pt")) is not None:
        trainer.load_state_dict(state["model"])
        training.restore(optimizer, state)
        step = state["step"]
    composer = Composer(read_library(folder, run, (*codes.QUESTIONS, "answers", "answers_more")), trainer.config)
    tests = {name: read_library(folder, run, (name,)) for name in codes.TESTS if load_codes(run, name) is not None}
    while step < steps:
        rng = training.seed_step(5, step)
        if step == pictures_from:
            trainer.open_eyes(run)
        batch, drawn = composer.batch(rng, _mix(step, speech_from, pictures_from))
        parts = trainer.losses(batch, drawn)
        loss = torch.stack([value * (0.3 if name == "picture" else 1.0) for name, value in parts.items()]).sum()
        training.set_rate(optimizer, training.cosine_rate(step, steps, rate))
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
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--speech-from", type=int, default=500)
    parser.add_argument("--pictures-from", type=int, default=2600)
    parser.add_argument("--rate", type=float, default=_PEAK, help="peak learning rate")
    given = parser.parse_args()
    torch.set_num_threads(1)
    train(given.folder, given.run, given.steps, given.speech_from, given.pictures_from, given.rate)


if __name__ == "__main__":
    main()
