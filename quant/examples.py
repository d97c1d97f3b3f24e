"""Conversations to calibrate on: turns of a file, or those that come along, with their answers, as prompts.

An answer is given and never generated, so nothing has to be loaded that could generate one.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant.media import Media, source
from quant.synthetic import Wave, picture, voice
from quant.turn import Turn, read_turns, refuse_unfit
from runtime.bundle import Manifest, SpecialTokens
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.prompt import Prompt, Spoken, Text

DEFAULT = Path(__file__).parent / "turns" / "calibration.jsonl"
BOOT = Path("/proc/sys/kernel/random/boot_id")
SECONDS = 6.0  # of a sound that is made here
PICTURES = ((448, 336), (224, 224), (280, 504))
LONGEST = 2048  # positions of a conversation; attention takes memory with their square
EVERY = 3  # every third turn of the default is heard, the next seen, and of both some are answered aloud


@dataclass(frozen=True)
class Example:
    """A turn with its media and what is said in answer; `aloud` is a recording whose codes stand for the answer's."""

    text: str
    audio: Path | Wave | None = None
    images: tuple[Path | bytes, ...] = ()
    answer: str = ""
    aloud: Path | Wave | None = None


def examples(turns: Sequence[Turn] | None, manifest: Manifest, partial: bool = False) -> tuple[Example, ...]:
    """The examples that `turns` spell, or the default's (None). A spoken answer takes the codes of its own question.

    EdgeOmniError if the bundle cannot take some turns, or, unless `partial`, can do what none of them asks of it.
    """
    if turns is None:
        plain = read_turns(DEFAULT)
        return tuple(_varied(turn, index, manifest) for index, turn in enumerate(plain))
    refuse_unfit(turns, manifest)
    if not partial:
        _refuse_untried(turns, manifest)
    return tuple(_given(turn, index, manifest) for index, turn in enumerate(turns))


def _refuse_untried(turns: Sequence[Turn], manifest: Manifest) -> None:
    abilities = (
        ("hear", manifest.audio, any(turn.audio for turn in turns)),
        ("see", manifest.image, any(turn.images for turn in turns)),
        ("speak", manifest.speech, any(turn.spoken for turn in turns)),
    )
    untried = [verb for verb, able, tried in abilities if able and not tried]
    if untried:
        raise EdgeOmniError(
            f"the calibration turns never let {manifest.family} {' or '.join(untried)}: what its "
            "matrices multiply then would be rounded as if it were text, and the model could lose that ability while "
            "every text looks right. Add such turns, leave --calibration out, or insist with --partial-calibration"
        )


def _given(turn: Turn, index: int, manifest: Manifest) -> Example:
    aloud = (turn.audio or _sound(manifest, index)) if turn.spoken and manifest.audio else None
    return Example(turn.text, turn.audio, tuple(map(source, turn.images)), " ".join(turn.answers[:1]), aloud)


def _varied(turn: Turn, index: int, manifest: Manifest) -> Example:
    """A turn of the default with what this kind of model can take of sounds and pictures."""
    audio = _sound(manifest, index) if manifest.audio and index % EVERY == 0 else None
    images = (picture(*PICTURES[index % len(PICTURES)], seed=index),) if manifest.image and index % EVERY == 1 else ()
    aloud = _sound(manifest, index + 1000) if manifest.speech and manifest.audio and index % 2 == 0 else None
    return Example(turn.text, audio, images, " ".join(turn.answers[:1]), aloud)


def _sound(manifest: Manifest, seed: int) -> Wave:
    assert manifest.audio is not None
    return voice(SECONDS, manifest.audio.sampling_rate, seed)


@dataclass(frozen=True, eq=False)
class Conversation:
    """A prompt that ends behind the answer, and where in it audio was answered.

    `frames` [n] are the positions of the answer's audio frames, `codes` [n, codebooks] theirs.
    """

    prompt: Prompt
    frames: NDArray[np.int64]
    codes: NDArray[np.int64]


def conversation(example: Example, engine: Engine) -> Conversation:
    """Read an example's media with the engine's own encoders and spell it as the bundle's template does.

    Only the first positions count where it is longer than LONGEST or than the model's context.
    """
    media = [] if example.audio is None else [engine.hear(example.audio)]
    seen = [engine.look(image) for image in example.images]
    said = [Text(example.text)] if example.text.strip() else []
    spoken = example.aloud is not None
    opening = engine.format.open_conversation(None, waits=True)
    whole = engine.format.user_turn([*media, *seen, *said], spoken, behind=opening)
    asked = len(whole)
    if example.answer or spoken:
        turn = engine.format.user_turn([*media, *seen, *said], spoken, behind=opening, waits=True)
        whole = engine.format.close_assistant([*_answer(example, engine)], spoken=spoken, behind=turn)
    whole = cut(whole, min(LONGEST, engine.manifest.cache.max_positions), engine.manifest.tokens)
    frames = np.flatnonzero(whole.ids == engine.manifest.tokens.audio_pad)
    answered = frames >= asked
    return Conversation(whole, frames[answered], whole.codes[answered])


def cut(prompt: Prompt, length: int, tokens: SpecialTokens) -> Prompt:
    """The first `length` positions of a prompt."""
    ids = prompt.ids[:length]
    pictures = [token for token in (tokens.img_pad, tokens.video_place) if token is not None]
    codes, rows = np.count_nonzero(ids == tokens.audio_pad), np.count_nonzero(np.isin(ids, pictures))
    return Prompt(ids, prompt.codes[:codes], prompt.rows[:rows])


def _answer(example: Example, engine: Engine) -> Iterator[Text | Spoken]:
    if example.aloud is None:
        yield Text(example.answer)
    else:
        yield Spoken(example.answer, engine.hear(example.aloud).codes)


@dataclass(frozen=True)
class Calibrating:
    """What a user wants to calibrate on: turns of his own, or those that come along (None)."""

    turns: tuple[Turn, ...] | None = None
    partial: bool = False  # even if they leave some of the model's abilities untried

    def examples(self, manifest: Manifest) -> tuple[Example, ...]:
        return examples(self.turns, manifest, self.partial)

    def fingerprint(self) -> str:
        """Differs where the turns or what they let hear and see differs, or the runtime that they run on.

        Also after each start of the machine: values of the turns are not forced onto the disk, which would take most
        of the time, so that a power cut may have lost some.
        """
        import onnxruntime  # not before our own runtime, which switches its telemetry off

        turns = read_turns(DEFAULT) if self.turns is None else self.turns
        told = [(turn.text, turn.answers, turn.spoken) for turn in turns]
        media = [_state(item) for turn in turns for item in (turn.audio, *turn.images) if item is not None]
        machine = (onnxruntime.__version__, os.cpu_count(), BOOT.read_text() if BOOT.is_file() else "")
        return hashlib.sha256(repr((told, media, machine)).encode()).hexdigest()


def _state(media: Media) -> tuple[str, ...]:
    """Which file it is and what lies in it, as far as its state tells."""
    file = media if isinstance(media, Path) else media.table
    state = file.stat()
    return (str(file.resolve()), str(state.st_size), str(state.st_mtime_ns), "" if file is media else repr(media))


BUILT_IN = Calibrating()


def read_calibrating(path: Path | None, partial: bool) -> Calibrating:
    """What the command line says; EdgeOmniError says everything that is wrong with the file of turns."""
    if partial and path is None:
        raise EdgeOmniError("--partial-calibration goes with a --calibration FILE, whose turns lack something")
    return Calibrating(None if path is None else read_turns(path), partial)
