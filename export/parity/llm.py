"""Replays group g04: prompt strings to ids and rows, rows through the decoder to logits, keys and values."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from export.parity.golden import Golden, Replayed
from export.parity.graphs import Graphs
from runtime.audio import load_mono, segments
from runtime.bundle import Manifest, PromptTemplate, VisionFrontEnd
from runtime.context import Context
from runtime.errors import EdgeOmniError
from runtime.image import patches, read_image, rotary_positions
from runtime.prompt import Answer, Audio, Image, Part, Prompt, PromptFormat, Spoken, Text, Video, concat, prompt_format
from runtime.tokenizer import Tokenizer
from runtime.video import thin_out

GROUP = "g04_llm"
PADDED = "padded"
UNCOVERED = {
    f"{GROUP}/*.prefill_k0_pos0": "positions from 0, which generation never has; the bundle's rotary table begins at 1",
    f"{GROUP}/{PADDED}.input_ids": "an input: prompts padded to one length; the runtime reads them one by one",
    f"{GROUP}/{PADDED}.attention_mask": "an input: which of the padded ids are prompt",
    f"{GROUP}/{PADDED}.position_ids": "an input: the positions of the padded ids",
}

# How a golden set writes media into its prompt strings: JSON that names a file, for a video that of each frame.
MEDIA = re.compile(r"<(audio|img|video|audiogen)_start_baichuan>(.*?)<\1_end_baichuan>", re.DOTALL)
FILE = re.compile(r"\{.*?\}")

Parts = Mapping[str, np.ndarray]  # what a run gives, by the names of the recording
Cache = dict[str, np.ndarray]  # "0.key", "0.value", "1.key", ...: [1, kv_heads, positions, head_dim]
Role = Literal["system", "user", "assistant", "spoken"]


def replay(golden: Golden, graphs: Graphs, manifest: Manifest) -> Iterator[Replayed]:
    """Ids and codes from the strings and files, rows from the recorded codes, the rest from the recorded rows."""
    recorded = golden.arrays(GROUP)
    if not recorded:
        return
    reader = Reader(golden, graphs, manifest, prompt_format(manifest, Tokenizer(graphs.folder / manifest.tokenizer)))
    for name, row in golden.tables["prompts"].items():
        if f"{name}.input_ids" in recorded:
            prompt = reader.prompt(row["text"])
            own = {part[len(name) + 1 :]: array for part, array in recorded.items() if part.startswith(f"{name}.")}
            parts = {"input_ids": prompt.ids[None], "audio_codes": prompt.codes}
            if "embeds" in own:
                parts |= {"embeds": embedded(graphs, manifest, prompt, own)[None], **generated(graphs, manifest, own)}
            yield from _select(name, parts, recorded)
    if f"{PADDED}.logits_last" in recorded:
        yield from _select(PADDED, {"logits_last": last_logits(graphs, manifest, recorded)}, recorded)


def _select(name: str, parts: Parts, recorded: Parts) -> Iterator[Replayed]:
    for part, ours in parts.items():
        if f"{name}.{part}" in recorded:
            yield Replayed(f"{GROUP}/{name}.{part}", ours)


@dataclass(frozen=True)
class Reader:
    """Turns a golden set's prompt strings into prompts: turns and media by the runtime, media from the files."""

    golden: Golden
    graphs: Graphs
    manifest: Manifest
    format: PromptFormat

    def prompt(self, string: str) -> Prompt:
        turns = split_turns(string, self.manifest.template)
        if not turns:
            return self._single(string)
        pieces = [] if turns[0][0] == "system" else [self.format.open_conversation("")]
        for (role, content), (following, _) in zip(turns, [*turns[1:], ("user", "")], strict=True):
            if role == "system":
                pieces.append(self.format.open_conversation(content))
            elif role == "user":
                pieces.append(self.format.user_turn(list(self._parts(content)), spoken=following == "spoken"))
            elif content:
                pieces.append(self.format.close_assistant(list(self._answers(content)), spoken=role == "spoken"))
        return concat(pieces)

    def _single(self, string: str) -> Prompt:
        """A prompt without roles: for transcription if it has an audio, else for reading aloud."""
        for part in self._parts(string):
            if isinstance(part, Audio):
                return self.format.transcribe(part)
        return self.format.speak(string.removesuffix((self.manifest.template.speak or "").partition("{text}")[2]))

    def _parts(self, content: str) -> Iterator[Part]:
        end = 0
        for found in MEDIA.finditer(content):
            yield Text(content[end : found.start()])
            yield self._medium(found[1], found[2])
            end = found.end()
        yield Text(content[end:])

    def _answers(self, content: str) -> Iterator[Answer]:
        end = 0
        for found in MEDIA.finditer(content):
            yield Spoken(content[end : found.start()], self._codes(found[2]))
            end = found.end()
        yield Text(content[end:])

    def _medium(self, kind: str, body: str) -> Part:
        if kind == "audio":
            return Audio(self._codes(body))
        if kind == "img":
            return Image(self._rows(body, self.manifest.image))
        assert self.manifest.video is not None
        frames = thin_out(FILE.findall(body), self.manifest.video.max_frame_num)
        return Video(tuple(self._rows(frame, self.manifest.video_frames) for frame in frames))

    def _codes(self, body: str) -> np.ndarray:
        front = self.manifest.audio
        if front is None:
            raise EdgeOmniError("the golden set's prompts hold audio, this bundle has no audio encoder")
        wave = load_mono(self._file(body), front.sampling_rate)
        return np.concatenate(
            [self.graphs.run("audio_encoder", {"mel": mel[None]})["codes"] for mel, _ in segments(wave, front)]
        )

    def _rows(self, body: str, front: VisionFrontEnd | None) -> np.ndarray:
        if front is None:
            raise EdgeOmniError("the golden set's prompts hold pictures, this bundle has no vision encoder")
        cut, grid = patches(read_image(self._file(body), official=True), front)
        feeds = {"patches": cut, "positions": rotary_positions(grid, front.merge_size)}
        return self.graphs.run("vision_projector", self.graphs.run("vision_encoder", feeds))["rows"]

    def _file(self, body: str) -> Path:
        named = json.loads(body)
        return self.golden.input(named.get("path") or named["local"])


def split_turns(string: str, template: PromptTemplate) -> list[tuple[Role, str]]:
    """(role, content) of each turn in a prompt string, an answer that is still to come with no content; [] if none."""
    marks: dict[str, Role] = {template.user[0]: "user"}
    if template.system is not None:
        marks[template.system[0]] = "system"
    marks[template.assistant[0]] = "assistant"
    if template.spoken_assistant is not None:
        marks[template.spoken_assistant[0]] = "spoken"
    longest_first = sorted(marks, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", string)
    return [(marks[mark], content) for mark, content in zip(pieces[1::2], pieces[2::2], strict=True)]


def embedded(graphs: Graphs, manifest: Manifest, prompt: Prompt, recorded: Parts) -> np.ndarray:
    """The prompt's rows [L, hidden], with the recorded codes for its audio."""
    context = Context(manifest, *(graphs.session(name) for name in ("decoder", "embed_tokens", "embed_audio")))
    return context.embed(replace(prompt, codes=recorded.get("audio_codes", prompt.codes)))


def read(graphs: Graphs, rows: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
    """Hidden states [n, hidden] of rows [n, hidden] that come behind the cache, and the cache that includes them."""
    ports = graphs.graphs["decoder"].inputs
    total = len(rows) + next(iter(cache.values())).shape[2]
    feeds = {
        "inputs_embeds": rows[None].astype(ports[0].dtype),
        "seqlens_k": np.array([total - 1], np.int32),
        "total_sequence_length": np.array(total, np.int32),
        **{f"past.{name}": array for name, array in cache.items()},
    }
    results = graphs.run("decoder", feeds)
    return results["hidden"][0], {name: results[f"present.{name}"] for name in cache}


def empty_cache(manifest: Manifest) -> Cache:
    layout = manifest.cache
    empty = np.zeros((1, layout.kv_heads, 0, layout.head_dim), layout.dtype)
    return {f"{layer}.{side}": empty for layer in range(layout.layers) for side in ("key", "value")}


def generated(graphs: Graphs, manifest: Manifest, recorded: Parts) -> Parts:
    """One run over the recorded rows, then as many greedy steps as were recorded."""
    rows = recorded["embeds"][0]
    hidden, cache = read(graphs, rows, empty_cache(manifest))
    logits = _logits(graphs, hidden)
    tail = recorded.get("prefill_logits_tail", logits[None]).shape[1]
    parts = {
        "hidden": hidden[None],
        "prefill_logits": logits[None],
        "prefill_logits_tail": logits[None, -tail:],
        **_keys_and_values("prefill", cache, 0),
    }
    choices = [logits[-1]]
    for token in recorded["greedy_tokens"][:-1]:
        row = graphs.run("embed_tokens", {"ids": token[None]})["rows"]
        hidden, cache = read(graphs, row, cache)
        choices.append(_logits(graphs, hidden)[0])
    best = np.sort(choices, axis=1)[:, -2:]
    return {
        **parts,
        "greedy_tokens": np.argmax(choices, axis=1),
        "decode_logits": np.array(choices[1:]),
        "greedy_gap": best[:, 1] - best[:, 0],
        **_keys_and_values("decode", cache, len(rows)),
    }


def _logits(graphs: Graphs, hidden: np.ndarray) -> np.ndarray:
    return graphs.run("lm_head", {"hidden": hidden})["logits"]


def _keys_and_values(stage: str, cache: Cache, start: int) -> Parts:
    """The cache from position `start` on, under the recording's names: k0, v0, k1, ..."""
    named = {name.partition(".")[::2]: array for name, array in cache.items()}
    return {f"{stage}_{side[0]}{layer}": array[:, :, start:] for (layer, side), array in named.items()}


def last_logits(graphs: Graphs, manifest: Manifest, recorded: Parts) -> np.ndarray:
    """Logits [prompts, vocab] behind each prompt of a padded batch, read alone and without its padding."""
    last = []
    for ids, mask in zip(recorded[f"{PADDED}.input_ids"], recorded[f"{PADDED}.attention_mask"], strict=True):
        rows = graphs.run("embed_tokens", {"ids": ids[mask == 1]})["rows"]
        hidden, _ = read(graphs, rows, empty_cache(manifest))
        last.append(_logits(graphs, hidden[-1:])[0])
    return np.array(last)
