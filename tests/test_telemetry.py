"""Nothing leaves this machine: a process with an open session makes no file of its own under HOME and no socket."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_llama

ROOT = Path(__file__).parents[1]

# Imports {first}, opens a bundle, answers, and watches for sockets: every file descriptor of the process, and every
# address that the kernel lists for its network.
WATCH = """
import json, os, sys, time
import {first}
from pathlib import Path
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.prompt import Text

def sockets():
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink("/proc/self/fd/" + entry)
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found

def addresses(inodes):
    lines = []
    for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        for line in Path("/proc/self/net/" + kind).read_text().splitlines()[1:]:
            if "socket:[" + line.split()[9] + "]" in inodes:
                lines.append(kind + " " + line.strip())
    return lines

seen = sockets()
engine = Engine(Path(sys.argv[1]))
engine.open_all()
list(Conversation.open(engine, seed=0).reply([Text("hello")], Choices(max_new=3)))
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    seen |= sockets()
    time.sleep(0.1)
print(json.dumps({{"sockets": sorted(seen), "addresses": addresses(seen)}}))
"""


def watched(first: str, home: Path, seconds: float) -> dict[str, object]:
    bundle = tiny_llama.bundle()
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(first=first), str(bundle), str(seconds)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_open_session_makes_no_socket_and_no_file_under_home(tmp_path: Path) -> None:
    found = watched("runtime", tmp_path, seconds=4)
    assert found == {"sockets": [], "addresses": []}
    assert not list(tmp_path.rglob("*"))


def test_the_watch_sees_a_socket_that_is_opened(tmp_path: Path) -> None:
    opened = "socket, sys; sys.kept = socket.create_server(('127.0.0.1', 0))"
    found = watched(opened, tmp_path, seconds=0)
    assert len(found["sockets"]) == 1  # type: ignore[arg-type]
    assert "tcp " in found["addresses"][0]  # type: ignore[index]


@pytest.mark.parametrize(
    "first", ["apps.cli", "apps.terminal", "apps.doctor", "export.convert", "export.parity.replay", "runtime.session"]
)
def test_telemetry_is_switched_off_before_onnx_runtime_is_imported(first: str) -> None:
    code = f"""
import os, sys
class Order:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Order())
import {first}
import runtime.session
"""
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1"]


def test_every_file_that_imports_onnx_runtime_lies_where_telemetry_is_switched_off_first() -> None:
    """`runtime/__init__.py` switches it off; other floors must not import it before they import ours."""
    for floor in ("export", "quant", "apps"):
        for path in (ROOT / floor).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "import onnxruntime" in text and "nano" not in path.parts:
                assert "from runtime" in text.split("import onnxruntime")[0], f"{path} imports onnxruntime first"
