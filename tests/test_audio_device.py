"""Microphone and loudspeaker: PortAudio on a private PulseAudio, and the pure parts that need no device."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from runtime.live.audio_device import AudioDevice, devices, plausible, portaudio
from runtime.live.devices import Device, DeviceError, attempts, choose, explained
from runtime.live.rates import Intake, Outlet, follow
from runtime.live.ring import Ring
from runtime.live.settings import HOP
from runtime.live.sound_check import judge_recording
from tests.sound_server import SoundServer, missing

pytest.importorskip("sounddevice")
pytest.importorskip("soxr")

LACKING = missing()
with_devices = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))

HEARD, PLAYED = 16_000, 24_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoundServer]:
    with SoundServer(tmp_path_factory.mktemp("sound")) as server:
        yield server


@pytest.fixture
def clients(server: SoundServer, monkeypatch: pytest.MonkeyPatch) -> SoundServer:
    """The server, with PortAudio started anew as its client."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    start_portaudio_anew()
    return server


def start_portaudio_anew() -> None:
    portaudio()._terminate()
    portaudio()._initialize()


def silence(count: int) -> np.ndarray:
    return np.zeros(count, np.float32)


def chirp(rate: int, seconds: float = 0.4, low: float = 300.0, high: float = 3000.0) -> np.ndarray:
    """A sound that is like itself at one delay only."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * (low * t + (high - low) * t**2 / (2 * seconds))
    return (0.4 * np.sin(phase)).astype(np.float32)


def three_calls(rate: int) -> np.ndarray:
    """The chirp three times, at unequal distances: a busy machine may spoil one of them."""
    pauses = [silence(int(seconds * rate)) for seconds in (0.3, 0.15, 0.25)]
    return np.concatenate([part for pause in pauses for part in (pause, chirp(rate))])


def player_of(sound: np.ndarray) -> Callable[[int], np.ndarray]:
    """Gives the sound piece by piece, and silence after it."""
    left = [np.concatenate([sound, silence(10 * PLAYED)])]

    def player_take(count: int) -> np.ndarray:
        taken, left[0] = left[0][:count], left[0][count:]
        return taken

    return player_take


def find(sound: np.ndarray, recording: np.ndarray) -> tuple[int, float]:
    """Where the sound is in the recording, and how well it fits there: 1 is the same up to a factor."""
    size = len(sound) + len(recording)
    product = np.fft.irfft(np.fft.rfft(recording, size) * np.conj(np.fft.rfft(sound, size)), size)
    energy = np.cumsum(np.concatenate([[0.0], np.square(recording, dtype=np.float64), np.zeros(len(sound))]))
    norms = np.sqrt(np.maximum(energy[len(sound) :] - energy[: -len(sound)], 1e-3)) * np.linalg.norm(sound)
    fits = product[: len(recording)] / norms[: len(recording)]
    at = int(np.argmax(fits))
    return at, float(fits[at])


def tasks() -> int:
    """How many threads this process has, those of libraries too."""
    return len(list(Path("/proc/self/task").iterdir()))


def take(device: AudioDevice, seconds: float) -> list[tuple[np.ndarray, float, np.ndarray]]:
    until, hops = time.monotonic() + seconds, []
    while time.monotonic() < until:
        if (hop := device.next_chunk(0.5)) is not None:
            hops.append(hop)
    return hops


@with_devices
def test_what_is_spoken_into_the_virtual_microphone_comes_out_of_next_chunk(clients: SoundServer, tmp_path: Path):
    soundfile.write(tmp_path / "question.wav", three_calls(48_000), 48_000)
    with AudioDevice(silence) as device:
        speaking = clients.play(tmp_path / "question.wav")
        hops = take(device, 2.0)
        speaking.wait(5)
    heard = np.concatenate([hop[0] for hop in hops])
    _, fit = find(chirp(HEARD), heard)
    assert fit > 0.98
    assert all(hop[0].shape == hop[2].shape == (HOP,) and hop[0].dtype == np.float32 for hop in hops)
    assert not np.concatenate([hop[2] for hop in hops]).any()
    steps = np.diff([hop[1] for hop in hops])
    assert hops[0][1] == pytest.approx(32) and np.all(np.abs(steps - 32) < 1.001)
    assert len(hops) >= 40 and device.broken == device.dropped == 0


@with_devices
def test_what_player_take_gives_sounds_at_the_virtual_loudspeaker_and_is_the_reference(
    clients: SoundServer, tmp_path: Path
):
    recording = clients.record(tmp_path / "heard.wav")
    time.sleep(0.3)
    with AudioDevice(player_of(three_calls(PLAYED))) as device:
        hops = take(device, 2.0)
        latency = device.latency
    recording.terminate()
    recording.wait(5)
    sounded, rate = soundfile.read(tmp_path / "heard.wav", dtype="float32")
    assert rate == PLAYED and find(chirp(PLAYED), sounded)[1] > 0.98
    reference = np.concatenate([hop[2] for hop in hops])
    assert find(chirp(HEARD), reference)[1] > 0.999
    assert 20 < latency.played < 300 and abs(latency.round_trip) < 300


@with_devices
def test_the_reference_comes_before_its_echo_by_about_the_round_trip(
    clients: SoundServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PULSE_SOURCE", "loudspeaker.monitor")  # the microphone hears the loudspeaker
    with AudioDevice(player_of(three_calls(PLAYED))) as device:
        hops = take(device, 2.2)
        stated = device.latency.round_trip
    heard, reference = (np.concatenate([hop[i] for hop in hops]) for i in (0, 2))
    at, fit = find(reference[: 2 * HEARD - 4000], heard)
    assert fit > 0.5
    delay = 1000 * at / HEARD
    assert 0 < delay < 250 and abs(delay - stated) < 100


@with_devices
def test_a_server_that_dies_is_noticed_and_its_return_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with SoundServer(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        start_portaudio_anew()
        threads, device = tasks(), AudioDevice(silence)
        device.open()
        assert take(device, 0.3) and not device.lost
        server.kill()
        died = time.monotonic()
        while not device.lost and time.monotonic() < died + 5:
            device.next_chunk(0.05)
        assert device.lost and time.monotonic() < died + 2
        assert not device.reopen() and device.lost
        assert "no microphone" in device.trouble and "\n" not in device.trouble
        begun = time.monotonic()
        assert device.next_chunk(0.1) is None and time.monotonic() > begun + 0.09  # a loop that goes on does not spin
        server.start()
        assert device.reopen() and not device.lost and device.trouble == ""
        hops = take(device, 0.5)
        assert len(hops) > 5 and hops[0][1] > 300 + 32  # the time in between counts
        device.close()
        until = time.monotonic() + 2
        while tasks() > threads and time.monotonic() < until:
            time.sleep(0.02)
        assert tasks() == threads and not device.lost


@with_devices
def test_without_any_device_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PULSE_SERVER", f"unix:{tmp_path}/none")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    start_portaudio_anew()
    with pytest.raises(DeviceError, match=r"^there is no (microphone|loudspeaker): connect one") as raised:
        AudioDevice(silence).open()
    assert "\n" not in str(raised.value)


@with_devices
def test_an_exception_in_player_take_is_kept_and_hearing_goes_on(clients: SoundServer):
    def player_take(count: int) -> np.ndarray:
        raise RuntimeError("the player is broken")

    with AudioDevice(player_take) as device:
        assert len(take(device, 0.4)) > 3
        assert device.failures > 3 and not device.lost and device.latency.played < 300
        errors = device.errors()
    assert 0 < len(errors) <= 16 and str(errors[0]) == "the player is broken"


@with_devices
def test_a_player_that_gives_too_few_samples_is_reported(clients: SoundServer):
    with AudioDevice(lambda count: silence(count - 1)) as device:
        assert take(device, 0.3)
    assert "expected" in str(device.errors()[0])


@with_devices
def test_numbers_that_are_none_are_played_as_silence(clients: SoundServer):
    with AudioDevice(lambda count: np.full(count, np.nan, np.float32)) as device:
        hops = take(device, 0.4)
    assert hops and not np.concatenate([hop[2] for hop in hops]).any()


@with_devices
def test_a_rate_that_the_device_refuses_falls_back_to_its_default(clients: SoundServer):
    with AudioDevice(silence, rate=999_000) as device:
        assert len(take(device, 0.4)) > 3
        assert device.rate == round(devices()[0].rate)


@with_devices
def test_a_callback_that_was_late_once_does_not_leave_the_microphone_late_for_good(
    clients: SoundServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("runtime.live.audio_device.RECONNECT_MS", 0)
    stalls = [0.0] * 20 + [0.4]

    def player_take(count: int) -> np.ndarray:
        time.sleep(stalls.pop(0) if stalls else 0.0)
        return silence(count)

    with AudioDevice(player_take) as device:
        take(device, 3.5)
        assert device.reconnects >= 1 and not device.lost
        assert device.latency.heard < 200


@with_devices
def test_somebody_else_is_woken_when_samples_come(clients: SoundServer):
    woken = threading.Event()
    with AudioDevice(silence, on_chunk=woken.set):
        assert woken.wait(2)


@with_devices
def test_the_check_records_two_seconds_and_says_that_nobody_spoke(clients: SoundServer):
    finding, recording = AudioDevice(silence).check()
    assert finding.kind == "silent" and len(recording) == pytest.approx(2 * PLAYED, rel=0.1)


@with_devices
def test_a_device_is_chosen_by_a_part_of_its_name(clients: SoundServer):
    with AudioDevice(silence, mic="puls", speaker="PULSE") as device:
        assert device.mic_name == device.speaker_name == "pulse"
    with pytest.raises(DeviceError, match=r"no microphone of a submarine; choose one.*\n  0: pulse"):
        AudioDevice(silence, mic="of a submarine").open()


FOUND = [
    Device(0, "Built-in", "ALSA", 2, 2, 48_000),
    Device(3, "Headset Pro", "ALSA", 1, 0, 16_000),
    Device(4, "Headset Mini", "ALSA", 1, 2, 44_100),
    Device(5, "Screen", "ALSA", 0, 2, 48_000),
]


def test_devices_are_chosen_by_number_name_part_and_default():
    assert choose(FOUND, 3, "input", 0).index == choose(FOUND, "3", "input", 0).index == 3
    assert choose(FOUND, "headset mini", "input", 0).index == choose(FOUND, "pro", "input", 0).index + 1 == 4
    assert choose(FOUND, "headset", "output", 0).index == 4  # the other one cannot be heard
    assert choose(FOUND, None, "output", 5).index == 5
    assert choose(FOUND, None, "output", -1).index == 0


def test_a_name_of_two_devices_lists_both_and_a_name_of_none_lists_all():
    with pytest.raises(DeviceError, match="2 microphones are called headset") as two:
        choose(FOUND, "headset", "input", 0)
    assert "3: Headset Pro" in str(two.value) and "Built-in" not in str(two.value)
    with pytest.raises(DeviceError, match="no loudspeaker 3") as none:
        choose(FOUND, 3, "output", 0)
    assert "5: Screen" in str(none.value) and "Headset Pro" not in str(none.value)
    with pytest.raises(DeviceError, match="there is no microphone: connect one"):
        choose([], None, "input", -1)


def test_our_rate_and_one_channel_are_tried_before_what_the_devices_want():
    assert attempts(48_000, FOUND[2], FOUND[3]) == [
        (48_000, (1, 1)), (48_000, (1, 2)), (44_100, (1, 1)), (44_100, (1, 2)),
    ]  # fmt: skip


@pytest.mark.parametrize(("number", "said"), [(-9985, "busy"), (-9997, "refused every rate"), (-9999, "cannot be")])
def test_each_refusal_says_what_to_do(number: int, said: str):
    text = explained(portaudio().PortAudioError("Error opening Stream", number), FOUND[0], FOUND[3])
    assert (said in text and "Built-in" in text and "Screen" in text and "another" in text) or "others" in text


def speech(rate: int, level: float = 0.1) -> np.ndarray:
    """Noise that comes and goes as syllables do."""
    noise = np.random.default_rng(0).standard_normal(2 * rate)
    return (level * noise * (np.sin(2 * np.pi * 3 * np.arange(2 * rate) / rate) > 0)).clip(-1, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("wave", "seconds", "kind"),
    [
        (speech(48_000), 2.0, "ok"),
        (speech(48_000), None, "ok"),
        (silence(96_000), 2.0, "silent"),
        (silence(0), 2.0, "silent"),
        (speech(48_000, 1e-6), 2.0, "silent"),
        (speech(48_000, 0.001), 2.0, "quiet"),
        (speech(48_000, 0.8), 2.0, "clipped"),
        (speech(48_000), 2.0 * 48_000 / 44_100, "rate"),
        (speech(48_000), 2.03, "ok"),
    ],
)
def test_a_recording_is_judged(wave: np.ndarray, seconds: float | None, kind: str):
    finding = judge_recording(wave, 48_000, seconds)
    assert finding.kind == kind and finding.text and finding.ok == (kind == "ok")


def test_one_loud_bang_is_no_clipping():
    wave = speech(48_000)
    wave[5000:5010] = 1
    assert judge_recording(wave, 48_000, 2.0).ok


def block(start: int, count: int) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.float32)[:, None]


def test_a_ring_gives_back_what_was_written_with_its_times():
    ring = Ring(100, 1000)
    assert ring.read() is None
    for start in range(0, 300, 30):
        ring.write(block(start, 30), 1000 + start)
        got = ring.read()
        assert got is not None and got[1] == start and np.array_equal(got[0], block(start, 30))
        assert ring.heard_at(start + 29) == 1000 + start + 29
    assert ring.dropped == 0


def test_a_full_ring_drops_the_oldest_and_counts_them():
    ring = Ring(100, 1000)
    for start in range(0, 240, 40):
        ring.write(block(start, 40), start)
    got = ring.read()
    assert got is not None and got[1] == 140 and np.array_equal(got[0], block(140, 100)) and ring.dropped == 140
    ring.write(block(240, 250), 240)  # more than it holds, at once
    got = ring.read()
    assert got is not None and got[1] == 390 and np.array_equal(got[0], block(390, 100)) and ring.dropped == 290


def test_a_ring_between_two_threads_loses_nothing_uncounted():
    ring, total = Ring(2000, 1000), 400_000

    def produce() -> None:
        for start in range(0, total, 100):
            ring.write(block(start, 100), start)

    writer = threading.Thread(target=produce)
    writer.start()
    seen = 0
    while writer.is_alive() or seen + ring.dropped < total:
        if (got := ring.read()) is not None:
            assert np.array_equal(got[0], block(got[1], len(got[0])))  # no sample of another position
            seen += len(got[0])
        ring.wait(0.01, 500)
    assert seen + ring.dropped == total and seen > 0


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100, 48_000])
def test_a_tone_passes_the_outlet_whole_and_its_delay_stays(rate: int):
    pulled = [0]

    def player_take(count: int) -> np.ndarray:
        pulled[0] += count
        return np.sin(2 * np.pi * 440 * np.arange(pulled[0] - count, pulled[0]) / PLAYED).astype(np.float32)

    outlet, delays, played = Outlet(player_take, rate), [], []
    for _ in range(150):
        played.append(outlet(rate // 50))
        delays.append(outlet.delay_ms)
    wave = np.concatenate(played)[rate // 2 :]
    wanted = np.sin(2 * np.pi * 440 * np.arange(rate // 2, 3 * rate) / rate)
    assert np.abs(wave - wanted).max() < 2e-3
    assert max(delays[10:]) - min(delays[10:]) < 1 and max(delays[75:]) - min(delays[75:]) < 0.1 and max(delays) < 50


def test_a_clock_that_follows_stamps_is_steady_and_never_runs_backwards():
    rng, t, times = np.random.default_rng(0), 0.0, []
    for i in range(1, 2000):
        t = follow(t, 32, 32 * 1.0002 * i + rng.uniform(-20, 20) + (5000 if i > 1000 else 0))
        times.append(t)
    steps = np.diff(times)
    assert steps.min() > 0 and np.sum(steps > 33.001) == 1  # the gap
    assert times[-1] == pytest.approx(32 * 1.0002 * 1999 + 5000, abs=25)
    assert follow(5000, 32, 100) == 5000  # the device's clock was set back


def test_broken_samples_of_a_microphone_become_silence_and_are_counted():
    ring = Ring(48_000, 48_000, 2)
    intake, samples = Intake(ring), np.full((6000, 2), 0.25, np.float32)
    samples[100:110, 0] = np.nan
    samples[200, 0] = np.inf
    ring.write(samples, 0)
    intake.pull()
    hop = intake.hop()
    assert hop is not None and intake.broken == 11 and np.isfinite(hop[0]).all() and np.isfinite(hop[1]).all()


def test_stamps_that_a_device_does_not_set_are_left_out():
    assert plausible(0.25) == 250 and plausible(1e6) == 0


def test_a_missing_portaudio_is_one_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(DeviceError, match=r"pip install edgeomni\[talk\]"):
        devices()
