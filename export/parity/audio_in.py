"""Replays groups g01 and g02: files to waves and log-mels, log-mels through the encoder and the bridge to codes."""

from collections.abc import Iterator

import numpy as np

from export.audio_encoder import BRIDGE, MODEL
from export.parity.golden import Golden, Replayed
from export.parity.graphs import Graphs
from runtime.audio import load_mono, mel_filters, segments
from runtime.bundle import AudioFrontEnd, Manifest

FRONT_END, ENCODER = "g01_audio_frontend", "g02_audio_encoder"
LOGMEL = ".logmel"
BATCHED = ("encoder_out", "bridge_out")  # recorded with a batch axis; of other values all items' rows in one

UNCOVERED = {
    f"{ENCODER}/batch.bridge_out": "recorded past the end of the shorter item too, where a run of one item has no rows",
}

Parts = dict[str, np.ndarray]  # what one run gives, by the names of the recording


def replay(golden: Golden, graphs: Graphs, manifest: Manifest) -> Iterator[Replayed]:
    """Log-mels from the files, codes and inner values from the recorded log-mels, and codes from the files."""
    if manifest.audio is not None:
        yield from replay_front_end(golden, manifest.audio)
        yield from replay_encoder(golden, graphs, manifest.audio)


def replay_front_end(golden: Golden, front: AudioFrontEnd) -> Iterator[Replayed]:
    recorded = golden.arrays(FRONT_END)
    filters = mel_filters(front.sampling_rate, front.n_fft, front.num_mel_bins)
    yield Replayed(f"{FRONT_END}/mel_filters", filters)
    for clip in _clips(golden, recorded):
        wave = _wave(golden, clip, front)
        parts = {f"seg{i}{LOGMEL}": mel for i, (mel, _) in enumerate(segments(wave, front))}
        for part, ours in {"wave16k": wave, **parts}.items():
            if f"{clip}.{part}" in recorded:
                yield Replayed(f"{FRONT_END}/{clip}.{part}", ours)


def _clips(golden: Golden, recorded: Parts) -> list[str]:
    """The audio files of which something is recorded."""
    return sorted({name.split(".")[0] for name in recorded} & golden.tables["audio"].keys())


def _wave(golden: Golden, clip: str, front: AudioFrontEnd) -> np.ndarray:
    return load_mono(golden.input(golden.tables["audio"][clip]["file"]), front.sampling_rate)


def replay_encoder(golden: Golden, graphs: Graphs, front: AudioFrontEnd) -> Iterator[Replayed]:
    recorded, mels = golden.arrays(ENCODER), golden.arrays(FRONT_END)
    taps = _taps(recorded, front)
    for name in mels:
        if name.endswith(LOGMEL):
            segment = name.removesuffix(LOGMEL)
            yield from _select(segment, _encode(graphs, mels[name], taps), recorded)
    for clip in _clips(golden, recorded):
        for index, (mel, _) in enumerate(segments(_wave(golden, clip, front), front)):
            codes = graphs.run("audio_encoder", {"mel": mel[None]})["codes"]
            yield from _select(f"{clip}.seg{index}", {"codes": codes}, recorded)
    if "batch.features" in recorded:
        yield from _select("batch", _replay_batch(golden, graphs, front, taps), recorded)


def _select(segment: str, parts: Parts, recorded: Parts) -> Iterator[Replayed]:
    """Those of `parts` that are recorded of this segment."""
    for part, ours in parts.items():
        if f"{segment}.{part}" in recorded:
            yield Replayed(f"{ENCODER}/{segment}.{part}", ours)
    tail = recorded.get(f"{segment}.encoder_out_tail")
    if tail is not None and "encoder_out" in parts:
        yield Replayed(f"{ENCODER}/{segment}.encoder_out_tail", parts["encoder_out"][:, -tail.shape[1] :])


def _taps(recorded: Parts, front: AudioFrontEnd) -> dict[str, str]:
    """Recorded name -> name in the graph, of every inner value."""
    layers = {part for name in recorded if (part := name.split(".")[-1]).startswith("layer")}
    distances = {f"distance{i}": f"{BRIDGE}.vq_list.{i}.distance" for i in range(len(front.codebook_sizes))}
    return {
        "embedded": f"{MODEL}.embedded",
        **{layer: f"{MODEL}.layers.{layer.removeprefix('layer')}.out" for layer in sorted(layers)},
        "encoder_out": f"{MODEL}.out",
        "bridge_out": f"{BRIDGE}.out",
        **distances,
    }


def _encode(graphs: Graphs, mel: np.ndarray, taps: dict[str, str]) -> Parts:
    """One item's log-mel [num_mel_bins, frames] through the graph."""
    results = graphs.run("audio_encoder", {"mel": mel[None]}, tuple(taps.values()))
    parts = {part: results[tap] for part, tap in taps.items()}
    margins = [_margin(parts.pop(part)) for part in taps if part.startswith("distance")]
    rows = {part: value if part in BATCHED else value[0] for part, value in parts.items()}
    return {**rows, "codes": results["codes"], "rvq_margin": np.stack(margins, axis=1)}


def _margin(distances: np.ndarray) -> np.ndarray:
    """By how much each choice was made: second best minus best of [n, codewords]."""
    best = np.partition(distances, 1, axis=1)
    return best[:, 1] - best[:, 0]


def _replay_batch(golden: Golden, graphs: Graphs, front: AudioFrontEnd, taps: dict[str, str]) -> Parts:
    """The official padded batch, item by item.

    Its last convolution reads conv1's output one frame past the end of a shorter item with an odd number of frames.
    One frame of padding in our run gives the same: a run takes all the frames that its last window reads.
    """
    clips = golden.mentioned(f"{ENCODER}/batch.features", golden.tables["audio"])
    found = [segment for clip in clips for segment in segments(_wave(golden, clip, front), front)]
    items = golden.arrays(ENCODER)["batch.features"]
    runs = [
        _encode(graphs, item[:, : of.encoder * front.stride], taps) for item, (_, of) in zip(items, found, strict=True)
    ]
    return {
        "features": _padded([mel for mel, _ in found], axis=1),
        "encoder_length": np.array([of.encoder for _, of in found]),
        "bridge_length": np.array([of.codes for _, of in found]),
        "encoder_out": _padded([run["encoder_out"][0] for run in runs], axis=0),
        "codes": np.concatenate([run["codes"] for run in runs]),
        "rvq_margin": np.concatenate([run["rvq_margin"] for run in runs]),
    }


def _padded(items: list[np.ndarray], axis: int) -> np.ndarray:
    """Items of different length along `axis`, filled up with zeros to the longest and stacked."""
    longest = max(item.shape[axis] for item in items)
    missing = [[(0, longest - item.shape[axis] if i == axis else 0) for i in range(item.ndim)] for item in items]
    return np.stack([np.pad(item, pads) for item, pads in zip(items, missing, strict=True)])
