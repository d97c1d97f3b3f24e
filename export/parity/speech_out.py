"""Replays groups g07, g08 and g10: codes to states, states to mel, and codes to joined waves."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.audio_decoder import BRIDGE, DECODER
from export.parity.golden import RECOMPUTED_F0, TOLERANCE, Golden, Replayed
from export.parity.graphs import Graphs
from export.unet import DECODER as UNET
from runtime.audio import join
from runtime.bundle import Manifest, SpeechLayout
from runtime.mel_stream import MelStream
from runtime.session import Carried
from runtime.speech import SegmentStream

STATES, FLOW, WAVES = "g07_audio_decoder", "g08_flow_matching", "g10_end_to_end"
INPUT, THROWN_AWAY = "an input", "of the mel branch that flow matching replaced: computed officially and thrown away"
UNCOVERED = {
    f"{STATES}/*.codes": INPUT,
    f"{STATES}/*.lengths": INPUT,
    f"{STATES}/*.coarse_mel_interp": THROWN_AWAY,
    f"{STATES}/*.refined_mel": THROWN_AWAY,
    f"{STATES}/*.mel_length": THROWN_AWAY,
    f"{FLOW}/*.codes": INPUT,
    f"{FLOW}/*.lengths": INPUT,
    f"{FLOW}/*.z": INPUT,
    f"{FLOW}/*.time_emb0": "an inner value of tables that are folded when the graph is made",
    f"{WAVES}/*.codes": INPUT,
}

Parts = dict[str, np.ndarray]  # recorded arrays of one clip, or ours, by the names of the recording


def replay(golden: Golden, graphs: Graphs, manifest: Manifest) -> Iterator[Replayed]:
    """Each stage from its own recorded input, and waves from codes."""
    if manifest.speech is not None:
        yield from replay_states(golden, graphs, manifest.speech)
        yield from replay_flow(golden, graphs, manifest.speech)
        yield from replay_waves(golden, graphs, manifest.speech)


def replay_states(golden: Golden, graphs: Graphs, layout: SpeechLayout) -> Iterator[Replayed]:
    """Recorded codes through the audio decoder, the official padded batch included."""
    for clip, recorded in clips(golden, STATES).items():
        layers = {part: f"{DECODER}.layers.{part.removeprefix('layer')}.out" for part in numbered("layer", recorded)}
        items = run_decoder(graphs, layout, recorded, tuple(layers.values()))
        ours = {
            "rvq_sum": np.concatenate([item[f"{BRIDGE}.rvq_sum"] for item in items]),
            "decoder_emb": np.concatenate([item[f"{BRIDGE}.proj_decoder.out"] for item in items]),
            "hidden_before_dconv2": np.concatenate([item["hidden"][0] for item in items]),
            "length_before_dconv2": np.array([item["hidden"].shape[1] for item in items]),
            "dconv1": items[0][f"{DECODER}.dconv1.out"],  # recorded of single items
            **{part: np.concatenate([item[name][0] for item in items]) for part, name in layers.items()},
        }
        yield from select(f"{STATES}/{clip}", ours, recorded)


def clips(golden: Golden, group: str) -> dict[str, Parts]:
    """The recorded arrays of a group by clip."""
    found: dict[str, Parts] = {}
    for name, array in golden.arrays(group).items():
        clip, dot, part = name.partition(".")
        if dot:
            found.setdefault(clip, {})[part] = array
    return found


def numbered(stem: str, recorded: Mapping[str, np.ndarray]) -> list[str]:
    return sorted(part for part in recorded if re.fullmatch(rf"{stem}\d+", part))


def select(clip: str, ours: Parts, recorded: Parts, tolerance: float = TOLERANCE) -> Iterator[Replayed]:
    """Those of our arrays that are recorded of this clip."""
    for part in ours:
        if part in recorded:
            yield Replayed(f"{clip}.{part}", ours[part], tolerance)


def run_decoder(graphs: Graphs, layout: SpeechLayout, recorded: Parts, layers: tuple[str, ...] = ()) -> list[Parts]:
    """Items of a recorded batch, each by itself, with outputs and inner values by name.

    The official norm covers an item's padding too. Padding holds the bias of the convolution, whose statistics are
    given as those of a past.
    """
    items = np.split(recorded["codes"], np.cumsum(recorded["lengths"])[:-1])
    lengths = [layout.frames_per_code * len(item) - layout.frames_short for item in items]
    taps = (f"{BRIDGE}.rvq_sum", f"{BRIDGE}.proj_decoder.out", f"{DECODER}.dconv1.out", *layers)
    bias = initializer(graphs, "audio_decoder", f"{DECODER}.dconv1.conv.bias")
    results = []
    for codes, length in zip(items, lengths, strict=True):
        state = Carried(graphs.session("audio_decoder")).state
        state["past.norm"] = moments(bias, max(lengths) - length)
        feeds = {"codes": codes, "frames": np.array(length), **state}
        results.append(graphs.run("audio_decoder", feeds, taps))
    return results


def initializer(graphs: Graphs, graph: str, name: str) -> np.ndarray:
    """The values that a graph stores under `name`."""
    stored = ir.load(graphs.folder / graphs.graphs[graph].file).graph.initializers[name].const_value
    assert stored is not None
    return stored.numpy().astype(np.float64)


def moments(row: np.ndarray, times: int) -> np.ndarray:
    """Count, mean and sum of squared deviations of `row` repeated."""
    return np.array([times * row.size, row.mean() if times else 0.0, times * row.size * row.var()], np.float32)


@dataclass
class Given:
    """Recorded noise [1, mel_bins, T] in place of a generator, frame by frame."""

    noise: np.ndarray
    drawn: int = 0

    def standard_normal(self, size: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        first, self.drawn = self.drawn, self.drawn + size[0]
        return self.noise[0, :, first : self.drawn].T.astype(dtype)


def replay_flow(golden: Golden, graphs: Graphs, layout: SpeechLayout) -> Iterator[Replayed]:
    """Recorded codes to the prenet's input, that to mu, recorded mu and noise to mel in one run, and by chunks."""
    times = np.array(layout.time_steps, np.float32)
    if "t_span" in golden.arrays(FLOW):
        yield Replayed(f"{FLOW}/t_span", times)
    for clip, recorded in clips(golden, FLOW).items():
        states = [item["hidden"][0] for item in run_decoder(graphs, layout, recorded)]
        lengths = [len(item) for item in states]
        ours = {"t": times[:-1], "mel_length": np.array(lengths), "prenet_in": padded(states)}
        yield from select(f"{FLOW}/{clip}", ours, recorded)
        yield from select(f"{FLOW}/{clip}", {"mu": run_prenet(graphs, recorded, lengths)}, recorded)
        if len(lengths) == 1:
            yield from select(f"{FLOW}/{clip}", run_steps(graphs, layout, recorded), recorded)
        yield from select(f"{FLOW}/{clip}", {"mel": stream_mel(graphs, layout, recorded, lengths)}, recorded)


def padded(items: list[np.ndarray]) -> np.ndarray:
    """[T_i, ..] of each item, filled up with zeros and stacked."""
    longest = max(len(item) for item in items)
    return np.stack([np.pad(item, ((0, longest - len(item)), (0, 0))) for item in items])


def run_prenet(graphs: Graphs, recorded: Parts, lengths: list[int]) -> np.ndarray:
    session = graphs.session("flow_prenet")
    hidden = recorded["prenet_in"]
    return padded([
        Carried(session).run(hidden=hidden[i : i + 1, :length])["mu"][0] for i, length in enumerate(lengths)
    ])  # fmt: skip


def run_steps(graphs: Graphs, layout: SpeechLayout, recorded: Parts) -> Parts:
    """Every Euler step over the whole of a single item, and the inner values of the first and the last."""
    inner = {
        "down_resnet": f"{UNET}.down_blocks.0.0.out",
        "down_tblock": f"{UNET}.down_blocks.0.1.0.out",
        "final_block": f"{UNET}.final_block.out",
        "v": f"{UNET}.out",
    }
    state = Carried(graphs.session("flow_estimator")).state
    xs, values = [recorded["z"]], []
    for step in range(len(layout.time_steps) - 1):
        feeds = {"x": xs[-1], "mu": recorded["mu"], "step": np.array(step), **state}
        results = graphs.run("flow_estimator", feeds, tuple(inner.values()))
        xs.append(results["x_next"])
        values.append({part: results[name] for part, name in inner.items()})  # [2, T, channels]
    first, last = values[0], values[-1]
    return {
        "mel": transposed(xs.pop()),
        "x_steps": np.stack(xs),
        "v_cond0": transposed(first["v"][:1]),
        "v_uncond0": transposed(first["v"][1:]),
        "v_cond_last": transposed(last["v"][:1]),
        "down_resnet0": transposed(first["down_resnet"][:1]),
        "down_tblock0": first["down_tblock"][:1],
        "final_block0": transposed(first["final_block"][:1]),
    }


def transposed(array: np.ndarray) -> np.ndarray:
    """[1, a, b] -> [1, b, a], either way."""
    return array.transpose(0, 2, 1)


def stream_mel(graphs: Graphs, layout: SpeechLayout, recorded: Parts, lengths: list[int]) -> np.ndarray:
    """The runtime's chunked flow from the recorded states: [batch, T, mel bins]. Padding keeps its noise officially."""
    mel = transposed(recorded["z"]).copy()
    for i, length in enumerate(lengths):
        stream = MelStream(graphs.session, layout, Given(recorded["z"][i : i + 1]))
        pieces = stream.mel(recorded["prenet_in"][i : i + 1, :length], last=True)
        mel[i, :length] = np.concatenate(list(pieces), axis=2)[0].T
    return mel


def replay_waves(golden: Golden, graphs: Graphs, layout: SpeechLayout) -> Iterator[Replayed]:
    """Recorded codes to waves without random draws, and those joined as the official player gets them."""
    recorded, waves = clips(golden, WAVES), []
    for clip in numbered("seg", {clip: np.empty(0) for clip in recorded}):
        stream = SegmentStream(graphs.session, layout)
        waves.append(np.concatenate([*stream.push(recorded[clip]["codes"]), *stream.finish()]))
        yield from select(f"{WAVES}/{clip}", {"wave": waves[-1][None]}, recorded[clip], RECOMPUTED_F0)
    if "joined" in golden.arrays(WAVES):
        yield Replayed(f"{WAVES}/joined", join(waves, layout.overlap_samples, official=True)[None], RECOMPUTED_F0)
