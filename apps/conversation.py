"""The one place where bundle, detector, echo, player, clock and duplex are put together."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from apps.options import VadName
from runtime.audio import Wave
from runtime.engine import Engine
from runtime.live.clock import Clock
from runtime.live.duplex import Duplex
from runtime.live.echo import EchoCanceller, EchoTest
from runtime.live.model import Model
from runtime.live.player import Player
from runtime.live.settings import HOP, Settings
from runtime.live.vad import Detector, open_detector
from runtime.session import Session
from runtime.trace import Trace


@dataclass(frozen=True)
class LiveParts:
    """A conversation that can begin, and the parts of it that its edges need."""

    duplex: Duplex
    player: Player
    clock: Clock
    trace: Trace
    ear: "Ear"
    on_work: list[Callable[[], None]]  # called after each piece of work, when time may have passed
    halt: Callable[[], None]  # from any thread: stop a graph that runs and runs


@dataclass(frozen=True)
class Voice:
    """How the model answers."""

    system: str | None = None
    seed: int | None = None
    greedy: bool = False
    remember: int | None = None  # turns before the newest one; None: all that there is room for


def open_live(
    engine: Engine,
    settings: Settings,
    clock: Clock,
    voice: Voice = Voice(),
    vad: VadName = "auto",
    aec: bool = True,
    echo_test: bool = True,
    traced: bool = False,
) -> LiveParts:
    """Everything but the devices, every graph opened.

    Raises:
        EdgeOmniError: the bundle cannot hear, has not the detector that was asked for, or no canceller is installed.
    """
    from runtime.live.branches import Branches

    trace, player, on_work = Trace() if traced else Trace(limit=0), Player(), []
    if traced:
        engine = TracedEngine(engine, trace, clock)
    engine.open_all()
    branches = Branches(engine, voice.system, voice.seed, voice.greedy, remember=voice.remember)
    ear = Ear(open_detector(vad, engine), EchoCanceller() if aec else None, EchoTest() if echo_test else None)
    model = cast(Model, Metered(branches, clock, trace, on_work))
    duplex = Duplex(model, ear, player, clock, settings, ear)
    return LiveParts(duplex, player, clock, trace, ear, on_work, engine.cancel)


LOUD_HOPS = 8  # a person counts as louder than the echo for so long: between words they are not


class Ear:
    """A hop of the microphone on its way to the duplex, which takes it for its detector and for its echo test.

    A canceller hides the person until it knows its room, and the quiet person always. So who speaks is told from the
    sound as it came in, but for hops that look like our own voice; and the model hears what the canceller left only
    where there is an echo, and nobody who is louder, whom it would damage.
    """

    def __init__(self, detector: Detector, canceller: EchoCanceller | None, test: EchoTest | None):
        self._detector, self._canceller, self._test = detector, canceller, test
        self._raw = self._passed = silence()
        self._echo = False
        self._late = np.zeros(EchoCanceller.delay_samples, np.float32)  # so that both ways are equally long
        self._loud = 0  # hops for which somebody counts as louder than the echo

    def hear(self, microphone: Wave, reference: Wave) -> Wave:
        """Microphone [512] and what was played in the same hop -> what the duplex hears."""
        self._raw = self._passed = microphone
        if self._canceller is None:
            self._judge(microphone, reference, microphone)
            return microphone
        cleaned = self._canceller.process(microphone, reference)
        late, self._late = np.split(np.concatenate([self._late, microphone]), [HOP])
        self._judge(microphone, reference, cleaned)
        self._passed = cleaned if self._test is None or (self._test.delay is not None and not self._loud) else late
        return self._passed

    def _judge(self, microphone: Wave, reference: Wave, cleaned: Wave) -> None:
        if self._test is not None:
            self._test.note_reference(reference)
            self._echo = self._test.suspicious(microphone, cleaned)
            self._loud = LOUD_HOPS if self._test.louder else max(0, self._loud - 1)

    def probability(self, chunk: Wave, /) -> float:
        """That a person speaks in the newest hop, or in what stands for it while the microphone is off."""
        heard = self._detector.probability(self._raw if chunk is self._passed else chunk)
        return 0.0 if self._echo else heard

    def suspicious(self, _chunk: Wave, /) -> bool:
        """Whether the newest hop looks like our own voice: as it came in, or by what the canceller took out of it."""
        return self._echo

    def reset(self) -> None:
        """Forget what was heard; the room stays the same."""
        self._detector.reset()


class Metered:
    """A model whose every piece of work is a span of the trace."""

    def __init__(self, model: Any, clock: Clock, trace: Trace, on_work: list[Callable[[], None]]):
        self._model, self._clock, self._trace, self._on_work = model, clock, trace, on_work

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            with self._measured(name):
                result = value(*arguments, **named)
            return self._pieces(name, result) if isinstance(result, Generator) else result

        return call

    def _pieces(self, name: str, work: Generator[Any, None, Any]) -> Generator[Any, None, Any]:
        ended = False
        try:
            while True:
                with self._measured(name):
                    try:
                        piece = next(work)
                    except StopIteration as stop:
                        ended = True
                        return stop.value
                yield piece
        except GeneratorExit:
            work.close()
            raise
        except BaseException as error:
            ended = True
            self._trace.instant(name, "failed", self._clock.now(), error=repr(error))
            raise
        finally:
            if not ended:
                self._trace.instant(name, "cancelled", self._clock.now())

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        start = self._clock.now()
        try:
            yield
        finally:
            self._trace.span(name, name, start, self._clock.now())
            for call in self._on_work:
                call()


class TracedEngine(Engine):
    """The same bundle, opened so that each run of a graph is a span."""

    def __init__(self, engine: Engine, trace: Trace, clock: Clock):
        super().__init__(engine.folder, engine.options, engine.compat)
        self._trace, self._clock = trace, clock
        self._traced: dict[str, Session] = {}

    def session(self, name: str) -> Session:
        if name not in self._traced:
            self._traced[name] = cast(Session, TracedGraph(super().session(name), name, self._trace, self._clock))
        return self._traced[name]


class TracedGraph:
    """A session, or what it has bound, whose runs are spans."""

    def __init__(self, graph: Any, name: str, trace: Trace, clock: Clock):
        self._graph, self._name, self._trace, self._clock = graph, name, trace, clock

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._graph, attribute)
        if attribute == "bind":
            return lambda *given: TracedGraph(value(*given), self._name, self._trace, self._clock)
        return self._timed(value) if attribute in ("run", "run_for") else value

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = self._clock.now()
            result = run(*arguments, **named)
            self._trace.span("graphs", self._name, start, self._clock.now())
            return result

        return timed


def silence() -> Wave:
    return np.zeros(HOP, np.float32)
