"""Keys and values of a bundle's decoder in 8 bits: a quarter of the memory that a conversation takes.

ONNX Runtime's attention rounds each position as it enters the cache and multiplies with the integers. The scales, one
for each channel of each head, do not change while it runs, so they are fitted beforehand to some conversations.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant.attention import remember_in_8_bits
from quant.examples import BUILT_IN, Calibrating, conversation
from quant.rewrite import open_graph, save_graph
from runtime.bundle import MANIFEST, File, Graph, Manifest, Port, describe_file, write_manifest
from runtime.bundle_writer import refuse_target, require_space, writing
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.session import Options
from runtime.shared_files import share

DECODER = "decoder"
LARGEST = 127  # code; -128 is left out, so that both signs reach as far
# Room above the largest value that was met: what is larger still, in another conversation, is cut to it.
ROOM = 1.1
LEAST = 1e-6  # a channel that was 0 throughout still needs a scale

Peaks = Mapping[str, NDArray[np.float32]]  # "LAYER.key" or "LAYER.value" -> largest magnitudes [kv_heads, head_dim]


@dataclass(frozen=True)
class Met:
    """What the cache held in the conversations that it was calibrated on."""

    peaks: Peaks
    positions: int


def quantize_cache(
    bundle: Path,
    out: Path,
    calibrating: Calibrating = BUILT_IN,
    standalone: bool = False,
    force: bool = False,
    options: Options | None = None,
    link: bool = False,
) -> Manifest:
    """Write `bundle`, whose weights may be quantized or not, into the bundle `out` with a cache of int8.

    Its files are cloned where the file system can, which takes no room; else, and with `standalone`, copied. With
    `link` they are those of `bundle`, hard-linked, and if they are written to in place this one opens no more. `force`
    replaces a bundle that is already there. EdgeOmniError if its cache is int8 already, it is for another provider than
    the CPU, or the calibration turns do not fit it.
    """
    refuse_target(out, force)
    if out.resolve() == bundle.resolve():
        raise EdgeOmniError(f"{out} is the bundle itself; name another folder for the one with the smaller cache")
    engine = Engine(bundle, options)
    refuse(bundle, engine.manifest)
    met = meet(engine, calibrating)
    with writing(out) as folder:
        return write(bundle, folder, engine.manifest, met, standalone, link)


def refuse(bundle: Path, manifest: Manifest) -> None:
    if manifest.cache.dtype == "int8":
        raise EdgeOmniError(f"{bundle} remembers in 8 bits already; nothing is left to do")
    if manifest.profile != "cpu":
        raise EdgeOmniError(f"{bundle} is for {manifest.profile}; a cache of 8 bits has been tried on CPUs only")


def meet(engine: Engine, calibrating: Calibrating) -> Met:
    """Read conversations and note the largest magnitude of each channel."""
    peaks: dict[str, NDArray[np.float32]] = {}
    positions = 0
    for example in calibrating.examples(engine.manifest):
        context = engine.context()
        rows = context.embed(conversation(example, engine).prompt)
        for _ in context.decoder.prefill(rows[: engine.manifest.cache.max_positions]):
            pass
        length = context.cache.length
        for name, buffer in context.cache.buffers.items():
            largest = np.abs(buffer[0, :, :length]).max(axis=1)
            peaks[name] = np.maximum(peaks.get(name, np.float32(0.0)), largest)
        positions += length
    broken = [name for name, largest in peaks.items() if not np.isfinite(largest).all()]
    if broken:
        raise EdgeOmniError(
            f"the cache of {engine.folder} is not finite in {', '.join(broken)}; its weights are damaged"
        )
    return Met(peaks, positions)


def scales(peaks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest magnitudes [kv_heads, head_dim] -> what one step of a code is worth, [1, kv_heads, 1, head_dim]."""
    return (np.maximum(ROOM * peaks, LEAST) / LARGEST).astype(np.float32)[None, :, None]


def write(bundle: Path, folder: Path, manifest: Manifest, met: Met, standalone: bool, link: bool) -> Manifest:
    graph = manifest.graphs[DECODER]
    model = open_graph(bundle / graph.file)
    remember_in_8_bits(model, {name: scales(largest) for name, largest in met.peaks.items()})
    save_graph(model, folder / graph.file)
    kept = _taken_over(bundle, folder, [file for file in manifest.files if file.path != graph.file], standalone, link)
    manifest = replace(
        manifest,
        cache=replace(manifest.cache, dtype="int8", calibrated_positions=met.positions),
        graphs={**manifest.graphs, DECODER: with_int8_cache(graph)},
        files=tuple(kept.get(file.path) or describe_file(folder, file.path) for file in manifest.files),
    )
    write_manifest(folder, manifest)
    return manifest


def _taken_over(bundle: Path, folder: Path, files: list[File], standalone: bool, link: bool) -> dict[str, File]:
    """Bring files of one bundle, unchanged, into another; how they are described there, by their paths."""
    worth = [] if standalone else [bundle / file.path for file in files if "/" not in file.path]
    shared = share(worth, folder, link, {MANIFEST, DECODER + ".onnx"})
    copied = [file for file in files if bundle / file.path not in shared]
    require_space(folder, sum(file.nbytes for file in copied))
    for file in copied:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / file.path, folder / file.path)
    linked = {file.path for file in files if link and file not in copied}
    return {file.path: describe_file(folder, file.path, file.path in linked) for file in files}


def with_int8_cache(graph: Graph) -> Graph:
    def narrowed(port: Port) -> Port:
        return replace(port, dtype="int8") if port.name.startswith(("past.", "present.")) else port

    return replace(graph, inputs=tuple(map(narrowed, graph.inputs)), outputs=tuple(map(narrowed, graph.outputs)))
