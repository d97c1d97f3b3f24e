"""A recording of read speech, from a package that is installed for this file alone and never imported; a listener."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from quant.comparison.recognise import Recogniser, recogniser
from runtime.audio import load_mono

BECKETT = "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."


@cache
def beckett(rate: int) -> np.ndarray:
    """Ten seconds of speech, float32 [n]; `BECKETT` is what is said."""
    spec = find_spec("moonshine_onnx")
    assert spec is not None and spec.origin is not None, "run make test, which installs the recording"
    return load_mono(Path(spec.origin).parent / "assets" / "beckett.wav", rate)


@cache
def whisper() -> Recogniser:
    """Loaded once for all tests."""
    found = recogniser("whisper", threads=1)
    assert found is not None
    return found
