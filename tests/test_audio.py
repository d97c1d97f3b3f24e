"""The audio front end: recorded log-mels and lengths of the official code, plain references of its rules, and files."""

import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from runtime import audio
from runtime.audio import (
    Lengths,
    join,
    lengths,
    load_mono,
    log_mel,
    mel_filters,
    pcm16,
    read_audio,
    resample,
    segments,
    split,
    write_wav,
)
from runtime.bundle import AudioFrontEnd
from runtime.errors import BundleError, MediaError
from runtime.sound_header import conversion, mp3_frame, whole_sound

GOLDEN = Path(__file__).parent / "golden" / "a"
RECORDED = load_file(GOLDEN / "g01_audio_frontend.safetensors")
TABLES = json.loads((GOLDEN / "tables.json").read_text(encoding="utf-8"))


def golden_front() -> AudioFrontEnd:
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text(encoding="utf-8"))["audio_config"]
    same = ("sampling_rate", "n_fft", "hop_length", "num_mel_bins", "max_audio_seconds", "split_overlap", "avg_pooler")
    sizes = tuple(config["vq_config"]["codebook_sizes"])
    return AudioFrontEnd(**{key: config[key] for key in same}, stride=config["stride_size"], codebook_sizes=sizes)


FRONT = golden_front()
REAL = replace(FRONT, max_audio_seconds=30)
SMALL = replace(FRONT, sampling_rate=4000, n_fft=100, hop_length=40, num_mel_bins=20, max_audio_seconds=1)


def noise(n: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def sine(rate: int, seconds: float, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def assert_close(ours, recorded, tolerance=2e-4):
    assert ours.shape == recorded.shape
    assert np.abs(ours - recorded).max() <= tolerance * np.abs(recorded).max()


# Recorded values


def test_the_mel_filters_are_the_recorded_ones():
    assert_close(mel_filters(FRONT.sampling_rate, FRONT.n_fft, FRONT.num_mel_bins), RECORDED["mel_filters"], 1e-6)


def test_a_stereo_file_of_another_rate_becomes_the_recorded_wave():
    assert_close(load_mono(GOLDEN / "inputs" / "w1.wav", 16000)[None], RECORDED["w1.wave16k"].reshape(1, -1), 1e-5)


@pytest.mark.parametrize("name", [name for name, row in TABLES["audio"].items() if row["segments"][0]["bridge_length"]])
def test_log_mels_and_lengths_of_each_recorded_file_agree(name):
    row = TABLES["audio"][name]
    wave = load_mono(GOLDEN / row["file"], FRONT.sampling_rate)
    found = list(segments(wave, FRONT))
    assert len(wave) == row["samples16k"]
    assert len(found) == len(row["segments"])
    for i, ((mel, of), expected) in enumerate(zip(found, row["segments"], strict=True)):
        assert of == Lengths(expected["valid_frames"], expected["encoder_length"], expected["bridge_length"])
        assert mel.dtype == np.float32
        assert_close(mel, RECORDED[f"{name}.seg{i}.logmel"])


def test_a_recorded_file_that_gives_no_code_is_refused():
    wave = load_mono(GOLDEN / "inputs" / "w3.wav", FRONT.sampling_rate)
    assert TABLES["audio"]["w3"]["segments"][0]["bridge_length"] == 0
    with pytest.raises(MediaError, match=r"too short: 56\.2 ms, at least 60\.0 ms"):
        segments(wave, FRONT)


def test_every_recorded_split_agrees():
    for row in TABLES["split"]:
        front = replace(FRONT, split_overlap=row["split_overlap"])
        assert [list(segment) for segment in split(row["samples"], front)] == row["segments"], row


def test_every_recorded_length_agrees():
    for row in TABLES["lengths"]:
        found = lengths((row["valid_frames"] - 1) * REAL.hop_length, REAL)
        assert found == Lengths(row["valid_frames"], row["encoder_length"], row["bridge_length"])


def test_official_joining_gives_the_recorded_wave():
    recorded = load_file(GOLDEN / "g10_end_to_end.safetensors")
    waves = [recorded["seg0.wave"][0], recorded["seg1.wave"][0]]
    assert_close(join(waves, 240, official=True), recorded["joined"][0], 1e-6)


def test_what_the_official_player_gets_is_reproduced_bit_by_bit():
    recorded = load_file(GOLDEN / "g11_interleaved.safetensors")
    waves = [recorded[f"wave{i}"][0] for i in range(3)]
    later = join(waves[1:], 240, official=True)[len(waves[1]) :]
    assert np.array_equal(pcm16(join(waves[:2], 240, official=True)), recorded["yield1.pcm16"])
    assert np.array_equal(pcm16(later), recorded["yield2.pcm16"])


# Log-mel


def log_mel_of_the_whole_window(segment, front):
    """The definition: every frame of the padded window, one by one."""
    window, half = front.max_audio_seconds * front.sampling_rate, front.n_fft // 2
    padded = np.pad(np.pad(segment.astype(float), (0, window - len(segment))), half, mode="reflect")
    hann = np.hanning(front.n_fft + 1)[:-1]
    frames = [padded[t : t + front.n_fft] * hann for t in range(0, window, front.hop_length)]
    power = np.abs(np.fft.rfft(frames)) ** 2
    decades = np.log10(np.maximum(power @ mel_filters(front.sampling_rate, front.n_fft, front.num_mel_bins), 1e-10))
    valid = min(window // front.hop_length, len(segment) // front.hop_length + 1)
    return ((np.maximum(decades, decades.max() - 8) + 4) / 4)[:valid].T


@given(st.integers(1, 4000), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_leaving_out_the_silent_frames_changes_nothing(n, seed):
    segment = noise(n, seed)
    np.testing.assert_allclose(log_mel(segment, SMALL), log_mel_of_the_whole_window(segment, SMALL), atol=1e-6)


@pytest.mark.parametrize("n", [400, 9759, 16000, 479_801, 479_999, 480_000])
def test_leaving_out_the_silent_frames_changes_nothing_at_real_size(n):
    np.testing.assert_allclose(log_mel(noise(n), REAL), log_mel_of_the_whole_window(noise(n), REAL), atol=1e-6)


def test_a_loud_end_that_is_cut_away_still_sets_the_range():
    segment = noise(16000 + 159) * np.float32(1e-4)
    without = log_mel(segment, REAL)
    segment[-5:] = 1.0  # beyond the middle of the last valid frame, inside the window of the two after it
    assert log_mel(segment, REAL)[:, :50].min() > without[:, :50].min()


def test_silence_lies_on_the_floor():
    assert np.all(log_mel(np.zeros(16000, np.float32), REAL) == -1.5)


def test_a_segment_longer_than_the_window_is_cut_to_it():
    wave = noise(5000)
    assert np.array_equal(log_mel(wave, SMALL), log_mel(wave[:4000], SMALL))


# Splitting and lengths


def official_walk(n, front):
    window, overlap, start, found = front.max_audio_seconds * front.sampling_rate, 0, 0, []
    overlap = int(front.sampling_rate * front.split_overlap)
    if n <= window or front.split_overlap < 0:
        return [(0, n)]
    while start < n:
        if start > overlap:
            start -= overlap
        end = min(start + window, n)
        if end - start >= front.n_fft:
            found.append((start, end))
        start = end
    return found


@given(st.integers(0, 50_000), st.floats(-0.1, 0.99))
def test_splitting_follows_the_official_walk(n, overlap):
    front = replace(SMALL, split_overlap=overlap)
    assert split(n, front) == official_walk(n, front)


@given(st.integers(4001, 50_000))
def test_segments_without_overlap_cover_all_but_a_tail_shorter_than_one_window(n):
    ranges = split(n, SMALL)
    assert ranges[0][0] == 0
    assert all(end == start for (_, end), (start, _) in pairwise(ranges))
    assert n - ranges[-1][1] < SMALL.n_fft


def test_an_overlap_as_long_as_a_segment_is_refused_rather_than_walked_for_ever():
    with pytest.raises(BundleError, match=r"split_overlap \(1.0 s\) must be below its max_audio_seconds \(1 s\)"):
        split(10_000, replace(SMALL, split_overlap=1.0))


@given(st.integers(0, 600_000))
def test_lengths_shrink_from_stage_to_stage_and_grow_with_the_segment(n):
    found, longer = lengths(n, REAL), lengths(n + 1, REAL)
    assert found.frames <= 3000 and found.encoder == math.ceil(found.frames / 2) and found.codes == found.encoder // 4
    assert longer.frames >= found.frames and longer.encoder >= found.encoder and longer.codes >= found.codes


@pytest.mark.parametrize(
    ("seconds", "codes"), [(0.1, [1]), (1, [12]), (7.3, [91]), (30, [375]), (30.02, [375]), (30.05, [375]), (95, None)]
)
def test_audio_of_any_length_becomes_segments_of_12_5_codes_a_second(seconds, codes):
    found = list(segments(sine(16000, seconds), REAL))
    assert [of.codes for _, of in found] == (codes or [375, 375, 375, 62])
    assert all(mel.shape == (REAL.num_mel_bins, of.frames) for mel, of in found)


@pytest.mark.parametrize("n", [1, 399, 959])
def test_audio_without_a_code_is_refused_with_what_is_needed(n):
    with pytest.raises(MediaError, match=r"at least 60\.0 ms are needed"):
        segments(noise(n), REAL)
    assert len(list(segments(noise(960), REAL))) == 1


def test_a_segment_shorter_than_one_window_gives_no_code_however_little_is_pooled():
    front = replace(REAL, avg_pooler=1)
    assert lengths(399, front).codes > 0
    with pytest.raises(MediaError, match=r"24\.9 ms, at least 25\.0 ms"):
        segments(noise(399), front)
    assert len(list(segments(noise(400), front))) == 1


def test_broken_samples_are_refused_before_they_reach_the_encoder():
    wave = noise(16000)
    wave[[5, 7]] = np.nan, np.inf
    with pytest.raises(MediaError, match="the audio holds 2 samples that are NaN or infinite"):
        segments(wave, REAL)
    with pytest.raises(MediaError, match="the audio holds no samples"):
        segments(noise(0), REAL)


# Resampling


def resample_by_definition(wave, from_rate, to_rate):
    """torchaudio's filter, one output sample at a time."""
    if from_rate == to_rate:
        return wave
    a, b = from_rate // math.gcd(from_rate, to_rate), to_rate // math.gcd(from_rate, to_rate)
    cutoff = 0.99 * min(a, b)
    n = np.arange(len(wave))
    out = []
    for m in range(math.ceil(b * len(wave) / a)):
        t = np.clip(cutoff * (n / a - m / b), -128, 128)
        out.append(np.sum(wave * np.sinc(t) * np.cos(np.pi * t / 256) ** 2) * cutoff / a)
    return np.array(out)


@pytest.mark.parametrize("rates", [(44100, 16000), (48000, 16000), (8000, 16000), (16000, 24000), (16001, 16000)])
def test_resampling_is_the_windowed_sinc(rates):
    wave = noise(1500)
    np.testing.assert_allclose(resample(wave, *rates), resample_by_definition(wave, *rates), atol=1e-6)


@given(st.integers(0, 200), st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_resampling_by_any_ratio_is_the_windowed_sinc(n, from_rate, to_rate):
    wave = noise(n)
    found = resample(wave, from_rate, to_rate)
    assert len(found) == -(-n * to_rate // from_rate)
    np.testing.assert_allclose(found, resample_by_definition(wave, from_rate, to_rate), atol=2e-6)


def test_resampling_in_small_pieces_gives_the_same(monkeypatch):
    wave = noise(44100)
    whole = resample(wave, 44100, 16000)
    monkeypatch.setattr(audio, "MATMUL_VALUES", 1)
    np.testing.assert_allclose(resample(wave, 44100, 16000), whole, atol=1e-6)


def test_a_tone_above_the_new_nyquist_frequency_vanishes_and_one_below_stays():
    middle = slice(2000, -2000)
    assert np.abs(resample(sine(48000, 1, 9000), 48000, 16000)[middle]).max() < 1e-3
    np.testing.assert_allclose(resample(sine(48000, 1), 48000, 16000)[middle], sine(16000, 1)[middle], atol=1e-4)


# Files


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("suffix", "accuracy"), [("wav", 1e-3), ("flac", 1e-3), ("mp3", 0.05)])
def test_files_of_any_kind_become_mono_at_the_wanted_rate(tmp_path, rate, channels, suffix, accuracy):
    path = tmp_path / f"a.{suffix}"
    left = sine(rate, 0.5)
    soundfile.write(path, np.stack([left, 0.5 * left][:channels], axis=1), rate)
    wave = load_mono(path, 16000)
    samples, read_rate = read_audio(path)
    assert (samples.shape[0], read_rate, samples.dtype, wave.dtype) == (channels, rate, np.float32, np.float32)
    assert len(wave) == -(-16000 * samples.shape[1] // rate)
    expected = sine(16000, 0.5) * (1 if channels == 1 else 0.75)
    np.testing.assert_allclose(wave[1000:7000], expected[1000:7000], atol=accuracy)


def test_sixteen_bit_samples_are_divided_by_32768(tmp_path):
    codes = np.array([-32768, -1, 0, 1, 32767], np.int16)
    soundfile.write(tmp_path / "a.wav", codes, 16000)
    assert np.array_equal(read_audio(tmp_path / "a.wav")[0][0], codes / np.float32(32768))


def test_a_file_longer_than_one_block_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "READ_FRAMES", 100)
    for n in (99, 100, 101, 1000):
        soundfile.write(tmp_path / "a.wav", noise(n), 16000)
        np.testing.assert_allclose(read_audio(tmp_path / "a.wav")[0][0], noise(n), atol=1 / 32768)


@pytest.mark.parametrize("rate", [16000, 44100, 22050, 8000])
def test_a_file_read_in_blocks_is_resampled_as_its_whole(tmp_path, monkeypatch, rate):
    soundfile.write(tmp_path / "a.flac", np.stack([noise(30001), noise(30001, 1)], axis=1), rate)
    samples, _ = read_audio(tmp_path / "a.flac")
    whole = resample(samples.mean(axis=0, dtype=np.float32), rate, 16000)
    monkeypatch.setattr(audio, "READ_FRAMES", 2500)
    np.testing.assert_allclose(load_mono(tmp_path / "a.flac", 16000), whole, atol=1e-6)


def test_no_more_is_decoded_of_a_long_recording_than_a_context_holds(tmp_path):
    """An hour of silence in a file of some kilobytes, read in a process of its own, whose memory is counted."""
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 48000, 2) as file:
        for _ in range(60):
            file.write(np.zeros((60 * 48000, 2), np.int16))
    assert (tmp_path / "a.flac").stat().st_size < 1 << 20
    with pytest.raises(
        MediaError, match=r"a\.flac lasts longer than 164 s, which is all that this model's context hol"
    ):
        load_mono(tmp_path / "a.flac", 16000, 163.84)
    code = (
        "import resource, sys; from runtime.audio import load_mono; before = resource.getrusage(0).ru_maxrss; "
        "assert len(load_mono(sys.argv[1], 16000, 3600)) == 3600 * 16000; "
        "print(resource.getrusage(0).ru_maxrss - before)"
    )
    # An hour at 16 kHz in float32 is 230 MB, of which there are two while it is put together; it was 2.8 GB.
    grown = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.flac"], capture_output=True, text=True, check=True
    )
    assert int(grown.stdout) < 600_000


def test_a_missing_file_a_folder_and_a_file_that_is_no_audio_are_named(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "bytes.raw").write_bytes(bytes(1000))
    for path, message in [
        (tmp_path / "none.wav", "none.wav is not a file; expected a wav, flac, mp3 or ogg"),
        (tmp_path, "is not a file"),
        (tmp_path / "text.wav", r"text.wav cannot be decoded; expected wav, flac, mp3 or ogg: convert it, ffmpeg -i "),
        (tmp_path / "bytes.raw", "bytes.raw cannot be decoded"),
    ]:
        with pytest.raises(MediaError, match=message):
            read_audio(path)


def test_more_than_two_channels_and_an_impossible_rate_are_named_together(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((100, 6), np.float32), 500)
    with pytest.raises(MediaError, match=r"6 channels, expected 1 or 2: mix it down and a rate of 500 Hz"):
        read_audio(tmp_path / "a.wav")


def test_a_file_without_samples_or_with_broken_ones_is_refused(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(MediaError, match=r"empty.wav holds no samples"):
        read_audio(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan, 0], np.float32), 16000, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"nan.wav holds 1 samples that are NaN or infinite"):
        read_audio(tmp_path / "nan.wav")


@given(
    kind=st.sampled_from(["flac", "wav", "mp3", "ogg"]),
    cut=st.integers(0, 3000),
    flips=st.lists(st.tuples(st.integers(0, 2999), st.integers(0, 255)), max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path_factory, kind, cut, flips):
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    soundfile.write(path, noise(2000), 16000)
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    path.write_bytes(content[: len(content) - cut % len(content)])
    try:
        samples, _ = read_audio(path)
    except MediaError:
        return
    assert samples.size and np.isfinite(samples).all()


# Headers that say less than the file holds (K3)


def loud_then_quiet(rate: int = 44100) -> np.ndarray:
    """4 s of noise, then 13.6 s of a soft tone: in MP3 of variable rate, the beginning has much longer frames."""
    return np.concatenate([3 * noise(4 * rate), 0.05 * sine(rate, 13.6)])


def variable_mp3(path: Path, wave: np.ndarray, rate: int = 44100) -> bytes:
    """The file's content without its first frame, the Xing header; libsndfile guesses its length then."""
    soundfile.write(path, wave, rate, bitrate_mode="VARIABLE", compression_level=0.5)
    content = path.read_bytes()
    start = next(i for i in range(len(content)) if mp3_frame(content, i))
    first = mp3_frame(content, start)
    assert first is not None and content[start : start + first.length].count(b"Xing") == 1
    return content[start + first.length :]


def test_an_mp3_of_variable_rate_without_a_header_is_heard_whole(tmp_path):
    wave = loud_then_quiet()
    path = tmp_path / "a.mp3"
    path.write_bytes(variable_mp3(path, wave))
    with soundfile.SoundFile(path) as file:
        assert file.frames / file.samplerate < 15  # what it would be believed to last
    samples, rate = read_audio(path)
    assert samples.shape[1] / rate == pytest.approx(17.6, abs=0.1)
    assert np.abs(samples[0, -2 * rate : -rate]).max() == pytest.approx(0.025, abs=0.01)


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
def test_mp3_files_that_were_joined_are_heard_whole(tmp_path, rate, capfd):
    path = tmp_path / "a.mp3"
    soundfile.write(path, sine(rate, 2), rate, bitrate_mode="VARIABLE")
    path.write_bytes(2 * path.read_bytes())  # the header of the first tells of the first alone
    samples, found = read_audio(path)
    assert found == rate and samples.shape[1] / rate == pytest.approx(4, abs=0.3)
    assert capfd.readouterr() == ("", "")


def test_what_lies_between_and_behind_the_frames_of_an_mp3_is_passed_over_in_silence(tmp_path, capfd):
    path = tmp_path / "a.mp3"
    soundfile.write(path, sine(44100, 2), 44100)
    content, tag = path.read_bytes(), b"ID3\4\0\0\0\0\2\0" + bytes(256)
    middle = next(i for i in range(9000, len(content)) if mp3_frame(content, i) and content[i : i + 2] == content[:2])
    for damaged in (
        content + bytes(9000),
        content[:middle] + bytes(999) + content[middle:],
        tag + content,
        content[:-99],
    ):
        path.write_bytes(damaged)
        assert read_audio(path)[0].shape[1] / 44100 == pytest.approx(2, abs=0.2)
    assert capfd.readouterr() == ("", "")


def test_a_whole_mp3_is_read_as_it_is(tmp_path):
    for name, mode in (("a.mp3", "CONSTANT"), ("b.mp3", "VARIABLE")):
        soundfile.write(tmp_path / name, sine(44100, 2), 44100, bitrate_mode=mode)
        assert whole_sound(tmp_path / name) == [tmp_path / name]


@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_whose_sizes_were_never_written_is_heard_whole(tmp_path, channels):
    path = tmp_path / "a.wav"
    wave = np.stack([noise(1000, seed) for seed in range(channels)], axis=1)
    soundfile.write(path, wave, 16000)
    content = bytearray(path.read_bytes())
    data = content.index(b"data")
    whole = read_audio(path)[0]
    for riff, size in ((0, 0), (len(content) - 8, 0), (2**32 - 1, 2**32 - 1)):
        content[4:8], content[data + 4 : data + 8] = riff.to_bytes(4, "little"), size.to_bytes(4, "little")
        path.write_bytes(content)
        assert np.array_equal(read_audio(path)[0], whole)
    path.write_bytes(content[: data + 4] + bytes(4))
    with pytest.raises(MediaError, match=r"a.wav holds no samples"):
        read_audio(path)


@pytest.mark.parametrize("n", [1, 4095, 4096, 4097, 50_000])
@pytest.mark.parametrize("rate", [16000, 44100, 12345])
def test_a_flac_that_came_through_a_pipe_is_heard_whole(tmp_path, n, rate):
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(n), rate)
    whole, content = read_audio(path)[0], bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # the number of samples is not known when a stream begins
    path.write_bytes(content)
    assert np.array_equal(read_audio(path)[0], whole)


def test_ogg_files_that_were_joined_are_heard_whole_or_refused_where_they_differ(tmp_path):
    soundfile.write(tmp_path / "a.ogg", sine(44100, 2), 44100)
    soundfile.write(tmp_path / "b.ogg", sine(48000, 1), 48000)
    one, other = (tmp_path / "a.ogg").read_bytes(), (tmp_path / "b.ogg").read_bytes()
    (tmp_path / "c.ogg").write_bytes(one + one)
    assert read_audio(tmp_path / "c.ogg")[0].shape[1] == 2 * 2 * 44100
    (tmp_path / "d.ogg").write_bytes(one + other)
    with pytest.raises(
        MediaError, match=r"d.ogg is joined of parts of 1 channels at 44100 Hz and 1 channels at 48000 Hz"
    ):
        read_audio(tmp_path / "d.ogg")


@pytest.mark.parametrize(
    ("beginning", "kind"),
    [
        (b"\0\0\0\x20ftypM4A ", "an mp4 or m4a file"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\1", "a webm or mkv file"),
        (b"\xff\xf1P\x80\2\x1f\xfc", "raw AAC"),
        (b"#!AMR\n", "an AMR file"),
        (b"RIFF\0\0\0\0AVI LIST", "an avi file"),
    ],
)
@pytest.mark.parametrize("name", ["my voice.m4a", "voice.mp3", "it's.wav", "-a.webm"])
def test_what_phones_and_browsers_record_is_named_with_a_command_for_this_very_file(
    tmp_path, name, beginning, kind, capfd
):
    path = tmp_path / name
    path.write_bytes(beginning + bytes(1000))
    with pytest.raises(MediaError) as caught:
        read_audio(path)
    said, command = str(caught.value).split("convert it, ")
    assert said == f"{path} is {kind}, which is not read; expected wav, flac, mp3 or ogg: "
    words = shlex.split(command)
    assert words[:3] == ["ffmpeg", "-i", str(path)]
    assert words[3].endswith(".wav") and Path(words[3]).parent == tmp_path and Path(words[3]) != path
    assert capfd.readouterr() == ("", "")


def test_the_command_for_a_name_that_begins_with_a_dash_does_not_take_it_for_an_option():
    assert conversion("-a.webm") == "ffmpeg -i ./-a.webm ./-a.wav"


@pytest.mark.parametrize(
    "content", [b"hello world " * 500, bytes(range(256)) * 80, bytes(9000), b"\xff" * 5000, b"ID3"]
)
def test_a_file_that_is_only_named_mp3_is_refused_without_a_librarys_notes(tmp_path, content, capfd):
    (tmp_path / "a.mp3").write_bytes(content)
    with pytest.raises(
        MediaError, match=r"a.mp3 cannot be decoded; expected wav, flac, mp3 or ogg: convert it, ffmpeg"
    ):
        read_audio(tmp_path / "a.mp3")
    assert capfd.readouterr() == ("", "")


# Joining and writing


def test_a_cross_fade_overlaps_its_neighbours_and_keeps_a_steady_level():
    waves = [np.full(n, 0.5, np.float32) for n in (1000, 300, 700)]
    joined = join(waves, 240)
    assert len(joined) == 2000 - 2 * 240
    np.testing.assert_allclose(joined, 0.5, atol=1e-6)


def test_a_cross_fade_moves_from_one_wave_to_the_next():
    joined = join([np.ones(10, np.float32), np.zeros(10, np.float32)], 3)
    np.testing.assert_allclose(joined, [1] * 7 + [1, 0.5, 0] + [0] * 7)


@pytest.mark.parametrize("official", [False, True])
def test_waves_no_longer_than_the_overlap_are_put_end_to_end(official):
    waves = [noise(500), noise(240), noise(500)]
    assert np.array_equal(join(waves, 240, official=official), np.concatenate(waves))
    assert np.array_equal(join(waves, 0, official=official), np.concatenate(waves))
    assert len(join([], 240, official=official)) == 0


def test_samples_are_limited_and_truncated_toward_zero():
    wave = np.array([0.0, 1.9 / 32768, -1.9 / 32768, 1.0, -7.0], np.float32)
    assert pcm16(wave).tolist() == [0, 1, -1, 32440, -32440]


def test_a_written_wave_is_read_back(tmp_path):
    write_wav(tmp_path / "a.wav", noise(2400), 24000)
    samples, rate = read_audio(tmp_path / "a.wav")
    assert rate == 24000
    np.testing.assert_allclose(samples[0], noise(2400), atol=1 / 32768)


def test_writing_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(MediaError, match=r"cannot be written .* check that its folder exists"):
        write_wav(tmp_path / "none" / "a.wav", noise(10), 24000)


def test_the_content_of_a_file_is_read_as_the_file_is(tmp_path):
    tone = (0.3 * np.sin(np.arange(9000) / 7)).astype(np.float32)
    for kind, ending in (("WAV", "wav"), ("FLAC", "flac"), ("OGG", "ogg"), ("MP3", "mp3")):
        soundfile.write(tmp_path / f"a.{ending}", tone, 24000, format=kind)
        content = (tmp_path / f"a.{ending}").read_bytes()
        assert np.array_equal(load_mono(content, 16000), load_mono(tmp_path / f"a.{ending}", 16000))
    joined = content = (tmp_path / "a.ogg").read_bytes() * 2
    assert len(load_mono(joined, 24000)) == 18000
    with pytest.raises(MediaError, match=r"the audio is an mp4 or m4a file, which is not read; .* convert it to WAV"):
        load_mono(b"\0\0\0\x20ftypM4A ", 16000)
