"""Runs the calibration turns through a bundle while it is being quantized, and solves each matrix for what it met.

A graph goes from stage to stage (quant/stages.py): ONNX Runtime runs the piece that leads to the next matrices, all
before them quantized already, on each sample; what a later piece needs lies on disk. So memory holds one piece, one
sample and the Hessians of one stage, whatever the model's size.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Lock

import numpy as np

from quant.affine import Quantized
from quant.examples import Calibrating, Example, conversation
from quant.gptq import Curvature, Gram, gptq
from quant.observe import HEAD, forced
from quant.plan import Plan
from quant.rewrite import Model, Weight
from quant.rtn import rtn
from quant.scheme import CALIBRATED, Scheme
from quant.spill import Spilled, Values
from quant.stages import Stage, choices, cut_out, needed, on_the_way, stages
from quant.taps import in_memory, load
from quant.turn import listed
from runtime.bundle import Graph, Manifest, Port
from runtime.context import embed
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.journal import Journal
from runtime.prompt import prompt_format
from runtime.session import InMemory, Options, Session
from runtime.tokenizer import Tokenizer

Solver = Callable[[np.ndarray], Quantized]  # rows of a matrix -> their codes
Feed = Callable[[int, Port], np.ndarray]  # number of the sample, port of the graph -> what goes in
CHOSEN = np.zeros((1, 1), np.int64)  # in the place of a choice that is forced

DECODER, LM_HEAD = "decoder", "lm_head"
REACHED = (DECODER, LM_HEAD, HEAD)  # graphs whose inputs follow from turns
ENDS = {DECODER: ("hidden",)}  # what a graph gives to others


@dataclass(frozen=True)
class Sampled:
    """What the samples of one graph are: how many, and what each feeds to a port."""

    count: int
    feed: Feed


class Unfinished(Engine):
    """The graphs of a bundle in the making that are finished; `tokenizer` may lie elsewhere."""

    def __init__(self, folder: Path, manifest: Manifest, tokenizer: Path):
        self.folder, self.manifest, self.compat, self.options = folder, manifest, "right", Options()
        self.tokenizer = Tokenizer(tokenizer)
        self.format = prompt_format(manifest, self.tokenizer)
        self._sessions = {}

    def session(self, name: str) -> Session:
        """The graph `name`, its float weights multiplied as they lie in their files; no copy of them is packed."""
        if name not in self._sessions and name in self.manifest.graphs:
            graph = self.manifest.graphs[name]
            self._sessions[name] = InMemory(*in_memory(load(self.folder, graph), graph), self.options)
        return super().session(name)

    def close(self) -> None:
        """Give back what the open graphs hold; a graph that is asked for again is opened again."""
        self._sessions.clear()


class Walk:
    """One graph on its way from stage to stage. Its model is rewritten in between, by whoever stores the solutions."""

    def __init__(self, name: str, graph: Graph, model: Model, samples: Sampled, values: Values):
        self.name, self.model, self.samples, self.values = name, model, samples, values
        self._ports = {port.name: port for port in graph.inputs}
        self._choices = frozenset(choices(model))
        self._kept: dict[str, Spilled] = {}

    def reach(self, step: str, wanted: Collection[str], later: Collection[str]) -> None:
        """Let the values `wanted` be known, and keep what those wanted `later` start from; a step runs once."""
        label = f"{self.name}.{step}"
        self._kept |= self.values.recall(label) or self._run(label, wanted, later)
        useful = needed(self.model, self._known, [*wanted, *later])
        for gone in [name for name in self._kept if name not in useful]:
            self.values.discard(self._kept.pop(gone))

    @property
    def _known(self) -> set[str]:
        return {*self._kept, *self._choices}

    def _run(self, label: str, wanted: Iterable[str], later: Iterable[str]) -> dict[str, Spilled]:
        found = on_the_way(self.model, self._known, wanted)
        kept = needed(self.model, self._known | found, later) & found
        missing = [name for name in wanted if name in found]
        outputs = tuple(dict.fromkeys([*missing, *sorted(kept)]))
        if not outputs:
            return self.values.store(label, (), ())
        inputs, piece = cut_out(self.model, self._known, outputs)
        session = InMemory(*in_memory(piece, _described(outputs)), Options())
        runs = (session.run(**{name: self.value(number, name) for name in inputs}) for number in self._numbers)
        return self.values.store(label, outputs, runs)

    @property
    def _numbers(self) -> range:
        return range(self.samples.count)

    def value(self, number: int, name: str) -> np.ndarray:
        """A value that is known, of one sample."""
        if name in self._choices:
            return CHOSEN
        kept = self._kept.get(name)
        return self.samples.feed(number, self._ports[name]) if kept is None else kept.sample(number)

    def gram(self, names: Iterable[str], group: int) -> Gram:
        """The Gram matrix of all rows of the values `names`, each [..., columns], of every sample."""
        found = (self.value(number, name) for name in names for number in self._numbers)
        rows = (value.reshape(-1, value.shape[-1]) for value in found)
        first = next(rows)
        gram = Gram(first.shape[1], group)
        for some in (first, *rows):
            gram.add(some)
        return gram

    def take(self, name: str) -> Spilled:
        """A value that was reached, to be kept by the caller."""
        return self._kept.pop(name)


def _described(outputs: tuple[str, ...]) -> Graph:
    ports = tuple(Port(name, "float32", ()) for name in outputs)
    return Graph("piece", (), (), ports, "", 0, 0)


def refuse_unreached(planned: Plan, calibrating: Calibrating) -> None:
    """EdgeOmniError if some matrices are to be calibrated and cannot, or turns are given and none is."""
    if calibrating.turns is not None and not planned.calibrated:
        raise EdgeOmniError(
            f"the recipe {planned.recipe.name} calibrates no matrix, so the calibration turns would do nothing; "
            f"leave them out, or take a recipe with the method {' or '.join(CALIBRATED)}"
        )
    problems = [
        f"  {item.weight.name} {why}"
        for graph in planned.graphs
        for item in graph.decided
        if item.calibrated and (why := _out_of_reach(graph.name, item.weight))
    ]
    if problems:
        raise EdgeOmniError(
            f'the recipe {planned.recipe.name} cannot calibrate all it names; give these the method "rtn":\n'
            + listed(problems)
        )


def _out_of_reach(graph: str, weight: Weight) -> str | None:
    if graph not in REACHED:
        return f"is in {graph}; turns are led through {', '.join(REACHED)} only"
    looked_up = any(node.op_type == "Gather" for node, _ in weight.value.uses())
    return "is a table in which rows are looked up: it multiplies nothing" if looked_up else None


class Calibration:
    """The turns on their way through the graphs of a bundle, in the order of its manifest."""

    def __init__(self, examples: tuple[Example, ...], engine: Unfinished, work: Path, journal: Journal):
        self.examples, self.engine, self.values = examples, engine, Values(work, journal)
        self._finished: dict[str, Model] = {}
        self._hidden: Spilled | None = None

    def finished(self, name: str, model: Model) -> None:
        """A graph was written; it may be run as a whole if another one needs what it gives."""
        self._finished[name] = model

    def walk(self, name: str, graph: Graph, model: Model) -> Walk:
        """EdgeOmniError for a graph that no turn leads to, or none of those given."""
        return Walk(name, graph, model, self._samples(name), self.values)

    def solutions(
        self, name: str, graph: Graph, model: Model, schemes: Mapping[str, Scheme]
    ) -> Iterator[tuple[str, Solver]]:
        """Each matrix of a graph that is to be calibrated, in an order in which it can be, and how to solve its rows.

        Whoever takes one stores it and lets the model read it before the next is asked for. Errors are `walk`'s.
        """
        walk, ends = self.walk(name, graph, model), ENDS.get(name, ())
        order = stages(model, schemes)
        for place, stage in enumerate(order):
            later = [*(value for after in order[place + 1 :] for value in after.inputs), *ends]
            walk.reach(str(place), stage.inputs, later)
            met = Met(walk, stage, {schemes[weight] for weight in stage.weights})
            yield from ((weight, partial(met.solve, scheme=schemes[weight])) for weight in stage.weights)
        self._leave(walk)

    def _samples(self, name: str) -> Sampled:
        if name == DECODER:
            rows = self._read()["rows"]
            return Sampled(rows.count, partial(_decoder_feed, rows))
        hidden = self._hidden_states()
        if name == LM_HEAD:
            return Sampled(hidden.count, lambda number, port: hidden.sample(number)[0])
        return self._frames(hidden)

    def _read(self) -> dict[str, Spilled]:
        """Of each example: rows [1, L, hidden], and the `frames` [n] and `codes` [n, codebooks] of a spoken answer."""
        label, names = "conversations", ("rows", "frames", "codes")
        found = self.values.recall(label)
        if found is None:
            found = self.values.store(label, names, map(self._one, self.examples))
            self.engine.close()
        return found

    def _one(self, example: Example) -> dict[str, np.ndarray]:
        engine = self.engine
        read = conversation(example, engine)
        audio = engine.session("embed_audio") if "embed_audio" in engine.manifest.graphs else None
        rows = embed(read.prompt, engine.manifest, engine.session("embed_tokens"), audio)
        return {"rows": rows[None], "frames": read.frames, "codes": read.codes}

    def _frames(self, hidden: Spilled) -> Sampled:
        """The audio head's samples: each frame of each spoken answer, from the position before it."""
        read = self._read()
        places = [(n, place) for n in range(hidden.count) for place in range(len(read["frames"].sample(n)))]
        if not places:
            raise EdgeOmniError(f"{HEAD} cannot be calibrated: no turn is answered aloud; give some that are")
        scores = next(port.shape[0] for port in self.engine.manifest.graphs[HEAD].inputs if port.name == "noise")

        def feed(number: int, port: Port) -> np.ndarray:
            sample, place = places[number]
            if port.name == "hidden":
                before = int(read["frames"].sample(sample)[place]) - 1
                return hidden.sample(sample)[0, before : before + 1]
            return forced(read["codes"].sample(sample)[place], int(scores))[port.name]

        return Sampled(len(places), feed)

    def _hidden_states(self) -> Spilled:
        if self._hidden is None:
            self._leave(self.walk(DECODER, self.engine.manifest.graphs[DECODER], self._finished[DECODER]))
        assert self._hidden is not None
        return self._hidden

    def _leave(self, walk: Walk) -> None:
        """At the end of a walk, compute and keep what other graphs begin with."""
        if walk.name == DECODER:
            walk.reach("end", ENDS[DECODER], ())
            self._hidden = walk.take(*ENDS[DECODER])


class Met:
    """What the matrices of one stage multiplied, summed up when the first of them asks."""

    def __init__(self, walk: Walk, stage: Stage, schemes: Collection[Scheme]):
        self.walk, self.stage = walk, stage
        self._group = max(scheme.group_size for scheme in schemes)
        self._lock = Lock()  # the slabs of a matrix are solved in several threads

    @cached_property
    def gram(self) -> Gram:
        return self.walk.gram(self.stage.inputs, self._group)

    @cached_property
    def felt(self) -> np.ndarray:
        return self.gram.felt()

    @cached_property
    def curvatures(self) -> tuple[Curvature, ...]:
        return self.gram.curvatures()

    def solve(self, weight: np.ndarray, scheme: Scheme) -> Quantized:
        """Rows of a matrix -> their codes, by the scheme's method."""
        with self._lock:
            curvatures, felt = (self.curvatures, None) if scheme.method == "gptq" else (None, self.felt)
        return rtn(weight, scheme, felt) if curvatures is None else gptq(weight, curvatures, scheme)


def _decoder_feed(rows: Spilled, number: int, port: Port) -> np.ndarray:
    """Rows are read in one run, on a cache that is empty and just large enough."""
    taken = rows.sample(number)
    length = taken.shape[1]
    match port.name:
        case "inputs_embeds":
            return taken
        case "seqlens_k":
            return np.array([length - 1], np.int32)
        case "total_sequence_length":
            return np.array(length, np.int32)
        case _:
            return np.zeros([length if isinstance(dim, str) else dim for dim in port.shape], port.dtype)
