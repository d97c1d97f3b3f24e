"""Measures the voice activity detectors on real speech, and what hears a person through our own echo."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
from rich.console import Console
from rich.table import Table

from apps.bench.recordings import hop_levels, levelled, recordings
from apps.bench.rooms import Point, room
from apps.embedded import embedded_bundle
from export.nano.noises import draw_noise
from runtime.audio import Wave
from runtime.engine import Engine
from runtime.live.echo import EchoCanceller, EchoTest
from runtime.live.settings import HOP, RATE
from runtime.live.vad import Detector, open_detector

PAUSE = RATE  # samples of silence around each clip
AFTER = 16  # hops after a clip that are no longer judged as silence: detectors let go slowly
CLEAR_DB = -20.0  # below a clip's loud hops, down to which a hop is clear speech
FLOOR_DB = -75.0  # of the white noise under everything
SNRS = (20, 10, 5, 0)
NOISES = {"white": ("white",), "pink": ("coloured",), "engine": ("engine",), "keys": ("keys",), "music": ("melody",)}
THRESHOLD, THRESHOLD_PLAY = 0.6, 0.75
ONSET_HOPS, LATEST_HOPS = 6, 47  # 192 ms; a person who is not heard within 1.5 s is not heard


@dataclass(frozen=True)
class Speech:
    """Clips with pauses between them, and what each hop is: 1 clear speech, 0 silence, -1 neither."""

    wave: Wave
    labels: np.ndarray


def joined(clips: list[Wave]) -> Speech:
    pieces, labels = [np.zeros(PAUSE // HOP * HOP, np.float32)], [np.zeros(PAUSE // HOP, int)]
    for clip in clips:
        whole = np.pad(clip, (0, -len(clip) % HOP))
        levels = hop_levels(whole)
        loud = np.percentile(levels, 90)
        speech = np.where(levels > loud + CLEAR_DB, 1, -1)
        after = np.r_[np.full(AFTER, -1), np.zeros(PAUSE // HOP, int)]
        pieces += [whole, np.zeros(len(after) * HOP, np.float32)]
        labels += [speech, after]
    marks = np.concatenate(labels)
    marks[:-1][(marks[1:] != 0) & (marks[:-1] == 0)] = -1  # the hop before a clip
    return Speech(np.concatenate(pieces), marks)


def heard(detector: Detector, wave: Wave) -> np.ndarray:
    detector.reset()
    return np.array([detector.probability(hop) for hop in wave[: len(wave) // HOP * HOP].reshape(-1, HOP)])


@dataclass(frozen=True)
class Agreement:
    """One detector on one speaker in one noise."""

    detector: str
    speaker: str
    noise: str
    snr: int | None
    speech: int  # hops
    missed: int
    silence: int
    false: int


def agreement(detectors: dict[str, Detector], seconds: float, rng: Random) -> Iterator[Agreement]:
    people = recordings(seconds, rng)
    for speaker, clips in people.items():
        speech = joined(clips)
        others = [clip for name, theirs in people.items() if name != speaker for clip in theirs]
        for noise, snr, wave in noisy(speech.wave, others, rng):
            for name, detector in detectors.items():
                found = heard(detector, wave) >= THRESHOLD
                said, silent = speech.labels == 1, speech.labels == 0
                missed, false = int((said & ~found).sum()), int((silent & found).sum())
                yield Agreement(name, speaker, noise, snr, int(said.sum()), missed, int(silent.sum()), false)


def noisy(wave: Wave, others: list[Wave], rng: Random) -> Iterator[tuple[str, int | None, Wave]]:
    """The speech alone, and in each noise at each ratio to its loud hops; a floor of white noise lies under all."""
    draws = np.random.default_rng(rng.getrandbits(32))
    floor = 10 ** (FLOOR_DB / 20) * draws.standard_normal(len(wave))
    wave = (wave + floor).astype(np.float32)
    yield "none", None, wave
    for name in (*NOISES, "babble"):
        noise = babble(len(wave), others, rng) if name == "babble" else made(name, len(wave), others, rng)
        speech_db, noise_db = np.percentile(hop_levels(wave), 90), 10 * np.log10(np.mean(noise**2))
        for snr in SNRS:
            yield name, snr, (wave + noise * 10 ** ((speech_db - noise_db - snr) / 20)).astype(np.float32)


def made(name: str, count: int, others: list[Wave], rng: Random) -> Wave:
    return draw_noise(rng, NOISES[name], lambda: rng.choice(others), count / RATE + 0.1)[1][:count]


def babble(count: int, others: list[Wave], rng: Random) -> Wave:
    """Five other people who speak without a break."""
    voices = [np.resize(np.concatenate(rng.sample(others, len(others))), count) for _ in range(5)]
    return np.stack(voices).sum(axis=0)


@dataclass(frozen=True)
class Scene:
    """What the loudspeaker plays, what the microphone hears, and the hops in which a person speaks into it."""

    reference: Wave
    mic: Wave
    alone: Wave  # what it would hear without the echo
    echo_db: int
    delay_ms: int
    near_db: int | None  # relative to the echo
    begin: int  # hop at which the person begins
    end: int


SECONDS, BEGIN, NEAR_SECONDS = 10.0, 5.0, 1.2
# The mouth, 0.7 m from the microphone; the loudspeaker; the microphone; the room's size.
ROOMS: tuple[tuple[Point, Point, Point, Point], ...] = (
    ((2.7, 2.0, 1.35), (2.0, 1.5, 1.0), (2.4, 1.5, 1.0), (5.0, 4.0, 2.7)),
    ((1.8, 1.7, 1.15), (1.2, 1.0, 0.8), (1.5, 1.2, 0.8), (3.2, 2.6, 2.4)),
    ((4.2, 3.0, 1.45), (3.0, 2.0, 1.1), (3.9, 2.5, 1.1), (7.0, 5.5, 3.0)),
)
ECHOES_DB, DELAYS_MS, NEARS_DB = (-10, -15, -20, -25), (50, 100, 150, 250), (0, -10)
ECHO_DB, MIC_NOISE_DB = (
    -35.0,
    -70.0,
)  # at the microphone, of loud hops; the reference is as much louder as the scene says


def scenes(count: int, seconds: float, rng: Random) -> Iterator[Scene]:
    """Real people as the assistant and as the person, in three rooms."""
    people = {name: clips for name, clips in recordings(seconds, rng).items() if sum(map(len, clips)) > 8 * RATE}
    people = {name: clips for name, clips in people.items() if max(map(len, clips)) > NEAR_SECONDS * RATE}
    paths = [(room(speaker, mic, size), room(mouth, mic, size)) for mouth, speaker, mic, size in ROOMS]
    for number in range(count):
        assistant, person = rng.sample(sorted(people), 2)
        echo_db, delay_ms = ECHOES_DB[number % 4], DELAYS_MS[number // 4 % 4]
        far = np.resize(np.concatenate(people[assistant]), round(SECONDS * RATE) // HOP * HOP)
        near = rng.choice([clip for clip in people[person] if len(clip) > NEAR_SECONDS * RATE])[: 2 * RATE]
        yield mixed(far, near, paths[number % 3], echo_db, delay_ms, NEARS_DB[number % 2 ^ number // 16 % 2], rng)


def mixed(
    far: Wave, near: Wave, paths: tuple[Wave, Wave], echo_db: int, delay_ms: int, near_db: int, rng: Random
) -> Scene:
    draws = np.random.default_rng(rng.getrandbits(32))
    reference = levelled(far, ECHO_DB - echo_db)
    late = np.r_[np.zeros(delay_ms * RATE // 1000, np.float32), through(reference, paths[0])]
    echo = levelled(late[: len(far)], ECHO_DB)
    said = levelled(through(near, paths[1])[: len(near)], ECHO_DB + near_db)
    start = round(BEGIN * RATE) // HOP * HOP
    voiced = np.flatnonzero(hop_levels(said) > ECHO_DB + near_db + CLEAR_DB)
    alone = 10 ** (MIC_NOISE_DB / 20) * draws.standard_normal(len(far), np.float32)
    alone[start : start + len(said)] += said
    first, last = start // HOP + voiced[0], start // HOP + voiced[-1] + 1
    return Scene(reference, alone + echo, alone, echo_db, delay_ms, near_db, int(first), int(last))


def through(wave: Wave, path: Wave) -> Wave:
    size = 1 << (len(wave) + len(path)).bit_length()
    return np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(path, size), size)[: len(wave)].astype(np.float32)


@dataclass(frozen=True)
class Ears:
    """A scene as each way of listening has it: probabilities of speech, and which hops are suspicious."""

    scene: Scene
    alone: np.ndarray
    raw: np.ndarray
    cancelled: np.ndarray
    suspicious: np.ndarray  # to the test alone
    suspicious_both: np.ndarray  # to the test that also sees what the canceller left


WAYS: dict[str, Callable[[Ears], np.ndarray]] = {
    "no echo at all": lambda ears: ears.alone >= THRESHOLD_PLAY,
    "raw": lambda ears: ears.raw >= THRESHOLD_PLAY,
    "raw, test": lambda ears: (ears.raw >= THRESHOLD_PLAY) & ~ears.suspicious,
    "raw, test with canceller": lambda ears: (ears.raw >= THRESHOLD_PLAY) & ~ears.suspicious_both,
    "cancelled": lambda ears: ears.cancelled >= THRESHOLD_PLAY,
    "cancelled, test": lambda ears: (ears.cancelled >= THRESHOLD_PLAY) & ~ears.suspicious,
}


def listen(scene: Scene, detector: Detector) -> Ears:
    canceller, alone, with_canceller = EchoCanceller(), EchoTest(), EchoTest()
    cleaned, first, second = [], [], []
    for mic, reference in zip(scene.mic.reshape(-1, HOP), scene.reference.reshape(-1, HOP), strict=True):
        cleaned.append(canceller.process(mic, reference))
        alone.note_reference(reference)
        with_canceller.note_reference(reference)
        first.append(alone.suspicious(mic))
        second.append(with_canceller.suspicious(mic, cleaned[-1]))
    raw, after = heard(detector, scene.mic), heard(detector, np.concatenate(cleaned))
    return Ears(scene, heard(detector, scene.alone), raw, after, np.array(first), np.array(second))


def barge_in(listened: list[Ears], way: Callable[[Ears], np.ndarray]) -> dict[str, float | None]:
    """False speech hops and onsets from the echo alone, and how many people are found, how late."""
    echo, onsets, result = [], [], {}
    for ears in listened:
        voiced, scene = way(ears), ears.scene
        echo.append(np.r_[voiced[: scene.begin], voiced[scene.end + AFTER :]])
        onsets.append(onset(voiced[: scene.begin]) is not None)
    result["false_hops"], result["false_onsets"] = float(np.concatenate(echo).mean()), float(np.mean(onsets))
    for near_db in NEARS_DB:
        people = [ears for ears in listened if ears.scene.near_db == near_db]
        late = [onset(way(ears)[ears.scene.begin : ears.scene.begin + LATEST_HOPS]) for ears in people]
        found = [32 * (hop + 1) for hop in late if hop is not None]
        result[f"found_{near_db}"] = len(found) / len(people)
        result[f"median_ms_{near_db}"] = float(np.median(found)) if found else None
    return result


def onset(voiced: np.ndarray) -> int | None:
    """The hop at which speech has lasted long enough to begin a turn while something plays."""
    run = 0
    for hop, speaks in enumerate(voiced):
        run = run + 1 if speaks else 0
        if run == ONSET_HOPS:
            return hop
    return None


def costs(detectors: dict[str, Detector]) -> dict[str, float]:
    """Processor ms a hop, in hops of noise."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((300, HOP)).astype(np.float32)
    canceller, test = EchoCanceller(), EchoTest()

    def tested(hop: Wave) -> None:
        test.note_reference(hop)
        test.suspicious(hop)

    jobs: dict[str, Callable[[Wave], object]] = {name: detector.probability for name, detector in detectors.items()}
    jobs |= {"canceller": lambda hop: canceller.process(hop, hop), "echo test": tested}
    return {name: cost(job, noise) for name, job in jobs.items()}


def cost(job: Callable[[Wave], object], hops: Wave) -> float:
    began = time.process_time()
    for hop in hops:
        job(hop)
    return 1000 * (time.process_time() - began) / len(hops)


def shares(rows: list[Agreement], key: Callable[[Agreement], str]) -> Table:
    """Missed speech and false speech in % of the hops, a row for each key."""
    names = sorted({row.detector for row in rows}, reverse=True)
    table = Table("", *(f"{name} {what}" for what, name in product(("missed %", "false %"), names)))
    for label in dict.fromkeys(map(key, rows)):
        cells = []
        for part, whole in (("missed", "speech"), ("false", "silence")):
            for name in names:
                these = [asdict(row) for row in rows if key(row) == label and row.detector == name]
                cells.append(f"{100 * sum(row[part] for row in these) / sum(row[whole] for row in these):.1f}")
        table.add_row(label, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15, help="of speech of each person")
    parser.add_argument("--scenes", type=int, default=64, help="with an echo and a person")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rng, console, engine = Random(chosen.seed), Console(width=120), Engine(embedded_bundle())
    detectors = {name: open_detector(name, engine) for name in ("silero", "bundle", "energy")}
    cpu = costs(detectors)
    rows = list(agreement(detectors, chosen.seconds, rng))
    listened = [listen(scene, detectors["silero"]) for scene in scenes(chosen.scenes, 25, rng)]
    barge = {name: barge_in(listened, way) for name, way in WAYS.items()}
    console.print(shares([row for row in rows if row.snr is None], lambda row: row.speaker))
    console.print(shares(rows, lambda row: row.noise if row.snr is None else f"{row.noise}, {row.snr} dB"))
    table = Table("", *next(iter(barge.values())))
    for name, values in barge.items():
        table.add_row(name, *("-" if value is None else f"{value:.3g}" for value in values.values()))
    console.print(table)
    console.print({name: f"{value:.3f} ms a hop" for name, value in cpu.items()})
    if chosen.json:
        found = {"cpu_ms": cpu, "agreement": [asdict(row) for row in rows], "barge_in": barge, "scenes": len(listened)}
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
