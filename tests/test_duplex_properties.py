"""Random scripts of sounds, verdicts, frames, keys and faults: what must hold whatever happens."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.live.duplex import Duplex
from runtime.live.events import ReplyEnded, Transition
from runtime.live.settings import HOP, HOP_MS
from tests.simulated import EchoOf, Script, begin

LOUDNESS = [0.0, 0.1, EchoOf.amplitude]
ACTS = [
    Duplex.reset,
    Duplex.interrupt,
    lambda d: d.say("hello"),
    lambda d: d.fail("capture"),
    lambda d: d.fail("playback"),
]
BACK = [lambda d: d.fail("capture_back"), lambda d: d.fail("playback_back")]

verdicts = st.lists(
    st.sampled_from(["QUERY", "QUERY", "NOISE", "BACKCHANNEL", "ECHO", "STOP", "INCOMPLETE", None]),
    min_size=1,
    max_size=6,
)
scripts = st.builds(
    Script,
    verdicts=verdicts,
    clauses=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    captions=st.lists(st.sampled_from([None, "mm-hm", "stop", "what is it"]), min_size=1, max_size=4),
    broken_speech=st.lists(st.integers(0, 3), max_size=2),
    broken_hearing=st.integers(0, 3),
)
sounds = st.lists(st.tuples(st.sampled_from(LOUDNESS), st.integers(1, 60)), min_size=1, max_size=12)
acts = st.dictionaries(st.integers(1, 300), st.sampled_from(ACTS), max_size=2)
frames = st.sets(st.integers(1, 300), max_size=6)
ALWAYS_BACK = 60_000  # ms after the last input within which every script is over: its answers, waits and verdicts


def follow(script: Script, sounds: list[tuple[float, int]], acts: dict, frames: set[int]) -> None:
    duplex, model, player = begin(script, echo=EchoOf())
    hops = [amplitude for amplitude, count in sounds for _ in range(count)]
    played: list[int] = []
    for hop in range(1, len(hops) + int(ALWAYS_BACK / HOP_MS)):
        if hop in acts:
            acts[hop](duplex)
        if hop == len(hops) + 1:
            for back in BACK:
                back(duplex)
        gen = player.gen
        if np.abs(player.take(int(HOP_MS * 24))).max() > 0 and gen is not None:
            played.append(gen)
        amplitude = hops[hop - 1] if hop <= len(hops) else 0.0
        events = list(duplex.step(np.full(HOP, amplitude, np.float32), hop if hop in frames else None, hop * HOP_MS))
        _check(duplex, model, events)
        if hop > len(hops) and duplex.state in ("IDLE", "CLOSED") and duplex.scheduler.idle and player.done:
            break
    assert duplex.state in ("IDLE", "CLOSED"), duplex.state
    assert played == sorted(played), "an answer was heard behind a later one"
    assert player.stale == 0, "an answer that was over wrote to the player"
    _check_turns(model.speak)


def _check(duplex: Duplex, model, events: list) -> None:
    model.check()
    for event in events:
        if isinstance(event, ReplyEnded):
            assert len(event.heard.split()) <= len(event.text.split()) * 2
        if isinstance(event, Transition):
            assert event.state != "CLOSED"
    assert (duplex.answer is None) or duplex.state in ("THINK", "SPEAK", "R_HEAR", "R_GATE")
    assert duplex.draft is None or duplex.turn is not None


def _check_turns(rows: list[str]) -> None:
    """No two user turns behind each other without something between their tags, no answer without a question."""
    for row, following in itertools.pairwise(rows):
        assert (row, following) != ("user", "user")
        assert (row, following) != ("user", "answer")


@given(scripts, sounds, acts, frames)
@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_whatever_happens_the_loop_comes_to_rest_and_plays_nothing_stale(script, sounds, acts, frames) -> None:
    follow(script, sounds, acts, frames)


@pytest.mark.slow
@given(scripts, sounds, acts, frames)
@settings(
    max_examples=10_000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_ten_thousand_scripts_come_to_rest(script, sounds, acts, frames) -> None:
    follow(script, sounds, acts, frames)
