"""Codes to a waveform: recorded waves, every way of cutting, seams, limits of memory and length, and prefix mode."""

from dataclasses import replace
from fnmatch import fnmatch
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.parity.graphs import Graphs
from export.parity.replay import judge
from export.parity.speech_out import UNCOVERED, WAVES, clips, replay_waves
from runtime.audio import join
from runtime.bundle import Manifest, SpeechLayout, read_bundle
from runtime.errors import EdgeOmniError
from runtime.mel_stream import MelStream
from runtime.session import Session
from runtime.speech import Mode, Pieces, Seams, SegmentStream, SpeechDecoder, spoken_rows
from runtime.vocoder import WaveStream
from tests.tiny import GOLDEN, omni_bundle

ARRAYS = {f"{WAVES}/{name}": array for name, array in GOLDEN.arrays(WAVES).items()}


@cache
def manifest() -> Manifest:
    return read_bundle(omni_bundle())


@cache
def graphs() -> Graphs:
    return Graphs(omni_bundle(), manifest().graphs)


def graph(name: str) -> Session:
    return graphs().session(name)


def layout() -> SpeechLayout:
    speech = manifest().speech
    assert speech is not None
    return speech


def random_codes(length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, length) for size in layout().codebook_sizes], axis=1)


def random_states(frames: int) -> np.ndarray:
    width = graph("flow_prenet").graph.inputs[0].shape[-1]
    assert isinstance(width, int)
    return np.random.default_rng(0).standard_normal((1, frames, width), np.float32)


def mel_of(stream: MelStream, states: np.ndarray, cuts: tuple[int, ...] = ()) -> np.ndarray:
    pieces = np.split(states, cuts, axis=1)
    mels = [mel for i, piece in enumerate(pieces) for mel in stream.mel(piece, last=i == len(pieces) - 1)]
    return np.concatenate(mels, axis=2)


def wave_of(stream: SegmentStream, codes: np.ndarray, sizes: tuple[int, ...] = ()) -> np.ndarray:
    chunks = [chunk for part in np.split(codes, np.cumsum(sizes).astype(int)) for chunk in stream.push(part)]
    return np.concatenate([np.zeros(0, np.float32), *chunks, *stream.finish()])


def samples_of(codes: int) -> int:
    return layout().samples_per_frame * (layout().frames_per_code * codes - layout().frames_short)


def decoder(seed: int = 0, mode: Mode = "exact", zero_noise: bool = True, official: bool = False) -> SpeechDecoder:
    return SpeechDecoder(graph, manifest(), np.random.default_rng(seed), mode, zero_noise, official)


def test_every_recorded_wave_is_replayed_within_its_tolerance():
    verdicts = [judge(replayed, ARRAYS[replayed.name]) for replayed in replay_waves(GOLDEN, graphs(), layout())]
    assert [verdict for verdict in verdicts if not verdict.passed] == []
    left = ARRAYS.keys() - {verdict.name for verdict in verdicts}
    assert [name for name in left if not any(fnmatch(name, pattern) for pattern in UNCOVERED)] == []


@pytest.mark.parametrize("official", [True, False])
def test_a_reply_streamed_segment_by_segment_equals_its_segments_joined(official):
    segments, reply = [clip["codes"] for clip in clips(GOLDEN, WAVES).values()], decoder(official=official)
    heard = []
    for codes in segments:
        heard += [*reply.push(codes[:3]), *reply.push(codes[3:]), *reply.end_segment()]
    heard += reply.finish()
    assert {chunk.sampling_rate for chunk in heard} == {layout().sampling_rate}
    waves = [wave_of(decoder().segment(), codes) for codes in segments]
    expected = join(waves, layout().overlap_samples, official=official)
    assert np.array_equal(np.concatenate([chunk.samples for chunk in heard]), expected)


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(0, 14), max_size=4), st.integers(1, 3))
@pytest.mark.parametrize("mode", ["exact", "prefix"])
def test_any_cutting_of_the_codes_gives_the_same_samples(mode, sizes, seed):
    codes = random_codes(30)
    whole = wave_of(decoder(seed, mode, zero_noise=False).segment(), codes)
    assert len(whole) == samples_of(30)
    streamed = wave_of(decoder(seed, mode, zero_noise=False).segment(), codes, tuple(sizes))
    assert np.array_equal(streamed, whole)


def test_another_seed_gives_another_wave():
    codes = random_codes(5)
    first, second = (wave_of(decoder(seed, zero_noise=False).segment(), codes) for seed in (1, 2))
    assert np.abs(first - second).max() > 1e-3


def test_the_noise_of_a_frame_does_not_depend_on_how_frames_are_grouped():
    states = random_states(220)
    whole = mel_of(MelStream(graph, layout(), np.random.default_rng(3)), states)
    assert whole.shape == (1, layout().mel_bins, 220)
    cut = mel_of(MelStream(graph, layout(), np.random.default_rng(3)), states, cuts=(100, 200))
    assert np.allclose(cut, whole, atol=1e-4)


def test_little_memory_for_carried_state_changes_nothing_where_all_frames_are_known():
    states = random_states(430)
    expected = mel_of(MelStream(graph, layout()), states)
    assert np.allclose(mel_of(MelStream(graph, layout(), carry_bytes=1), states), expected, atol=1e-4)


def test_no_state_is_left_when_a_segment_is_over():
    stream = MelStream(graph, layout())
    mel_of(stream, random_states(190))
    assert all(len(array[0, 0]) == 0 for step in stream.steps for name, array in step.state.items() if "key" in name)


def test_carried_state_stays_within_its_limit_while_more_frames_may_come():
    stream = MelStream(graph, layout(), carry_bytes=1)
    for _ in range(4):
        assert sum(mel.shape[2] for mel in stream.mel(random_states(100), last=False)) == 100
        lengths = {array.shape[2] for step in stream.steps for name, array in step.state.items() if "key" in name}
        assert lengths == {layout().chunk_frames}


def test_an_open_chunk_is_run_again_when_it_has_grown_so_that_only_what_was_sent_early_differs():
    states, early = random_states(130), 20
    exact = mel_of(MelStream(graph, layout()), states)
    ours = mel_of(MelStream(graph, layout()), states, cuts=(early, 60))
    assert ours.shape == exact.shape
    assert np.allclose(ours[:, :, 60:], exact[:, :, 60:], atol=1e-4)
    assert np.abs(ours - exact)[:, :, :early].max() > 1e-3


class Counted:
    """A bundle's graphs that count the Euler steps that were run."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, name: str) -> Session:
        return CountedSession(self, graph(name)) if name == "flow_estimator" else graph(name)


class CountedSession(Session):
    def __init__(self, counted: Counted, session: Session):
        self.counted, self.session, self.graph = counted, session, session.graph

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        self.counted.steps += 1
        return self.session.run(**feeds)


def test_the_first_samples_of_a_long_segment_leave_when_its_first_chunk_is_made():
    counted, steps = Counted(), len(layout().time_steps) - 1
    stream = SegmentStream(counted, layout())
    assert list(stream.push(random_codes(60))) == []
    rest = stream.finish()
    assert len(next(rest)) > 0 and counted.steps == steps
    assert len(list(rest)) > 1 and counted.steps == 3 * steps


def test_prefix_mode_answers_as_soon_as_one_more_code_than_a_chunk_is_known():
    stream = SegmentStream(graph, layout(), mode="prefix", chunk_codes=10, first_codes=8)
    codes = random_codes(24)
    heard = [sum(map(len, stream.push(row[None]))) > 0 for row in codes]
    assert np.flatnonzero(heard).tolist() == [8, 10, 20]
    assert sum(map(len, stream.finish())) > 0


def test_pieces_double_up_to_a_chunk_then_end_with_whole_chunks_and_never_pass_the_position_table():
    pieces = Pieces(first=5, chunk=25, longest=60)
    ends = [0]
    while ends[-1] < 60:
        ends.append(ends[-1] + pieces.next(ends[-1]))
    assert ends == [0, 5, 10, 20, 25, 50, 60]
    assert Pieces.of(layout(), "exact", 3, 2).next(0) == layout().max_frames // layout().frames_per_code


@pytest.mark.parametrize(("chunk", "first"), [(0, None), (5, 0), (-1, 3)])
def test_pieces_without_codes_are_refused(chunk, first):
    with pytest.raises(EdgeOmniError, match="expected at least 1 of each"):
        Pieces.of(layout(), "prefix", chunk, first)


def test_prefix_mode_is_exact_up_to_one_chunk_and_near_beyond():
    chunk = layout().chunk_frames // layout().frames_per_code
    short = decoder().prefix_error(random_codes(chunk))
    assert short.hidden == 0 and short.mel == 0
    long = decoder().prefix_error(random_codes(2 * chunk + 5))
    assert 1e-4 < long.hidden < 0.2 and 1e-4 < long.mel < 0.5
    eager = decoder().prefix_error(random_codes(2 * chunk + 5), first_codes=5)
    assert eager.mel > long.mel


def test_the_error_of_prefix_mode_is_not_asked_of_silence():
    with pytest.raises(EdgeOmniError, match="without frames"):
        decoder().prefix_error(np.array([layout().codebook_sizes]))


def test_a_segment_longer_than_the_position_table_goes_on_as_a_new_one():
    few = replace(layout(), max_frames=43)  # ten codes
    codes = random_codes(25)
    whole = wave_of(SegmentStream(graph, few), codes)
    assert len(whole) == samples_of(25)
    again = wave_of(SegmentStream(graph, few), codes, (4, 6, 1, 9))
    assert np.array_equal(again, whole)
    vocoder, mels = WaveStream(graph("vocoder_f0"), graph("vocoder"), few), []
    for part, ends in ((codes[:10], False), (codes[10:20], False), (codes[20:], True)):
        stream = MelStream(graph, few)
        mels += stream.mel(stream.hidden(part, ends), last=True)
    expected = np.concatenate([vocoder.push(np.concatenate(mels, axis=2)), vocoder.finish()])
    assert np.allclose(whole, expected, atol=2e-2)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_segment_without_frames_is_silence(rows):
    codes = np.array([layout().codebook_sizes] * rows, np.int64).reshape(rows, len(layout().codebook_sizes))
    reply = decoder()
    if rows:
        assert list(reply.push(codes)) == []
    assert [*reply.end_segment(), *reply.finish()] == []


def test_the_row_with_the_end_code_and_all_after_it_are_dropped():
    codes = random_codes(12)
    codes[4, 0] = layout().codebook_sizes[0]
    codes[7] = 99_999  # what follows the end is not looked at
    stream = decoder().segment()
    assert [*stream.push(codes), *stream.push(random_codes(9))] == []
    assert np.array_equal(np.concatenate(list(stream.finish())), wave_of(decoder().segment(), codes[:4]))


def test_codes_that_no_codebook_has_are_all_named():
    codes = random_codes(6)
    codes[2, 1], codes[5, 0] = layout().codebook_sizes[1], -1
    with pytest.raises(EdgeOmniError, match=r"2 codes are in no codebook.*row 2 \(codebook 1.*-1 in row 5"):
        decoder().push(codes)


@pytest.mark.parametrize("codes", [np.zeros((3, 2), np.int64), np.zeros(8, np.int64), np.zeros((3, 8), np.float32)])
def test_codes_of_another_shape_or_type_are_refused(codes):
    with pytest.raises(EdgeOmniError, match=r"expected integers \[n, 8\]"):
        spoken_rows(codes, layout())


def test_a_bundle_that_cannot_speak_says_so():
    with pytest.raises(EdgeOmniError, match="does not speak"):
        SpeechDecoder(graph, replace(manifest(), speech=None), np.random.default_rng(0))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 30), max_size=6),
    st.integers(0, 9),
    st.booleans(),
    st.lists(st.integers(0, 30), max_size=5),
)
def test_seams_of_segments_that_arrive_in_pieces_equal_the_joined_wave(lengths, overlap, official, cuts):
    rng = np.random.default_rng(0)
    waves = [rng.standard_normal(length, np.float32) for length in lengths]
    seams, heard = Seams(overlap, official), []
    for wave in waves:
        heard += [seams.push(piece) for piece in np.split(wave, sorted(cuts))]
        heard.append(seams.end_segment())
    heard.append(seams.finish())
    assert np.array_equal(np.concatenate(heard), join(waves, overlap, official=official))


def test_only_the_overlap_waits_inside_a_segment():
    seams = Seams(240)
    assert len(seams.push(np.ones(1000, np.float32))) == 760
    assert len(seams.push(np.ones(10, np.float32))) == 10


def test_the_state_of_each_step_is_its_own():
    stream = MelStream(graph, layout())
    list(stream.mel(random_states(100), last=False))
    first, second = stream.steps[0].state, stream.steps[1].state
    assert not np.array_equal(first["past.0.key"], second["past.0.key"])
