"""What the loudspeaker gets: gains, pauses, fades, and how much of an answer was heard, sample by sample."""

import threading

import numpy as np
import pytest

from runtime.live.player import Player

MS = 24  # samples


def speaking(samples: int = 2400 * MS) -> Player:
    player = Player()
    player.open(1)
    player.write(np.ones(samples, np.float32), 1)
    return player


def test_what_is_written_comes_out_and_then_silence() -> None:
    player = speaking(10 * MS)
    player.end(1)
    out = player.take(20 * MS)
    np.testing.assert_array_equal(out, np.repeat([1, 0], 10 * MS).astype(np.float32))
    assert player.underruns == 0


def test_heard_is_what_was_taken_one_latency_ago() -> None:
    player = speaking()
    player.take(30 * MS)
    assert player.heard_ms == 0
    player.take(70 * MS)
    assert player.heard_ms == 60
    assert player.audible


def test_an_answer_is_done_when_its_last_sample_has_left_the_loudspeaker() -> None:
    player = speaking(100 * MS)
    player.end(1)
    player.take(100 * MS)
    assert not player.done
    player.take(41 * MS)
    assert player.done and not player.audible and player.heard_ms == 100


def test_ducking_glides_to_its_gain_and_back() -> None:
    player = speaking()
    player.take(10 * MS)
    player.duck(-12, 20)
    out = player.take(40 * MS)
    assert out[0] == pytest.approx(1, abs=0.01) and (np.diff(out) <= 1e-6).all()
    assert out[-1] == pytest.approx(10 ** (-12 / 20))
    player.unduck(80)
    out = player.take(100 * MS)
    assert out[-1] == 1 and np.abs(np.diff(out)).max() < 1e-3


def test_a_pause_is_silent_and_what_follows_it_repeats_the_last_moment() -> None:
    player = Player()
    player.open(1)
    player.write(np.arange(1, 1000 * MS + 1, dtype=np.float32), 1)
    player.take(200 * MS)
    player.pause()
    assert not player.take(100 * MS).any()
    assert player.heard_ms == 200
    player.resume(100)
    np.testing.assert_array_equal(player.take(50 * MS), np.arange(100 * MS + 1, 150 * MS + 1, dtype=np.float32))


def test_what_was_on_its_way_when_it_paused_counts_as_unheard_until_it_is_heard() -> None:
    player = speaking()
    player.take(200 * MS)
    player.pause()
    assert player.heard_ms == 160
    player.take(20 * MS)
    assert player.heard_ms == 180


def test_a_flush_fades_out_within_its_time_and_what_is_stale_is_refused() -> None:
    player = speaking()
    player.take(100 * MS)
    assert player.flush(20) == 60
    out = player.take(60 * MS)
    assert out[: 19 * MS].all() and not out[20 * MS :].any()
    assert (np.diff(out[: 20 * MS]) <= 0).all()
    assert not player.write(np.ones(10, np.float32), 1)
    player.open(2)
    assert not player.write(np.ones(10, np.float32), 1) and player.stale >= 1
    assert not player.take(10 * MS).any()


def test_a_flush_of_a_paused_answer_makes_no_sound() -> None:
    player = speaking()
    player.take(100 * MS)
    player.pause()
    player.take(50 * MS)
    player.flush(20)
    assert not player.take(50 * MS).any()


def test_the_next_answer_begins_at_full_gain_over_the_fading_end_of_the_last() -> None:
    player = speaking()
    player.take(100 * MS)
    player.duck(-12, 20)
    player.take(40 * MS)
    player.flush(20)
    player.open(2)
    player.write(np.full(100 * MS, 0.5, np.float32), 2)
    out = player.take(50 * MS)
    assert out[-1] == 0.5 and out[0] > 0.5


def test_running_dry_is_counted_once_until_there_is_more() -> None:
    player = speaking(10 * MS)
    player.take(20 * MS)
    player.take(20 * MS)
    assert player.underruns == 1
    player.write(np.ones(10 * MS, np.float32), 1)
    player.take(20 * MS)
    assert player.underruns == 2


def test_taking_and_writing_from_two_threads_loses_nothing() -> None:
    player, count = Player(), 300 * 480
    player.open(1)
    wave = np.arange(1, count + 1, dtype=np.float32)

    def write() -> None:
        for start in range(0, count, 480):
            player.write(wave[start : start + 480], 1)

    thread = threading.Thread(target=write)
    thread.start()
    out = np.concatenate([player.take(240) for _ in range(400)])
    thread.join()
    out = np.concatenate([out, player.take(count)])
    np.testing.assert_array_equal(out[out != 0], wave)
