"""EdgeOmni from Python: hold conversations with a bundle on this machine, make bundles, and judge them.

    import edgeomni

    engine = edgeomni.Engine("nano")  # or the folder of a bundle
    conversation = edgeomni.Conversation.open(engine, seed=0)
    for event in conversation.reply("What's 7 + 5?"):
        match event:
            case edgeomni.events.TextDelta(text):
                print(text, end="", flush=True)
            case edgeomni.events.ReplyDone(timings=timings):
                print(f"  ({timings.total:.2f} s)")

    picture = engine.look("picture.png")
    spoken = edgeomni.Choices(spoken=True)
    for event in conversation.reply([picture, "what do you see"], spoken):
        if isinstance(event, edgeomni.events.AudioChunk):
            play(event.samples, event.sampling_rate)

What stands in `__all__` is what scripts may rely on. Paths may be strings. A mistake that its user can set right is an
`EdgeOmniError`, which says what was found, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from apps.opened import Engine
    from quant.comparison.compare import Comparison
    from runtime import events
    from runtime.bundle import Manifest, Profile, Sampling
    from runtime.conversation import Choices, Conversation
    from runtime.errors import EdgeOmniError
    from runtime.events import AudioChunk
    from runtime.live.duplex import Duplex

__all__ = [
    "Choices",
    "Conversation",
    "Duplex",
    "EdgeOmniError",
    "Engine",
    "Sampling",
    "compare",
    "events",
    "export",
    "quantize",
    "say",
    "transcribe",
]

PACKAGES = ("runtime", "export", "quant", "apps")
# What is imported when it is first asked for, since it loads ONNX Runtime or NumPy.
LATER = {
    "Choices": "runtime.conversation",
    "Conversation": "runtime.conversation",
    "Duplex": "runtime.live.duplex",
    "EdgeOmniError": "runtime.errors",
    "Engine": "apps.opened",
    "Sampling": "runtime.bundle",
    "events": "runtime",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module 'edgeomni' has no attribute {name!r}; it has {', '.join(__all__)}")
    if name == "events":
        value: Any = import_module("runtime.events")
    else:
        value = getattr(import_module(LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def transcribe(audio: str | Path | NDArray[np.float32], engine: Engine | str | Path = "nano") -> str:
    """The words of a recording.

    Args:
        audio: a file (wav, flac, mp3, ogg), or a waveform float32 [n] at the rate of the bundle's ears
            (`engine.manifest.audio.sampling_rate`).
        engine: an open one, or the name of a bundle, which is opened for this call.

    Raises:
        EdgeOmniError: the file cannot be used, or the bundle has no prompt for transcription.
    """
    from runtime import conversation
    from runtime.events import TextDelta

    ears = _opened(engine)
    said = conversation.transcribe(ears, ears.hear(audio))
    return "".join(event.text for event in said if isinstance(event, TextDelta)).strip()


def say(
    text: str,
    out: str | Path | None = None,
    engine: Engine | str | Path = "nano",
    *,
    seed: int | None = None,
    greedy: bool = False,
) -> AudioChunk:
    """A text as speech: `samples` float32 [n] in -1..1 and their `sampling_rate` in Hz.

    Args:
        text: what is read aloud.
        out: a WAV file to write as well.
        engine: an open one, or the name of a bundle, which is opened for this call.
        seed: makes every random draw repeatable.
        greedy: always take the likeliest code.

    Raises:
        EdgeOmniError: the text is blank, the bundle has no prompt for reading aloud, or `out` cannot be written.
    """
    import numpy as np

    from runtime.audio import write_wav
    from runtime.conversation import Choices, read_aloud
    from runtime.events import AudioChunk

    voice = _opened(engine)
    said = read_aloud(voice, text, Choices(greedy=greedy), seed)
    chunks = [event for event in said if isinstance(event, AudioChunk)]
    rate = voice.manifest.speech.sampling_rate if voice.manifest.speech else 0
    speech = AudioChunk(np.concatenate([np.zeros(0, np.float32), *(chunk.samples for chunk in chunks)]), rate)
    if out is not None:
        write_wav(Path(out), speech.samples, rate)
    return speech


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    profile: Profile = "cpu",
    force: bool = False,
    threads: int = 0,
) -> Manifest:
    """Turn a checkpoint into a bundle, whole or not at all; returns the manifest that was written.

    Args:
        checkpoint: folder of a Hugging Face checkpoint, or a GGUF file.
        out: folder to write.
        recipe: the name of one that comes along (`int8`, `int4-rtn`, ...) or a TOML file: quantize in the same pass,
            so that no float bundle is written. None: floats, or integers as the checkpoint stores them.
        profile: "cpu" (fp32) or "cuda" (fp16).
        force: replace a bundle that is already there. Nothing else is ever replaced.
        threads: threads that quantize; 0: as many as there are cores.

    Raises:
        EdgeOmniError: the checkpoint cannot be exported, the target is taken, or the disk is too small.
        ModuleNotFoundError: the extra `export` is not installed.
    """
    from apps import one_pass
    from export import convert
    from quant import quantize as quantization
    from quant.scheme import read_recipe
    from runtime.bundle_writer import refuse_target

    target = Path(out)
    refuse_target(target, force)  # before the checkpoint is read
    wanted = None if recipe is None else read_recipe(recipe)
    planned, smaller = one_pass.plan(Path(checkpoint), profile, wanted, random=False)
    if smaller is None:
        return convert.write(planned, target, force=force)
    return quantization.write(smaller, target, force=force, threads=threads)


def quantize(
    bundle: str | Path,
    out: str | Path,
    recipe: str | Path = "int4-rtn",
    *,
    calibration: str | Path | None = None,
    force: bool = False,
    threads: int = 0,
) -> Manifest:
    """Make a smaller bundle of a float one; after a kill the same call goes on where it was.

    Args:
        bundle: a float bundle.
        out: folder to write.
        recipe: the name of one that comes along, or a TOML file.
        calibration: a file of turns, with their answers, that a recipe with calibration is fitted to; None: those that
            come along.
        force: replace a bundle that is already there.
        threads: 0: as many as there are cores.

    Returns the manifest that was written.

    Raises:
        EdgeOmniError: bundle, recipe or turns cannot be used, the target is taken, or the disk is too small.
        ModuleNotFoundError: the extra `export` is not installed.
    """
    from apps.names import bundle_named
    from quant.examples import read_calibrating
    from quant.quantize import quantize as run
    from quant.scheme import read_recipe

    calibrating = read_calibrating(None if calibration is None else Path(calibration), False)
    return run(
        bundle_named(bundle), Path(out), read_recipe(recipe), force=force, threads=threads, calibrating=calibrating
    )


def compare(
    reference: str | Path,
    candidate: str | Path,
    report: str | Path,
    *,
    turns: Sequence[str | Path] = (),
    gates: str | Path | None = None,
    recogniser: str | None = None,
    seed: int = 0,
    threads: int = 0,
) -> Comparison:
    """Measure what a smaller bundle loses against its reference, and write a report.

    Args:
        reference: a bundle, or the folder that `edgeomni record` wrote.
        candidate: the bundle that is to be judged.
        report: folder for report.html, report.md and report.json.
        turns: files of turns to answer; none: those that come along.
        gates: a TOML file with limits of figures.
        recogniser: who listens to spoken answers: "whisper" (used where installed), "none", a bundle or a command.
        seed: of the speech decoder's noise.
        threads: of each graph; 0: as many as there are cores.

    Returns the comparison: `passed` says whether every gate was kept, `figure(name)` gives a figure with its interval.

    Raises:
        EdgeOmniError: the two are not of one family and tokenizer, or one of the files cannot be used.
        ModuleNotFoundError: the extra `compare` is not installed.
    """
    from apps.compare_command import Settings, compare_command
    from apps.names import NANO, bundle_named
    from apps.turn_sources import turn_sources
    from quant.limits import Limits

    sources = turn_sources([Path(file) for file in turns], None, None, 0, seed)
    return compare_command(
        bundle_named(reference),
        bundle_named(candidate),
        Path(report),
        Settings(sources, Limits(seed=seed), threads),
        None if gates is None else Path(gates),
        quiet=True,
        listener=str(bundle_named(NANO)) if recogniser == NANO else recogniser,
    )


def _opened(engine: Engine | str | Path) -> Engine:
    from apps.opened import Engine
    from runtime import engine as engines

    return engine if isinstance(engine, engines.Engine) else Engine(engine)


def _refuse_others() -> None:
    """ImportError if one of our packages, whose names are plain words, is somebody else's."""
    home = Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = find_spec(name)
        place = None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent
        if place != home / name:
            raise ImportError(
                f"edgeomni's package {name!r} is expected in {home / name}, and Python finds "
                f"{place or 'none'}; another package or a folder of that name stands before it: install edgeomni in "
                "an environment of its own, and start from another folder"
            )


_refuse_others()
