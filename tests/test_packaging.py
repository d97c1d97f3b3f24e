"""The wheel as it would be published: whole, ours alone, and starting without the tools that only exporting needs."""

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("export", "quant", "runtime", "apps")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder of their own, as an installer lays them."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_every_source_and_data_file_is_in_the_wheel(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "edgeomni.py", *OURS], capture_output=True, text=True, cwd=ROOT, check=False
    )
    listed = tracked.stdout.split() or [
        path.relative_to(ROOT).as_posix() for floor in OURS for path in (ROOT / floor).rglob("*.[pjt][ys]*")
    ]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {path for path in listed if (ROOT / path).is_file()} <= names
    assert {path.split("/")[0] for path in names if ".dist-info" not in path} == {"edgeomni.py", *OURS}
    assert {f"{floor}/py.typed" for floor in OURS} <= names
    assert any(path.endswith((".json", ".toml")) for path in names)


def test_the_wheel_carries_its_licence_and_its_command(installed: Path) -> None:
    (info,) = installed.glob("edgeomni-*.dist-info")
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    assert "edgeomni = apps.cli:main" in (info / "entry_points.txt").read_text()


def test_no_other_distribution_owns_our_names(installed: Path) -> None:
    """Looks at what is installed here beside the wheel; an editable install of ourselves names no other owner."""
    code = "import importlib.metadata as m, json; print(json.dumps(m.packages_distributions()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=installed,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    owners = json.loads(done.stdout)
    for name in ("edgeomni", *OURS):
        assert set(owners[name]) == {"edgeomni"}


def test_the_installed_command_starts_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    code = "import apps.cli, sys; print(apps.cli.__file__); sys.argv = ['edgeomni', '--version']; apps.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where, said = done.stdout.splitlines()
    assert where.startswith(str(installed))
    assert said == f"edgeomni {tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}"


def test_the_two_onnx_runtimes_are_never_asked_for_together() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith("onnxruntime>") for line in extras["cpu"])
    assert any(line.startswith("onnxruntime-gpu") for line in extras["cuda"])
    for name, lines in extras.items():
        if name != "cuda":
            assert not any("onnxruntime-gpu" in line or "edgeomni[cuda" in line for line in lines)
