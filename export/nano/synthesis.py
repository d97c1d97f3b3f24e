"""Makes every recording, deterministically and resumably: python -m export.nano.synthesis DATA_FOLDER [SET ...].

A set is a folder of shards of a few hundred clips. Each shard draws from its own seed (set name and shard number), so
a run that is stopped goes on with the first shard that is missing, and the result does not depend on where it stopped.
"""

import argparse
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
from scipy.signal import resample_poly

from export.nano import corpus, domain, noises, outside, pictures
from export.nano.corpus import Clip
from export.nano.engines import Engine, Style, Utterance, open_engine
from export.nano.split import Split, read_split

QUESTION_RATE = 16000  # what the audio encoder hears
ANSWER_RATE = 24000  # what the vocoder says
TARGET_VOICE = "piper/joe"
SHARD = 400  # clips
_FOLLOW_UPS = 0.35  # share of questions with a second turn
_HELDOUT_PAIRS = 0.2  # share of draws for held-out sets that ask for a pair of turns
_MURMURS, _OWN_WORDS, _AMONG_PEOPLE = 0.2, 0.15, 0.4  # shares of the talk that is not for the assistant
# The rest of that talk is made of these words in random order; none begins like a command.
_OTHER_WORDS = (
    "because yesterday nobody people before house street never always think going would could should maybe nothing "
    "something everyone school train ticket dinner lunch teacher brother sister mother father letter market money "
    "really almost enough without between through together against country water number story question answer moment "
    "said went came took found gave told felt became left kept began seemed looked turned walked money later earlier "
    "he she they we his her their our this that these those with from about into over under again once only even still"
).split()


@dataclass(frozen=True)
class Plan:
    """One set: its voices, its size and what is said in it."""

    engine: str
    clips: int
    kind: Literal["questions", "answers", "more_answers", "other_talk", "noises"]
    heldout: bool = False  # held-out voices and noises, and of the sentences with a key the held-out ones only
    seen_voices: bool = False  # training voices although the sentences are held out


PLANS: dict[str, Plan] = {
    "questions_espeak": Plan("espeak", 24000, "questions"),
    "questions_flite": Plan("flite", 3200, "questions"),
    "answers": Plan("piper", 4800, "answers"),
    "answers_more": Plan("piper", 1600, "more_answers"),
    "answers_heldout": Plan("piper", 800, "answers", heldout=True, seen_voices=True),
    "questions_piper": Plan("piper", 1600, "questions"),
    "test_espeak": Plan("espeak", 2000, "questions", heldout=True),
    "test_espeak_seen": Plan("espeak", 800, "questions", heldout=True, seen_voices=True),
    "test_flite": Plan("flite", 2000, "questions", heldout=True),
    "test_festival": Plan("festival", 800, "questions", heldout=True),
    "other_talk": Plan("espeak", 2400, "other_talk"),
    "other_talk_flite": Plan("flite", 800, "other_talk"),
    "other_talk_piper": Plan("piper", 800, "other_talk"),
    "noises": Plan("espeak", 2800, "noises"),
    "test_other_talk": Plan("espeak", 800, "other_talk", heldout=True),
    "test_noises": Plan("espeak", 800, "noises", heldout=True),
    "questions_kokoro": Plan("kokoro", 1600, "questions"),
    "other_talk_kokoro": Plan("kokoro", 400, "other_talk"),
    "test_kokoro": Plan("kokoro", 800, "questions", heldout=True),
}


def _voices(plan: Plan, split: Split) -> list[str]:
    names = split.heldout_voices if plan.heldout and not plan.seen_voices else split.train_voices
    return [v for v in names if v.startswith(plan.engine + "/")]


def _style(rng: Random, plan: Plan, target: bool) -> Style:
    """How a clip is spoken: answers always alike, questions as varied as the engine allows."""
    if target:
        return Style(speed=1.0, liveliness=0.4)
    blend: tuple[tuple[str, float], ...] = ()
    if plan.engine == "kokoro" and not plan.heldout:
        named = [v.split("/", 1)[1] for v in rng.sample(_voices(plan, read_split()), rng.randint(1, 3))]
        weights = np.array([rng.gammavariate(0.7, 1) for _ in named]) + 1e-3
        blend = tuple(zip(named, (float(w) for w in weights / weights.sum()), strict=True))
    few = plan.engine in ("kokoro", "piper", "flite")
    low, high = (0.73, 1.3) if plan.engine == "espeak" else (0.82, 1.25)
    style = Style(rng.uniform(low, high), rng.uniform(0.15, 0.85), rng.uniform(0.2, 0.9), rng.uniform(0.5, 1.1), blend)
    # These engines have few voices: most of their sentences are spoken as by somebody larger or smaller.
    return replace(style, throat=rng.uniform(0.74, 1.16)) if few and not plan.heldout and rng.random() < 0.75 else style


def _tidy(speech: Utterance, rate: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Resample to `rate`, cut to 50 ms of silence before and 75 ms after, peak 0.7; alignment in samples."""
    common = int(np.gcd(speech.rate, rate))
    wave = resample_poly(speech.wave, rate // common, speech.rate // common).astype(np.float32)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    start = max(0, int(loud[0]) - rate // 20)
    wave = wave[start : int(loud[-1]) + rate * 3 // 40]
    alignment = [(int(seconds * rate) - start, phone) for seconds, phone in speech.alignment]
    return wave * (0.7 / float(np.abs(wave).max())), alignment


class _Shard:
    """One shard in the making: its random source, its engine and the clips so far."""

    def __init__(self, plan: Plan, name: str, index: int, folder: Path) -> None:
        self.plan, self.split = plan, read_split()
        self.seed = zlib.crc32(f"{self.split.salt}/{name}/{index}".encode())
        self.rng = Random(self.seed)
        self.engine: Engine = open_engine(plan.engine, folder, self.seed % 2**31)
        self.voices = _voices(plan, self.split)
        self.clips: list[tuple[Clip, np.ndarray]] = []

    def wanted(self, key: str | None) -> bool:
        """Sentences without a key go everywhere, the others to the side of the split that they belong to."""
        return key is None or self.split.sentence_is_heldout(key) == self.plan.heldout

    def speak(self, turn: domain.Turn, voice: str, style: Style, rate: int, number: int = 0) -> None:
        """Record one sentence."""
        speech = self.engine.say(turn.question, voice.split("/", 1)[1], style)
        wave, alignment = _tidy(speech, rate)
        clip = Clip(turn.question, turn.answer, turn.intent, turn.key, voice, number, rate, 0, 0, alignment)
        self.clips.append((clip, wave))

    def questions(self) -> None:
        """A question and, for some, the follow-up in the same voice."""
        if self.plan.heldout:
            self._heldout_questions()
            return
        turn = domain.draw_turn(self.rng)
        if not self.wanted(turn.key):
            return
        voice, style = self.rng.choice(self.voices), _style(self.rng, self.plan, target=False)
        then = domain.draw_follow_up(self.rng, turn) if self.rng.random() < _FOLLOW_UPS else None
        self.speak(turn, voice, style, QUESTION_RATE)
        if then is not None and self.wanted(then.key):
            self.speak(then, voice, style, QUESTION_RATE, number=1)

    def _heldout_questions(self) -> None:
        """An unseen sentence, or two turns that were never heard together, of which the first may be a seen one; a few
        sentences without content of their own (greetings) complete the set."""
        turn = domain.draw_turn(self.rng)
        then = domain.draw_follow_up(self.rng, turn) if self.rng.random() < _HELDOUT_PAIRS else None
        if then is None:
            usable = self.wanted(turn.key) and (turn.key is not None or self.rng.random() < 0.05)
        else:
            usable = self.wanted(then.key)
        if not usable:
            return
        voice, style = self.rng.choice(self.voices), _style(self.rng, self.plan, target=False)
        self.speak(turn, voice, style, QUESTION_RATE)
        if then is not None:
            self.speak(then, voice, style, QUESTION_RATE, number=1)

    def answers(self) -> None:
        """What the assistant says: an answer, or words in random order, in the target voice."""
        turn = domain.draw_turn(self.rng)
        text = turn.answer if self.rng.random() < 0.6 else domain.draw_reading(self.rng)
        self._answer(text, text)

    def more_answers(self) -> None:
        """Answers that need a picture or the turn before; those about pictures are few and all belong to training."""
        if self.rng.random() < 0.6:
            pairs = pictures.questions(pictures.draw_picture(self.rng))
            self._answer(pictures.draw_question(self.rng, pairs)[1], None)
            return
        then = domain.draw_follow_up(self.rng, domain.draw_turn(self.rng))
        if then is not None:
            self._answer(then.answer, then.answer)

    def _answer(self, text: str, key: str | None) -> None:
        if self.wanted(key):
            style = _style(self.rng, self.plan, target=True)
            self.speak(domain.Turn(text, "", "read", key), TARGET_VOICE, style, ANSWER_RATE)

    def other_talk(self) -> None:
        """Speech that is not for the assistant: talk, a listener's murmur, or what the assistant itself says."""
        draw = self.rng.random()
        if draw < _MURMURS:
            text, key = self.rng.choice(domain.BACKCHANNELS), None
        elif draw < _MURMURS + _OWN_WORDS:
            turn = domain.draw_turn(self.rng)
            if turn.intent in ("chat", "repeat", "word", "outside", "look"):
                return
            text = key = turn.answer
        elif draw < _MURMURS + _OWN_WORDS + _AMONG_PEOPLE:
            text = key = outside.draw_talk(self.rng)
        else:
            text = key = " ".join(self.rng.choice(_OTHER_WORDS) for _ in range(self.rng.randint(3, 10)))
        if not self.wanted(key):
            return
        voice, style = self.rng.choice(self.voices), _style(self.rng, self.plan, target=False)
        self.speak(domain.Turn(text, "", "noise", key), voice, style, QUESTION_RATE)

    def noises(self) -> None:
        """A sound that is no speech."""
        kinds = self.split.heldout_noises if self.plan.heldout else self.split.train_noises
        kind, wave = noises.draw_noise(self.rng, kinds, self._any_speech, self.rng.uniform(0.8, 4.0))
        self.clips.append((Clip("", "", "noise", None, f"noise/{kind}", 0, QUESTION_RATE, 0, 0), wave))

    def _any_speech(self) -> np.ndarray:
        style = _style(self.rng, self.plan, target=False)
        text = domain.draw_turn(self.rng).question
        return _tidy(self.engine.say(text, self.rng.choice(self.voices).split("/", 1)[1], style), QUESTION_RATE)[0]


def make_shard(plan: Plan, name: str, index: int, folder: Path, size: int = SHARD) -> list[tuple[Clip, np.ndarray]]:
    """Make the clips of one shard; a follow-up may exceed the size by one."""
    shard = _Shard(plan, name, index, folder)
    add = {
        "questions": shard.questions,
        "answers": shard.answers,
        "more_answers": shard.more_answers,
        "other_talk": shard.other_talk,
        "noises": shard.noises,
    }[plan.kind]
    while len(shard.clips) < size:
        add()
    return shard.clips


def write_one(name: str, index: int, folder: Path) -> None:
    """Make and write one shard."""
    corpus.write_shard(folder / name / f"{index:03d}", make_shard(PLANS[name], name, index, folder))


def make_set(name: str, folder: Path, most: int | None = None) -> None:
    """Make the missing shards of a set, at most the first `most` of it."""
    count = -(-PLANS[name].clips // SHARD)
    for index in range(min(count, most or count)):
        if not (folder / name / f"{index:03d}.jsonl").exists():
            # espeak-ng keeps state from one sentence to the next: only in a process of its own is a shard reproducible.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                process.submit(write_one, name, index, folder).result()
            print(f"{name} {index + 1}/{count}", flush=True)


def main() -> None:
    """Make the sets named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sets", nargs="*", help="set names, each optionally NAME:SHARDS for its first shards only")
    arguments = parser.parse_args()
    for item in arguments.sets or PLANS:
        name, _, most = item.partition(":")
        make_set(name, arguments.folder, int(most) if most else None)


if __name__ == "__main__":
    main()
