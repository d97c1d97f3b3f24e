"""What the ear makes of a hop: a person over the assistant is heard at once, the assistant's own echo is not."""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from apps.conversation import Ear
from apps.embedded import CHECKPOINT
from runtime.audio import Wave, load_mono
from runtime.live.echo import EchoCanceller, EchoTest
from runtime.live.settings import DEFAULTS, HOP, HOP_MS, RATE
from runtime.live.vad import SileroDetector

SAMPLES = CHECKPOINT.parent / "samples"
DELAY = RATE // 10


def sample(name: str) -> Wave:
    wave = load_mono(Path(SAMPLES / name), RATE)
    return wave * np.float32(0.3 / np.abs(wave).max())


def played(seconds: float) -> Wave:
    """What the assistant says: answers of a voice that is not the person's, without a pause."""
    wave = np.concatenate([sample(f"espeak-00{number}.flac") for number in range(8)])
    return wave[: int(seconds * RATE)]


def echo_of(wave: Wave, db: float) -> Wave:
    return np.concatenate([np.zeros(DELAY, np.float32), wave])[: len(wave)] * np.float32(10 ** (db / 20))


def voiced(ear: Ear, microphone: Wave, reference: Wave) -> np.ndarray:
    """For each hop whether it is taken for a person."""
    noise = np.random.default_rng(0).normal(0, 1e-4, len(microphone)).astype(np.float32)
    hops = zip((microphone + noise).reshape(-1, HOP), reference.reshape(-1, HOP), strict=True)
    return np.array([ear.probability(ear.hear(*pair)) >= DEFAULTS.vad_on_play for pair in hops])


def longest_run(voiced: np.ndarray) -> int:
    return max((len(list(run)) for is_voiced, run in groupby(voiced) if is_voiced), default=0)


@pytest.fixture
def ear() -> Ear:
    return Ear(SileroDetector(), EchoCanceller(), EchoTest())


def test_a_person_over_the_first_words_of_the_assistant_is_heard_through_headphones(ear: Ear) -> None:
    """The canceller by itself hides them: it has not yet learnt that there is no echo."""
    reference = played(4)[: 4 * RATE // HOP * HOP]
    person = np.zeros(len(reference), np.float32)
    question = sample("kokoro-003.flac")
    person[RATE // 2 : RATE // 2 + len(question)] += question
    found = voiced(ear, person, reference)[RATE // 2 // HOP :]
    alone = voiced(Ear(SileroDetector(), None, None), person, np.zeros_like(reference))[RATE // 2 // HOP :]
    assert found.sum() >= 0.9 * alone.sum() > 10


def test_the_own_echo_is_not_taken_for_a_person_once_it_is_known(ear: Ear) -> None:
    reference = played(12)[: 12 * RATE // HOP * HOP]
    found = voiced(ear, echo_of(reference, -10), reference)
    raw = voiced(Ear(SileroDetector(), None, None), echo_of(reference, -10), reference)
    learnt = 2 * RATE // HOP
    assert longest_run(found[learnt:]) * HOP_MS < DEFAULTS.t_start_play <= longest_run(raw[learnt:]) * HOP_MS


def test_what_the_model_hears_is_cancelled_as_soon_as_there_is_an_echo(ear: Ear) -> None:
    reference = played(6)[: 6 * RATE // HOP * HOP]
    microphone = echo_of(reference, -10)
    heard = [ear.hear(*pair) for pair in zip(microphone.reshape(-1, HOP), reference.reshape(-1, HOP), strict=True)]
    late = EchoCanceller.delay_samples
    np.testing.assert_array_equal(np.concatenate(heard[:3])[late:], microphone[: 3 * HOP - late])
    after = slice(4 * RATE // HOP, None)
    assert np.square(heard[after]).mean() < 0.02 * np.square(microphone.reshape(-1, HOP)[after]).mean()


def test_a_microphone_that_is_off_is_silent_whatever_it_picks_up(ear: Ear) -> None:
    question = sample("kokoro-003.flac")[: RATE // HOP * HOP].reshape(-1, HOP)
    for hop in question:
        ear.hear(hop, np.zeros(HOP, np.float32))
        assert ear.probability(np.zeros(HOP, np.float32)) < 0.1


def test_a_person_who_is_louder_than_the_echo_reaches_the_model_as_they_spoke(ear: Ear) -> None:
    """In double talk the canceller damages them, too."""
    reference = played(8)[: 8 * RATE // HOP * HOP]
    question = np.concatenate([sample("kokoro-003.flac")] * 2)
    microphone = echo_of(reference, -20)
    at = 5 * RATE
    microphone[at : at + len(question)] += question[: len(microphone) - at]
    hops = zip(microphone.reshape(-1, HOP), reference.reshape(-1, HOP), strict=True)
    heard = np.concatenate([ear.hear(*pair) for pair in hops])
    late = EchoCanceller.delay_samples
    same = (heard[late:] == microphone[:-late]).reshape(-1)
    spoken = np.abs(question[: len(same) - at]) > 0.05
    assert same[at : at + len(spoken)][spoken].mean() > 0.9
    assert same[3 * RATE : 4 * RATE].mean() < 0.1
