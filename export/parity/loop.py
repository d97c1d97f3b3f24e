"""Replays group g11: the whole interleaved loop of the official demo, from a recording to what the player gets."""

import json
import re
from collections.abc import Iterator

import numpy as np

from export.parity.golden import RECOMPUTED_F0, Golden, Replayed
from export.parity.graphs import Graphs
from runtime.audio import join
from runtime.bundle import Manifest
from runtime.engine import Engine
from runtime.events import StepDone
from runtime.prompt import Prompt
from runtime.reply import spoken_reply

GROUP = "g11_interleaved"
UNCOVERED: dict[str, str] = {}


def replay(golden: Golden, graphs: Graphs, manifest: Manifest) -> Iterator[Replayed]:
    """The loop with the official overwriting of positions, greedy, with every random draw of the vocoder at zero."""
    recorded = golden.arrays(GROUP)
    if not recorded:
        return
    engine = Engine(graphs.folder, graphs.options, compat="official")
    steps = list(_steps(golden, engine, recorded["step00.text.inputs"][0]))
    for index, step in enumerate(steps):
        name = f"{GROUP}/step{index:02d}.{step.kind}"
        yield Replayed(f"{name}.inputs", np.array([step.inputs]))
        yield Replayed(f"{name}.out", np.array([step.ids]))
        if step.kind == "audio":
            yield Replayed(f"{name}.codes", _with_closing_row(step.codes, manifest)[None])
    waves = [_wave(engine, step.codes) for step in steps if step.kind == "audio"]
    for index, wave in enumerate(waves):
        yield Replayed(f"{GROUP}/wave{index}", wave[None], RECOMPUTED_F0)
    yield from _player(golden, waves, manifest)


def _steps(golden: Golden, engine: Engine, ids: np.ndarray) -> Iterator[StepDone]:
    """Generate from the recorded prompt, with the audio that its string names heard anew."""
    text = golden.tables["prompts"][golden.tables["interleaved"]["prompt"]]["text"]
    paths = [
        json.loads(found)["path"] for found in re.findall(r"<audio_start_baichuan>(\{.*?\})<audio_end_baichuan>", text)
    ]
    codes = np.concatenate([engine.hear(golden.input(path)).codes for path in paths])
    context = engine.context()
    context.append(Prompt(ids, codes, np.empty((0, engine.manifest.hidden_size), np.float32)))
    rng = np.random.default_rng(0)
    reply = spoken_reply(context, engine.writer(rng, greedy=True), engine.voice(greedy=True), engine.compat)
    yield from (item for item in reply if isinstance(item, StepDone))


def _with_closing_row(codes: np.ndarray, manifest: Manifest) -> np.ndarray:
    """The official generate appends a row that holds every codebook's size."""
    assert manifest.speech is not None
    return np.concatenate([codes, [manifest.speech.codebook_sizes]])


def _wave(engine: Engine, codes: np.ndarray) -> np.ndarray:
    segment = engine.speech(np.random.default_rng(0), "exact", zero_noise=True).segment()
    return np.concatenate([*segment.push(codes), *segment.finish()])


def _player(golden: Golden, waves: list[np.ndarray], manifest: Manifest) -> Iterator[Replayed]:
    """The demo hands out nothing but silence first, then the joined waves of the first two segments, then each next."""
    assert manifest.speech is not None
    overlap = manifest.speech.overlap_samples
    heard = 0
    for index in range(1, len(waves)):
        joined = join(waves[: index + 1], overlap, official=True)
        yield Replayed(f"{GROUP}/yield{index}.pcm16", joined[heard:] * 32768, RECOMPUTED_F0)
        heard = len(joined)
