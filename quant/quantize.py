"""READ FIRST. Float bundle to smaller bundle: one loop over graphs and weights, one slab of one weight at a time."""

import hashlib
import shutil
from collections.abc import Callable, Hashable, Iterator
from dataclasses import astuple, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quant.affine import Quantized, dequantize
from quant.calibration import Calibration, Solver, Unfinished, refuse_unreached
from quant.examples import BUILT_IN, Calibrating
from quant.pack import pack
from quant.parallel import cores, in_order
from quant.plan import Decided, Plan, PlannedGraph, open_bundle, plan
from quant.rewrite import (
    Matrix,
    Weight,
    external_files,
    halve_uses,
    padded_rows,
    point,
    quantize_uses,
    save_graph,
    weight_bytes,
)
from quant.rtn import rtn
from quant.scheme import STORED, Recipe, Scheme
from quant.take_over import Lost, taken_over
from runtime.bundle import (
    MANIFEST,
    File,
    FloatWeight,
    Graph,
    Manifest,
    Quantization,
    QuantizedWeight,
    describe_file,
    write_manifest,
)
from runtime.bundle_writer import (
    Draft,
    Place,
    align,
    append,
    append_pieces,
    drafting,
    refuse_target,
    require_space,
)
from runtime.errors import EdgeOmniError
from runtime.integers import Form
from runtime.journal import Journal
from runtime.shared_files import share

Progress = Callable[[str, int], None]  # (weight that was stored, bytes that it had as floats)

QUANTIZED = "{}.quantized.data"  # of a graph that has a file of the usual name already, taken over whole
SLAB = 1 << 16  # values that are quantized at once, so that they stay in the cache; rows do not depend on each other
SOLVED = 1 << 21  # the same for a method that takes one column after the other


def quantize(
    bundle: Path,
    out: Path,
    recipe: Recipe,
    standalone: bool = False,
    force: bool = False,
    progress: Progress = lambda name, nbytes: None,
    threads: int = 0,
    calibrating: Calibrating = BUILT_IN,
    link: bool = False,
) -> Manifest:
    """Quantize the float bundle `bundle` by `recipe` into the bundle `out`; whole or not at all.

    Memory holds some slabs of one weight, two for each of `threads` (0: as many as there are cores), and the scales of
    that weight. The same bundle and recipe give the same bytes, with any number of threads.
    Files whose weights mostly stay floats are cloned where the file system can, which takes no room; else, and with
    `standalone`, those weights are copied. With `link` such files are hard-linked: those of `bundle`, and if they are
    written to in place this one opens no more. `force` replaces a bundle that is already there. A run that is killed
    leaves a draft beside `out`, and the same run once more goes on at the last finished weight, to the same bytes; an
    error leaves nothing. EdgeOmniError says everything that is wrong with bundle and recipe, or names the weight that
    holds NaN or infinity.
    """
    if out.resolve() == bundle.resolve():
        raise EdgeOmniError(f"{out} is the float bundle itself; name another folder for the quantized one")
    refuse_target(out, force)
    return write(plan(open_bundle(bundle), recipe), out, standalone, force, progress, threads, calibrating, link)


def write(
    planned: Plan,
    out: Path,
    standalone: bool = False,
    force: bool = False,
    progress: Progress = lambda name, nbytes: None,
    threads: int = 0,
    calibrating: Calibrating = BUILT_IN,
    link: bool = False,
) -> Manifest:
    """Write a planned quantization into the bundle `out`; the arguments and errors are those of `quantize`.

    A float bundle that was never written gives the bytes that it would give had it been.
    """
    refuse_target(out, force)
    refuse_unreached(planned, calibrating)
    worth = frozenset() if standalone else planned.worth_sharing()
    with drafting(out, job(planned, standalone, calibrating, link)) as draft:
        shared = share(sorted(worth), draft.folder, link, own_names(planned))
        require_space(out.parent, planned.bytes_after(shared) - draft.bytes_written(shared.values()))
        calibration = calibrating_in(draft, planned, calibrating) if planned.calibrated else None
        writer = Writer(planned, draft.folder, draft.journal, shared, link, threads or cores(), calibration)
        return writer.write(progress)


def own_names(planned: Plan) -> set[str]:
    """What the bundle's own files are called, those beside shared ones included."""
    graphs = {graph.graph.file for graph in planned.graphs}
    return {MANIFEST, *planned.bundle.others, *graphs, *(QUANTIZED.format(graph.name) for graph in planned.graphs)}


def calibrating_in(draft: Draft, planned: Plan, calibrating: Calibrating) -> Calibration:
    """What leads the calibration turns through the graphs. EdgeOmniError if the model cannot take them."""
    examples, name = calibrating.examples(planned.manifest), planned.manifest.tokenizer
    tokenizer = planned.bundle.others[name]
    if isinstance(tokenizer, bytes):
        (draft.work / name).write_bytes(tokenizer)
        tokenizer = draft.work / name
    return Calibration(examples, Unfinished(draft.folder, planned.manifest, tokenizer), draft.work, draft.journal)


def job(planned: Plan, standalone: bool, calibrating: Calibrating = BUILT_IN, link: bool = False) -> dict[str, Any]:
    """All that decides about the bytes, so that a run goes on only with what its like began."""
    states = [(file.resolve(), file.stat()) for file in planned.bundle.sources]
    return {
        "software": {"edgeomni": version("edgeomni"), "numpy": np.__version__},
        "bundle": hashlib.sha256(repr(planned.manifest).encode()).hexdigest(),
        "sources": [[str(file), state.st_size, state.st_mtime_ns] for file, state in states],
        "recipe": [planned.recipe.name, planned.recipe.text],
        "standalone": standalone,
        "link": link,
        "calibration": calibrating.fingerprint() if planned.calibrated else None,
    }


@dataclass
class Writer:
    """The quantized bundle in the making. A weight that two graphs share is stored once.

    Each weight that is written is recorded in the journal. One that is there already, because a run that was killed had
    finished it, is not computed again.
    """

    plan: Plan
    folder: Path
    journal: Journal
    shared: dict[Path, str]  # files that the bundle takes over whole, and what they are called here
    link: bool  # they are the original ones
    threads: int = 1
    calibration: Calibration | None = None
    kept: dict[Hashable, Place] = field(default_factory=dict)
    matrices: dict[Hashable, Matrix] = field(default_factory=dict)
    orders: dict[object, Place] = field(default_factory=dict)  # of columns

    def write(self, progress: Progress) -> Manifest:
        rows = [self._write_graph(graph, progress) for graph in self.plan.graphs]
        manifest, recipe = self.plan.manifest, self.plan.recipe
        self._carry_over()
        manifest = replace(
            manifest,
            graphs={graph.name: row for graph, row in zip(self.plan.graphs, rows, strict=True)},
            files=tuple(self._describe(name) for name in sorted(self._names())),
            quantization=Quantization(
                recipe=recipe.name,
                recipe_toml=recipe.text,
                quantized=tuple(self._quantized_rows()),
                kept=tuple(self._kept_rows()),
            ),
        )
        write_manifest(self.folder, manifest)
        return manifest

    def _write_graph(self, planned: PlannedGraph, progress: Progress) -> Graph:
        name = f"{planned.name}.data"
        if name in self.shared.values():
            name = QUANTIZED.format(planned.name)
        with self.journal.append_to(self.folder / name) as out:
            for item, solve in self._in_turn(planned):
                self._store(item, planned, out, name, solve)
                out.flush()  # the next matrix may be calibrated on what this one makes of its inputs
                progress(item.weight.name, item.weight.nbytes)
        if (self.folder / name).stat().st_size == 0:
            (self.folder / name).unlink()
        save_graph(planned.model, self.folder / planned.graph.file)
        if self.calibration is not None:
            self.calibration.finished(planned.name, planned.model)
        smaller = any(item.smaller for item in planned.decided)
        return replace(
            planned.graph,
            weights=external_files(planned.model),
            precision=self.plan.recipe.name if smaller else planned.graph.precision,
            weight_bytes=weight_bytes(planned.model),
        )

    def _in_turn(self, planned: PlannedGraph) -> Iterator[tuple[Decided, Solver | None]]:
        """The weights of a graph: those that are calibrated last, in an order that allows it, each with its solver."""
        yield from ((item, None) for item in planned.decided if not item.calibrated)
        waiting = {item.weight.name: item for item in planned.decided if item.calibrated}
        if self.calibration is not None and waiting:
            schemes = {name: item.scheme for name, item in waiting.items() if item.scheme is not None}
            solutions = self.calibration.solutions(planned.name, planned.graph, planned.model, schemes)
            yield from ((waiting[name], solve) for name, solve in solutions)

    def _store(self, item: Decided, planned: PlannedGraph, out: BinaryIO, name: str, solve: Solver | None) -> None:
        weight, scheme, label = item.weight, item.scheme, f"{planned.name}/{item.weight.name}"
        if scheme is not None:
            if item.key not in self.matrices:
                self.matrices[item.key] = self._matrix(weight, scheme, item.taken_over, out, name, label, solve)
            quantize_uses(planned.model, weight, self.matrices[item.key], self.plan.manifest.profile, self.folder)
        elif item.half:
            if item.key not in self.kept:
                self.kept[item.key] = self._halve(weight, out, name, label)
            halve_uses(planned.model, weight, self.kept[item.key], self.folder)
        elif not weight.stays_inside:
            if item.key not in self.kept:
                self.kept[item.key] = self._keep(weight, out, name, label)
            point(weight, self.kept[item.key], self.folder)

    def _matrix(
        self,
        weight: Weight,
        scheme: Scheme,
        form: Form | None,
        out: BinaryIO,
        name: str,
        label: str,
        solve: Solver | None,
    ) -> Matrix:
        rows = padded_rows(weight.shape[0], scheme.bits, self.plan.manifest.profile)
        if found := self.journal.recall(label):
            *places, sqnr = found
            places = (place and Place(*place) for place in places)
            matrix = Matrix(scheme, rows, weight.shape[1], weight.dtype, *places, sqnr_db=sqnr)
        else:
            matrix = write_matrix(weight, scheme, rows, out, name, form, self.threads, solve)
            matrix = replace(matrix, order=self._order(form, out, name))
            places = (matrix.codes, matrix.scales, matrix.zeros, matrix.order)
            self.journal.record(label, [*(place and astuple(place) for place in places), matrix.sqnr_db], out)
        if form is not None and matrix.order is not None:
            self.orders[form.order] = matrix.order
        return matrix

    def _order(self, form: Form | None, out: BinaryIO, name: str) -> Place | None:
        """Where the order of a matrix's columns lies, which matrices with the same input have in common."""
        if form is None or form.order is None:
            return None
        return self.orders.get(form.order) or append(out, name, np.array(form.order, np.int32))

    def _halve(self, weight: Weight, out: BinaryIO, name: str, label: str) -> Place:
        if found := self.journal.recall(label):
            return Place(*found)
        place = append_pieces(out, name, weight.nbytes // 2, (halved(slab, weight) for slab in slabs(weight)))
        self.journal.record(label, astuple(place), out)
        return place

    def _keep(self, weight: Weight, out: BinaryIO, name: str, label: str) -> Place:
        shared = None if weight.file is None else self.shared.get(weight.file)
        if shared is not None:
            return Place(shared, weight.offset, weight.nbytes)
        if found := self.journal.recall(label):
            return Place(*found)
        place = append_pieces(out, name, weight.nbytes, slabs(weight))
        self.journal.record(label, astuple(place), out)
        return place

    def _carry_over(self) -> None:
        """The files that belong to no graph: the tokenizer."""
        for name, content in self.plan.bundle.others.items():
            if isinstance(content, bytes):
                (self.folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, self.folder / name)

    def _names(self) -> Iterator[str]:
        """The bundle's files; a run that was killed at the very end has left a manifest as well."""
        yield from (path.name for path in self.folder.iterdir() if path.name != MANIFEST)

    def _describe(self, name: str) -> File:
        return describe_file(self.folder, name, linked=self.link and name in self.shared.values())

    def _quantized_rows(self) -> Iterator[QuantizedWeight]:
        for graph in self.plan.graphs:
            for item in graph.decided:
                if item.scheme is not None:
                    matrix = self.matrices[item.key]
                    yield QuantizedWeight(
                        graph=graph.name,
                        name=item.weight.name,
                        parameters=item.weight.parameters,
                        bits_per_weight=round(8 * matrix.nbytes / item.weight.parameters, 3),
                        stored_as=" and ".join(item.weight.stored_as) or None,
                        sqnr_db=None if matrix.sqnr_db is None else round(matrix.sqnr_db, 2),
                        **{**vars(item.scheme), **({"method": STORED} if item.taken_over else {})},
                    )

    def _kept_rows(self) -> Iterator[FloatWeight]:
        for graph in self.plan.graphs:
            for item in graph.decided:
                weight = item.weight
                if item.scheme is None and weight.is_float and len(weight.shape) > 1:
                    bits = 16 if item.half else 8 * weight.dtype.itemsize
                    yield FloatWeight(graph.name, weight.name, weight.parameters, bits, item.reason)


def write_matrix(
    weight: Weight,
    scheme: Scheme,
    rows: int,
    out: BinaryIO,
    name: str,
    form: Form | None = None,
    threads: int = 1,
    solve: Solver | None = None,
) -> Matrix:
    """Quantize `weight` slab by slab into the file `name`, open as `out`, filled up to `rows` rows with zeros.

    With a `form` the integers that its checkpoint stores are taken over, else its rows are solved by `solve`, or
    rounded to nearest. EdgeOmniError if it holds NaN or infinity.
    """
    lost = Lost()
    columns, spare = weight.shape[1], rows - weight.shape[0]
    size = rows * columns * scheme.bits // 8
    codes = Place(name, align(out, size), size)
    scales, zeros = [], []
    for packed in map(pack, taken_over(weight, scheme) if form else _rounded(weight, scheme, lost, threads, solve)):
        out.write(packed.codes.tobytes())
        scales.append(packed.scales)
        zeros += [] if packed.zeros is None else [packed.zeros]
    out.write(b"\0" * (spare * size // rows))
    return Matrix(
        scheme=scheme,
        rows=rows,
        columns=columns,
        dtype=weight.dtype,
        codes=codes,
        scales=append(out, name, _filled_up(scales, spare)),
        zeros=append(out, name, _filled_up(zeros, spare)) if zeros else None,
        sqnr_db=lost.sqnr_db,
    )


def _rounded(weight: Weight, scheme: Scheme, lost: Lost, threads: int, solve: Solver | None) -> Iterator[Quantized]:
    """The rows of a weight, rounded; what that lost is told where they had been rounded before."""

    def rounded(slab: np.ndarray) -> tuple[np.ndarray, Quantized]:
        require_finite(slab, weight)
        return slab, rtn(slab, scheme) if solve is None else solve(slab)

    for slab, matrix in in_order(rounded, slabs(weight, SLAB if solve is None else SOLVED), threads):
        if weight.stored_as:
            lost.add(slab, dequantize(matrix))
        yield matrix


def slabs(weight: Weight, size: int = SLAB) -> Iterator[np.ndarray]:
    """The rows of a weight, some at a time, of `size` values or one row."""
    step = max(1, size * weight.shape[0] // max(1, weight.parameters))
    for start in range(0, weight.shape[0], step):
        yield weight.rows(start, min(start + step, weight.shape[0]))


def halved(slab: np.ndarray, weight: Weight) -> np.ndarray:
    """fp32 -> fp16. EdgeOmniError where it holds NaN or infinity, or what fp16 has no number for."""
    require_finite(slab, weight)
    if np.abs(slab).max(initial=0) > np.finfo(np.float16).max:
        raise EdgeOmniError(f"{weight.name} holds {np.abs(slab).max()}, and fp16 ends at 65504; keep it in the recipe")
    return slab.astype(np.float16)


def require_finite(slab: np.ndarray, weight: Weight) -> None:
    if not np.isfinite(slab).all():
        found = slab[~np.isfinite(slab)][0]
        raise EdgeOmniError(f"{weight.name} holds {found}, which stands for no weight; the checkpoint is damaged")


def _filled_up(parts: list[np.ndarray], spare: int) -> np.ndarray:
    columns = parts[0].shape[1]
    return np.concatenate([*parts, np.zeros((spare, columns), parts[0].dtype)])
