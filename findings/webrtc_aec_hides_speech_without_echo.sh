#!/usr/bin/env bash
# WebRTC's echo canceller (livekit 1.2.1, its AudioProcessingModule) removes a person who speaks over the first words
# of a loudspeaker that the microphone does not hear at all, as through headphones.
#
# A good guess: where the reference is not in the microphone there is nothing to cancel, so that speech passes
# untouched (it does, within 0.4 dB, while the reference is silent).
# Seen: while the canceller is new, 89 % of the clear 10-ms pieces of speech are taken away by more than 20 dB (4 % where
# nothing is played); after it has heard twenty seconds of such a reference, 5 %.
# So a detector of barge-in should not listen behind a canceller that has not found an echo yet.
#
# Source: livekit 1.2.1 (wheel, libwebrtc inside), numpy 2.4.6, soundfile 0.14.0; the voice is beckett.wav of
# useful-moonshine-onnx 20251121, which is only unpacked. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install livekit==1.2.1 numpy==2.4.6 soundfile==0.14.0
"$work/venv/bin/pip" -q install --no-deps useful-moonshine-onnx==20251121
"$work/venv/bin/python" - <<'PYTHON'
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile
from livekit.rtc import AudioFrame
from livekit.rtc.apm import AudioProcessingModule

RATE, TEN_MS = 16_000, 160
folder = Path(find_spec("moonshine_onnx").submodule_search_locations[0])
voice, rate = soundfile.read(folder / "assets" / "beckett.wav", dtype="float32")
assert rate == RATE, rate
voice = 0.3 * voice / np.abs(voice).max()
reference = np.tile(voice[::-1], 4)  # backwards: a voice with nothing of the person's words


def passed(lead_seconds: int, played: bool) -> np.ndarray:
    """dB by which each clear 10 ms of the person's three seconds was changed."""
    apm = AudioProcessingModule(echo_cancellation=True)
    lead, start = lead_seconds * RATE, int(0.5 * RATE)
    microphone = np.zeros(lead + start + 3 * RATE, np.float32)
    person = voice[RATE : 4 * RATE]
    microphone[lead + start :] = person
    out = []
    for at in range(0, len(microphone) - TEN_MS + 1, TEN_MS):
        loud = reference[at : at + TEN_MS] if played else np.zeros(TEN_MS, np.float32)
        far = AudioFrame(bytearray((loud * 32767).astype(np.int16).tobytes()), RATE, 1, TEN_MS)
        near = AudioFrame(bytearray((microphone[at : at + TEN_MS] * 32767).astype(np.int16).tobytes()), RATE, 1, TEN_MS)
        apm.process_reverse_stream(far)
        apm.process_stream(near)
        out.append(np.frombuffer(bytes(near.data), np.int16).astype(np.float32) / 32767)
    late = 127  # samples that the canceller takes
    got = np.concatenate(out)[lead + start + late :][: len(person) - late]
    level = lambda wave: 10 * np.log10(np.square(wave[: len(got) // TEN_MS * TEN_MS].reshape(-1, TEN_MS)).mean(axis=1) + 1e-9)
    before, after = level(person), level(got)
    return (after - before)[before > before.max() - 20]


def report(name: str, change: np.ndarray) -> float:
    taken = float((change < -20).mean())
    print(f"{name}: median {np.median(change):.1f} dB, {taken:.0%} of the clear pieces taken away by over 20 dB")
    return taken


silent = report("nothing is played", passed(0, played=False))
new = report("a voice is played that the microphone does not hear, canceller new", passed(0, played=True))
used = report("the same after twenty seconds of it", passed(20, played=True))
assert silent < 0.1, silent
assert new > 0.5, new
assert used < new / 4, (used, new)
PYTHON
