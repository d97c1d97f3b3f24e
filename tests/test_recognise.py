"""Recognisers: Whisper hears what is read, commands get a file and no shell, and what cannot be used is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from quant.comparison.recognise import Command, Transcriber, Whisper, language_of, recogniser
from quant.comparison.wer import word_errors
from runtime.errors import EdgeOmniError
from tests import tiny_llama
from tests.recording import BECKETT, beckett, whisper
from tests.tiny import omni_bundle

RATE = 16000


def test_whisper_hears_what_is_read_and_misses_what_is_buried_in_noise_or_cut_off() -> None:
    heard, speech = whisper(), beckett(24000)
    assert isinstance(heard, Whisper)
    assert word_errors(BECKETT, heard.hear(speech, 24000, "en")).rate < 0.15
    loud = np.random.default_rng(0).normal(0, 0.5, len(speech)).astype(np.float32)
    assert word_errors(BECKETT, heard.hear(speech + loud, 24000, "en")).rate > 0.5
    assert word_errors(BECKETT, heard.hear(speech[: len(speech) // 2], 24000, "en")).deletions >= 4


def script(folder: Path, code: str) -> str:
    (folder / "heard.py").write_text(code)
    return f"{sys.executable} '{folder / 'heard.py'}'"


def test_a_command_is_given_a_wav_file_and_what_it_prints_is_what_was_heard(tmp_path: Path) -> None:
    line = script(tmp_path, "import sys, soundfile; w, r = soundfile.read(sys.argv[-1]); print(len(w), r, sys.argv[1])")
    made = recogniser(f"{line} --{{language}} {{wav}}")
    assert made is not None
    assert made.hear(np.zeros(1200, np.float32), 24000, "zh") == "1200 24000 --zh"


def test_no_shell_reads_a_command(tmp_path: Path) -> None:
    line = script(tmp_path, "import sys; print(sys.argv[1:-1])")
    made = Command(f"{line} ; touch {tmp_path / 'made'} $(id) `id`")
    printed = made.hear(np.zeros(100, np.float32), RATE, "en")
    assert printed == str([";", "touch", str(tmp_path / "made"), "$(id)", "`id`"])
    assert not (tmp_path / "made").exists()


def test_the_file_is_sixteen_bit_mono_and_gone_afterwards(tmp_path: Path) -> None:
    made = Command(script(tmp_path, f"import sys, shutil; shutil.copy(sys.argv[1], '{tmp_path}'); print(sys.argv[1])"))
    name = Path(made.hear(beckett(RATE)[:RATE], RATE, "en"))
    assert not name.exists()
    info = soundfile.info(tmp_path / name.name)
    assert (info.channels, info.subtype, info.samplerate) == (1, "PCM_16", RATE)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("no-such-program --x", "there is no recogniser 'no-such-program --x': expected whisper, none"),
        ("", "there is no recogniser ''"),
        ("whisper 'open", "cannot be read as a command"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"no model\")'", "ended with 1: no model"),
    ],
)
def test_a_recogniser_that_cannot_be_used_is_refused_before_anything_runs(wanted: str, message: str) -> None:
    with pytest.raises(EdgeOmniError, match=message):
        recogniser(wanted)


def test_another_bundle_can_be_the_recogniser_if_it_can_transcribe() -> None:
    made = recogniser(str(omni_bundle()), threads=1)
    assert isinstance(made, Transcriber)
    assert made.hear(beckett(24000)[:24000], 24000, "en")  # random weights: any text
    with pytest.raises(EdgeOmniError, match="cannot transcribe; give a bundle that can"):
        recogniser(str(tiny_llama.bundle()))


def test_none_is_none() -> None:
    assert recogniser("none") is None


@pytest.mark.parametrize(
    ("text", "language"),
    [("Hello", "en"), ("你好，OK", "zh"), ("こんにちは世界", "ja"), ("안녕", "ko"), ("Привет", "ru"), ("12", "en")],
)
def test_the_language_to_listen_for_follows_from_the_script(text: str, language: str) -> None:
    assert language_of(text) == language
