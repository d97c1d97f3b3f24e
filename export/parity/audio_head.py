"""Replays groups g05 and g06: hidden states through the audio head to codes, and logits through the sampler."""

import itertools
import re
from collections.abc import Iterator

import numpy as np

from export.audio_head import headnorm_tap, layer_tap, logits_tap, score_sizes
from export.draw import scores_tap
from export.parity.golden import Golden, Replayed
from export.parity.graphs import Graphs
from runtime.bundle import Manifest, Sampling
from runtime.context import Context
from runtime.errors import EdgeOmniError
from runtime.prompt import Prompt
from runtime.reply import Voice
from runtime.sampling import penalise, probabilities

HEAD, SAMPLER = "g05_audio_head", "g06_sampling"
FORCED = "tf"  # recorded with given codes; every other part of g05 is a greedy run

UNCOVERED = {
    f"{HEAD}/{FORCED}.hidden": "an input: what the audio head was given",
    f"{HEAD}/{FORCED}.codes": "an input: the codes that were forced",
    f"{HEAD}/*.input_ids": "an input: the context of a run",
    f"{SAMPLER}/logits": "an input: what the sampler was given",
    f"{SAMPLER}/context": "an input: the ids that count as seen",
}

Parts = dict[str, np.ndarray]  # what a run gives, by the names of the recording


def replay(golden: Golden, graphs: Graphs, manifest: Manifest) -> Iterator[Replayed]:
    """Inner values and scores from the recorded hidden states; codes and hidden states from the recorded ids."""
    yield from replay_sampler(golden)
    recorded = golden.arrays(HEAD)
    if manifest.speech is None or not recorded:
        return
    books = manifest.speech.codebook_sizes
    if f"{FORCED}.codes" in recorded:
        yield from _select(FORCED, forced_frames(graphs, books, recorded), recorded)
    for run in sorted({name.split(".")[0] for name in recorded} - {FORCED}):
        penalty = _penalty(golden, f"{HEAD}/{run}.scores0")
        scores = greedy_scores(graphs, books, recorded[f"{run}.hidden"], penalty)
        frames = generated_frames(graphs, manifest, recorded[f"{run}.input_ids"][0], penalty, len(scores["gap"]))
        yield from _select(run, {**scores, **frames}, recorded)


def _select(run: str, parts: Parts, recorded: Parts) -> Iterator[Replayed]:
    for part, ours in parts.items():
        if f"{run}.{part}" in recorded:
            yield Replayed(f"{HEAD}/{run}.{part}", ours)


def head_feeds(graphs: Graphs, books: tuple[int, ...], hidden: np.ndarray) -> Parts:
    """Feeds for the likeliest codes of one hidden state [hidden], with nothing seen and no penalty."""
    count = sum(score_sizes(books))
    dtype = graphs.graphs["audio_head"].inputs[0].dtype
    return {
        "hidden": hidden[None].astype(dtype),
        "noise": np.zeros(count, np.float32),
        "temperature": np.array(1.0, np.float32),
        "top_k": np.array(1, np.int64),
        "top_p": np.array(1.0, np.float32),
        "repetition_penalty": np.array(1.0, np.float32),
        "seen": np.zeros(count, np.bool_),
        "forced": np.full(len(books), -1, np.int64),
    }


def forced_frames(graphs: Graphs, books: tuple[int, ...], recorded: Parts) -> Parts:
    """Every inner value of the frames whose codes were given."""
    depths = range(len(books))
    layers = sum(name.startswith(f"{FORCED}.layer") for name in recorded)
    stacked = {f"layer{i}": [layer_tap(i, depth) for depth in depths] for i in range(layers)}
    stacked["headnorm"] = [headnorm_tap(depth) for depth in depths]
    logits = [logits_tap(depth) for depth in depths]
    taps = [*itertools.chain(*stacked.values()), *logits]
    frames = []
    for hidden, codes in zip(recorded[f"{FORCED}.hidden"], recorded[f"{FORCED}.codes"], strict=True):
        feeds = {**head_feeds(graphs, books, hidden), "forced": codes}
        frames.append(graphs.run("audio_head", feeds, taps))
    parts = {
        name: np.array([[frame[tap].ravel() for tap in taps] for frame in frames]) for name, taps in stacked.items()
    }
    for depth, tap in enumerate(logits):  # a head may have been padded
        parts[f"logits{depth}"] = np.array([frame[tap].ravel()[: books[depth] + 1] for frame in frames])
    return {**parts, "frame_embed": np.concatenate([frame["row"] for frame in frames])}


def greedy_scores(graphs: Graphs, books: tuple[int, ...], hidden: np.ndarray, penalty: float) -> Parts:
    """Scores of every codebook, and by how much the best leads, for the hidden states [frames, hidden] of a run."""
    taps = [scores_tap(depth) for depth in range(len(books))]
    frames, seen = [], np.zeros(sum(score_sizes(books)), np.bool_)
    for row in hidden:
        feeds = {**head_feeds(graphs, books, row), "seen": seen, "repetition_penalty": np.array(penalty, np.float32)}
        frames.append(graphs.run("audio_head", feeds, taps))
        seen = frames[-1]["seen_next"]
    scores = [np.array([frame[tap].ravel() for frame in frames]) for tap in taps]
    best = [np.sort(score, axis=1)[:, -2:] for score in scores]
    gap = np.stack([pair[:, 1] - pair[:, 0] for pair in best], axis=1)
    return {**{f"scores{depth}": score for depth, score in enumerate(scores)}, "gap": gap}


def generated_frames(graphs: Graphs, manifest: Manifest, ids: np.ndarray, penalty: float, limit: int) -> Parts:
    """The run itself, decoder and audio head in turn, until the end code or `limit` frames."""
    assert manifest.speech is not None and manifest.tokens.audio_pad is not None
    books = manifest.speech.codebook_sizes
    context = Context(manifest, *(graphs.session(name) for name in ("decoder", "embed_tokens", "embed_audio")))
    voice = Voice(graphs.session("audio_head"), score_sizes(books), Sampling(repetition_penalty=penalty, greedy=True))
    no_codes, no_rows = np.empty((0, len(books)), np.int64), np.empty((0, manifest.hidden_size), np.float32)
    context.append(Prompt(ids, no_codes, no_rows))
    codes, hidden, rng = [], [], np.random.default_rng(0)
    while len(codes) < limit and not (codes and codes[-1][0] == voice.end_code):
        hidden.append(context.hidden().copy())
        frame, row = voice.frame(hidden[-1], rng)
        context.push(manifest.tokens.audio_pad, row)
        codes.append(frame)
    codes.append(np.array(books))  # the official generate closes with a row of the codebooks' sizes
    return {"codes": np.array(codes), "hidden": np.concatenate(hidden), "sequence_len": np.array(len(context.ids))}


def replay_sampler(golden: Golden) -> Iterator[Replayed]:
    recorded = golden.arrays(SAMPLER)
    for name in sorted(recorded):
        step, _, part = name.rpartition(".")
        if part != "probs":
            continue
        sampling = _sampling(golden, step)
        rows = [
            penalise(logits, context, sampling.repetition_penalty)
            for logits, context in zip(recorded["logits"], recorded["context"], strict=True)
        ]
        yield Replayed(f"{SAMPLER}/{step}.penalised", np.array(rows))
        yield Replayed(f"{SAMPLER}/{step}.probs", np.array([probabilities(row, sampling) for row in rows]))


def _sampling(golden: Golden, step: str) -> Sampling:
    """The settings of a step, which the set states in its arrays' descriptions alone."""
    meaning = golden.meaning(f"{SAMPLER}/{step}.probs")
    temperature, top_k, top_p = (float(_number(meaning, word)) for word in ("temperature", "top-k", "top-p"))
    penalty = _penalty(golden, f"{SAMPLER}/{step}.penalised")
    return Sampling(temperature, int(top_k), top_p, penalty)


def _penalty(golden: Golden, array: str) -> float:
    return _number(golden.meaning(array), "repetition penalty")


def _number(meaning: str, word: str) -> float:
    """The number behind `word` in a description."""
    found = re.search(rf"{word} (\d+(?:\.\d+)?)", meaning)
    if found is None:
        raise EdgeOmniError(f"the golden set's manifest does not say the {word}: {meaning!r}")
    return float(found[1])
