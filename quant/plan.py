"""What a recipe makes of each weight of a bundle, decided before anything is read or written."""

from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quant.rewrite import Model, Weight, open_graph, padded_rows, weights
from quant.scheme import GROUP_SIZES, Recipe, Rule, Scheme, stored_scheme
from runtime.bundle import MANIFEST, Graph, Manifest, Profile, read_bundle
from runtime.errors import EdgeOmniError
from runtime.float_bundle import FloatBundle
from runtime.integers import Form

CUDA_GROUP = 32  # the one group size of CUDA's fused kernels

UNDIVIDED = "no group size divides its rows"

# RVQ codebooks and convolutions that are stored as matrices. Only a pattern that ends as they do quantizes them: "*"
# would do so without anybody having meant it.
GUARDED = (".codebook.embed", ".unfolded_weight", ".res_conv.weight", ".final_proj.weight", ".patch_embed.proj.weight")


@dataclass(frozen=True)
class Decided:
    """A weight and what becomes of it: stored by a scheme, or kept as it is for a reason.

    `half`: stored as fp16 and multiplied as it was. `taken_over`: the integers that the checkpoint stores already,
    brought to the scheme without loss.
    """

    weight: Weight
    scheme: Scheme | None = None
    reason: str = ""
    taken_over: Form | None = None
    half: bool = False

    @property
    def key(self) -> Hashable:
        """Equal for two that are stored as one. Forms count: where rows are looked up, columns stay in their order."""
        return self.weight.source, self.scheme, self.taken_over, self.half

    @property
    def smaller(self) -> bool:
        return self.half or self.scheme is not None

    @property
    def calibrated(self) -> bool:
        """Whether it is solved for what it multiplies on calibration turns."""
        return self.scheme is not None and self.scheme.calibrated and self.taken_over is None

    def bytes_after(self, profile: Profile) -> int:
        """Bytes of the weight in the quantized bundle."""
        if self.scheme is None:
            return self.weight.nbytes // (2 if self.half else 1)
        rows, columns = self.weight.shape
        values = padded_rows(rows, self.scheme.bits, profile) * columns
        return int(values * self.scheme.bits_per_weight(8 * self.weight.dtype.itemsize)) // 8


@dataclass(frozen=True)
class PlannedGraph:
    name: str
    graph: Graph
    model: Model
    decided: tuple[Decided, ...]


@dataclass(frozen=True)
class Plan:
    bundle: FloatBundle
    recipe: Recipe
    graphs: tuple[PlannedGraph, ...]

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def bytes_now(self) -> int:
        """Bytes of all weights as floats, those that two graphs share counted in each."""
        return sum(item.weight.nbytes for graph in self.graphs for item in graph.decided)

    @property
    def calibrated(self) -> bool:
        return any(item.calibrated for item in self.decided)

    @property
    def decided(self) -> Iterator[Decided]:
        """Every weight once, however many graphs read it."""
        seen: set[Hashable] = set()
        for graph in self.graphs:
            for item in graph.decided:
                if item.key not in seen:
                    seen.add(item.key)
                    yield item

    def worth_sharing(self) -> frozenset[Path]:
        """Weight files of which at least half stays as it is; a bundle that shares one has it whole."""
        kept: dict[Path, int] = {}
        for item in self.decided:
            if not item.smaller and item.weight.file is not None:
                kept[item.weight.file] = kept.get(item.weight.file, 0) + item.weight.nbytes
        return frozenset(file for file, nbytes in kept.items() if 2 * nbytes >= file.stat().st_size)

    def bytes_after(self, shared: Collection[Path] = ()) -> int:
        """Bytes of weights to be written when those in the `shared` files are not copied."""
        written = (item for item in self.decided if item.smaller or item.weight.file not in shared)
        return sum(item.bytes_after(self.manifest.profile) for item in written)


def open_bundle(folder: Path) -> FloatBundle:
    """The float bundle in `folder`, its weights unread; BundleError if it is none, EdgeOmniError if it is quantized."""
    manifest = read_bundle(folder)
    if manifest.quantization is not None:
        raise EdgeOmniError(
            f"{folder} is quantized already, by the recipe {manifest.quantization.recipe!r}, and rounding twice loses "
            "twice; give the float bundle that it was made from"
        )
    graphs = {name for graph in manifest.graphs.values() for name in (graph.file, *graph.weights)}
    files = [file.path for file in manifest.files]
    return FloatBundle(
        name=str(folder),
        manifest=manifest,
        models={name: open_graph(folder / graph.file) for name, graph in manifest.graphs.items()},
        others={path: folder / path for path in files if path not in graphs},
        sources=tuple(folder / path for path in (MANIFEST, *files)),
        folder=folder,
    )


def plan(bundle: FloatBundle, recipe: Recipe) -> Plan:
    """Decide for every weight of a float bundle; EdgeOmniError says all that is wrong with the two."""
    manifest = bundle.manifest
    recipe = recipe.bound([weight.name for model in bundle.models.values() for weight in weights(model)])
    graphs = tuple(
        _planned(name, graph, bundle.models[name], recipe, manifest.profile) for name, graph in manifest.graphs.items()
    )
    every = [item for graph in graphs for item in graph.decided]
    problems = [*_misnamed(every, recipe), *_undivided(every, recipe), *_unfit_for(manifest.profile, every)]
    if bundle.folder is not None:
        problems += _outside(every, {(bundle.folder / file.path).resolve() for file in manifest.files})
    if not problems and not any(item.smaller for item in every):
        problems.append(_nothing(every, recipe))
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise EdgeOmniError(f"the recipe {recipe.name} cannot quantize {bundle.name}:\n{lines}")
    return Plan(bundle, recipe, graphs)


def _planned(name: str, graph: Graph, model: Model, recipe: Recipe, profile: Profile) -> PlannedGraph:
    return PlannedGraph(name, graph, model, tuple(_decide(weight, recipe, profile) for weight in weights(model)))


def _decide(weight: Weight, recipe: Recipe, profile: Profile) -> Decided:
    rule = recipe.rule_for(weight.name)
    if rule is None:
        return Decided(weight, reason="no pattern names it")
    if rule.keeps:
        return Decided(weight, reason=f"kept by {rule.pattern!r}")
    if obstacle := weight.obstacle() or _unmeant(weight, rule):
        return Decided(weight, reason=obstacle)
    if rule.half:
        wide = weight.dtype == np.float32
        return Decided(weight, reason=f"{'made' if wide else 'is'} fp16 by {rule.pattern!r}", half=wide)
    form = weight.form()
    if rule.stored:
        return _as_stored(weight, form, profile)
    if scheme := rule.scheme_for(weight.shape[1]):
        return Decided(weight, scheme, taken_over=form if form and scheme.holds(form, profile) else None)
    return Decided(weight, reason=UNDIVIDED)


def _as_stored(weight: Weight, form: Form | None, profile: Profile) -> Decided:
    """The integers of the checkpoint as they are; on CUDA only where its kernels take them."""
    if form is None:
        types = " and ".join(weight.stored_as)
        return Decided(weight, reason=f"no operator takes its {types} as it is" if types else "is float")
    groups = CUDA_GROUP if profile == "cuda" and form.group_size > CUDA_GROUP else form.group_size
    scheme = stored_scheme(replace(form, group_size=groups))
    if profile == "cuda" and (_off_cuda(scheme) or not scheme.holds(form, profile)):
        return Decided(weight, reason=f"{scheme} is not for CUDA's kernels")
    return Decided(weight, scheme, taken_over=form)


def _unmeant(weight: Weight, rule: Rule) -> str | None:
    """Why a pattern that matches does not count, or None."""
    ending = next((ending for ending in GUARDED if weight.name.endswith(ending)), None)
    if ending is None or rule.pattern.endswith(ending):
        return None
    return f"is a codebook or a convolution: {rule.pattern!r} would have to end in {ending!r}"


def _misnamed(every: Iterable[Decided], recipe: Recipe) -> Iterator[str]:
    """Patterns that spell one weight's very name and ask of it what no operator can."""
    for item in every:
        rule = recipe.rule_for(item.weight.name)
        obstacle = item.weight.obstacle()
        if rule is not None and rule.schemes and rule.pattern == item.weight.name and obstacle:
            yield f"{rule.pattern!r} {obstacle}; keep it"


def _undivided(every: Iterable[Decided], recipe: Recipe) -> Iterator[str]:
    names: dict[tuple[Rule, int], list[str]] = {}
    for item in every:
        rule = recipe.rule_for(item.weight.name)
        if rule is None or item.reason != UNDIVIDED:
            continue
        names.setdefault((rule, item.weight.shape[1]), []).append(item.weight.name)
    for (rule, columns), found in names.items():
        asked = ", ".join(str(scheme.group_size) for scheme in rule.schemes)
        fitting = " or ".join(str(size) for size in GROUP_SIZES if columns % size == 0)
        yield (
            f"{rule.pattern!r} asks for groups of {asked}, which do not divide the {columns} columns of {found[0]}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + (f"; {fitting} would" if fitting else "; no group size does: keep it")
        )


def _unfit_for(profile: Profile, every: Iterable[Decided]) -> Iterator[str]:
    """Schemes that leave CUDA's fused kernels, which know symmetric groups of 32 only."""
    schemes = {item.scheme for item in every if item.scheme is not None} if profile == "cuda" else set()
    for scheme in sorted(schemes, key=str):
        if _off_cuda(scheme):
            yield f"{scheme}: the cuda profile takes 4 or 8 bits, symmetric, in groups of {CUDA_GROUP}"


def _off_cuda(scheme: Scheme) -> bool:
    return not scheme.symmetric or scheme.group_size != CUDA_GROUP or scheme.bits == 2


def _outside(every: Iterable[Decided], listed: Collection[Path]) -> Iterator[str]:
    """Weights that a graph takes from a file which the manifest does not vouch for."""
    for item in every:
        if item.weight.file is not None and item.weight.file.resolve() not in listed:
            yield f"{item.weight.name} lies in {item.weight.file}, outside the bundle; export it again"


def _no_floats_to_halve(recipe: Recipe) -> str:
    patterns = ", ".join(repr(rule.pattern) for rule in recipe.rules if rule.half)
    return f"no matrix of fp32 is named by {patterns}: those of a bundle for cuda are fp16 already"


def _nothing(every: Iterable[Decided], recipe: Recipe) -> str:
    if not any(rule.schemes for rule in recipe.rules):
        stored = any(rule.stored for rule in recipe.rules)
        return "no matrix is stored as integers in what it was made from" if stored else _no_floats_to_halve(recipe)
    patterns = ", ".join(repr(rule.pattern) for rule in recipe.rules if not rule.keeps)
    matrices = [item.weight.name for item in every if item.weight.obstacle() is None]
    return f"no matrix is named by its patterns {patterns}; the bundle's are called {', '.join(matrices[:3])}, ..."
