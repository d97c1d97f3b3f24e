"""How the engine answers a dialogue: piece by piece, as the worker wants it, so that others get their turn."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np

from apps.server.dialogue import Answered, Asked, Dialogue, Given, How, Said, Shown
from apps.server.failures import refused
from apps.server.media import picture
from apps.server.settings import Limits
from apps.server.stops import Stops
from runtime.context import Context
from runtime.engine import Engine
from runtime.events import Event, Finish, TextDelta
from runtime.prompt import Part, Prompt, Text
from runtime.reply import Steps, text_reply


@dataclass(frozen=True)
class Started:
    """The dialogue is understood and fits: from here on an answer can be sent. Counts are positions of the context."""

    prompt: int


@dataclass(frozen=True)
class Done:
    """The end of an answer and how many positions it took."""

    finish: Finish
    completion: int


Told = Started | TextDelta | Done
Telling = Generator[Told | None, None, None]


class Answerer:
    """Makes answers of one engine; its generators run in the worker's thread alone."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits = engine, limits

    def answer(self, dialogue: Dialogue, how: How) -> Telling:
        """Read a dialogue and answer it. EdgeOmniError or ApiError, before Started, where it cannot be."""
        prompt = self._prompt(dialogue)
        context = self.engine.context()
        if len(prompt) >= context.room:
            raise refused(
                f"the conversation takes {len(prompt)} tokens, the model's context has {context.room}; shorten it",
                "messages",
                "context_length_exceeded",
            )
        yield Started(len(prompt))
        context.append(prompt)
        for _ in context.read(keep=1):
            yield None
        yield from self._told(self._steps(context, how), how, context)

    def _steps(self, context: Context, how: How) -> Steps:
        writer = self.engine.writer(np.random.default_rng(how.seed), greedy=False, options=how.sampling)
        step = self.engine.manifest.generation.text
        return text_reply(context, writer, step if how.max_new is None else replace(step, max_new=how.max_new))

    def _told(self, steps: Steps, how: How, context: Context) -> Telling:
        """The events of an answer as its client gets them: without what stands behind a stop string."""
        stops, before = Stops(how.stop), len(context.ids)
        finish: Finish = "end"
        for event in _returning(steps):
            if isinstance(event, str):
                finish = event
            elif isinstance(event, TextDelta) and (certain := stops.push(event.text)):
                yield TextDelta(certain)
            else:
                yield None
            if stops.found:
                steps.close()
                break
        if rest := stops.flush():
            yield TextDelta(rest)
        yield Done(finish, len(context.ids) - before)

    def _prompt(self, dialogue: Dialogue) -> Prompt:
        """The whole dialogue as the model reads it, up to where its answer begins."""
        form = self.engine.format
        prompt = form.open_conversation(dialogue.system, waits=True)
        for index, turn in enumerate(dialogue.turns):
            last = index == len(dialogue.turns) - 1
            match turn:
                case Asked(parts):
                    prompt = form.user_turn(self._parts(parts), False, behind=prompt, waits=not last)
                case Answered(text):
                    prompt = form.close_assistant([Text(text)], spoken=False, behind=prompt, waits=True)
        return prompt

    def _parts(self, given: tuple[Given, ...]) -> list[Part]:
        return [self._part(one) for one in given]

    def _part(self, given: Given) -> Part:
        match given:
            case Said(text):
                return Text(text)
            case Shown(data):
                return self.engine.look_at(picture(data, self.limits))


def _returning(steps: Steps) -> Iterator[Event | Finish]:
    """The events of a written answer, and then why it ended."""
    while True:
        try:
            item = next(steps)
        except StopIteration as stop:
            yield stop.value
            return
        assert isinstance(item, Event), "a written answer has no codes"
        yield item
