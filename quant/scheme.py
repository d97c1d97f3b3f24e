"""What becomes of each weight: a Scheme says how one matrix is stored, a Recipe which weights get which, by name.

A recipe is a TOML file. Under [weights] stand name patterns (`*`, `?`, `[...]`) in order; the first that matches a
weight's name decides, and a weight that none matches stays as it is. `{outer}` stands for the number of a layer in the
first or the last eighth of its kind, which feel rounding most.

    description = "..."
    [schemes]
    int4 = { bits = 4, group_size = [64, 32] }    # the first size that divides the matrix's columns
    [weights]
    "*.vq_list.*" = "keep"
    "lm_head.weight" = { bits = 8, group_size = 32, symmetric = false }
    "model.layers.0.*" = "stored"                 # the integers that a checkpoint holds, else floats
    "model.layers.1.*" = "fp16"                   # floats of half the size, widened when the graph is opened
    "*" = "int4"
"""

import fnmatch
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ConfigDict, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from runtime.bundle import Profile
from runtime.errors import EdgeOmniError
from runtime.integers import Form

Method = Literal["rtn", "weighted", "gptq"]
CALIBRATED: tuple[Method, ...] = ("weighted", "gptq")  # methods that ask what a matrix multiplies
Bits = Literal[2, 4, 8]
GroupSize = Literal[16, 32, 64, 128, 256]
GROUP_SIZES: tuple[int, ...] = get_args(GroupSize)
STRICT = ConfigDict(extra="forbid")
OUTER, OUTER_SHARE = "{outer}", 8
OWN = KEEP, STORED, HALF = "keep", "stored", "fp16"  # what a pattern may ask for without a scheme
PARTS: dict[str, type] = {"description": str, "schemes": dict, "weights": dict}
SHIPPED = Path(__file__).parent / "recipes"
# ONNX Runtime 1.31 multiplies 2-bit weights with int8 activations for these sizes only, elsewhere in slow fp32.
FAST_2_BIT = (32, 64, 128)


@checked_dataclass(frozen=True, config=STRICT)
class Scheme:
    """How a matrix is stored: codes of `bits` bits, and one scale for `group_size` columns of a row.

    `symmetric`: 0 is the middle code, else each group has a zero of its own. `activations` says in what a matrix
    multiplies on a CPU: "int8", quantized anew in each run, or "float", which is exact and about 20 times slower.
    `method`: "rtn" rounds to nearest; "weighted" does so with scales searched for what the matrix multiplies; "gptq"
    lets later columns make up for what earlier ones lost (quant/gptq.py). The last two need calibration turns.
    """

    bits: Bits
    group_size: GroupSize
    symmetric: StrictBool = True
    method: Method = "rtn"
    activations: Literal["int8", "float"] = "int8"

    def __post_init__(self) -> None:
        if self.bits == 2 and self.activations == "int8" and self.group_size not in FAST_2_BIT:
            raise ValueError("2 bits multiply with int8 activations in groups of 32, 64 or 128 only")

    @property
    def calibrated(self) -> bool:
        """Whether it has to be known what the matrix multiplies."""
        return self.method in CALIBRATED

    def holds(self, form: Form, profile: Profile) -> bool:
        """Whether a matrix in that form can be stored so without loss: bits to spare, narrower groups, zeros if any."""
        fits = form.bits <= self.bits and form.group_size % self.group_size == 0
        return fits and form.symmetric >= self.symmetric and (profile == "cpu" or form.scale_bits == 16)

    def bits_per_weight(self, scale_bits: int) -> float:
        """Bits a value costs, its share of scale and zero counted."""
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) / self.group_size

    def __str__(self) -> str:
        kind = "" if self.symmetric else " with zeros"
        return f"int{self.bits} by {self.group_size}{kind}, {self.method}"


def stored_scheme(form: Form) -> Scheme:
    """The scheme of a matrix that is stored in that form already."""
    slow = form.bits == 2 and form.group_size not in FAST_2_BIT
    return _SCHEME.validate_python(
        {
            "bits": form.bits,
            "group_size": form.group_size,
            "symmetric": form.symmetric,
            "activations": "float" if slow else "int8",
        }
    )


Schemes = tuple[Scheme, ...]


@dataclass(frozen=True)
class Rule:
    """Weights whose name matches `pattern` get the first of `schemes` whose groups divide their rows; none: kept.

    `stored`: those that a checkpoint holds as integers are taken as they are. `half`: they are stored as fp16.
    """

    pattern: str
    schemes: Schemes
    stored: bool = False
    half: bool = False
    layers: tuple[int, ...] = ()  # that OUTER stands for

    @property
    def keeps(self) -> bool:
        """Whether it leaves weights as they are."""
        return not (self.schemes or self.stored or self.half)

    def matches(self, name: str) -> bool:
        if OUTER not in self.pattern:
            return fnmatch.fnmatchcase(name, self.pattern)
        return any(self._matches_in(layer, name) for layer in self.layers)

    def _matches_in(self, layer: int, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.pattern.replace(OUTER, str(layer)))

    def bound(self, names: Sequence[str]) -> "Rule":
        """The same rule where it is known what weights there are, and so how many layers."""
        if OUTER not in self.pattern:
            return self
        numbered = [(int(number), name) for name in names for number in re.findall(r"\d+", name)]
        found = [number for number, name in numbered if self._matches_in(number, name)]
        count = max(found, default=-1) + 1
        ends = max(1, count // OUTER_SHARE)
        outer = {*range(min(ends, count)), *range(max(0, count - ends), count)}
        return replace(self, layers=tuple(sorted(outer)))

    def scheme_for(self, columns: int) -> Scheme | None:
        """The first scheme whose groups divide rows of so many columns."""
        return next((scheme for scheme in self.schemes if columns % scheme.group_size == 0), None)


@dataclass(frozen=True)
class Recipe:
    """`text` is the TOML that it was read from, to be stored beside what it made."""

    name: str
    text: str
    description: str
    rules: tuple[Rule, ...]

    def bound(self, names: Sequence[str]) -> "Recipe":
        """The same recipe for a bundle whose weights have these names; only then `{outer}` matches anything."""
        return replace(self, rules=tuple(rule.bound(names) for rule in self.rules))

    def rule_for(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(name)), None)


def read_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or a TOML file. EdgeOmniError says everything that is wrong with it."""
    path = Path(name_or_path)
    if str(name_or_path) in shipped_recipes():
        path = SHIPPED / f"{name_or_path}.toml"
    elif path.suffix != ".toml" or not path.is_file():
        raise EdgeOmniError(
            f"there is no recipe {str(name_or_path)!r}: expected {', '.join(shipped_recipes())} or a file NAME.toml"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeOmniError(f"the recipe {path} cannot be read: {error}") from None
    return parse_recipe(path.stem, text)


def shipped_recipes() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def parse_recipe(name: str, text: str) -> Recipe:
    """The recipe that a TOML text spells; EdgeOmniError says everything that is wrong with it at once."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise EdgeOmniError(f"the recipe {name} is no TOML: {error}") from None
    problems = [f"{key}: unknown; expected {', '.join(PARTS)}" for key in document if key not in PARTS]
    description, schemes, weights = (_part(document, key, kind, problems) for key, kind in PARTS.items())
    named = {key: _schemes(f"schemes.{key}", value, {}, problems) for key, value in schemes.items()}
    choices = {**dict.fromkeys(OWN, ()), **named}
    problems += [f"schemes.{key}: means something already; call the scheme otherwise" for key in named if key in OWN]
    rules = tuple(
        Rule(key, _schemes(f"weights.{key!r}", value, choices, problems), *(value == ask for ask in (STORED, HALF)))
        for key, value in weights.items()
    )
    if not problems and all(rule.keeps for rule in rules):
        problems.append(
            'weights: no pattern has a scheme, so nothing would be quantized; expected "*" = "int4" or such'
        )
    problems += _unreachable(rules)
    if problems:
        lines = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
        raise EdgeOmniError(f"the recipe {name} cannot be used:\n{lines}")
    return Recipe(name, text, description, rules)


def _part(document: dict[str, Any], key: str, kind: type, problems: list[str]) -> Any:
    value = document.get(key, kind())
    if isinstance(value, kind):
        return value
    problems.append(f"{key}: expected {'a text' if kind is str else 'a table'}, found {value!r}")
    return kind()


def _schemes(where: str, value: object, named: Mapping[str, Schemes], problems: list[str]) -> Schemes:
    """The schemes that a value spells: the name of some, or a table with one or several group sizes."""
    if isinstance(value, str) and value in named:
        return named[value]
    if not isinstance(value, dict):
        spelled = [f'"{name}"' for name in named] + ["a table { bits = ..., group_size = ... }"]
        problems.append(f"{where}: {value!r} is no scheme; expected {' or '.join(spelled)}")
        return ()
    sizes = value.get("group_size")
    tables = [{**value, "group_size": size} for size in sizes] if isinstance(sizes, list) and sizes else [value]
    return tuple(scheme for table in tables if (scheme := _scheme(where, table, problems)))


def _scheme(where: str, table: dict[str, Any], problems: list[str]) -> Scheme | None:
    try:
        return _SCHEME.validate_python(table)
    except ValidationError as error:
        for mistake in error.errors():
            problems.append(".".join([where, *map(str, mistake["loc"])]) + ": " + _in_words(mistake))
        return None


def _in_words(mistake: Any) -> str:
    match mistake["type"]:
        case "unexpected_keyword_argument":
            return f"unknown; expected {', '.join(Scheme.__dataclass_fields__)}"
        case "missing" | "missing_argument":
            return "missing"
        case "literal_error":
            return f"found {mistake['input']!r}, expected {mistake['ctx']['expected']}"
        case "value_error":
            return str(mistake["ctx"]["error"])
        case _:
            return f"found {mistake['input']!r}; {mistake['msg'].lower()}"


def _unreachable(rules: tuple[Rule, ...]) -> Iterator[str]:
    """Rules behind a `*`, which decides for every name."""
    everything = next((index for index, rule in enumerate(rules) if rule.pattern == "*"), len(rules))
    for rule in rules[everything + 1 :]:
        yield f'weights.{rule.pattern!r}: stands behind "*", which matches every name before it; put it first'


_SCHEME = TypeAdapter(Scheme)
AS_STORED = parse_recipe(
    "as stored",
    """description = "What the checkpoint stores as integers stays as it is, all else is float"

[weights]
"*" = "stored"
""",
)
