"""Replays group g09: F0, the sine source, the inner values of the vocoder and its waveform."""

from collections.abc import Iterator

import numpy as np

from export.parity.golden import RECOMPUTED_F0, TOLERANCE, Golden, Replayed
from export.parity.graphs import Graphs
from runtime.bundle import Manifest, SpeechLayout
from runtime.vocoder import WaveStream, harmonic_cycles

GROUP = "g09_vocoder"
TAPS = {
    "conv_pre": "hift.conv_pre.out",
    "up0": "hift.ups.0.out",
    "source_down0": "hift.source_downs.0.out",
    "source_res0": "hift.source_resblocks.0.out",
    # Recorded by reference: the official code goes on to add the level's other blocks to this tensor in place.
    "resblock0": "hift.levels.0.resblocks_sum",
    "conv_post": "hift.conv_post.out",
    "source_stft": "hift.source.stft",
    "sines": "hift.m_source.sines",
    "source": "hift.m_source.out",
}
BEFORE_SOURCE = ("conv_pre", "up0", "sines")
UNCOVERED = {
    f"{GROUP}/*.mel": "an input",
    f"{GROUP}/*.phase": "an input: the random phases",
    f"{GROUP}/*.noise": "an input: the random noise",
}


def replay(golden: Golden, graphs: Graphs, manifest: Manifest) -> Iterator[Replayed]:
    """Every recorded array from the clip's own mel, F0 and draws; waves without draws also from mel alone."""
    if manifest.speech is not None:
        yield from replay_clips(golden, graphs, manifest.speech)


def replay_clips(golden: Golden, graphs: Graphs, layout: SpeechLayout) -> Iterator[Replayed]:
    arrays = golden.arrays(GROUP)
    for clip in sorted({name.split(".")[0] for name in arrays}):
        recorded = {name.split(".", 1)[1]: array for name, array in arrays.items() if name.startswith(f"{clip}.")}
        for part, ours, tolerance in _replay_clip(recorded, graphs, layout):
            yield Replayed(f"{GROUP}/{clip}.{part}", ours, tolerance)


def _replay_clip(
    recorded: dict[str, np.ndarray], graphs: Graphs, layout: SpeechLayout
) -> Iterator[tuple[str, np.ndarray, float]]:
    mel, f0 = recorded["mel"], recorded["f0"]
    yield "f0", graphs.run("vocoder_f0", {"mel": mel})["f0"], TOLERANCE
    taps = {part: tap for part, tap in TAPS.items() if part in recorded}
    results = graphs.run("vocoder", {"mel": mel, **_source(recorded, layout)}, tuple(taps.values()))
    rounding = _phase_rounding(f0, layout)
    for part, tap in taps.items():
        ours = results[tap][..., : recorded[part].shape[-1]]  # of `sines` only the beginning is recorded
        yield part, ours, TOLERANCE if part in BEFORE_SOURCE else rounding
    yield "wave", results["wave"], rounding
    if "phase" not in recorded and "noise" not in recorded:
        stream = WaveStream(graphs.session("vocoder_f0"), graphs.session("vocoder"), layout)
        yield "wave", np.concatenate([stream.push(mel), stream.finish()])[None], RECOMPUTED_F0


def _source(recorded: dict[str, np.ndarray], layout: SpeechLayout) -> dict[str, np.ndarray]:
    """The recorded F0 and draws (phases in radians; where there are none they were 0) as the graph takes them."""
    f0, phases = recorded["f0"], np.zeros(layout.harmonics)
    if "phase" in recorded:
        phases[1:] = recorded["phase"][0, 1:, 0] / (2 * np.pi)
    cycles, _ = harmonic_cycles(0.0, f0, phases, layout)
    silence = np.zeros((1, layout.harmonics, f0.shape[1] * layout.samples_per_frame), np.float32)
    return {"f0": f0, "cycles": cycles, "noise": recorded.get("noise", silence).astype(np.float32)}


def _phase_rounding(f0: np.ndarray, layout: SpeechLayout) -> float:
    """What the recording itself is off by: the official running sum is float32, so after N turns it is rounded to
    N * 2^-24 turns (measured: the recorded sources lie 2e-4 from float64 arithmetic, ours 1e-5)."""
    turns = layout.harmonics * float(f0.sum()) * layout.samples_per_frame / layout.sampling_rate
    return max(TOLERANCE, 2 * np.pi * turns * 2.0**-24)
