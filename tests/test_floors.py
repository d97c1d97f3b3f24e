"""The floors of the house: who may import whom, ours and third parties, read from the sources with `ast`."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("export", "quant", "runtime", "apps", "tests")

# Longest path first: the row of the innermost room that a file lies in is the one that counts.
# Of ours: a whole floor, or single modules of it.
OURS = {
    "export/parity": {"export", "runtime"},  # replays the runtime's own preprocessing and loops
    "export/nano/evaluation.py": {"export", "runtime.bundle", "runtime.image"},  # shows pictures as the runtime does
    "export": {"export", "runtime.session"}
    | {"runtime.bundle", "runtime.bundle_writer", "runtime.errors", "runtime.float_bundle", "runtime.integers"}
    | {"runtime.shared_files"},
    "quant": {"quant", "runtime"},
    "runtime": {"runtime"},
    "apps": {"apps", "export", "quant", "runtime"},
    "tests": {"apps", "export", "quant", "runtime", "tests"},
}
THEIRS = {
    "export/nano": {"faster_whisper", "num2words", "numpy", "onnx", "onnxruntime", "PIL", "safetensors", "scipy"}
    | {"sklearn", "soundfile", "tokenizers", "torch"},
    "export": {"jinja2", "ml_dtypes", "numpy", "onnx_ir", "onnxscript", "pydantic", "safetensors", "tokenizers"},
    "quant": {"numpy", "pydantic", "scipy"},
    "runtime": {"numpy", "onnxruntime", "PIL", "pydantic", "soundfile", "tokenizers"},
    "apps/server": {"numpy", "pydantic", "soundfile"},
    "apps": {"numpy", "rich", "typer"},
}
# These packages may be imported in these files alone (of the rooms that are named).
ONLY_IN = {
    ("runtime", "cv2"): {"runtime/video.py", "runtime/live/camera.py"},
    ("runtime", "sounddevice"): {"runtime/live/audio_device.py"},
    ("runtime", "soxr"): {"runtime/live/rates.py"},
    ("runtime", "livekit"): {"runtime/live/echo.py"},
    ("quant", "onnx_ir"): {"quant/attention.py", "quant/comparison/mixing.py", "quant/rewrite.py", "quant/stages.py"}
    | {"quant/taps.py"},
    ("quant", "onnxruntime"): {"quant/examples.py"},
    ("quant", "PIL"): {"quant/synthetic.py"},
    ("quant", "faster_whisper"): {"quant/comparison/recognise.py"},
    ("quant", "jiwer"): {"quant/comparison/wer.py"},
    ("quant", "yaml"): {"quant/comparison/suites/ultraeval.py"},
    ("apps", "starlette"): {"apps/server/audio.py", "apps/server/chat.py", "apps/server/http.py"}
    | {"apps/server/realtime.py", "apps/server/requests.py"},
    ("apps", "prometheus_client"): {"apps/server/metrics.py"},
    ("apps", "python_multipart"): {"apps/server/requests.py"},
    ("apps", "uvicorn"): {"apps/server/command.py"},
    ("apps", "matplotlib"): {"apps/report/report.py"},
    ("apps", "ray"): {"apps/cluster.py"},
    ("apps", "PIL"): {"apps/bench/turn.py", "apps/report/spectrogram.py", "apps/server/media.py"},
    ("apps", "PySide6"): {"apps/desktop.py"},
    ("apps", "textual"): {"apps/talk.py"},
    ("apps", "onnx_ir"): {"apps/bench/floor.py", "apps/bench/genai.py"},
    ("apps", "gguf"): {"apps/bench/gguf_file.py"},
    ("apps", "llama_cpp"): {"apps/bench/peer.py"},
    ("apps", "onnxruntime_genai"): {"apps/bench/peer.py"},
    ("apps", "torch"): {"apps/bench/peer.py", "apps/bench/transformers_model.py"},
    ("apps", "transformers"): {"apps/bench/peer.py", "apps/bench/transformers_model.py"},
}


def sources(*floors: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for floor in floors for path in (ROOT / floor).rglob("*.py"))


@cache
def parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported(file: str) -> Iterator[str]:
    """Every module that a file imports anywhere, in full; `from runtime import audio` counts as runtime.audio."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full"
            module = str(node.module)
            whole = module in FLOORS or (ROOT / module.replace(".", "/")).is_dir()
            yield from (f"{module}.{alias.name}" if whole else module for alias in node.names)


def row(table: dict[str, set[str]], file: str) -> set[str]:
    """The entry of the file itself, or of the innermost room that holds it."""
    return table[next(room for room in table if f"{file}/".startswith(f"{room}/"))]


@pytest.mark.parametrize("file", sources(*FLOORS))
def test_a_file_imports_only_floors_that_it_stands_on(file: str) -> None:
    allowed = row(OURS, file)
    for module in imported(file):
        if module.split(".")[0] in FLOORS:
            known = any(module == name or module.startswith(f"{name}.") for name in allowed)
            assert known, f"{file} may not import {module}"


@pytest.mark.parametrize("file", sources("export", "quant", "runtime", "apps"))
def test_a_file_imports_only_third_parties_of_its_floor(file: str) -> None:
    allowed = row(THEIRS, file) | {package for (_, package), files in ONLY_IN.items() if file in files}
    for module in imported(file):
        package = module.split(".")[0]
        if package not in FLOORS and package not in sys.stdlib_module_names:
            assert package in allowed, f"{file} may not import {package}"


@pytest.mark.parametrize(("place", "files"), ONLY_IN.items())
def test_a_package_that_belongs_to_one_file_is_imported_nowhere_else(place: tuple[str, str], files: set[str]) -> None:
    room, package = place
    users = {file for file in sources(room) if any(module.split(".")[0] == package for module in imported(file))}
    assert users <= files


def test_nothing_outside_the_live_room_imports_it_from_within_the_runtime() -> None:
    for file in sources("runtime"):
        if not file.startswith("runtime/live/"):
            assert not any(module.startswith("runtime.live") for module in imported(file)), file


def test_there_is_no_sixth_folder() -> None:
    found = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert found == set(FLOORS)


@pytest.mark.parametrize("file", sources(*FLOORS))
def test_a_file_opens_with_one_sentence_that_says_what_it_is(file: str) -> None:
    docstring = ast.get_docstring(parsed(file))
    assert docstring, f"{file} has no docstring"
    assert docstring.split("\n\n")[0].endswith("."), f"{file}: {docstring}"


def test_a_mistake_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "bad.py").write_text("def f():\n    from export import convert\n    import torch\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"may not import export\.convert"):
        test_a_file_imports_only_floors_that_it_stands_on("runtime/bad.py")
    with pytest.raises(AssertionError, match="may not import torch"):
        test_a_file_imports_only_third_parties_of_its_floor("runtime/bad.py")
    parsed.cache_clear()
