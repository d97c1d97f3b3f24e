"""The generation loops: a text answer, and the interleaved text and audio of a spoken answer."""

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Manifest, Sampling, Step
from runtime.context import Context
from runtime.errors import EdgeOmniError
from runtime.events import Event, Finish, StepDone, TextDelta
from runtime.repetition import ENDLESS, loops
from runtime.sampling import AS_BUNDLE, NOTHING, SamplingOptions, banned_in_text, gumbel, sample
from runtime.session import Session
from runtime.tokenizer import Tokenizer

Compat = Literal["right", "official"]
MAX_SEGMENTS = 100  # of one spoken answer
NO_CODES = np.empty((0, 0), np.int64)


class Voice:
    """The graph that chooses the codes of one audio frame, and which codes the segment has used so far."""

    def __init__(self, session: Session, sizes: tuple[int, ...], sampling: Sampling):
        self.session, self.sampling = session, sampling
        self.end_code = sizes[0] - 1  # `sizes` are those of the score vectors: the first counts the end code
        self.seen = np.zeros(sum(sizes), np.bool_)
        self._settings = {
            "temperature": np.array(sampling.temperature, np.float32),
            "top_k": np.array(sampling.top_k, np.int64),
            "top_p": np.array(sampling.top_p, np.float32),
            "repetition_penalty": np.array(sampling.repetition_penalty, np.float32),
            "forced": np.full(len(sizes), -1, np.int64),
        }

    def frame(self, hidden: NDArray[np.floating], rng: np.random.Generator) -> tuple[NDArray[np.int64], np.ndarray]:
        """hidden [1, hidden] -> codes [codebooks] of the next frame, and its row [hidden] for the decoder."""
        if not np.isfinite(hidden).all():
            raise EdgeOmniError("cannot choose codes: the decoder's hidden state is not finite; try a higher precision")
        noise = gumbel(rng, len(self.seen), self.sampling.greedy)
        out = self.session.run(hidden=hidden, noise=noise, seen=self.seen, **self._settings)
        self.seen = out["seen_next"]
        return out["codes"], out["row"][0]

    def forget(self) -> None:
        """Begin a segment: the repetition penalty counts the codes of one segment only."""
        self.seen = np.zeros_like(self.seen)


@dataclass
class Writer:
    """Chooses the text tokens of one reply. `stop_loops`: end it when it goes round in a loop, over all its pieces."""

    manifest: Manifest
    tokenizer: Tokenizer
    lm_head: Session
    rng: np.random.Generator
    greedy: bool
    options: SamplingOptions = AS_BUNDLE
    stop_loops: bool = False
    said: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.banned = banned_in_text(self.manifest.tokens, self.manifest.known_tokens, self.manifest.vocab_size)

    def step(self, context: Context, step: Step) -> Generator[Event, None, Finish]:
        """Generate until an end token, a stop string or the step's limit; yields the text as it becomes certain.

        The token that ends the step is in the context like any other.
        """
        inputs = tuple(context.ids)
        stream = self.tokenizer.stream()
        sampling = self.options.of(step.sampling)
        sampling = replace(sampling, greedy=True) if self.greedy else sampling
        finish: Finish = "length"
        for _ in range(step.max_new):
            if context.room < 1:
                finish = "context"
                break
            logits = self.lm_head.run(hidden=context.hidden())["logits"][0]
            seen = np.array(context.ids) if sampling.repetition_penalty != 1.0 else NOTHING
            token = sample(logits, seen, sampling, self.rng, self.banned)
            context.push(token)
            if token == self.manifest.tokens.not_addressed:
                finish = "unaddressed"
                break
            if text := stream.push(token):
                yield TextDelta(text)
            if token in self.manifest.tokens.eos or self._stops(context.ids, step.stop):
                finish = "end"
                break
            self.said.append(token)
            if self.stop_loops and loops(self.said, ENDLESS):
                finish = "repeats"
                break
        if text := stream.flush():
            yield TextDelta(text)
        yield StepDone("text", inputs, tuple(context.ids), NO_CODES)
        return finish

    def _stops(self, ids: list[int], stop: tuple[str, ...]) -> bool:
        """Whether the text ends in a stop string that overlaps the last token (transformers' StopStringCriteria)."""
        if not stop:
            return False
        last = self.tokenizer.bytes_of(ids[-1], skip_special=False)
        before = b"".join(self.tokenizer.bytes_of(i, skip_special=False) for i in ids[-16:-1])
        return any(_found(mark.encode(), before, last) for mark in stop)


def _found(mark: bytes, before: bytes, last: bytes) -> bool:
    return mark in before[len(before) - len(mark) + 1 :] + last if len(mark) > 1 else mark in last


# Events, the codes [codebooks] of an audio frame, and None where an audio segment ends; it returns why it ended.
Item = Event | NDArray[np.int64] | None
Steps = Generator[Item, None, Finish]


def text_reply(context: Context, writer: Writer, step: Step) -> Steps:
    """An answer in text alone. The end token does not stay in the context: the prompt template closes the turn."""
    finish = yield from writer.step(context, step)
    if finish == "unaddressed" or context.ids[-1] in writer.manifest.tokens.eos:
        context.drop_last()
    return finish


def spoken_reply(context: Context, writer: Writer, voice: Voice, compat: Compat) -> Steps:
    """Pieces of text, each followed by its audio: the loop of the official demo (web_demo, `generate`).

    Where the official loop loses context it is repaired: there the last token of a piece of text (a punctuation mark,
    or the one that reached the limit) and the last frame of a segment that reached its limit are overwritten by the
    tokens that begin and end audio. `compat="official"` overwrites them too.
    """
    generation, tokens = writer.manifest.generation, writer.manifest.tokens
    assert generation.first_text and generation.later_text and generation.audio
    assert tokens.audiogen_start is not None and tokens.audiogen_end is not None
    for index in range(MAX_SEGMENTS):
        before = len(context.ids)
        finish = yield from writer.step(context, generation.later_text if index else generation.first_text)
        ended = context.ids[-1] in tokens.eos
        if finish == "unaddressed" or (ended and len(context.ids) == before + 1):
            context.drop_last()
            return finish
        if finish == "repeats":
            return finish
        if finish == "context" or context.room < 2:
            return "context"
        _begin_audio(context, tokens.audiogen_start, ended or compat == "official")
        complete = yield from audio_step(context, voice, writer.rng, generation.audio.max_new)
        if complete or compat == "official":
            context.replace_last(tokens.audiogen_end)
        elif context.room:
            context.push(tokens.audiogen_end)
        yield None
        if ended:
            return "end"
        if not context.room:
            return "context"
    return "length"


def _begin_audio(context: Context, audiogen_start: int, overwrite: bool) -> None:
    if overwrite:
        context.replace_last(audiogen_start)
    elif context.ids[-1] != audiogen_start:
        context.push(audiogen_start)


def audio_step(
    context: Context, voice: Voice, rng: np.random.Generator, max_frames: int
) -> Generator[Item, None, bool]:
    """Frames until the end code or the limit; yields the codes of each. Returns whether the end code came.

    The position of the frame with the end code stays in the context as a placeholder, to be replaced by the caller.
    """
    inputs, frames = tuple(context.ids), []
    audio_pad = context.manifest.tokens.audio_pad
    assert audio_pad is not None
    voice.forget()
    complete = False
    while not complete and len(frames) < max_frames and context.room > 1:
        codes, row = voice.frame(context.hidden(), rng)
        context.push(audio_pad, row)
        frames.append(codes)
        complete = int(codes[0]) == voice.end_code
        if not complete:
            context.media[len(context.ids) - 1] = codes
            yield codes
    yield StepDone("audio", inputs, tuple(context.ids), np.array(frames))
    return complete
