"""What the engine does for clients, piece by piece, as the worker wants it, so that others get their turn."""

import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from apps.server.dialogue import Answered, Asked, Dialogue, Given, Heard, How, Said, Shown
from apps.server.failures import refused
from apps.server.kept import KeptContexts, behind
from apps.server.media import picture
from apps.server.metrics import Metrics
from apps.server.settings import Limits
from apps.server.stops import Stops
from runtime.audio import Wave
from runtime.bundle import SpeechLayout
from runtime.context import Context
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import MediaError
from runtime.events import AudioChunk, Event, Finish, StepDone, TextDelta
from runtime.prompt import Answer, Audio, Codes, Part, Prompt, Spoken, Text, split_for_speech
from runtime.reply import Steps
from runtime.speech import SpeechDecoder


@dataclass(frozen=True)
class Started:
    """The request is understood and fits: from here on an answer can be sent. Counts are positions of the context.

    `cached` were read for an earlier request. `seconds`: of audio that is to be written down.
    """

    prompt: int
    cached: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Done:
    """The end of an answer, how many positions it took, and the pieces of a spoken one, to be remembered."""

    finish: Finish
    completion: int
    aloud: tuple[Answer, ...] = ()


@dataclass(frozen=True, eq=False)
class Aloud:
    """A clause of a spoken answer is made, whose audio follows."""

    piece: Spoken


Told = Started | TextDelta | AudioChunk | Aloud | Done
Telling = Generator[Told | None, None, None]


class Answerer:
    """Makes answers of one engine; its generators run in the worker's thread alone."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.kept = KeptContexts(engine.manifest, limits.kept_bytes)
        self._encoded: WeakKeyDictionary[Given, Part] = WeakKeyDictionary()

    def answer(self, dialogue: Dialogue, how: How) -> Telling:
        """Read a dialogue and answer it. EdgeOmniError or ApiError, before Started, where it cannot be."""
        prompt = self._prompt(dialogue, how.spoken)
        conversation = Conversation(self.engine, prompt, how.seed)
        self._check_fits(prompt, conversation.context)
        choices = Choices(how.spoken, sampling=how.sampling)
        if how.spoken:
            self.engine.voice(greedy=False)  # so that who cannot have speech is told before anything is read
        context, cached = self.kept.take(prompt, lambda: conversation.context)
        conversation.context = context
        try:
            self.metrics.note_prompt(len(prompt), cached)
            yield Started(len(prompt), cached)
            yield from self._read(context, behind(prompt, cached, self.engine.manifest))
            speech = self.engine.speech(conversation.rng, choices.mode, choices.zero_noise) if how.spoken else None
            yield from told(self._steps(conversation, choices, how), context, speech, Stops(how.stop), how.max_new)
        finally:  # also of an answer that its client has left
            self.kept.keep(context)
            self.metrics.kept_bytes.set(self.kept.nbytes)

    def _steps(self, conversation: Conversation, choices: Choices, how: How) -> Steps:
        if how.spoken:
            return conversation.spoken(choices)
        step = self.engine.manifest.generation.text
        return conversation.written(step if how.max_new is None else replace(step, max_new=how.max_new), choices)

    def write_down(self, audio: bytes | Wave, how: How) -> Telling:
        """The words of an audio file or of a wave. EdgeOmniError or ApiError, before Started, where it cannot be."""
        wave = self.engine.listen(audio) if isinstance(audio, bytes) else audio
        front = self.engine.manifest.audio
        assert front is not None  # it has listened
        yield None
        prompt = self.engine.format.transcribe(self._hear(wave))
        conversation = Conversation(self.engine, prompt, how.seed)
        self._check_fits(prompt, conversation.context)
        yield Started(len(prompt), seconds=len(wave) / front.sampling_rate)
        yield from self._read(conversation.context, prompt)
        generation = self.engine.manifest.generation
        steps = conversation.written(generation.transcribe or generation.text, Choices(sampling=how.sampling))
        yield from told(steps, conversation.context, None, Stops(()), None)

    def read_aloud(self, text: str) -> Telling:
        """A text as speech. EdgeOmniError, before Started, where the bundle cannot."""
        first, *others = split_for_speech(text) or [""]
        prompt = self.engine.format.speak(first)
        conversation = Conversation(self.engine, prompt, None)
        speech = self.engine.speech(conversation.rng, "exact", zero_noise=False)
        steps = conversation.read_aloud(others, Choices(spoken=True))
        yield Started(len(prompt))
        yield from self._read(conversation.context, prompt)
        yield from told(steps, conversation.context, speech, Stops(()), None)

    def _check_fits(self, prompt: Prompt, context: Context) -> None:
        if len(prompt) >= context.room:
            raise refused(
                f"the conversation takes {len(prompt)} tokens, the model's context has {context.room}; shorten it",
                "messages",
                "context_length_exceeded",
            )

    def _read(self, context: Context, prompt: Prompt) -> Generator[None, None, None]:
        """All of it but the last position, whose hidden state the first step asks for."""
        context.append(prompt)
        pieces, before = context.read(keep=1), context.cache.length
        while True:
            start = time.perf_counter()
            if next(pieces, None) is None:
                return
            self.metrics.note_read(context.cache.length - before, time.perf_counter() - start)
            before = context.cache.length
            yield None

    def _prompt(self, dialogue: Dialogue, spoken: bool) -> Prompt:
        """The whole dialogue as the model reads it, up to where its answer begins."""
        form = self.engine.format
        prompt = form.open_conversation(dialogue.system, waits=True)
        for turn, after in zip(dialogue.turns, [*dialogue.turns[1:], None], strict=True):
            match turn:
                case Asked(parts):
                    aloud = after.aloud is not None if isinstance(after, Answered) else spoken
                    prompt = form.user_turn(self._parts(parts), aloud, behind=prompt, waits=after is not None)
                case Answered(text, aloud):
                    pieces, heard = aloud or [Text(text)], aloud is not None
                    prompt = form.close_assistant(pieces, spoken=heard, behind=prompt, waits=True)
        return prompt

    def _parts(self, given: tuple[Given, ...]) -> list[Part]:
        return [self._part(one) for one in given]

    def _part(self, given: Given) -> Part:
        """Encoded once, for as long as whoever asked keeps what was given."""
        if isinstance(given, Said):
            return Text(given.text)
        if given not in self._encoded:
            self._encoded[given] = self._encode(given)
        return self._encoded[given]

    def _encode(self, given: Shown | Heard) -> Part:
        match given:
            case Shown(data):
                return self.engine.look_at(picture(data, self.limits))
            case Heard(data):
                return self._hear(data)

    def _hear(self, audio: bytes | Wave) -> Audio:
        try:
            return self.engine.hear(audio)
        except MediaError as error:
            raise refused(str(error), "messages", "invalid_audio") from None


def told(steps: Steps, context: Context, speech: SpeechDecoder | None, stops: Stops, most: int | None) -> Telling:
    """An answer as its client gets it: without what stands behind a stop string.

    One in speech ends behind the clause with which it has `most` positions: it is heard, and remembered, in whole ones.
    """
    before, pieces = len(context.ids), Pieces()
    finish: Finish = "end"
    try:
        for event in played(steps, speech):
            match event:
                case str():
                    finish = event
                case TextDelta(text):
                    pieces.text += text
                    certain = stops.push(text)
                    yield TextDelta(certain) if certain else None
                case AudioChunk():
                    yield event
                case StepDone("audio") if speech is not None:
                    piece = pieces.end(event.codes, speech.layout)
                    yield Aloud(piece) if piece is not None else None
                    _remember_codes(context, event, speech.layout)
                    if most is not None and len(context.ids) - before >= most:
                        yield from speech.finish()
                        finish = "length"
                        break
                case _:
                    yield None
            if stops.found:
                break
    finally:
        steps.close()
    if rest := stops.flush():
        yield TextDelta(rest)
    yield Done(finish, len(context.ids) - before, pieces.answer() if speech is not None else ())


def _remember_codes(context: Context, step: StepDone, layout: SpeechLayout) -> None:
    """Let the context know what its generated positions stand for, so that it can be told from another answer's."""
    for at, codes in enumerate(step.codes, len(step.inputs)):
        if codes[0] != layout.codebook_sizes[0]:
            context.media[at] = codes


def played(steps: Steps, speech: SpeechDecoder | None) -> Generator[Event | Finish | None, None, None]:
    """The events of an answer, the audio of its codes, None after each other piece of work; then why it ended."""
    while True:
        try:
            item = next(steps)
        except StopIteration as stop:
            if speech is not None:
                yield from speech.finish()
            yield stop.value
            return
        if isinstance(item, Event):
            yield item
        elif speech is not None:
            yield from speech.work_to_end() if item is None else speech.work(item[None])
        else:
            yield None


@dataclass
class Pieces:
    """Puts together of what a spoken answer consists, so that it can stand in a history."""

    done: list[Answer] = field(default_factory=list)
    text: str = ""

    def end(self, codes: Codes, layout: SpeechLayout) -> Spoken | None:
        """Codes [frames, codebooks] of what the text so far says; the frame with the end code is none of it."""
        said = codes[codes[:, 0] != layout.codebook_sizes[0]] if len(codes) else codes
        if not len(said):
            return None
        piece = Spoken(self.text, said)
        self.done.append(piece)
        self.text = ""
        return piece

    def answer(self) -> tuple[Answer, ...]:
        return (*self.done, Text(self.text)) if self.text else tuple(self.done)
