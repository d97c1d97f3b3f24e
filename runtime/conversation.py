"""Turns with one memory: what was read stays in the cache, generated codes included; nothing is computed twice."""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.bundle import Step
from runtime.context import selected
from runtime.context_policy import Plan, Said, plan
from runtime.engine import Engine
from runtime.errors import EdgeOmniError, PromptError
from runtime.events import AudioChunk, Event, Finish, Reading, ReplyDone, StepDone, TextDelta, Timings
from runtime.generate import PIECE
from runtime.prompt import Audio, Part, Prompt, Text, Turn, continued_by, parts_of, split_for_speech
from runtime.reply import Steps, Writer, audio_step, spoken_reply, text_reply
from runtime.sampling import AS_BUNDLE, SamplingOptions
from runtime.speech import Mode, SpeechDecoder


@dataclass(frozen=True)
class Choices:
    """How one reply is made. `zero_noise` silences every random draw of the speech decoder, for comparisons.

    `greedy` takes the likeliest token and code always, whatever `sampling` says, which is of text alone.
    """

    spoken: bool = False
    greedy: bool = False
    mode: Mode = "exact"
    zero_noise: bool = False
    max_new: int | None = None  # tokens of a text answer; None: the bundle's default
    sampling: SamplingOptions = AS_BUNDLE
    stop_loops: bool = True  # end an answer that goes round in a loop


PLAIN = Choices()
ANSWER_SHARE = 0.25  # of the context: room that an answer is given at most before older turns are kept


@dataclass(frozen=True, eq=False)
class Overflow:
    """More than the context can hold: all that was said, the piece included that is pending, and what goes of it."""

    said: Prompt
    plan: Plan
    pinned: int


class Conversation:
    """One conversation with an open bundle. Not to be used from two threads at once; two conversations may be.

    What its context cannot hold any more is forgotten, oldest pictures and turns first (`context_policy.plan`).
    """

    def __init__(self, engine: Engine, opening: Prompt, seed: int | None):
        self.engine, self.rng = engine, np.random.default_rng(seed)
        self.context = engine.context()
        self.starts: list[int] = []  # where each turn begins, behind what closes the one before
        self._asked: Prompt | None = None  # the turn that is being answered, where its answer is to be rewritten
        self._read = 0  # positions of what was read before the answer
        self._opening = opening
        self._before: tuple[int, Prompt, list[int]] | None = None  # the turn that was answered last: what stood then
        self._pending: Prompt | None = opening  # what stands before the next answer and has not been read

    @classmethod
    def open(cls, engine: Engine, system: str | None = None, seed: int | None = None) -> "Conversation":
        """A new conversation. `system` None: the bundle's default prompt; "": none."""
        return cls(engine, engine.format.open_conversation(system, waits=True), seed)

    def reply(self, said: Turn, choices: Choices = PLAIN) -> Generator[Event, None, None]:
        """Answer a turn: a text, an input that the engine encoded, or several of both in their order.

        PromptError for an empty turn or one that the context cannot hold; after any error, and when it is closed while
        the turn is read, the conversation stands as before the turn.
        """
        assert self._pending is not None
        before, starts, turn, stood = self._pending, self.starts, None, None
        parts = parts_of(said)
        form, forgotten = self.engine.format, None
        try:
            turn = form.user_turn(parts, choices.spoken, behind=before)
            if found := self._overflow(turn, choices):
                before, forgotten = self._forget(found), found.plan.forgotten
                turn = form.user_turn(parts, choices.spoken, behind=self._pending)
            stood = len(self.context.ids), self._pending, self.starts
            self.starts = [*self.starts, len(self.context.ids) + self._seam(turn)]
            if form.template.forgets is not None or form.template.opens_answer:
                self._asked = form.user_turn(parts, choices.spoken, behind=self._pending, waits=True)
            self._pending = turn
            if forgotten:
                yield forgotten
            steps = self.spoken(choices) if choices.spoken else self.written(self._text_step(choices), choices)
            yield from self.run(steps, choices)
        except EdgeOmniError:
            self._pending = None
            raise
        finally:
            if self._pending is None or self._pending is turn:  # the turn was not read
                self._pending, self.starts = before, starts
            else:
                self._before = stood

    def take_back(self) -> None:
        """Forget the last turn and its answer. EdgeOmniError where that was done already, or no turn was answered."""
        if self._before is None:
            raise EdgeOmniError("there is no answer to take back; ask something first")
        (length, self._pending, self.starts), self._before = self._before, None
        self.context.truncate(length)

    def remember(self, parts: Sequence[Part], answer: str) -> None:
        """Add a turn of an earlier conversation, with its answer as text. It is read together with the next turn."""
        turn = self.engine.format.user_turn(parts, spoken=False, behind=self._pending, waits=True)
        self.starts = [*self.starts, len(self.context.ids) + self._seam(turn)]
        said = [Text(answer)] if answer else []
        self._pending = self.engine.format.close_assistant(said, spoken=False, behind=turn, waits=True)
        self._before = None

    def _text_step(self, choices: Choices) -> Step:
        text = self.engine.manifest.generation.text
        return text if choices.max_new is None else replace(text, max_new=choices.max_new)

    def _seam(self, turn: Prompt) -> int:
        """Where a turn begins in a piece of prompt that has it behind what is pending.

        That is behind the last text of what closes the turn before, unless its tokens are those of this one's text too.
        """
        assert self._pending is not None
        closed = self.engine.format.closed(self._pending).ids
        return len(closed if np.array_equal(turn.ids[: len(closed)], closed) else self._pending.ids)

    def _overflow(self, turn: Prompt, choices: Choices) -> "Overflow | None":
        """What has to be forgotten so that a turn behind what is pending, and its answer, fit; None for nothing.

        PromptError where the turn would not fit if everything else were forgotten.
        """
        assert self._pending is not None
        manifest, seam = self.engine.manifest, self._seam(turn)
        most, pinned = manifest.cache.max_positions, self.starts[0] if self.starts else seam
        new, longest = len(turn) - seam, most if choices.spoken else self._text_step(choices).max_new
        if pinned + new > most:
            raise PromptError(
                f"this turn needs {new} positions beside the {pinned} of the system prompt, the model's context has "
                f"{most}; shorten it"
            )
        reserve = new + min(longest, int(ANSWER_SHARE * most))
        if len(self.context.ids) + seam + reserve <= most:
            return None
        piece = self.engine.format.closed(self._pending) if seam > len(self._pending) else self._pending
        said = continued_by(self.context.prompt(0, len(self.context.ids)), piece)
        found = plan(Said(said.ids.tolist(), pinned, self.starts), manifest, reserve)
        return None if found is None else Overflow(said, found, pinned)

    def _forget(self, overflow: "Overflow") -> Prompt:
        """Forget what a plan says; returns what then would have to be pending for nothing to be forgotten."""
        said, found = overflow.said, overflow.plan
        keep = np.zeros(len(said), np.bool_)
        for start, end in found.kept:
            keep[start:end] = True
        whole = found.positions == overflow.pinned  # but for the system prompt, whose last text meets the turn anew
        same = 0 if whole else min(int(np.argmin(np.append(keep, False))), len(self.context.ids))
        rest = np.arange(len(said)) >= same
        self.context.truncate(same)
        self.starts = found.moved(self.starts)
        manifest = self.engine.manifest
        self._pending = self._opening if whole else selected(said, keep & rest, manifest)
        return selected(said, rest, manifest)

    def run(self, steps: Steps, choices: Choices) -> Iterator[Event]:
        """Read what is pending, then pass on the events of `steps`, each segment's codes turned into audio."""
        mark, tally, is_read = len(self.context.ids), Tally(), False
        try:
            yield from self._read_pending(tally)
            is_read = True
            speech = self.engine.speech(self.rng, choices.mode, choices.zero_noise) if choices.spoken else None
            finish = yield from with_audio(steps, speech, tally)
            yield ReplyDone("".join(tally.text), finish, tally.total())
        except EdgeOmniError:
            self.context.truncate(mark)
            raise
        finally:
            steps.close()
            if not is_read:
                self.context.truncate(mark)
            elif len(self.context.ids) > mark:
                self._pending = self._closing(choices.spoken) if self._asked is None else self._rewritten(mark)

    def written(self, step: Step, choices: Choices) -> Steps:
        """The steps of an answer in text."""
        return text_reply(self.context, self._writer(choices), step)

    def spoken(self, choices: Choices) -> Steps:
        """The steps of a spoken answer."""
        voice = self.engine.voice(choices.greedy)
        return spoken_reply(self.context, self._writer(choices), voice, self.engine.compat)

    def _writer(self, choices: Choices) -> Writer:
        writer = self.engine.writer(self.rng, choices.greedy, choices.sampling)
        return replace(writer, stop_loops=choices.stop_loops)

    def read_aloud(self, others: Sequence[str], choices: Choices) -> Steps:
        """The steps of reading a text whose first piece is pending and whose other pieces follow it."""
        voice, limit = self.engine.voice(choices.greedy), self.engine.manifest.generation.audio
        assert limit is not None
        for piece in [None, *others]:
            if piece is not None:
                self.context.drop_last()  # the frame with the end code; the next piece begins with audiogen_end
                self.context.append(self.engine.format.speak(piece, within_audio=True))
            yield from audio_step(self.context, voice, self.rng, limit.max_new)
            yield None
        return "end"

    def _read_pending(self, tally: "Tally") -> Iterator[Reading]:
        """Read all but the last pending position, whose hidden state the first step asks for."""
        if self._pending is not None:
            self.context.append(self._pending)
            self._read = len(self._pending)
        self._pending = None
        positions = len(self.context.tail)
        if positions > PIECE:
            yield Reading(0, positions)
        for _ in self.context.read(keep=1):
            if len(self.context.tail) > 1:
                yield Reading(positions - len(self.context.tail), positions)
        tally.prefilled(positions)

    def _rewritten(self, mark: int) -> Prompt:
        """The turn and its answer as the template writes them into a history, where that is otherwise than they were
        read and generated: an answer's reasoning is forgotten. All behind `mark` is read once more.
        """
        assert self._asked is not None
        said = Text(self.engine.tokenizer.decode(self.context.ids[mark + self._read :]))
        self.context.truncate(mark)
        return self.engine.format.close_assistant([said], spoken=False, behind=self._asked, waits=True)

    def _closing(self, spoken: bool) -> Prompt:
        """What ends the answer, complete or interrupted, before the next turn."""
        tokens, last = self.engine.manifest.tokens, len(self.context.ids) - 1
        if self.context.ids[last] == tokens.audio_pad and last not in self.context.media:
            self.context.truncate(last)  # the frame of an end code, which stands for nothing
        within = self.context.ids[-1] in (tokens.audio_pad, tokens.audiogen_start)
        return self.engine.format.close_assistant(spoken=spoken, within_audio=within, waits=True)


class Tally:
    """Collects the text and the timings of one reply as its events pass."""

    def __init__(self) -> None:
        self.start = self.step_start = time.perf_counter()
        self.timings = Timings()
        self.text: list[str] = []

    def now(self) -> float:
        return time.perf_counter() - self.start

    def prefilled(self, positions: int) -> None:
        self.timings = replace(self.timings, prompt_positions=positions, prefill=self.now())
        self.step_start = time.perf_counter()

    def noted(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events, counted before they are passed on."""
        for event in events:
            self._note(event)
            yield event

    def _note(self, event: Event) -> None:
        had, now = self.timings, self.now()
        match event:
            case TextDelta(text):
                self.text.append(text)
                self.timings = replace(had, first_token=now if had.first_token is None else had.first_token)
            case AudioChunk(samples, rate):
                first = now if had.first_audio is None else had.first_audio
                self.timings = replace(had, first_audio=first, samples=had.samples + len(samples), sampling_rate=rate)
            case StepDone("text", inputs, ids):
                seconds = had.text_seconds + time.perf_counter() - self.step_start
                self.timings = replace(had, text_seconds=seconds, text_tokens=had.text_tokens + len(ids) - len(inputs))
            case StepDone("audio", codes=codes):
                self.timings = replace(had, audio_frames=had.audio_frames + len(codes))
        if isinstance(event, StepDone):
            self.step_start = time.perf_counter()

    def total(self) -> Timings:
        return replace(self.timings, total=self.now())


def transcribe(engine: Engine, audio: Audio) -> Iterator[Event]:
    """The words of an audio as text (checkpoints with a transcription prompt, that is -Base)."""
    conversation, greedy = Conversation(engine, engine.format.transcribe(audio), seed=None), Choices(greedy=True)
    step = engine.manifest.generation.transcribe or engine.manifest.generation.text
    yield from conversation.run(conversation.written(step, greedy), greedy)


def read_aloud(engine: Engine, text: str, choices: Choices, seed: int | None = None) -> Iterator[Event]:
    """A text as speech, piece by piece (checkpoints with a reading prompt, that is -Base)."""
    first, *others = split_for_speech(text) or [""]
    conversation = Conversation(engine, engine.format.speak(first), seed)
    yield from conversation.run(conversation.read_aloud(others, choices), replace(choices, spoken=True))


def with_audio(steps: Steps, speech: SpeechDecoder | None, tally: Tally) -> Generator[Event, None, Finish]:
    """The events of a reply, and the audio of its codes as soon as it is certain; returns why the reply ended."""
    while True:
        try:
            item = next(steps)
        except StopIteration as stop:
            if speech is not None:
                yield from tally.noted(speech.finish())
            return stop.value
        if isinstance(item, Event):
            yield from tally.noted([item])
        elif speech is not None:
            yield from tally.noted(speech.end_segment() if item is None else speech.push(item[None]))
