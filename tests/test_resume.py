"""A run that is killed goes on at the last finished weight, and writes the bytes of one that was not interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pytest

from export.convert import export
from quant.quantize import quantize
from quant.scheme import read_recipe
from runtime import journal as journals
from runtime.bundle import read_bundle
from runtime.bundle_writer import drafting
from runtime.errors import EdgeOmniError
from runtime.journal import JOURNAL, Journal
from tests import tiny_llama
from tests.tiny import CHECKPOINT, omni_bundle

ROOT = Path(__file__).parents[1]

# Runs commands of the command line, each in a process of its own: one that has imported everything forks for each. A
# command kills itself when it comes to a place for the n-th time, and says at its end how many matrices it computed.
RUNNER = """
import json, os, signal, sys
from apps import cli, one_pass, tables
from quant import quantize
from runtime import bundle_writer, journal

journal.EVERY = 0

def run(place, times, arguments, told):
    met = {}

    def counted(module, name):
        inner = getattr(module, name)
        def call(*arguments):
            met[name] = met.get(name, 0) + 1
            if name == place and met[name] == times:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments)
        setattr(module, name, call)

    for name in ("write_matrix", "append", "save_graph", "write_manifest"):
        counted(quantize, name)
    counted(bundle_writer, "_take_place")
    counted(bundle_writer.Path, "rename")
    sys.argv = ["edgeomni", *arguments]
    sys.stdout = sys.stderr = open(told, "w")
    try:
        cli.main()
    finally:
        print("computed", met.get("write_matrix", 0))

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(*json.loads(line))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

KILLS = [
    ("write_matrix", 1),  # before anything was finished
    ("write_matrix", 6),
    ("append", 6),  # the codes of a matrix are written, its scales are not
    ("save_graph", 2),
    ("write_manifest", 1),
    ("_take_place", 1),
    ("rename", 1),
]


@dataclass(frozen=True)
class Done:
    code: int
    told: str


@cache
def runner() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUNNER]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def run(*arguments: object, kill: tuple[str, int] = ("", 0)) -> Done:
    """Run a command in a process of its own, which kills itself at `kill`: a function, and its how manieth call."""
    with NamedTemporaryFile("r") as told:
        wanted, answered = runner().stdin, runner().stdout
        assert wanted is not None and answered is not None
        wanted.write(json.dumps([*kill, [str(argument) for argument in arguments], told.name]) + "\n")
        wanted.flush()
        return Done(int(answered.readline()), told.read())


def computed(done: Done) -> int:
    """Matrices that a run has computed."""
    assert done.code == 0, done.told
    return int(done.told.rsplit("computed ", 1)[1])


def matrices(bundle: Path) -> int:
    """Matrices that a quantized bundle holds."""
    quantization = read_bundle(bundle).quantization
    assert quantization is not None
    return len(quantization.quantized)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_is_not(
    command: str, tmp_path: Path
) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "float")
    source = tmp_path / ("checkpoint" if command == "export" else "float")
    rest = [source, "--recipe", "int4-rtn", *(["--random"] if command == "export" else [])]
    whole = computed(run(command, *rest, "-o", tmp_path / "whole"))
    for kill in KILLS:
        assert run(command, *rest, "-o", tmp_path / "killed", kill=kill).code == -signal.SIGKILL, kill
        assert not (tmp_path / "killed").exists()
    assert computed(run(command, *rest, "-o", tmp_path / "killed")) == 0 < whole
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "float", "killed", "whole"}


CALIBRATED = """[weights]
"*embed_tokens*" = { bits = 8, group_size = 32 }
"*" = { bits = 4, group_size = 32, method = "gptq" }
"""


def test_a_calibrated_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "gptq.toml").write_text(CALIBRATED)
    (tmp_path / "turns.jsonl").write_text('{"text": "hello", "answer": "hell"}\n{"text": "ab", "answer": "cdefgh"}\n')
    rest = [tiny_llama.save(tmp_path / "checkpoint"), "--recipe", tmp_path / "gptq.toml"]
    rest += ["--calibration", tmp_path / "turns.jsonl"]
    whole = computed(run("export", *rest, "-o", tmp_path / "whole"))
    for times in (3, 3, 4):  # each run begins with the matrix before which the last one was killed
        done = run("export", *rest, "-o", tmp_path / "killed", kill=("write_matrix", times))
        assert done.code == -signal.SIGKILL, done.told
    assert computed(run("export", *rest, "-o", tmp_path / "killed")) == whole - (2 + 2 + 3)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("kill", "left"), [(("write_matrix", 4), 3), (("append", 4), 3), (("save_graph", 2), 11)])
def test_only_the_weights_behind_the_kill_are_computed(kill: tuple[str, int], left: int, tmp_path: Path) -> None:
    rest = [tiny_llama.bundle(), "--recipe", "int4-rtn", "-o", tmp_path / "small"]
    run("quantize", *rest, kill=kill)
    again = computed(run("quantize", *rest))
    quantize(tiny_llama.bundle(), tmp_path / "whole", read_recipe("int4-rtn"))
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")
    assert again == matrices(tmp_path / "whole") - left


def test_an_omni_checkpoint_that_is_killed_from_outside_ends_with_the_same_bytes(tmp_path: Path) -> None:
    quantize(omni_bundle(), tmp_path / "whole", read_recipe("int8"), standalone=True)
    arguments = ["export", CHECKPOINT, "--random", "--recipe", "int8", "--standalone", "-o", tmp_path / "killed"]
    process = subprocess.Popen([sys.executable, "-m", "apps", *map(str, arguments)], cwd=ROOT)
    while process.poll() is None and written(tmp_path / ".killed.partial") < 3_000_000:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert run(*arguments).code == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def written(scratch: Path) -> int:
    try:
        return sum(path.stat().st_size for path in scratch.rglob("*.data"))
    except FileNotFoundError:  # something was renamed just now
        return 0


def killed(out: Path, *arguments: object) -> Path:
    """A draft that a killed run left."""
    assert run(*arguments, "-o", out, kill=("write_matrix", 6)).code == -signal.SIGKILL
    draft = out.parent / f".{out.name}.partial"
    assert draft.is_dir()
    return draft


def test_a_draft_of_another_job_is_not_gone_on_with(tmp_path: Path) -> None:
    killed(tmp_path / "small", "quantize", tiny_llama.bundle(), "--recipe", "int4-rtn")
    whole = computed(run("quantize", tiny_llama.bundle(), "--recipe", "int8", "-o", tmp_path / "small"))
    quantize(tiny_llama.bundle(), tmp_path / "whole", read_recipe("int8"))
    assert whole == matrices(tmp_path / "whole")
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")


def test_a_draft_of_a_source_that_has_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    killed(tmp_path / "small", "export", checkpoint, "--recipe", "int4-rtn")
    tiny_llama.save(checkpoint, tiny_llama.tensors(seed=1))
    arguments = ("export", checkpoint, "--recipe", "int4-rtn", "-o")
    whole = [computed(run(*arguments, tmp_path / name)) for name in ("small", "whole")]
    assert whole[0] == whole[1] > 5
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")


def test_an_error_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    tensors = tiny_llama.tensors()
    tensors["lm_head.weight"][3, 5] = np.inf
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", tensors)
    done = run("export", checkpoint, "--recipe", "int4-rtn", "-o", tmp_path / "small")
    assert done.code == 2
    assert "lm_head.weight holds inf" in done.told
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_two_runs_at_once_are_refused_and_the_first_is_not_disturbed(tmp_path: Path) -> None:
    with drafting(tmp_path / "out", {"job": 1}) as draft:
        (draft.folder / "x").write_text("first")
        with pytest.raises(EdgeOmniError, match="another process is writing"), drafting(tmp_path / "out", {"job": 1}):
            pass
    assert contents(tmp_path / "out") == {"x": b"first"}


# The journal itself


JOB = {"recipe": "int4", "sizes": (1, 2)}


def step(journal: Journal, folder: Path, *names: str) -> list[str]:
    """Write what is not recorded, one letter for each name; which names that were."""
    made = []
    with journal.append_to(folder / "x") as out:
        for name in names:
            if journal.recall(name) is None:
                made.append(name)
                out.write(name.encode())
                journal.record(name, (name, len(made)), out)
    return made


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where "a" and "b" were finished, and "c" was half written."""
    monkeypatch.setattr(journals, "EVERY", 0)
    journal = Journal.begun(tmp_path, JOB)
    step(journal, tmp_path, "a", "b")
    journal.close()
    with (tmp_path / "x").open("ab") as out:
        out.write(b"???")
    return tmp_path


def taken_up(folder: Path) -> Journal:
    journal = Journal.taken_up(folder, JOB)
    assert journal is not None
    return journal


def test_what_was_recorded_is_recalled_and_the_rest_is_cut_off(begun: Path) -> None:
    journal = taken_up(begun)
    assert journal.recall("b") == ["b", 2]
    assert step(journal, begun, "a", "b", "c") == ["c"]
    assert (begun / "x").read_bytes() == b"abc"
    assert step(taken_up(begun), begun, "a", "b", "c", "d") == ["d"]


@pytest.mark.parametrize("cut", range(1, 40, 5))
def test_a_line_that_was_cut_off_counts_for_nothing(begun: Path, cut: int) -> None:
    os.truncate(begun / JOURNAL, (begun / JOURNAL).stat().st_size - cut)
    assert step(taken_up(begun), begun, "a", "b", "c") == ["b", "c"]
    assert (begun / "x").read_bytes() == b"abc"
    assert step(taken_up(begun), begun, "a", "b", "c") == []


def test_a_journal_of_another_job_or_without_its_files_is_not_taken_up(begun: Path) -> None:
    assert Journal.taken_up(begun, {**JOB, "recipe": "int8"}) is None
    assert taken_up(begun)
    os.truncate(begun / "x", 1)
    assert Journal.taken_up(begun, JOB) is None
    (begun / "x").unlink()
    assert Journal.taken_up(begun, JOB) is None
    (begun / JOURNAL).write_bytes(b"\0\0\0\n")
    assert Journal.taken_up(begun, JOB) is None
    (begun / JOURNAL).unlink()
    assert Journal.taken_up(begun, JOB) is None


def test_what_is_recorded_in_quick_succession_waits_for_the_disk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(os, "fsync", waits.append)
    monkeypatch.setattr(journals, "EVERY", 3600)
    journal = Journal.begun(tmp_path, JOB)
    step(journal, tmp_path, "a", "b", "c")
    assert len(waits) == 1
    journal.sync()
    assert len(waits) == 3  # the file, then the journal
    assert step(taken_up(tmp_path), tmp_path, "a", "b", "c", "d") == ["d"]


def test_a_body_that_raises_leaves_nothing_not_even_when_it_is_stopped_by_hand(tmp_path: Path) -> None:
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), drafting(tmp_path / "out", JOB) as draft:
            (draft.work / "spilled").write_text("much")
            step(draft.journal, draft.folder, "a")
            raise error
        assert not list(tmp_path.iterdir())
