"""What to change in a recipe: which of its lines governs the loss, and which new line buys most for its bytes."""

import fnmatch
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

from quant.comparison.within import LAYER, Loss, Within, kind_of, stored_as
from quant.scheme import Recipe, Rule, parse_recipe
from runtime.bundle import Graph, Manifest, Quantization, QuantizedWeight

MORE: dict[int, int] = {2: 4, 4: 8}  # bits -> the next that there are; above them stand floats


@dataclass(frozen=True)
class Governing:
    """A line of the recipe, and the share of the loss that the weights have for which it decides."""

    pattern: str
    line: int  # counted from 1; 0 where the recipe's text does not show it
    text: str
    share: float


@dataclass(frozen=True)
class Advice:
    """Lines to put before line `before` of the recipe, what they cost, and to what the divergence falls at best.

    It was measured with these weights as floats, which the bits advised come close to.
    """

    graph: str
    group: str
    lines: tuple[str, ...]
    before: int
    stored: str  # as they are now
    extra_bytes: int
    kl_now: float
    kl_then: float
    error: float  # half the 95 % interval of the difference

    @property
    def per_megabyte(self) -> float:
        """By what divergence falls for each million bytes."""
        return (self.kl_now - self.kl_then) / (self.extra_bytes / 1e6)


def governing(within: Within | None, quantization: Quantization | None) -> tuple[Governing, ...]:
    """The lines of the recipe that decided for the weights which were tried, by the loss of these when alone."""
    if within is None or quantization is None:
        return ()
    recipe, lost = recipe_of(quantization), {}
    for loss in _kinds(within):
        if rule := recipe.rule_for(loss.weights[0]):
            lost[rule.pattern] = lost.get(rule.pattern, 0.0) + loss.alone
    total = sum(lost.values()) or 1.0
    found = [Governing(pattern, *line_of(recipe, pattern), share=kl / total) for pattern, kl in lost.items()]
    return tuple(sorted(found, key=lambda line: line.share, reverse=True))


def recipe_of(quantization: Quantization) -> Recipe:
    """The recipe that made a bundle, for the layers that it has."""
    names = [weight.name for weight in (*quantization.quantized, *quantization.kept)]
    return parse_recipe(quantization.recipe, quantization.recipe_toml).bound(names)


def _kinds(within: Within) -> list[Loss]:
    """Groups that hold every weight once: those by kind, or where there are none, those by layer."""
    kinds = [loss for loss in within.losses if loss.by == "kind"]
    return kinds or [*within.losses]


def line_of(recipe: Recipe, pattern: str) -> tuple[int, str]:
    """Number and text of the line that spells a pattern; (0, "") where none does so plainly."""
    spelled = re.compile(rf"\s*(\"|')?{re.escape(pattern)}(?(1)\1)\s*=")
    lines = recipe.text.splitlines()
    return next(((n, line.strip()) for n, line in enumerate(lines, 1) if spelled.match(line)), (0, ""))


def advice(within: Within | None, manifest: Manifest) -> tuple[Advice, ...]:
    """Lines that raise one group of weights each, where that surely helps; the best for its bytes first."""
    quantization = manifest.quantization
    if within is None or quantization is None:
        return ()
    recipe = recipe_of(quantization)
    found = [made for loss in within.losses for made in _advice(loss, within, recipe, quantization, manifest)]
    return tuple(sorted(found, key=lambda one: one.per_megabyte, reverse=True))


def _advice(
    loss: Loss, within: Within, recipe: Recipe, quantization: Quantization, manifest: Manifest
) -> Iterator[Advice]:
    stored = [w for w in quantization.quantized if w.graph == loss.graph and w.name in set(loss.weights)]
    rules = {recipe.rule_for(weight.name) for weight in stored}
    rule = rules.pop() if len(rules) == 1 else None  # of weights under several lines no one line can be advised
    if rule is None or not within.whole - loss.without > loss.error:  # else it may be chance
        return
    graph = manifest.graphs[loss.graph]
    yield Advice(
        graph=loss.graph,
        group=loss.group,
        lines=tuple(
            f'"{pattern}" = {_spelled(stored[0], recipe)}' for pattern in _raising(loss, rule, recipe, quantization)
        ),
        before=line_of(recipe, rule.pattern)[0],
        stored=stored_as(stored[0]),
        extra_bytes=sum(_extra_bytes(weight, graph) for weight in stored),
        kl_now=within.whole,
        kl_then=loss.without,
        error=loss.error,
    )


def _raising(loss: Loss, rule: Rule, recipe: Recipe, quantization: Quantization) -> tuple[str, ...]:
    """Patterns that, before the line of `rule`, name the weights of the group and no others."""
    if loss.by == "layer":
        return patterns(loss)
    kind, since = kind_of(loss.weights[0]), recipe.rules.index(rule)
    reached = {
        weight.name
        for weight in (*quantization.quantized, *quantization.kept)
        if fnmatch.fnmatchcase(weight.name, kind)
        and (ruled := recipe.rule_for(weight.name)) is not None
        and recipe.rules.index(ruled) >= since
    }
    return (kind,) if reached == set(loss.weights) else loss.weights


def patterns(loss: Loss) -> tuple[str, ...]:
    """What names the group."""
    if loss.by == "kind":
        return (loss.group,)
    layers = dict.fromkeys(name[: found.end()] for name in loss.weights if (found := LAYER.search(name)))
    return tuple(f"{layer}.*" for layer in layers)


def _spelled(weight: QuantizedWeight, recipe: Recipe) -> str:
    """The next scheme above a weight's own as a recipe spells it: by a name that the recipe has, if it has one."""
    if weight.bits not in MORE:
        return '"keep"'
    named = tomllib.loads(recipe.text).get("schemes", {})
    fitting = (name for name, table in named.items() if table.get("bits") == MORE[weight.bits])
    name = next(fitting, None)
    return f'"{name}"' if name else f"{{ bits = {MORE[weight.bits]}, group_size = {weight.group_size} }}"


def _extra_bytes(weight: QuantizedWeight, graph: Graph) -> int:
    """What a weight grows by with the next more bits, its scales staying as they are."""
    floats = 16 if any(port.dtype == "float16" for port in graph.inputs) else 32
    more = MORE[weight.bits] - weight.bits if weight.bits in MORE else floats - weight.bits_per_weight
    return round(weight.parameters * more / 8)
