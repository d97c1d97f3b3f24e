"""A reference on disk: what a bundle answered, for comparisons on machines that cannot load it.

It holds the k likeliest ids of each choice with the mass of the rest, codes, waveforms, the turns with their media, and
inputs and outputs of each graph for its first runs; every file with its checksum, and nothing that could be executed.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from quant.answer import Answer, Ending, Taken
from quant.comparison.memory import Memory
from quant.comparison.metrics import Top
from quant.comparison.record import STRICT, Live, Machine, Recorded, Sample, Seen, Side
from quant.limits import Limits
from quant.media import Embedded, Media
from quant.observe import Feeds, Observed
from quant.turn import Metric, Turn, listed
from runtime.bundle import sha256_of
from runtime.bundle_writer import writing
from runtime.errors import EdgeOmniError
from runtime.events import Timings

REFERENCE = "reference.json"
SAMPLES = "samples.npz"
TOP_K = 64
Progress = Callable[[str], None]


@checked_dataclass(frozen=True, config=STRICT)
class StoredTurn:
    text: str
    audio: str | None
    images: tuple[str, ...]
    spoken: bool
    expected: tuple[str, ...]
    metric: Metric
    choices: tuple[str, ...]
    suite: str
    item: str
    group: str
    max_new: int
    transcribe: bool
    kinds: tuple[Literal["text", "audio"], ...]
    streams: tuple[int, ...]
    answer: str
    failure: str
    ending: Ending
    cut: bool
    timings: Timings
    letters: tuple[float, ...]
    prompt_positions: int
    prefill: float
    token_seconds: tuple[float, ...]
    file: str
    cuts: tuple[int, ...] = ()


@checked_dataclass(frozen=True, config=STRICT)
class Index:
    """reference.json."""

    version: Literal[2]
    side: Side
    machine: Machine | None  # where the times are from
    memory: Memory | None
    top_k: int
    max_new: int
    max_frames: int
    seed: int
    turns: tuple[StoredTurn, ...]
    samples: tuple[str, ...]  # the graph of each
    files: dict[str, str]  # name -> sha256


def record(reference: Live, out: Path, progress: Progress = lambda text: None, machine: Machine | None = None) -> None:
    """Write the folder `out`, whole or not at all; EdgeOmniError where something is there already.

    `machine` is where this is: times mean nothing without it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EdgeOmniError(f"{out} exists; name a folder that does not")
    with writing(out) as folder:
        turns = []
        for number, turn in enumerate(reference.turns):
            progress(turn.text)
            turns.append(_store_turn(folder, number, turn, reference.recorded(number)))
        samples = reference.samples()
        _save(folder / SAMPLES, dict(_sample_arrays(samples)))
        limits = reference.limits
        index = Index(
            version=2,
            side=reference.side,
            machine=machine,
            memory=reference.memory,
            top_k=reference.k or TOP_K,
            max_new=limits.max_new,
            max_frames=limits.max_frames,
            seed=limits.seed,
            turns=tuple(turns),
            samples=tuple(sample.graph for sample in samples),
            files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        )
        (folder / REFERENCE).write_bytes(_INDEX.dump_json(index, indent=1))


def _store_turn(folder: Path, number: int, turn: Turn, found: Recorded) -> StoredTurn:
    arrays: Feeds = {"wave": found.answer.wave, "heard": found.heard}
    for place, (step, streams) in enumerate(zip(found.answer.steps, found.seen, strict=True)):
        arrays |= {f"{place}.inputs": step.inputs, f"{place}.chosen": step.chosen}
        for stream, seen in enumerate(streams):
            at = f"{place}.{stream}"
            arrays |= {f"{at}.ids": seen.top.ids.astype(np.int32), f"{at}.logp": seen.top.logp}
            arrays |= {f"{at}.tail": seen.top.tail, f"{at}.taken": seen.taken}
    name = f"turn-{number:04}.npz"
    _save(folder / name, arrays)
    return StoredTurn(
        text=turn.text,
        audio=None if turn.audio is None else _copy(turn.audio, folder, number),
        images=tuple(_copy(image, folder, number, place) for place, image in enumerate(turn.images)),
        cuts=turn.cuts,
        spoken=turn.spoken,
        expected=turn.answers,
        metric=turn.metric,
        choices=turn.choices,
        suite=turn.suite,
        item=turn.item,
        group=turn.group,
        max_new=turn.max_new,
        transcribe=turn.transcribe,
        kinds=tuple(step.kind for step in found.answer.steps),
        streams=tuple(map(len, found.seen)),
        answer=found.answer.text,
        failure=found.answer.failure,
        prompt_positions=found.prompt_positions,
        prefill=found.prefill,
        token_seconds=found.token_seconds,
        ending=found.answer.ending,
        cut=found.answer.cut,
        timings=found.answer.timings,
        letters=found.answer.letters,
        file=name,
    )


def _copy(media: Media, folder: Path, number: int, place: int = 0) -> str:
    name = f"turn-{number:04}-{place}-{media.name}"
    if isinstance(media, Embedded):
        (folder / name).write_bytes(media.read())
    else:
        shutil.copyfile(media, folder / name)
    return name


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz, which `np.load` reads without pickle; numpy's own writer takes names as arguments, which may clash."""
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def _sample_arrays(samples: Sequence[Sample]) -> Iterator[tuple[str, np.ndarray]]:
    for number, sample in enumerate(samples):
        for kind, arrays in (("feeds", sample.feeds), ("outputs", sample.outputs), ("layers", sample.layers)):
            yield from ((f"{number}.{kind}.{port}", array) for port, array in arrays.items())


class Stored:
    """A reference that `record` wrote. EdgeOmniError where it is damaged or of another version."""

    engine: Observed | None = None

    def __init__(self, folder: Path):
        self.folder, self.index = folder, read_index(folder)
        self.side = replace(self.index.side, path=str(folder))
        self.machine, self.memory = self.index.machine, self.index.memory
        self.limits = Limits(self.index.max_new, self.index.max_frames, self.index.seed)
        self.turns = tuple(self._turn(turn) for turn in self.index.turns)

    def _turn(self, turn: StoredTurn) -> Turn:
        return Turn(
            text=turn.text,
            audio=None if turn.audio is None else self.folder / turn.audio,
            images=tuple(self.folder / name for name in turn.images),
            cuts=turn.cuts,
            spoken=turn.spoken,
            answers=turn.expected,
            metric=turn.metric,
            choices=turn.choices,
            suite=turn.suite,
            item=turn.item,
            group=turn.group,
            max_new=turn.max_new,
            transcribe=turn.transcribe,
        )

    def recorded(self, index: int) -> Recorded:
        turn = self.index.turns[index]
        arrays = self._arrays(turn.file)
        steps = (Taken(kind, arrays[f"{n}.inputs"], arrays[f"{n}.chosen"]) for n, kind in enumerate(turn.kinds))
        made = (turn.failure, turn.ending, turn.cut, turn.timings, turn.letters)
        answer = Answer(turn.answer, tuple(steps), arrays["wave"], *made)
        seen = (
            tuple(_seen(arrays, f"{place}.{stream}") for stream in range(streams))
            for place, streams in enumerate(turn.streams)
        )
        return Recorded(answer, tuple(seen), arrays["heard"], turn.prompt_positions, turn.prefill, turn.token_seconds)

    def samples(self) -> list[Sample]:
        arrays = self._arrays(SAMPLES)
        return [
            Sample(graph, *(_part(arrays, f"{number}.{kind}.") for kind in ("feeds", "outputs", "layers")))
            for number, graph in enumerate(self.index.samples)
        ]

    def _arrays(self, name: str) -> Feeds:
        try:
            with np.load(self.folder / name, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, BadZipFile) as error:
            raise EdgeOmniError(f"{self.folder / name} cannot be read ({error}); record it again") from None


def _seen(arrays: Feeds, at: str) -> Seen:
    ids = arrays[f"{at}.ids"].astype(np.int64)
    return Seen(Top(ids, arrays[f"{at}.logp"], arrays[f"{at}.tail"]), arrays[f"{at}.taken"])


def _part(arrays: Feeds, prefix: str) -> Feeds:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def read_index(folder: Path) -> Index:
    """reference.json of a stored reference, whose files are as it says; EdgeOmniError names all that are not."""
    try:
        index = _INDEX.validate_json((folder / REFERENCE).read_bytes())
    except OSError as error:
        raise EdgeOmniError(f"{folder / REFERENCE} cannot be read ({error.strerror}); record it again") from None
    except ValidationError as error:
        mistakes = [f"  {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise EdgeOmniError(
            f"{folder / REFERENCE} is no stored reference of this version; record it again:\n" + listed(mistakes)
        ) from None
    used = {SAMPLES, *(name for turn in index.turns for name in (turn.file, turn.audio, *turn.images) if name)}
    wrong = [name for name, sha256 in index.files.items() if not _is_whole(folder, name, sha256)]
    wrong += sorted(used - index.files.keys())
    if wrong:
        raise EdgeOmniError(f"the stored reference {folder} is damaged: {', '.join(wrong)}; record it again")
    return index


def _is_whole(folder: Path, name: str, sha256: str) -> bool:
    return Path(name).name == name and (folder / name).is_file() and sha256_of(folder / name) == sha256


_INDEX = TypeAdapter(Index)
