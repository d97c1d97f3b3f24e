"""What scripts import: names that are there, paths as strings, and mistakes that are told."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgeomni
from tests import tiny_llama

ROOT = Path(__file__).parents[1]


def python(code: str, folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, path))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_every_name_is_there_and_explains_itself() -> None:
    for name in edgeomni.__all__:
        assert getattr(edgeomni, name).__doc__, name
    assert set(edgeomni.__all__) <= set(dir(edgeomni))
    with pytest.raises(AttributeError, match=r"has no attribute 'chat'; it has .*Conversation"):
        _ = edgeomni.chat  # type: ignore[attr-defined]


def test_importing_it_loads_neither_arrays_nor_graphs(tmp_path: Path) -> None:
    code = "import edgeomni, sys; print(sorted({'numpy', 'onnxruntime', 'pydantic', 'typer'} & set(sys.modules)))"
    done = python(code, tmp_path, ROOT)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_a_package_of_ours_that_is_somebody_elses_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").write_text("")
    done = python("import edgeomni", tmp_path, tmp_path, ROOT)
    assert done.returncode == 1
    assert f"'runtime' is expected in {ROOT / 'runtime'}, and Python finds {tmp_path / 'runtime'}" in done.stderr


def test_a_checkpoint_becomes_a_bundle_that_is_quantized_and_answers_with_strings_for_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint, floats, small = str(tiny_llama.save(tmp_path / "c")), str(tmp_path / "f"), str(tmp_path / "s")
    assert edgeomni.export(checkpoint, floats).quantization is None
    made = edgeomni.quantize(floats, small, "int8")
    assert made.quantization is not None and made.quantization.recipe == "int8"
    engine = edgeomni.Engine(small, threads=1)
    *_, done = edgeomni.Conversation.open(engine, seed=0).reply("hello", edgeomni.Choices(max_new=3))
    assert isinstance(done, edgeomni.events.ReplyDone) and done.timings.text_tokens > 0
    assert list((tmp_path / "cache" / "edgeomni").iterdir())  # packed weights, kept
    for wrong in (lambda: edgeomni.export(checkpoint, floats), lambda: edgeomni.Engine("nowhere")):
        with pytest.raises(edgeomni.EdgeOmniError):
            wrong()


def test_what_nano_says_is_heard_by_it_and_the_example_of_the_docstring_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    speech = edgeomni.say("the light is on", str(tmp_path / "said.wav"), seed=0)
    assert 0.3 < len(speech.samples) / speech.sampling_rate < 10 and np.abs(speech.samples).max() > 0.02
    assert (tmp_path / "said.wav").is_file()
    question = ROOT / "export" / "nano" / "samples" / "espeak-004.flac"
    assert edgeomni.transcribe(str(question), edgeomni.Engine("nano"))
    assert edgeomni.__doc__ is not None
    (example,) = re.findall(r"\n\n((?:    .*\n|\n)+)", edgeomni.__doc__)
    picture = ROOT / "export" / "nano" / "samples" / "picture.png"
    code = re.sub(r"^    ", "", example, flags=re.MULTILINE).replace('"picture.png"', repr(str(picture)))
    printed: list[str] = []
    played: list[int] = []
    exec(code, {"print": lambda text, **_: printed.append(text), "play": lambda wave, rate: played.append(len(wave))})
    assert "seven plus five is twelve" in "".join(printed) and sum(played) > 0
