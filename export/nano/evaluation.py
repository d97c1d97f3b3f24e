"""Measures a checkpoint on what was held out: python -m export.nano.evaluation DATA_FOLDER CHECKPOINT [FIGURE ...].

Figures: `vocoder` (mel of recordings to speech), `voice` (codes of recordings to speech), `hearing` (answers,
transcriptions, noise markers, follow-ups), `reading` (the same questions typed), `looking`, `speaking` (question in,
speech out). Shares carry 95 % Wilson intervals, word error rates 95 % bootstrap intervals over the clips (Efron 1979);
these stand beside the recogniser's own on the recordings.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from export.nano import codes, corpus, features, pictures, vocabulary
from export.nano.corpus import Recording
from export.nano.judge import Judge
from export.nano.language import Cache
from export.nano.language_stage import LanguageTrainer, Predicted, exact, predict
from export.nano.model import load_checkpoint
from export.nano.sequences import Sequence, Writer, collate
from export.nano.turns import unseen

_MOST = 600  # items of a figure
_SPOKEN = 500  # recordings of a figure that is judged by ear
_LONGEST_TEXT, _LONGEST_SPEECH = 24, 80  # tokens, frames


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (1927)."""
    z, p = 1.96, right / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)  # at 0 and 1 rounding may step over the end


class Examiner:
    """The checkpoint with everything that asks it."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.omni, self.hift = load_checkpoint(checkpoint)
        self.config = self.omni.config
        self.writer = Writer(checkpoint, self.config.codebook_sizes)
        self.trainer = LanguageTrainer(None).eval()
        self.trainer.omni = self.omni
        self.judge: Judge | None = None

    def predict(self, sequences: list[Sequence]) -> Predicted:
        """The likeliest tokens and the right ones where one is due."""
        return predict(self.trainer, sequences, self.writer.token(vocabulary.EOS))

    def encode(self, recording: Recording) -> Tensor:
        """Codes of a recording with 50 ms of silence around it."""
        bins = self.config.audio.num_mel_bins
        wave = np.pad(recording.wave(), (800, 800))
        return codes.encode_waves(self.omni.audio_tokenizer, [wave], bins)[0]

    def vocode(self, mel: Tensor) -> np.ndarray:
        """Mel [bins, T] -> samples at 24 kHz."""
        phase, noise = self.hift.draw(mel[None], torch.Generator().manual_seed(0))
        with torch.no_grad():
            return self.hift(mel[None], phase, noise)[0].numpy()

    def speak(self, spoken: Tensor) -> np.ndarray:
        """Codes [L, levels] -> samples at 24 kHz."""
        with torch.no_grad():
            mu = self.omni.audio_tokenizer.condition(spoken[None])
            noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(0))
            mel = self.omni.audio_tokenizer.audio_flow_matching_decoder.sample(mu, noise)
        return self.vocode(mel[0])

    @torch.no_grad()
    def start(self, sequence: Sequence) -> tuple[Tensor, Cache]:
        """Prefill: hidden states [1, T, hidden] and the cache."""
        batch = collate([sequence], 0, len(self.config.codebook_sizes))
        seen = None
        if len(batch.pictures):
            side = pictures.SIZE // self.config.vision.patch_size
            seen = self.omni.model.embed_images(batch.pictures, [(side, side)]).flatten(0, 1)
        rows = self.omni.model.embed(batch.ids, batch.codes if len(batch.codes) else None, seen)
        return self.omni.model(rows, torch.arange(1, rows.shape[1] + 1))

    @torch.no_grad()
    def follow(self, row: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """One more row [hidden]."""
        return self.omni.model(row[None, None], torch.tensor([past[0][0].shape[2] + 1]), past)

    @torch.no_grad()
    def write(self, sequence: Sequence, stops: tuple[str, ...]) -> tuple[list[int], Tensor, Cache]:
        """Greedy text without its stop token; the hidden state after that token has been read, and the cache."""
        ends = [self.writer.token(stop) for stop in stops]
        hidden, past = self.start(sequence)
        out: list[int] = []
        while True:
            token = int(self.omni.lm_head(hidden[0, -1]).argmax())
            hidden, past = self.follow(self.omni.model.embed_tokens(torch.tensor(token)), past)
            if token in ends or len(out) >= _LONGEST_TEXT:
                return out, hidden[0, -1], past
            out.append(token)

    @torch.no_grad()
    def utter(self, hidden: Tensor, past: Cache) -> Tensor:
        """Greedy frames [L, levels] from the hidden state of audiogen_start."""
        frames: list[Tensor] = []
        while len(frames) < _LONGEST_SPEECH:
            frame = self.omni.greedy_frame(hidden)
            if int(frame[0]) == self.config.codebook_sizes[0]:
                break
            frames.append(frame)
            states, past = self.follow(self.omni.model.embed_audio(frame), past)
            hidden = states[0, -1]
        return torch.stack(frames) if frames else torch.zeros(0, len(self.config.codebook_sizes), dtype=torch.long)

    def clips(self, name: str) -> list[Recording]:
        """A held-out set in random order, for the parts of a figure to be alike."""
        found = corpus.recordings(self.folder / name)
        Random(1).shuffle(found)
        return found

    def errors(self, spoken: Iterable[tuple[np.ndarray, int, str]]) -> np.ndarray:
        """Wrong words, and words in all, of each clip by the judge: [n, 2]."""
        self.judge = self.judge or Judge(self.folder)
        return self.judge.errors(spoken)


def _share(right: list[bool]) -> dict[str, float]:
    low, high = interval(sum(right), len(right))
    return {"share": sum(right) / len(right), "low": low, "high": high, "n": len(right)}


def word_error_rate(wrong: np.ndarray, words: np.ndarray) -> dict[str, float]:
    """Wrong words of each clip [n], which may be a difference of two ways to speak it, over all its words [n]."""

    def rate(wrong: np.ndarray, words: np.ndarray, axis: int = -1) -> np.ndarray:
        return wrong.sum(axis) / words.sum(axis)

    drawn = bootstrap(
        (wrong, words), rate, paired=True, vectorized=True, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return {"wer": float(rate(wrong, words)), "low": float(drawn.low), "high": float(drawn.high), "n": len(wrong)}


def vocoder(examiner: Examiner) -> dict[str, dict[str, float]]:
    """Held-out recordings, and their mels through the vocoder."""
    found = examiner.clips("answers_heldout")[:_SPOKEN]
    bins = examiner.config.vocoder.in_channels

    def made() -> Iterator[tuple[np.ndarray, int, str]]:
        for r in found:
            mel = features.spoken_mel(torch.from_numpy(r.wave())[None], bins)[0]
            yield examiner.vocode(mel), features.SPOKEN_RATE, r.clip.text

    own = examiner.errors((r.wave(), r.clip.rate, r.clip.text) for r in found)
    spoken = examiner.errors(made())
    return {
        "recordings": word_error_rate(*own.T),
        "vocoder": word_error_rate(*spoken.T),
        "vocoder above recordings": word_error_rate(spoken[:, 0] - own[:, 0], own[:, 1]),
    }


def voice(examiner: Examiner) -> dict[str, dict[str, float]]:
    """Held-out recordings through codes, flow matching and vocoder."""
    found, draws = examiner.clips("answers_heldout")[:_SPOKEN], np.random.default_rng(0)
    bins = examiner.config.audio.num_mel_bins

    def made() -> Iterator[tuple[np.ndarray, int, str]]:
        for r in found:
            wave = codes.heard_version(codes.target_wave(r, 0, draws))
            coded = codes.encode_waves(examiner.omni.audio_tokenizer, [wave], bins)[0]
            yield examiner.speak(coded), features.SPOKEN_RATE, r.clip.text

    return {"voice": word_error_rate(*examiner.errors(made()).T)}


def _put(examiner: Examiner, sequence: Sequence, recording: Recording, typed: bool) -> None:
    """The user's turn, heard or typed."""
    examiner.writer.text(sequence, "<C_Q>")
    if typed:
        examiner.writer.text(sequence, recording.clip.text)
    else:
        examiner.writer.hear(sequence, examiner.encode(recording))


def _ask(examiner: Examiner, recording: Recording, answer: str, spoken: bool = False, typed: bool = False) -> Sequence:
    """A question; with the answer to be predicted, unless it is to be spoken."""
    sequence = Sequence()
    _put(examiner, sequence, recording, typed)
    if spoken:
        examiner.writer.text(sequence, "<audiotext_start_baichuan><C_A>")
    else:
        examiner.writer.answer(sequence, answer)
    return sequence


def _follow(examiner: Examiner, first: Recording, then: Recording, typed: bool = False) -> Sequence:
    sequence = Sequence()
    _put(examiner, sequence, first, typed)
    examiner.writer.answer(sequence, " " + first.clip.answer, last=False, learn=False)
    _put(examiner, sequence, then, typed)
    examiner.writer.answer(sequence, " " + then.clip.answer)
    return sequence


def _transcribe(examiner: Examiner, recording: Recording) -> Sequence:
    sequence = Sequence()
    examiner.writer.text(sequence, vocabulary.TRANSCRIBE)
    examiner.writer.hear(sequence, examiner.encode(recording))
    examiner.writer.text(sequence, f" {recording.clip.text}{vocabulary.EOS}", learn=True)
    return sequence


def hearing(examiner: Examiner) -> dict[str, dict[str, float]]:
    """Unseen sentences: answers, arithmetic among them, transcriptions, commands taken for noise; and noise itself."""
    figures: dict[str, dict[str, float]] = {}
    for name in codes.TESTS:
        found = examiner.clips(name)
        if found and found[0].clip.intent == "noise":
            asked = [_ask(examiner, r, vocabulary.NOISE_MARKER) for r in found[:_MOST]]
            figures[f"{name} marked"] = _share(exact(examiner.predict(asked)))
        elif found:
            figures |= {f"{name} {what}": share for what, share in _commands(examiner, name, unseen(found)).items()}
    return figures


def _commands(examiner: Examiner, name: str, found: list[Recording]) -> dict[str, dict[str, float]]:
    found = found[:_MOST]
    answers = examiner.predict([_ask(examiner, r, " " + r.clip.answer) for r in found])
    right = exact(answers)
    sums = [ok for ok, r in zip(right, found, strict=True) if r.clip.intent in ("add", "sub", "mul", "half")]
    marker = examiner.writer.token(vocabulary.NOISE_MARKER)
    written = examiner.predict([_transcribe(examiner, r) for r in found])
    pairs = _pairs(examiner, name)
    tokens = [a == b for best, labels in written for a, b in zip(best, labels, strict=True)]
    figures = {
        "answered": _share(right),
        "rejected": _share([best[0] == marker for best, _ in answers]),
        "transcribed": _share(exact(written)),
        "transcript tokens": _share(tokens),
    }
    if sums:
        figures["arithmetic"] = _share(sums)
    if pairs:
        followed = examiner.predict([_follow(examiner, first, then) for first, then in pairs])
        figures["followed"] = _share(exact(followed))
    return figures


def _pairs(examiner: Examiner, name: str) -> list[tuple[Recording, Recording]]:
    """Questions with their follow-ups."""
    found = corpus.recordings(examiner.folder / name)
    return [(first, then) for first, then in pairwise(found) if then.clip.turn == 1][:_MOST]


def reading(examiner: Examiner) -> dict[str, dict[str, float]]:
    """Unseen sentences and follow-ups as `hearing` asks them, typed."""
    found = unseen(examiner.clips("test_espeak"))[:_MOST]
    asked = [_ask(examiner, r, " " + r.clip.answer, typed=True) for r in found]
    followed = [_follow(examiner, *pair, typed=True) for pair in _pairs(examiner, "test_espeak")]
    sequences = {"typed answered": asked, "typed followed": followed}
    return {name: _share(exact(examiner.predict(some))) for name, some in sequences.items()}


def looking(examiner: Examiner) -> dict[str, dict[str, float]]:
    """Typed questions about fresh pictures, digits being held-out ones, by the kind of question; and questions that
    follow one to three others about the same picture, to which the right answers were given."""
    rng, by_kind = Random(10_000), {}
    for _ in range(4 * _MOST):
        picture = pictures.draw_picture(rng, heldout=True)
        pair = pictures.draw_question(rng, pictures.questions(picture))
        kinds = ("how many", "color", "digit", "number", "say", "word", "where")
        kind = next((kind for kind in kinds if kind in pair[0]), "shape")
        by_kind.setdefault(f"looking {kind}", []).append(_look(examiner, picture, [pair]))
    rights = {kind: exact(examiner.predict(asked)) for kind, asked in sorted(by_kind.items())}
    rights["looking"] = [right for some in rights.values() for right in some]
    again = []
    while len(again) < _MOST:
        picture = pictures.draw_picture(rng, heldout=True)
        pairs = pictures.draw_questions(rng, pictures.questions(picture), rng.randint(2, 4))
        if len(pairs) > 1:
            again.append(_look(examiner, picture, pairs))
    rights["looking again"] = exact(examiner.predict(again))
    return {kind: _share(right) for kind, right in rights.items()}


def _look(examiner: Examiner, picture: pictures.Picture, pairs: list[tuple[str, str]]) -> Sequence:
    """Typed questions about one picture, the last of which is to be answered."""
    sequence, vision = Sequence(), examiner.config.vision
    for i, (question, answer) in enumerate(pairs):
        examiner.writer.text(sequence, "<C_Q>")
        if i == 0:
            patches = torch.from_numpy(pictures.patches(picture.pixels, vision.image_mean, vision.image_std)).float()
            examiner.writer.see(sequence, patches, (pictures.SIZE // pictures.CELL) ** 2)
        examiner.writer.text(sequence, question)
        last = i == len(pairs) - 1
        examiner.writer.answer(sequence, " " + answer, last=last, learn=last)
    return sequence


def speaking(examiner: Examiner) -> dict[str, dict[str, float]]:
    """Spoken questions in held-out voices, answered aloud, judged against the right answer."""
    found = [r for r in examiner.clips("test_espeak") if r.clip.turn == 0 and r.clip.intent != "look"][:_SPOKEN]

    def made() -> Iterator[tuple[np.ndarray, int, str]]:
        for r in found:
            asked = _ask(examiner, r, "", spoken=True)
            _, hidden, past = examiner.write(asked, ("<audiogen_start_baichuan>", vocabulary.EOS))
            frames = examiner.utter(hidden, past)
            wave = examiner.speak(frames) if len(frames) else np.zeros(features.SPOKEN_RATE, np.float32)
            yield wave, features.SPOKEN_RATE, r.clip.answer

    return {"speaking": word_error_rate(*examiner.errors(made()).T)}


FIGURES: dict[str, Callable[[Examiner], dict[str, dict[str, float]]]] = {
    "vocoder": vocoder,
    "voice": voice,
    "hearing": hearing,
    "reading": reading,
    "looking": looking,
    "speaking": speaking,
}


def main() -> None:
    """Print the figures as a table and as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    examiner, table = Examiner(arguments.folder, arguments.checkpoint), {}
    for name in arguments.figures or FIGURES:
        for row, values in FIGURES[name](examiner).items():
            table[row] = {key: round(value, 4) for key, value in values.items()}
            print(f"{row:32}" + "  ".join(f"{key} {value:g}" for key, value in table[row].items()), flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
