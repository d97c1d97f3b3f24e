"""A bundle opened to be measured: it answers within limits, and follows the answer of another word by word."""

import copy
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.answer import SILENCE, Answer, Followed, Taken, taken
from quant.limits import Limits
from quant.media import source
from quant.taps import exposed, load
from quant.turn import Turn, shown_in
from runtime.bundle import Step
from runtime.context import Context
from runtime.conversation import Tally, with_audio
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.events import AudioChunk, Event, Finish, StepDone
from runtime.prompt import Prompt, Text
from runtime.reply import Steps, spoken_reply, text_reply
from runtime.session import InMemory, Options, Session
from runtime.speech import SpeechDecoder

Feeds = dict[str, np.ndarray]
KEPT = 3  # runs of each graph whose inputs are kept
HEAD = "audio_head"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options


class Watched(Session):
    """A session that keeps what its first runs were given."""

    def __init__(self, *source: Any):
        super().__init__(*source)
        self.kept: list[Feeds] = []

    def run(self, **feeds: np.ndarray) -> Feeds:
        if len(self.kept) < KEPT:
            self.kept.append({name: np.array(array) for name, array in feeds.items()})
        return super().run(**feeds)


class WatchedInMemory(Watched, InMemory):
    """The same of a graph that was changed."""


class Observed(Engine):
    """An engine whose sessions are watched, whose audio head shows its logits, and whose graphs can be swapped."""

    def __init__(self, folder: Path, options: Options | None = None, limits: Limits | None = None):
        super().__init__(folder, options)
        self.limits, self.whole = limits or Limits(), self.manifest
        self.manifest = self.limits.of(self.whole)
        self.swapped: dict[str, Observed] = {}
        self.used: set[str] = set()  # graphs that were asked for since `forget`
        self._warm: set[tuple[bool, ...]] = set()  # kinds of turns that were answered before

    def with_graphs(self, other: "Observed", names: Iterable[str]) -> "Observed":
        """The same engine with some graphs of another bundle in the place of its own; sessions are shared."""
        made = copy.copy(self)
        made.swapped = dict.fromkeys(names, other)
        return made

    def session(self, name: str) -> Session:
        if name in self.swapped:
            return self.swapped[name].session(name)
        self.used.add(name)
        if name in self.manifest.graphs and name not in self._sessions:
            self._sessions[name] = self._tapped() if name == HEAD else self._watched(name)
        return super().session(name)

    def forget(self) -> None:
        """Let `used` and `kept` tell of what runs from now on."""
        self.used.clear()
        for session in self._sessions.values():
            if isinstance(session, Watched):
                session.kept.clear()

    def kept(self) -> dict[str, list[Feeds]]:
        """What the first runs since `forget` were given, by graph; the decoder's, which are bound, left out."""
        watched = {name: session for name, session in self._sessions.items() if isinstance(session, Watched)}
        return {name: list(session.kept) for name, session in watched.items() if session.kept and name != "decoder"}

    def _watched(self, name: str) -> Session:
        return Watched(self.folder, self.manifest.graphs[name], self.options)

    def _tapped(self) -> Session:
        graph = self.manifest.graphs[HEAD]
        return WatchedInMemory(*exposed(load(self.folder, graph), graph, self.code_taps), self.options)

    @property
    def code_taps(self) -> list[str]:
        """The values in the audio head that are each codebook's logits, as its author named them."""
        assert self.manifest.speech is not None
        return [f"{HEAD}.heads.{depth}.out" for depth in range(len(self.manifest.speech.codebook_sizes))]

    @property
    def choices_of_code(self) -> tuple[int, ...]:
        """Codes to choose from in each codebook: the first has the end of audio as well."""
        assert self.manifest.speech is not None
        first, *others = self.manifest.speech.codebook_sizes
        return (first + 1, *others)

    def prompt(self, turn: Turn) -> Prompt:
        """A new conversation's first turn, its media read by this engine's own encoders."""
        media = [] if turn.audio is None else [self.hear(turn.audio)]
        if turn.transcribe:
            return self.format.transcribe(*media)
        seen = [self.look(source(image)) for image in turn.images]
        if turn.cuts:
            pieces = shown_in(turn.text, turn.cuts)
            said = [seen[piece] if isinstance(piece, int) else Text(piece) for piece in pieces]
        else:
            said = [*seen, *([Text(turn.text)] if turn.text.strip() else [])]
        opening = self.format.open_conversation(None, waits=True)
        return self.format.user_turn([*media, *said], turn.spoken, behind=opening)

    def ask(self, turn: Turn) -> tuple[Prompt, Answer]:
        """A turn as a prompt, and the answer, whose times count from before its media were encoded.

        The first turn of each kind is asked twice: to open graphs and to touch memory for the first time is no part of
        what an answer takes.
        """
        kind = (turn.spoken, turn.audio is not None, bool(turn.images))
        if kind not in self._warm:
            self._warm.add(kind)
            self.reply(self.prompt(turn), turn)
            self.forget()
        tally = Tally()
        prompt = self.prompt(turn)
        return prompt, self.reply(prompt, turn, tally)

    def reply(self, prompt: Prompt, turn: Turn, tally: Tally | None = None) -> Answer:
        """Answer a turn as its metric asks: with the letter of an option, or in words or speech of its own."""
        if turn.metric == "letter":
            return self.choose(prompt, len(turn.choices))
        return self.answer(prompt, turn.spoken, self._step(turn), tally)

    def _step(self, turn: Turn) -> Step:
        """How an answer in text is made; a suite's may be longer than the limits."""
        made = self.whole.generation
        step = made.transcribe if turn.transcribe and made.transcribe else made.text
        return replace(step, max_new=min(step.max_new, max(turn.max_new, self.limits.max_new)))

    def choose(self, prompt: Prompt, options: int) -> Answer:
        """Answer with the letter that is the likeliest first token among those of so many options."""
        context = self.context()
        context.append(prompt)
        logits = self.session("lm_head").run(hidden=context.hidden())["logits"][0].astype(np.float64)
        ids = [self.letter_ids(letter) for letter in LETTERS[:options]]
        scores = np.array([np.logaddexp.reduce(logits[forms]) for forms in ids])
        failure = "" if np.isfinite(scores).all() else "the scores of the letters are not finite"
        forms = ids[int(scores.argmax())]
        token = forms[int(logits[forms].argmax())]
        step = Taken("text", prompt.ids, np.array([token], np.int64))
        letters = tuple(np.exp(scores - np.logaddexp.reduce(scores)).tolist())
        return Answer(self.tokenizer.decode([token]).strip(), (step,), SILENCE, failure, letters=letters)

    def letter_ids(self, letter: str) -> list[int]:
        """The tokens that are a letter alone, with and without a space before it; EdgeOmniError where none is."""
        found = [self.tokenizer.encode(text, special=False).tolist() for text in (letter, f" {letter}")]
        single = list(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))
        if not single:
            raise EdgeOmniError(
                f"the tokenizer of {self.folder} has no token for the letter {letter} alone, so that the likelihood of "
                "options cannot be compared; leave suites out that are judged by it"
            )
        return single

    def answer(self, prompt: Prompt, spoken: bool, step: Step | None = None, tally: Tally | None = None) -> Answer:
        """Answer by itself, always the likeliest token and code, within the limits or those of a text step.

        `tally` has counted the time since the question; without one it starts here.
        """
        tally, steps, chunks = tally or Tally(), [], [SILENCE]
        try:
            speech = self._sounding() if spoken else None
            made = self._generate(prompt, spoken, step or self.manifest.generation.text, tally)
            finish = self._gather(with_audio(made, speech, tally), steps, chunks, spoken)
            if finish is None and speech is not None:
                rest = tally.noted(event for part in (speech.end_segment, speech.finish) for event in part())
                chunks += [event.samples for event in rest if isinstance(event, AudioChunk)]
        except EdgeOmniError as error:
            return Answer("".join(tally.text), tuple(steps), SILENCE, str(error))
        cut = any(map(self._cut, steps))
        # An answer that the model refuses, since nobody spoke to it, is complete.
        ending = "limit" if cut or finish in (None, "length") else "context" if finish == "context" else "end"
        return Answer("".join(tally.text), tuple(steps), np.concatenate(chunks), "", ending, cut, tally.total())

    def _generate(self, prompt: Prompt, spoken: bool, step: Step, tally: Tally) -> Steps:
        context, writer = self.context(), self.writer(np.random.default_rng(self.limits.seed), greedy=True)
        context.append(prompt)
        for _ in context.read(keep=1):
            pass
        tally.prefilled(len(prompt))
        if spoken:
            return spoken_reply(context, writer, self.voice(greedy=True), self.compat)
        return text_reply(context, writer, step)

    def _gather(
        self, events: Generator[Event, None, Finish], steps: list[Taken], chunks: list[np.ndarray], spoken: bool
    ) -> Finish | None:
        """Collect what is made until it ends or, in speech, is enough; returns why it ended, None for enough."""
        while True:
            try:
                event = next(events)
            except StopIteration as stop:
                return stop.value
            if isinstance(event, AudioChunk):
                chunks.append(event.samples)
            elif isinstance(event, StepDone) and len(done := taken(event)):
                steps.append(done)
                if spoken and self._enough(steps):
                    return None

    def _cut(self, step: Taken) -> bool:
        """Whether a piece of speech ended without its end code."""
        return step.kind == "audio" and int(step.chosen[-1, 0]) != self.choices_of_code[0] - 1

    def _enough(self, steps: Sequence[Taken]) -> bool:
        """Whether a spoken answer is as long as it may get; a piece of text is followed by its audio first."""
        if steps[-1].kind == "text" or self._said_all(steps):
            return False
        made = {kind: sum(len(step.chosen) for step in steps if step.kind == kind) for kind in ("text", "audio")}
        return made["audio"] >= self.limits.max_frames or made["text"] >= self.limits.max_new

    def _said_all(self, steps: Sequence[Taken]) -> bool:
        """Whether the last piece of text has the token that ends an answer."""
        last = next((step for step in reversed(steps) if step.kind == "text"), None)
        return last is not None and int(last.chosen[-1]) in self.manifest.tokens.eos

    def follow(self, prompt: Prompt, steps: Sequence[Taken]) -> Followed:
        """Read the prompt and then another's answer in place of its own, and say what each choice looked like.

        EdgeOmniError if the prompt is not the one that the answer was given to.
        """
        if steps and not np.array_equal(steps[0].inputs[: len(prompt)], prompt.ids):
            raise EdgeOmniError(
                "the two bundles spell the same turn differently (another template, tokenizer or front end), so their "
                "choices cannot be compared position by position; compare bundles of one checkpoint"
            )
        context, seconds, start = self.context(), [], time.perf_counter()
        context.append(prompt)
        for _ in context.read(keep=1):
            pass
        prefill, logits = time.perf_counter() - start, []
        for step in steps:
            rewind(context, step.inputs)
            read = self._text(context, step, seconds) if step.kind == "text" else self._audio(context, step)
            logits.append(read)
        return Followed(tuple(logits), len(prompt), prefill, tuple(seconds))

    def _text(self, context: Context, step: Taken, seconds: list[float]) -> tuple[NDArray[np.float32], ...]:
        head, rows = self.session("lm_head"), []
        for token in step.chosen:
            start = time.perf_counter()
            rows.append(head.run(hidden=context.hidden())["logits"][0].astype(np.float32))
            context.push(int(token))
            seconds.append(time.perf_counter() - start)
        return (np.array(rows, np.float32).reshape(len(rows), -1),)

    def _audio(self, context: Context, step: Taken) -> tuple[NDArray[np.float32], ...]:
        sizes, pad = self.choices_of_code, self.manifest.tokens.audio_pad
        assert pad is not None
        frames: list[list[np.ndarray]] = []
        for codes in step.chosen:
            out = self.session(HEAD).run(hidden=context.hidden(), **forced(codes, sum(sizes)))
            context.push(pad, out["row"][0])
            frames.append([out[tap].ravel()[:size] for tap, size in zip(self.code_taps, sizes, strict=True)])
        return tuple(np.array(depth, np.float32) for depth in zip(*frames, strict=True))

    def sound(self, steps: Sequence[Taken]) -> NDArray[np.float32]:
        """The waveform [n] of an answer's codes, with the seed's noise."""
        decoder = self._sounding()
        chunks: list[AudioChunk] = []
        for step in steps:
            if step.kind == "audio":
                chunks += [*decoder.push(step.chosen), *decoder.end_segment()]
        chunks += decoder.finish()
        return np.concatenate([SILENCE, *(chunk.samples for chunk in chunks)])

    def _sounding(self) -> SpeechDecoder:
        return self.speech(np.random.default_rng(self.limits.seed), "exact", zero_noise=False)


def rewind(context: Context, ids: NDArray[np.int64]) -> None:
    """Let the context hold exactly `ids`: what differs at its end is forgotten, and what lacks are plain tokens."""
    had = np.array(context.ids[: len(ids)], np.int64)
    differ = np.flatnonzero(had != ids[: len(had)])
    context.truncate(int(differ[0]) if len(differ) else len(had))
    for token in ids[len(context.ids) :]:
        context.push(int(token))


def forced(codes: NDArray[np.int64], scores: int) -> Feeds:
    """Inputs of the audio head, but for the hidden state, that make it take `codes` [codebooks]."""
    return {
        "forced": codes,
        "noise": np.zeros(scores, np.float32),
        "seen": np.zeros(scores, np.bool_),
        "temperature": np.array(1.0, np.float32),
        "top_k": np.array(1, np.int64),
        "top_p": np.array(1.0, np.float32),
        "repetition_penalty": np.array(1.0, np.float32),
    }
