"""Measures a checkpoint on what was held out: python -m export.nano.evaluation DATA_FOLDER CHECKPOINT [FIGURE ...].

Figures: `vocoder` (mel of recordings to speech), `voice` (codes of recordings to speech), `hearing` (answers,
transcriptions, noise markers, follow-ups), `listening` (a real person's words), `reading` (the same questions as
`hearing` typed, also as people type), `outside` (what it cannot know), `conversing` (behind turns on other subjects),
`looking`, `drawings` (large ones, on any ground), `speaking` (question in, speech out). Shares carry 95 % Wilson
intervals, word error rates 95 % bootstrap intervals over the clips (Efron 1979); these stand beside the
recogniser's own on the recordings.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from scipy.signal import resample_poly
from scipy.stats import bootstrap

from export.nano import codes, corpus, domain, features, pictures, real_speech, vocabulary
from export.nano.corpus import Recording
from export.nano.engines import Style, open_engine
from export.nano.examiner import Examiner
from export.nano.judge import distance
from export.nano.language_stage import exact
from export.nano.sequences import Sequence
from export.nano.split import read_split
from export.nano.turns import unseen
from runtime.bundle import VisionFrontEnd
from runtime.image import resize

_MOST = 600  # items of a figure
_REAL = 200  # joined recordings of a real person
_SPOKEN = 500  # recordings of a figure that is judged by ear
_DIGITS = {domain.number(n): str(n) for n in range(100)}
# Colours as painting programs name them.
_PAINTS = {name: ImageColor.getrgb(name)[:3] for name in domain.COLORS}


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (1927)."""
    z, p = 1.96, right / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)  # at 0 and 1 rounding may step over the end


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
    """Unseen sentences and follow-ups as `hearing` asks them, typed; and the former as people type them."""
    found = unseen(examiner.clips("test_espeak"))[:_MOST]
    asked = [_ask(examiner, r, " " + r.clip.answer, typed=True) for r in found]
    followed = [_follow(examiner, *pair, typed=True) for pair in _pairs(examiner, "test_espeak")]
    loose = [_typed(examiner, _as_people_type(i, r.clip.text), r.clip.answer) for i, r in enumerate(found)]
    sequences = {"typed answered": asked, "typed followed": followed, "typed as people type": loose}
    return {name: _share(exact(examiner.predict(some))) for name, some in sequences.items()}


def _typed(examiner: Examiner, question: str, answer: str) -> Sequence:
    sequence = Sequence()
    examiner.writer.text(sequence, "<C_Q>" + question)
    examiner.writer.answer(sequence, " " + answer)
    return sequence


def _as_people_type(i: int, question: str) -> str:
    """Capitals, digits, signs, contractions and punctuation, each as it comes in turn."""
    mark = "" if question.startswith(("set", "turn", "make", "wake")) else "?"
    digits = re.sub("|".join(sorted(_DIGITS, key=len, reverse=True)), lambda m: _DIGITS[m.group()], question)
    signs = digits
    for word, sign in (("plus", "+"), ("minus", "-"), ("times", "x")):
        signs = re.sub(rf"(?<=\d) {word} (?=\d)", f" {sign} ", signs)
    short = re.sub(r"^what is", "What's", signs)
    return (question.upper() + mark, question.capitalize() + (mark or "."), short[:1].upper() + short[1:] + mark)[i % 3]


def outside(examiner: Examiner) -> dict[str, dict[str, float]]:
    """Sentences from outside its world that were written by hand, typed and in held-out voices: the honest sentence,
    or the noise marker."""
    engine, rng = open_engine("espeak", examiner.folder, 0), Random(4)
    voices = [v for v in read_split().heldout_voices if v.startswith("espeak/")]
    sentences, asked = Path(__file__).with_name("outside.txt").read_text().splitlines(), []
    for text in sentences:
        speech = engine.say(text, rng.choice(voices).split("/", 1)[1], Style())
        wave = resample_poly(speech.wave, 320, 441).astype(np.float32)  # 22,050 Hz
        heard = Sequence()
        examiner.writer.text(heard, "<C_Q>")
        examiner.writer.hear(heard, examiner.encode_wave(wave))
        examiner.writer.answer(heard, " " + domain.OUTSIDE)
        asked.append(heard)
    asked = [_typed(examiner, text, domain.OUTSIDE) for text in sentences] + asked
    marker = examiner.writer.token(vocabulary.NOISE_MARKER)
    fine = [best == labels or best[0] == marker for best, labels in examiner.predict(asked)]
    n = len(sentences)
    return {"outside typed": _share(fine[:n]), "outside spoken": _share(fine[n:])}


def listening(examiner: Examiner) -> dict[str, dict[str, float]]:
    """A real person: words and strings of words written down, and sums answered."""
    spoken = [*real_speech.words(), *real_speech.strings(_REAL)]
    written = [_written(examiner, s.wave) for s in spoken]
    wanted = [s.text.split() for s in spoken]
    counts = np.array([(distance(want, got), len(want)) for want, got in zip(wanted, written, strict=True)])
    asked = []
    for said, answer in real_speech.sums(_REAL):
        sequence = Sequence()
        examiner.writer.text(sequence, "<C_Q>")
        examiner.writer.hear(sequence, examiner.encode_wave(said.wave))
        examiner.writer.answer(sequence, " " + answer)
        asked.append(sequence)
    alone = len(spoken) - _REAL
    return {
        "real words": word_error_rate(*counts[:alone].T),
        "real strings of words": word_error_rate(*counts[alone:].T),
        "real sums answered": _share(exact(examiner.predict(asked))),
    }


def _written(examiner: Examiner, wave: np.ndarray) -> list[str]:
    """The words of a greedy transcript."""
    sequence = Sequence()
    examiner.writer.text(sequence, vocabulary.TRANSCRIBE)
    examiner.writer.hear(sequence, examiner.encode_wave(wave))
    ids, _, _ = examiner.write(sequence, (vocabulary.EOS, vocabulary.NOISE_MARKER))
    return examiner.writer.decode(ids).split()


def conversing(examiner: Examiner) -> dict[str, dict[str, float]]:
    """Questions that are answered rightly alone, behind one, two and five turns on other subjects."""
    found = [r for r in unseen(examiner.clips("test_espeak")) if r.clip.turn == 0][:_MOST]
    figures: dict[str, dict[str, float]] = {}
    for typed in (True, False):
        alone = exact(examiner.predict([_ask(examiner, r, " " + r.clip.answer, typed=typed) for r in found]))
        known = [r for r, right in zip(found, alone, strict=True) if right]
        for turns in (1, 2, 5):
            rng = Random(turns)
            asked = [_behind(examiner, rng, found, r, turns, typed) for r in known]
            name = f"{'typed' if typed else 'spoken'} behind {turns}"
            figures[name] = _share(exact(examiner.predict(asked)))
    return figures


def _behind(
    examiner: Examiner, rng: Random, others: list[Recording], asked: Recording, turns: int, typed: bool
) -> Sequence:
    """A question behind turns of other intents, of which some are about a picture."""
    sequence = Sequence()
    for _ in range(turns):
        other = rng.choice([r for r in others if r.clip.intent != asked.clip.intent])
        if rng.random() < 0.25:
            picture = pictures.draw_picture(rng, heldout=True)
            _show(examiner, sequence, picture, rng.choice(pictures.questions(picture)), last=False, learn=False)
            continue
        _put(examiner, sequence, other, typed)
        examiner.writer.answer(sequence, " " + other.clip.answer, last=False, learn=False)
    _put(examiner, sequence, asked, typed)
    examiner.writer.answer(sequence, " " + asked.clip.answer)
    return sequence


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
    sequence = Sequence()
    for i, pair in enumerate(pairs):
        last = i == len(pairs) - 1
        _show(examiner, sequence, None if i else picture, pair, last=last, learn=last)
    return sequence


def _show(
    examiner: Examiner,
    sequence: Sequence,
    picture: pictures.Picture | None,
    pair: tuple[str, str],
    last: bool,
    learn: bool,
) -> None:
    """A typed question about a picture that is shown, or was before, and its answer."""
    vision = examiner.config.vision
    examiner.writer.text(sequence, "<C_Q>")
    if picture is not None:
        patches = torch.from_numpy(pictures.patches(picture.pixels, vision.image_mean, vision.image_std)).float()
        height, width, _ = picture.pixels.shape
        examiner.writer.see(sequence, patches, (height // pictures.CELL, width // pictures.CELL))
    examiner.writer.text(sequence, pair[0])
    examiner.writer.answer(sequence, " " + pair[1], last=last, learn=learn)


def drawings(examiner: Examiner) -> dict[str, dict[str, float]]:
    """One to four shapes as somebody paints them, on large canvases of white and of plain colours, brought down as the
    runtime does it."""
    rng, vision = Random(77), examiner.config.vision
    front = VisionFrontEnd(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=vision.image_mean,
        image_std=vision.image_std,
        min_pixels=vision.min_pixels,
        max_pixels=vision.max_pixels,
    )
    asked: dict[str, list[Sequence]] = {"white": [], "coloured": []}
    for i in range(2 * _MOST):
        kind = "white" if i % 2 else "coloured"
        picture = _painted(rng, kind == "white", front)
        pair = rng.choice(pictures.draw_questions(rng, pictures.questions(picture), 1))
        asked[kind].append(_look(examiner, picture, [pair]))
    return {f"drawings {kind}": _share(exact(examiner.predict(some))) for kind, some in asked.items()}


def _painted(rng: Random, white: bool, front: VisionFrontEnd) -> pictures.Picture:
    """A canvas of 400 to 1,600 pixels with one to four shapes apart from each other, as the model gets it."""
    width, height = rng.choice(((800, 600), (640, 480), (1600, 900), (1024, 1024), (400, 400), (600, 800), (1200, 800)))
    ground = "white" if white else rng.choice([name for name in _PAINTS if name != "white"])
    image = Image.new("RGB", (width, height), _PAINTS[ground])
    canvas, side, shapes = ImageDraw.Draw(image), min(width, height), []
    places = rng.sample([(x, y) for x in (0.2, 0.5, 0.8) for y in (0.25, 0.75)], rng.choice((1, 1, 2, 3, 4)))
    for x, y in places:
        kind, color = rng.choice(domain.SHAPES), rng.choice([c for c in domain.COLORS if c != ground])
        radius = side * (rng.uniform(0.18, 0.24) if len(places) == 1 else rng.uniform(0.12, 0.18))
        shape = pictures.Shape(kind, color, x * width, y * height, radius)
        if kind == "circle":
            canvas.circle((shape.x, shape.y), radius, fill=_PAINTS[color])
        else:
            canvas.polygon(pictures.outline(shape, 0.0), fill=_PAINTS[color])
        shapes.append(shape)
    pixels = resize(np.asarray(image), front)
    scale = pixels.shape[1] / width, pixels.shape[0] / height
    moved = [replace(s, x=s.x * scale[0], y=s.y * scale[1], radius=s.radius * scale[1]) for s in shapes]
    return pictures.Picture(pixels, tuple(moved))


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
    "outside": outside,
    "listening": listening,
    "conversing": conversing,
    "looking": looking,
    "drawings": drawings,
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
