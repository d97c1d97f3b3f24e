"""The example in the README holds a conversation, as it is printed there."""

import re
from pathlib import Path

import numpy as np

from apps.embedded import CHECKPOINT, embedded_bundle
from runtime.audio import load_mono
from runtime.live.events import LiveEvent, Transition
from runtime.live.settings import HOP, RATE

README = Path(__file__).parents[1] / "README.md"


class Loudspeaker:
    def __init__(self) -> None:
        self.played: list[np.ndarray] = []

    def write(self, samples: np.ndarray) -> None:
        self.played.append(samples)


def test_the_live_loop_of_the_readme_answers_a_recorded_question_aloud() -> None:
    (example,) = [
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "Duplex" in code
    ]
    question = load_mono(CHECKPOINT.parent / "samples" / "espeak-002.flac", RATE)
    wave = np.pad(question, (RATE, 5 * RATE))
    loudspeaker, microphone = Loudspeaker(), wave[: len(wave) // HOP * HOP].reshape(-1, HOP)
    events: list[LiveEvent] = []
    names = {"microphone": microphone, "loudspeaker": loudspeaker, "print": events.append}
    code = example.replace('"BUNDLE"', repr(str(embedded_bundle()))).replace("WallClock", "MeasuredClock")
    exec(code, names)  # nobody waits for the microphone here, so time is that of the samples
    assert "G(QUERY)" in [event.event for event in events if isinstance(event, Transition)]
    assert np.abs(np.concatenate(loudspeaker.played)).max() > 0.05
