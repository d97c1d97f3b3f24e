"""A model that listens while it speaks: two contexts, SPEAK and LISTEN, on one set of weights."""

import secrets
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image as Picture

from runtime.bundle import Step
from runtime.context_policy import Plan, Said, plan
from runtime.engine import Engine
from runtime.errors import MediaError, PromptError
from runtime.events import Event, Finish, TextDelta
from runtime.image import Rgb, check_size, read_image
from runtime.live.branch import Branch
from runtime.live.events import Verdict
from runtime.live.pace import Pace
from runtime.prompt import Audio, Codes, Image
from runtime.reply import Item, Steps, spoken_reply, text_reply
from runtime.shown import shown
from runtime.speech import Mode, SpeechDecoder

Wave = NDArray[np.float32]
Frame = bytes | Picture | Rgb
Work = Generator[None, None, None]
Answer = Generator[Event | None, None, Finish]

FIRST_CODES = 8  # of the piece of speech that a person waits for; 7 give less sound than the next piece takes to make
FRAMES_KEPT = 8  # encoded pictures that are kept for a turn that is begun once more


class Branches:
    """`runtime.live.model.Model` over an open bundle.

    One graph's run is the smallest piece of work: an audio segment's encoder, a picture's, a piece of a prompt (see
    `Pace`), one step of an answer, one Euler step of its speech or the vocoder's run over half of a chunk.
    """

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        seed: int | None = None,
        greedy: bool = False,
        mode: Mode = "prefix",
        first_codes: int | None = FIRST_CODES,
        remember: int | None = None,
    ):
        """`remember`: whole turns that stay, for models that were trained on short conversations; None: all that fit.
        Turns beyond it are forgotten by `compact`."""
        self.engine, self.greedy = engine, greedy
        self.mode: Mode = mode
        self.first_codes = first_codes if mode == "prefix" else None
        self.speaks = engine.manifest.speech is not None and engine.manifest.template.spoken_assistant is not None
        self.rate = engine.manifest.speech.sampling_rate if engine.manifest.speech else 24_000
        self.remember = remember
        self.pace = Pace()
        self.speak, self.listen = (Branch(engine, engine.context()) for _ in range(2))
        self._seed = secrets.randbits(64) if seed is None else seed
        self._accepted = 0  # turns; the answer to each has random draws of its own
        self._seen: list[tuple[Frame, Image]] = []
        self._heard: tuple[Wave, Codes] | None = None
        self.speak.append(engine.format.open_conversation(system))
        self.pinned = len(self.speak)
        for _ in self.pace.read(self.speak.context):
            pass
        self.listen.take_over(self.speak, self.pinned)

    @property
    def synced(self) -> int:
        """Rows that are known to be equal in both caches."""
        return min(self.speak.shared, self.listen.shared)

    def check(self) -> None:
        """Assert that these rows and positions are equal, and that each context knows what it has read."""
        speak, listen, end = self.speak.context, self.listen.context, self.synced
        assert speak.cache.equals(listen.cache, end), f"the caches differ before position {end}"
        assert speak.ids[:end] == listen.ids[:end], f"the branches differ before position {end}"
        assert all(len(c.ids) == c.cache.length + len(c.tail) for c in (speak, listen)), "rows were lost"

    def lengths(self) -> tuple[int, int]:
        return len(self.speak), len(self.listen)

    def fork(self, heard_ms: float | None) -> None:
        """LISTEN becomes SPEAK up to what was heard of the answer in progress, closed, and a user turn is opened.

        Where nothing of it was heard it is as if nobody had begun it: the new user turn follows the one before.
        """
        forgets = self.remember == 0 and heard_ms != 0  # an answer that was interrupted is a turn before this one, too
        self.listen.take_over(self.speak, self.pinned if forgets else self.speak.boundary(heard_ms))
        self.listen.open_user()

    def accept(self) -> None:
        """LISTEN becomes SPEAK. What still ran on SPEAK is stale."""
        self.speak, self.listen = self.listen, self.speak
        self.speak.is_open = self.listen.is_open = False
        self.listen.epoch += 1
        self._accepted += 1

    def reject(self) -> None:
        """Forget what LISTEN has of its own."""
        self.listen.cut(self.synced)
        self.listen.is_open = False

    def unhear(self) -> None:
        """LISTEN as it was before `hear(last=True)` or `read`; pictures and earlier segments stay."""
        if self.listen.is_open and self.listen.answer is not None:
            self.listen.cut(self.listen.kept)

    def commit(self, heard_ms: float | None) -> None:
        """The answer on SPEAK is over, cut at what was heard of it; None: all of it was."""
        end = self.speak.boundary(heard_ms)
        if end < len(self.speak):
            self.speak.cut(end)
        self.speak.close()

    def heard_text(self, heard_ms: float) -> str:
        """The text of the answer on SPEAK up to what was heard of it; of a written one all that there is."""
        return self.speak.log.heard_text(heard_ms) if self.speak.spoken else self.speak.log.text

    def reset(self) -> None:
        """A new conversation with the same system prompt."""
        for branch in (self.speak, self.listen):
            branch.cut(self.pinned)
            branch.is_open = branch.within_audio = False
        self._seen.clear()
        self._heard = None

    def see(self, frame: Frame) -> Work:
        """Encode one frame and read it. PromptError once the turn has audio, before which all its pictures stand."""
        branch = self._open()
        if branch.within_audio or branch.answer is not None:
            raise PromptError(
                "a picture came after the audio of its turn, expected before it; show it in the next turn"
            )
        image = yield from self._look(frame)
        with branch.undone():
            branch.append(self.engine.format.show(image))
            yield from self.pace.read(branch.context)
        branch.kept = len(branch)

    def hear(self, wave: Wave, last: bool) -> Generator[None, None, int]:
        """Read a wave [n] at the bundle's rate. All segments of a turn lie between one pair of tags; `last` closes it.

        Returns the positions that were read. MediaError for a wave too short for a code, unless it ends longer audio.
        """
        branch = self._open()
        self.unhear()
        codes = yield from self._encode(wave, may_be_short=last and branch.within_audio)
        before = len(branch)
        with branch.undone():
            branch.hear(codes, last)
            if last:
                branch.ask(self.speaks)
            yield from self.pace.read(branch.context)
        if not last:
            branch.kept, branch.within_audio = len(branch), True
        return len(branch) - before

    def read(self, text: str) -> Work:
        """A typed turn, behind the pictures that were shown in it. PromptError for a blank text."""
        if not text.strip():
            raise PromptError("the turn is empty: type a text")
        branch = self._open()
        self.unhear()
        with branch.undone():
            branch.ask(self.speaks, text)
            yield from self.pace.read(branch.context)

    def judge(self, speaking: bool) -> Generator[None, None, tuple[Verdict, float]]:
        """Whether the turn on LISTEN is meant for us, and the probability of that verdict.

        A family whose answers begin with a token of their own where they should not be given (`not_addressed`) is asked
        for its probability; the manifest's `gate` says where the line is. Any other is not asked: the verdict is QUERY
        with 1. Two logits behind an instruction could be compared, but no manifest declares an instruction whose
        answers were calibrated.
        """
        token = self.engine.manifest.tokens.not_addressed
        if token is None:
            return "QUERY", 1.0
        logits = self.engine.session("lm_head").run(hidden=self.listen.context.hidden())["logits"][0]
        yield
        meant = 1.0 - _probability(logits, token)
        gate = self.engine.manifest.gate
        least = gate.over_answer if speaking else gate.in_silence
        return ("QUERY", meant) if meant >= least else ("NOISE", 1.0 - meant)

    def reply(self, spoken: bool) -> Answer:
        """Answer the turn on LISTEN, or on SPEAK once it was accepted; goes on undisturbed when the branches swap.

        The same turn has the same random draws each time it is answered. Where its branch is cut meanwhile it ends.
        """
        branch = self.listen if self.listen.is_open else self.speak
        if branch.answer is None:
            raise PromptError("there is no turn to answer; hear or read one first")
        return self._answer_on(branch, spoken)

    def _answer_on(self, branch: Branch, spoken: bool) -> Answer:
        if branch.answer is None:  # it was cut before the answer was begun
            return "length"
        if len(branch) > branch.answer or branch.spoken != spoken:
            branch.ask_again(spoken)
        return (yield from self._answer(branch))

    def reply_in_text(self) -> Answer:
        """Answer the turn on SPEAK anew, in text, whatever of its answer is there already."""
        if self.speak.user_end is None:
            raise PromptError("there is no turn to answer; hear or read one first")
        self.speak.ask_again(spoken=False)
        return (yield from self._answer(self.speak))

    def _answer(self, branch: Branch) -> Answer:
        yield from self.pace.read(branch.context)
        rng = np.random.default_rng([self._seed, self._accepted + (branch is self.listen)])
        writer, generation = self.engine.writer(rng, self.greedy), self.engine.manifest.generation
        if not branch.spoken:
            return (yield from self._run(branch, text_reply(branch.context, writer, generation.text), None))
        speech = self.engine.speech(rng, self.mode, zero_noise=False, first_codes=self.first_codes)
        steps = spoken_reply(branch.context, writer, self.engine.voice(self.greedy), self.engine.compat)
        return (yield from self._run(branch, steps, speech))

    def _run(self, branch: Branch, steps: Steps, speech: SpeechDecoder | None) -> Answer:
        epoch = branch.epoch
        try:
            while branch.epoch == epoch:
                try:
                    item = next(steps)
                except StopIteration as stop:
                    if speech is not None:
                        yield from speech.finish()
                    return stop.value
                yield from self._pass_on(branch, item, speech)
            return "length"
        finally:
            steps.close()

    def _pass_on(self, branch: Branch, item: Item, speech: SpeechDecoder | None) -> Generator[Event | None, None, None]:
        """Log an item of an answer, pass on its events, and turn its codes into audio."""
        if isinstance(item, TextDelta):
            branch.log.text += item.text
        if isinstance(item, Event):
            yield item
        elif item is None:
            branch.log.end_segment()
            if speech is not None:
                yield from speech.work_to_end()
        else:
            branch.log.frame(len(branch) - 1)
            yield
            if speech is not None:
                yield from speech.work(item[None])

    def caption(self, wave: Wave) -> Generator[None, None, str | None]:
        """What was said, in words, by a context of its own; None where the bundle has no prompt for it."""
        if self.engine.manifest.template.transcribe is None:
            return None
        codes, said = (yield from self._encode(wave, may_be_short=False)), []
        context, generation = self.engine.context(), self.engine.manifest.generation
        context.append(self.engine.format.transcribe(Audio(codes)))
        yield from self.pace.read(context)
        step: Step = generation.transcribe or generation.text
        for event in self.engine.writer(np.random.default_rng(0), greedy=True).step(context, step):
            said += [event.text] if isinstance(event, TextDelta) else []
            yield
        return "".join(said).strip()

    def compact(self, reserve: int) -> Generator[None, None, str | None]:
        """Make room for `reserve` positions if there is less; a line about what had to be forgotten, or None.

        What is kept is read anew on LISTEN, which then becomes SPEAK; cancelled, nothing has happened. Nothing is done
        while a turn is open or an answer is not committed.
        """
        if self.listen.is_open or self.speak.answer is not None:
            return None
        said = Said(self.speak.context.ids, self.pinned, self.speak.starts)
        found = plan(said, self.engine.manifest, reserve, self.remember)
        if found is None:
            return None
        self.listen.cut(self.pinned)
        with self.listen.undone():
            self._keep(found)
            yield from self.pace.read(self.listen.context)
        self.speak, self.listen = self.listen, self.speak
        self.speak.shared = self.listen.shared = self.pinned
        return str(found.forgotten) if found.full else None

    def _keep(self, found: Plan) -> None:
        old, new = self.speak, self.listen
        new.starts = found.moved(old.starts)
        for start, end in found.kept:
            new.append(old.context.prompt(max(start, self.pinned), end))

    def _open(self) -> Branch:
        """LISTEN with a user turn open."""
        if not self.listen.is_open:
            self.fork(None)
        return self.listen

    def _look(self, frame: Frame) -> Generator[None, None, Image]:
        """Encode a frame, unless that was done lately for a turn that was forgotten."""
        image = next((image for seen, image in self._seen if seen is frame), None)
        if image is None:
            picture = _rgb(frame, self.engine.compat == "official")
            yield
            image = self.engine.look_at(picture)
            self._seen = [*self._seen[1 - FRAMES_KEPT :], (frame, image)]
        yield
        return image

    def _encode(self, wave: Wave, may_be_short: bool) -> Generator[None, None, Codes]:
        """Encode a wave, segment by segment, unless it is the one that was encoded last."""
        if self._heard is None or not np.array_equal(self._heard[0], wave):
            segments = []
            try:
                for codes in self.engine.codes_of(wave):
                    segments.append(codes)
                    yield
            except MediaError:
                if not may_be_short or not np.isfinite(wave).all():
                    raise
                return np.empty((0, len(self.engine.format.codebook_sizes)), np.int64)
            self._heard = wave.copy(), np.concatenate(segments)
        return self._heard[1]


def _probability(logits: NDArray[np.floating], token: int) -> float:
    scores = logits.astype(np.float64)
    weights = np.exp(scores - scores.max())
    return float(weights[token] / weights.sum())


def _rgb(frame: Frame, official: bool) -> Rgb:
    """uint8 [height, width, 3] of a frame; MediaError where it cannot be used."""
    if isinstance(frame, bytes):
        return read_image(frame, official=official)
    picture = np.asarray(frame.convert("RGB") if official else shown(frame)) if isinstance(frame, Picture) else frame
    check_size(picture.shape[0], picture.shape[1], "the frame")
    return picture
