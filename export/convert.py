"""Checkpoint folder to bundle folder: plan, check everything, write beside the target, rename."""

import fnmatch
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint import Checkpoint, open_checkpoint
from export.families.family import Blueprint
from export.families.registry import read_family
from export.graph import Subgraph, static_shape
from export.problems import refuse
from export.streamed import fill, worth_sharing
from export.tokenizer_files import known_tokens
from export.weights import WeightStore
from runtime.bundle import (
    MANIFEST,
    File,
    Graph,
    Manifest,
    Profile,
    Source,
    describe_file,
    write_manifest,
)
from runtime.bundle_writer import refuse_target, require_space, writing
from runtime.float_bundle import FloatBundle
from runtime.shared_files import share

TOKENIZER = "tokenizer.json"
Progress = Callable[[str, int], None]  # (graph that was written, bytes of its weights)


@dataclass(frozen=True)
class Planned:
    """One graph of an export that has not been written: how much goes in and how much comes out."""

    name: str
    tensors: int
    parameters: int
    bytes_now: int
    bytes_after: int


@dataclass(frozen=True)
class Plan:
    checkpoint: Checkpoint
    blueprint: Blueprint
    profile: Profile
    graphs: tuple[Planned, ...]
    bytes_after: int  # weights of the bundle, those that two graphs share counted once

    def memory_estimate(self, positions: int) -> int:
        """Bytes to run it: all weights resident and a cache of `positions` (activations are small beside them)."""
        return self.bytes_after + positions * self.blueprint.cache.bytes_per_position


def plan(path: Path, profile: Profile) -> Plan:
    """Open the checkpoint, author its graphs, and check that each parameter has its tensor and each tensor its place.

    CheckpointError names every tensor that is missing, misshapen or left over.
    """
    checkpoint = open_checkpoint(path)
    blueprint = read_family(checkpoint, profile)
    refuse(f"checkpoint {str(path)!r} does not fit its config", list(mismatches(blueprint)))
    graphs = tuple(_planned(graph, blueprint) for graph in blueprint.subgraphs)
    stored = {key: nbytes for graph in blueprint.subgraphs for key, nbytes in _stored(graph)}
    return Plan(checkpoint, blueprint, profile, graphs, sum(stored.values()))


def mismatches(blueprint: Blueprint) -> Iterator[str]:
    used: set[str] = set()
    told: set[str] = set()
    for graph in blueprint.subgraphs:
        for parameter in graph.parameters():
            source = graph.source_of(parameter)
            for key, shape in zip(source.keys, source.shapes, strict=True):
                used.add(key)
                found = blueprint.tensors.get(key)
                if key not in told and found is None:
                    yield f"missing: {key} {list(shape)} (graph {graph.name})"
                elif key not in told and found is not None and found.shape != shape:
                    yield f"misshapen: {key} is {list(found.shape)}, config.json makes it {list(shape)}"
                told.add(key)
    for key in blueprint.tensors:
        if key not in used and not any(fnmatch.fnmatchcase(key, pattern) for pattern in blueprint.unused):
            yield f"left over: {key} {list(blueprint.tensors[key].shape)} belongs to no graph"


def _stored(graph: Subgraph) -> Iterator[tuple[str, int]]:
    """What each initializer is stored under, and its bytes in the bundle."""
    for value in graph.model.graph.initializers.values():
        source = graph.source_of(value)
        assert value.dtype is not None
        nbytes = math.prod(static_shape(value)) * value.dtype.bitwidth // 8
        yield (str(value.name) if source.make else source.keys[0]), nbytes


def _planned(graph: Subgraph, blueprint: Blueprint) -> Planned:
    keys = {key for value in graph.parameters() for key in graph.source_of(value).keys}
    parameters = sum(math.prod(static_shape(value)) for value in graph.parameters())
    bytes_now = sum(blueprint.tensors[key].nbytes for key in keys)
    return Planned(graph.name, len(keys), parameters, bytes_now, sum(dict(_stored(graph)).values()))


def export(
    path: Path,
    out: Path,
    profile: Profile = "cpu",
    standalone: bool = False,
    force: bool = False,
    random: bool = False,
    progress: Progress = lambda name, nbytes: None,
    link: bool = False,
) -> Manifest:
    """Export the checkpoint at `path` into the bundle `out`; whole or not at all.

    Files of the checkpoint that hold most of their tensors as the bundle needs them are cloned where the file system
    can, which takes no room; else, and with `standalone`, the tensors are copied. With `link` such files are the
    checkpoint's own, hard-linked, and if it is saved again in place the bundle opens no more.
    `force` replaces a bundle that is already there; any other folder is never replaced. `random` marks weights that
    were never trained. EdgeOmniError if the target exists, the disk is too small or the checkpoint cannot be exported.
    """
    refuse_target(out, force)
    return write(plan(path, profile), out, standalone, force, random, progress, link)


def write(
    planned: Plan,
    out: Path,
    standalone: bool = False,
    force: bool = False,
    random: bool = False,
    progress: Progress = lambda name, nbytes: None,
    link: bool = False,
) -> Manifest:
    """Write a planned export into the bundle `out`; the arguments and errors are those of `export`."""
    refuse_target(out, force)
    with writing(out) as folder:
        for subgraph in planned.blueprint.subgraphs:
            fill(subgraph, planned.blueprint.tensors)
        worth = {} if standalone else worth_sharing(planned.blueprint.subgraphs)
        shared = share(sorted(worth), folder, link, own_names(planned))
        require_space(out.parent, planned.bytes_after - sum(worth[file] for file in shared))
        return _write(planned, folder, shared, link, random, progress)


def own_names(planned: Plan) -> set[str]:
    """What the bundle's own files are called."""
    return {MANIFEST, TOKENIZER, *(row.name + ending for row in planned.graphs for ending in (".onnx", ".data"))}


def _write(
    planned: Plan, folder: Path, shared: dict[Path, str], link: bool, random: bool, progress: Progress
) -> Manifest:
    blueprint, graphs = planned.blueprint, {}
    store = WeightStore(folder, blueprint.tensors, shared)
    for subgraph, row in zip(blueprint.subgraphs, planned.graphs, strict=True):
        graphs[subgraph.name] = _graph(planned, subgraph, row, store.write(subgraph))
        progress(subgraph.name, row.bytes_after)
    (folder / TOKENIZER).write_bytes(blueprint.tokenizer_json.encode())
    linked = set(shared.values()) if link else set()
    names = sorted(path.name for path in folder.iterdir())
    files = tuple(describe_file(folder, name, name in linked) for name in names)
    manifest = _manifest(planned, graphs, files, random)
    write_manifest(folder, manifest)
    return manifest


def stream(planned: Plan, random: bool = False) -> FloatBundle:
    """The bundle that `write` would write, to be quantized without having been written.

    Its weights are read from the checkpoint, a few rows at a time, when they are asked for.
    """
    blueprint = planned.blueprint
    for subgraph in blueprint.subgraphs:
        fill(subgraph, blueprint.tensors)
    rows = zip(blueprint.subgraphs, planned.graphs, strict=True)
    graphs = {subgraph.name: _graph(planned, subgraph, row, ()) for subgraph, row in rows}
    checkpoint = planned.checkpoint
    listed = {checkpoint.folder / file.name for file in checkpoint.files}
    return FloatBundle(
        name=str(checkpoint.folder),
        manifest=_manifest(planned, graphs, (), random),
        models={subgraph.name: subgraph.model for subgraph in blueprint.subgraphs},
        others={TOKENIZER: blueprint.tokenizer_json.encode()},
        sources=tuple(sorted(listed | {tensor.file for tensor in blueprint.tensors.values()})),
    )


def _graph(planned: Plan, subgraph: Subgraph, row: Planned, weights: tuple[str, ...]) -> Graph:
    return Graph(
        file=f"{subgraph.name}.onnx",
        weights=weights,
        inputs=subgraph.inputs,
        outputs=subgraph.outputs,
        precision="fp16" if planned.profile == "cuda" else "fp32",
        parameters=row.parameters,
        weight_bytes=row.bytes_after,
    )


def _manifest(planned: Plan, graphs: dict[str, Graph], files: tuple[File, ...], random: bool) -> Manifest:
    blueprint = planned.blueprint
    return Manifest(
        schema_version=1,
        family=blueprint.family,
        profile=planned.profile,
        source=_source(planned.checkpoint, random),
        vocab_size=blueprint.vocab_size,
        known_tokens=min(known_tokens(blueprint.tokenizer_json), blueprint.vocab_size),
        hidden_size=blueprint.hidden_size,
        tokenizer=TOKENIZER,
        files=files,
        graphs=graphs,
        cache=blueprint.cache,
        tokens=blueprint.tokens,
        template=blueprint.template,
        generation=blueprint.generation,
        audio=blueprint.audio,
        image=blueprint.image,
        video_frames=blueprint.video_frames,
        video=blueprint.video,
        speech=blueprint.speech,
        gate=blueprint.gate,
        notes=blueprint.notes,
    )


def _source(checkpoint: Checkpoint, random: bool) -> Source:
    described = checkpoint.config or {k: v for k, v in checkpoint.metadata.items() if isinstance(v, str | int | float)}
    text = json.dumps(described, sort_keys=True, ensure_ascii=False)
    return Source(
        name=str(checkpoint.metadata.get("general.name") or checkpoint.folder.resolve().name),
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        stored_dtypes=tuple(sorted({tensor.dtype for tensor in checkpoint.values()})),
        licence=str(checkpoint.metadata.get("general.license") or "not stated by the checkpoint"),
        random=random,
    )
