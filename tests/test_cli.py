"""The command line as a person meets it: what it prints, what it writes, and how it says that something is wrong."""

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import cv2
import jsonschema
import numpy as np
import pytest
import soundfile

from apps import cli, doctor, tables, terminal
from apps.terminal import UNPRINTABLE, one_answer
from export.convert import export
from runtime.bundle import Port, manifest_schema
from runtime.container import Container
from runtime.engine import Engine
from runtime.events import ReplyDone, StepDone, Timings
from tests import tiny_llama
from tests.tiny import CHECKPOINT, GOLDEN

ROOT = Path(__file__).parents[1]
INPUTS = GOLDEN.folder / "inputs"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def edgeomni(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in this process, with a cache and a standard input of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object, stdin: str = "") -> Done:
        (tmp_path / "stdin").write_text(stdin)
        with (tmp_path / "stdin").open() as source:
            monkeypatch.setattr(sys, "stdin", source)
            monkeypatch.setattr(sys, "argv", ["edgeomni", *map(str, arguments)])
            with pytest.raises(SystemExit) as left:
                cli.main()
        captured = capsys.readouterr()
        return Done(int(left.value.code or 0), captured.out, captured.err)

    return run


@cache
def omni() -> Path:
    """The golden checkpoint as a bundle, which says that its weights are random."""
    bundle = Path(mkdtemp(prefix="edgeomni-test-")) / "bundle"
    export(CHECKPOINT, bundle, random=True)
    return bundle


def process(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "apps", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, **options)  # type: ignore[call-overload]


def one_message(done: Done) -> str:
    """The single message of a mistake: exit code 2, nothing on stdout, no traceback."""
    assert (done.code, done.out) == (2, "")
    messages = [line for line in done.err.splitlines() if line.startswith("edgeomni: ") and "random" not in line]
    assert len(messages) == 1, done.err
    assert "Traceback" not in done.err
    return done.err


# Help


def test_help_and_version_load_neither_arrays_nor_graphs() -> None:
    heavy = "{'numpy', 'onnxruntime', 'pydantic', 'tokenizers', 'rich.table', 'onnx_ir', 'export.convert'}"
    code = f"""
import atexit, sys
atexit.register(lambda: print(sorted({heavy} & set(sys.modules)), file=sys.stderr))
sys.argv = ["edgeomni", sys.argv[1]]
from apps.cli import main
main()
"""
    for flag in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert not {"numpy", "onnxruntime", "pydantic", "onnx_ir"} & set(json.loads(done.stderr.replace("'", '"')))


def test_every_command_explains_itself(edgeomni: Run) -> None:
    listed = edgeomni("--help").out
    for command in cli.app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert name in listed
        assert edgeomni(name, "--help").code == 0


def test_an_unknown_option_is_a_usage_error(edgeomni: Run) -> None:
    done = edgeomni("inspect", "--nonsense")
    assert done.code == 2
    assert "--nonsense" in done.err


# Export, inspect, verify, parity


def test_a_dry_run_shows_the_plan_and_writes_nothing(edgeomni: Run, tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    record = json.loads(edgeomni("export", checkpoint, "-o", tmp_path / "bundle", "--dry-run", "--json").out)
    assert [graph["name"] for graph in record["graphs"]] == ["embed_tokens", "decoder", "lm_head"]
    assert record["memory_estimate"] > record["bytes_after"] > 0
    shown = edgeomni("export", checkpoint, "--dry-run").out
    for word in ("decoder", "tensors", "parameters", "now", "after", "memory"):
        assert word in shown
    assert not (tmp_path / "bundle").exists()


def test_an_export_without_a_place_asks_for_one(edgeomni: Run, tmp_path: Path) -> None:
    assert "-o BUNDLE" in one_message(edgeomni("export", tiny_llama.save(tmp_path / "checkpoint")))


def test_partial_calibration_without_turns_of_ones_own_is_refused(edgeomni: Run, tmp_path: Path) -> None:
    done = edgeomni("export", CHECKPOINT, "-o", tmp_path / "x", "--recipe", "int4", "--partial-calibration")
    assert "--partial-calibration goes with a --calibration FILE" in one_message(done)


def test_what_export_says_for_machines_is_what_inspect_says(edgeomni: Run, tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    written = edgeomni("export", checkpoint, "-o", tmp_path / "bundle", "--json")
    assert json.loads(written.out) == json.loads(edgeomni("inspect", tmp_path / "bundle", "--json").out)
    assert "--force" in one_message(edgeomni("export", checkpoint, "-o", tmp_path / "bundle"))
    assert edgeomni("export", checkpoint, "-o", tmp_path / "bundle", "--force").code == 0


def test_an_export_with_a_recipe_is_a_quantized_bundle_and_its_plan_is_that_of_one(
    edgeomni: Run, tmp_path: Path
) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    planned = json.loads(edgeomni("export", checkpoint, "--dry-run", "--recipe", "int4-rtn", "--json").out)
    floats = json.loads(edgeomni("export", checkpoint, "--dry-run", "--json").out)
    assert planned["bytes_after"] < floats["bytes_after"] / 3
    assert "int4 by 32, rtn" in edgeomni("export", checkpoint, "-o", tmp_path / "b", "--recipe", "int4-rtn").out
    written = json.loads(edgeomni("inspect", tmp_path / "b", "--json").out)
    assert written["manifest"]["quantization"]["recipe"] == "int4-rtn"
    assert planned["bytes_after"] == pytest.approx(written["weight_bytes"], rel=0.2)
    assert "there is no recipe 'int3'" in one_message(edgeomni("export", "nowhere", "-o", "x", "--recipe", "int3"))


def test_the_manifest_follows_the_published_schema(edgeomni: Run) -> None:
    schema = json.loads(edgeomni("inspect", "--schema").out)
    assert schema == manifest_schema()
    record = json.loads(edgeomni("inspect", omni(), "--json").out)
    jsonschema.Draft202012Validator(schema).validate(record["manifest"])
    record["manifest"]["cache"]["layers"] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(record["manifest"])


def test_inspect_shows_graphs_ports_source_licence_and_warns_of_random_weights(edgeomni: Run) -> None:
    shown = edgeomni("inspect", omni()).out
    for word in ("audio_head", "fp32", "past.0.key  × 2", "float32", "licence", "memory", "weights are random"):
        assert word in shown


def test_ports_that_every_layer_has_are_shown_once() -> None:
    ports = [Port(f"past.{layer}.{side}", "float32", (1, 2)) for layer in range(3) for side in ("key", "value")]
    assert [(port.name, count) for port, count in tables.gathered(ports)] == [("past.0.key", 3), ("past.0.value", 3)]


def test_verify_passes_what_an_export_wrote_and_names_what_was_altered(edgeomni: Run, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export(tiny_llama.save(tmp_path / "checkpoint"), bundle, standalone=True)
    done = edgeomni("verify", bundle)
    assert done.code == 0
    assert "ok      graph decoder" in done.out
    with (bundle / "decoder.data").open("r+b") as file:
        file.write(b"swap")
    done = edgeomni("verify", bundle)
    assert done.code == 2
    assert "decoder.data: altered" in done.err
    record = json.loads(edgeomni("verify", bundle, "--json").out)
    assert not record["passed"]
    assert [check["subject"] for check in record["checks"] if check["problems"]] == ["decoder.data"]


def test_parity_holds_on_the_golden_set_and_its_exit_code_says_when_not(edgeomni: Run, tmp_path: Path) -> None:
    done = edgeomni("parity", omni(), GOLDEN.folder, "--json")
    record = json.loads(done.out)
    assert [row["name"] for row in record["compared"] if not row["passed"]] == []
    assert record["unexplained"] == []
    assert (done.code, record["passed"]) == (0, True)
    altered = tmp_path / "golden"
    altered.mkdir()
    for path in GOLDEN.folder.iterdir():
        (altered / path.name).symlink_to(path)
    (altered / "manifest.json").unlink()
    rows = json.loads((GOLDEN.folder / "manifest.json").read_text())
    (altered / "manifest.json").write_text(json.dumps([*rows, {**rows[0], "name": "an array that nobody replays"}]))
    done = edgeomni("parity", omni(), altered)
    assert done.code == 1
    assert "an array that nobody replays was recorded, but nothing replays it" in done.out
    assert "parity does not hold" in done.out


def test_a_quantized_bundle_says_by_which_recipe_and_answers(edgeomni: Run, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert edgeomni("quantize", tiny_llama.bundle(), "-o", small, "--recipe", "int8").code == 0
    assert "int8: " in edgeomni("inspect", small).out
    assert edgeomni("verify", small).code == 0
    assert edgeomni("chat", small, "Hi", "--greedy", "--max-new", 3).code == 0
    bundle = tmp_path / "b"
    message = one_message(edgeomni("quantize", omni(), "-o", bundle, "--recipe", "no-such-recipe"))
    assert "no-such-recipe" in message


# Chat


def test_a_text_answer_streams_to_stdout_and_its_figures_to_stderr(edgeomni: Run) -> None:
    done = edgeomni("chat", omni(), "Hello", "--greedy", "--max-new", 8)
    assert done.code == 0
    assert len(done.out) > 1
    assert "tokens/s" in done.err
    assert "the weights of this bundle are random" in done.err
    assert edgeomni("chat", omni(), "Hello", "--greedy", "--max-new", 8).out == done.out


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(edgeomni: Run) -> None:
    first, again, other = (edgeomni("chat", omni(), "Hello", "--seed", seed, "--max-new", 20).out for seed in (1, 1, 2))
    assert first == again != other


def test_everything_at_once_is_answered_in_text_and_in_speech(edgeomni: Run, tmp_path: Path) -> None:
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 2.0, (64, 48))
    for shade in (0, 90, 180, 250):
        writer.write(np.full((48, 64, 3), shade, np.uint8))
    writer.release()
    wave = tmp_path / "answer.wav"
    media = ("--audio", INPUTS / "w0.wav", "--image", INPUTS / "i0.png", "--image", INPUTS / "i1.png", "--video", clip)
    done = edgeomni("chat", omni(), "What is this?", *media, "--speak", wave, "--seed", 0, "--json")
    assert done.code == 0
    record = json.loads(done.out)
    assert record["speech"] == str(wave)
    assert record["timings"]["samples"] == soundfile.info(wave).frames > 0
    assert soundfile.info(wave).samplerate == record["timings"]["sampling_rate"] == 24000
    assert record["timings"]["first_audio"] <= record["timings"]["total"]
    assert record["timings"]["real_time_factor"] > 0


def test_what_low_latency_costs_is_measured_and_said(edgeomni: Run, tmp_path: Path, capsys) -> None:
    done = edgeomni("chat", omni(), "Hello", "--speak", tmp_path / "a.wav", "--seed", 3, "--low-latency", "--json")
    assert json.loads(done.out)["low_latency_error"] is not None
    engine = Engine(omni())
    assert engine.manifest.speech is not None
    sizes = engine.manifest.speech.codebook_sizes
    codes = np.random.default_rng(0).integers(0, sizes, (80, len(sizes)))  # longer than one chunk of the flow
    events = [StepDone("audio", (), (), codes), ReplyDone("", "end", Timings())]
    one_answer(iter(events), None, as_json=True, decoder=engine.speech(np.random.default_rng(0), "exact", True))
    assert json.loads(capsys.readouterr().out)["low_latency_error"] > 1e-4
    one_answer(iter(events), None, as_json=True)
    assert json.loads(capsys.readouterr().out)["low_latency_error"] is None


def test_speech_alone_may_be_the_question(edgeomni: Run) -> None:
    done = edgeomni("chat", omni(), "--audio", INPUTS / "w0.wav", "--max-new", 3, "--json")
    assert json.loads(done.out)["timings"]["text_tokens"] <= 3


def test_each_line_from_a_pipe_is_a_turn_of_one_conversation(edgeomni: Run) -> None:
    lines = "Hello\n\n/reset\nHello\nAnd now?\n/quit\nnever read\n"
    done = edgeomni("chat", omni(), "--greedy", "--max-new", 4, "--json", stdin=lines)
    first, after_reset, second = map(json.loads, done.out.splitlines())
    assert first["text"] == after_reset["text"]
    assert first["timings"]["prompt_positions"] == after_reset["timings"]["prompt_positions"]
    alone = json.loads(edgeomni("chat", omni(), "And now?", "--greedy", "--max-new", 4, "--json").out)
    assert second["timings"]["prompt_positions"] < alone["timings"]["prompt_positions"]  # no system prompt again


def test_speech_of_later_turns_does_not_overwrite_that_of_the_first(edgeomni: Run, tmp_path: Path) -> None:
    wave = tmp_path / "a.wav"
    lines = f"/speak {wave}\nHello\nAgain\n/speak off\nHello\n"
    records = [
        json.loads(line) for line in edgeomni("chat", omni(), "--seed", 3, "--json", stdin=lines).out.splitlines()
    ]
    assert [record["speech"] for record in records] == [str(wave), str(tmp_path / "a-2.wav"), None]


def test_attached_media_wait_for_the_next_turn(edgeomni: Run) -> None:
    lines = f"/image {INPUTS / 'i0.png'}\nWhat?\nWhat?\n"
    done = edgeomni("chat", omni(), "--max-new", 2, "--greedy", "--json", stdin=lines)
    with_image, without = (json.loads(line)["timings"]["prompt_positions"] for line in done.out.splitlines())
    assert with_image > without + 10


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    assert "a\x1b[2Jb\r\n\tc\x9b".translate(UNPRINTABLE) == "a\ufffd[2Jb\ufffd\n\tc\ufffd"


def test_prepacked_weights_are_kept_unless_that_is_unwanted(edgeomni: Run, tmp_path: Path) -> None:
    bundle = tiny_llama.bundle()
    plain = edgeomni("chat", bundle, "Hi", "--greedy", "--max-new", 3, "--no-cache")
    assert not (tmp_path / "cache").exists()
    packed = [edgeomni("chat", bundle, "Hi", "--greedy", "--max-new", 3).out for _ in range(2)]
    assert packed == [plain.out, plain.out]
    assert list((tmp_path / "cache" / "edgeomni").iterdir())


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("",), "the turn is empty"),
        (("   \n",), "the turn is empty"),
        (("word " * 9000,), "the model's context has 8192"),
        (("Hi", "--audio", "missing.wav"), "missing.wav is not a file"),
        (("Hi", "--audio", __file__), "cannot be decoded"),
        (("Hi", "--image", __file__), "test_cli.py"),
        (("Hi", "--video", __file__), "test_cli.py"),
        (("Hi", "--speak", "/nowhere/a.wav"), "/nowhere/a.wav cannot be written"),
    ],
)
def test_a_turn_that_cannot_be_answered_is_one_message(edgeomni: Run, arguments: tuple[str, ...], found: str) -> None:
    done = edgeomni("chat", omni(), *arguments)
    assert found in one_message(Done(done.code, "", done.err))


def test_media_that_a_text_model_cannot_take_are_refused_by_name(edgeomni: Run) -> None:
    bundle = tiny_llama.bundle()
    for option, file, found in (
        ("--audio", INPUTS / "w0.wav", "does not listen"),
        ("--image", INPUTS / "i0.png", "does not see"),
        ("--video", INPUTS / "i0.png", "does not watch"),
        ("--speak", "a.wav", "answers in text only"),
    ):
        assert found in one_message(edgeomni("chat", bundle, "Hi", option, file))
    assert "does not listen" in one_message(edgeomni("transcribe", bundle, INPUTS / "w0.wav"))
    assert "no prompt for reading a text aloud" in one_message(edgeomni("say", bundle, "Hi", "a.wav"))


def test_a_base_checkpoint_transcribes_and_reads_aloud(edgeomni: Run, tmp_path: Path) -> None:
    written = json.loads(edgeomni("transcribe", omni(), INPUTS / "w0.wav", "--json").out)
    assert written["timings"]["text_tokens"] > 0
    read = json.loads(edgeomni("say", omni(), "Hello there.", tmp_path / "a.wav", "--seed", 0, "--json").out)
    assert soundfile.info(tmp_path / "a.wav").frames == read["timings"]["samples"] > 0


@pytest.mark.parametrize("command", ["chat", "inspect", "verify"])
def test_a_folder_that_is_no_bundle_is_refused(edgeomni: Run, tmp_path: Path, command: str) -> None:
    assert "is not a bundle" in one_message(edgeomni(command, tmp_path))


def test_lines_with_a_tilde_or_a_slash_are_answered_as_any_other(edgeomni: Run) -> None:
    lines = "about ~10 people came, is that many?\n/usr/bin holds what?\n~\n/shrug\n"
    done = edgeomni("chat", omni(), "--max-new", 2, "--json", stdin=lines)
    assert (done.code, len(done.out.splitlines())) == (0, 4), done.err


def test_a_mistake_in_a_pipe_ends_it_after_what_was_answered(edgeomni: Run) -> None:
    done = edgeomni("chat", omni(), "--max-new", 2, "--json", stdin="Hi\n/audio nothing.wav\nnever\n")
    assert (done.code, len(done.out.splitlines())) == (2, 1)
    assert "nothing.wav is not a file" in done.err


def test_a_package_that_an_extra_brings_is_named_with_its_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxscript'] = None; sys.argv = ['edgeomni', 'export', '.', '--dry-run']; "
        "from apps.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "onnxscript, which is not installed: pip install 'edgeomni[export]'" in one_message(
        Done(done.returncode, done.stdout, done.stderr)
    )


# Pipes, interrupts, terminals


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    started = process("inspect", omni(), "--json", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (1, b"")


LATIN = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
ASCII = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("environment", [LATIN, ASCII, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}])
def test_a_terminal_of_any_encoding_shows_what_it_can(environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from apps import cli, terminal; from runtime.events import TextDelta, ReplyDone, Timings\n"
        "events = lambda: iter([TextDelta('caf\\u00e9 \\u4e2d \\U0001f600'), "
        "ReplyDone('caf\\u00e9 \\u4e2d \\U0001f600', 'stop', Timings())])\n"
        "cli.app = lambda **_: [terminal.one_answer(events(), None, as_json) for as_json in (False, True)]\n"
        "cli.main()"
    )
    env = {**os.environ, **environment, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=env, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    shown, record = done.stdout.splitlines()
    assert shown.startswith(b"caf")
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    assert json.loads(record.decode(encoding))["text"] == "café \u4e2d \U0001f600"


def test_bytes_of_another_encoding_in_a_pipe_are_one_message_after_what_was_answered() -> None:
    arguments = ("chat", omni(), "--max-new", 2, "--json", "--no-cache")
    started = process(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = started.communicate("\ufeffHi\n".encode() + b"caf\xe9?\nnever\n", timeout=120)
    assert (started.returncode, len(out.splitlines())) == (2, 1)
    assert b"the byte 0xE9 at character 4" in err and b"Traceback" not in err


@pytest.mark.parametrize("closed", ["<&-", "</dev/null >&-", "</dev/null 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_bug(closed: str, tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m apps chat {shlex.quote(str(omni()))} --max-new 2 {closed}"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, cwd=ROOT, env=env, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr


def test_a_long_question_is_no_name_of_a_file_and_one_with_a_slash_neither() -> None:
    assert not cli.could_be_folder("why? " * 100)
    assert not cli.could_be_folder("what is 3/4 of 8?")
    assert all(map(cli.could_be_folder, ("/no/such place", "./b", "a/b", str(omni()))))


def test_that_the_sound_of_a_clip_is_not_heard_is_said_with_a_way_to_hear_it(
    edgeomni: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 2.0, (64, 48))
    for _ in range(3):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    assert "not heard" not in edgeomni("chat", omni(), "What?", "--video", clip, "--max-new", 2).err
    monkeypatch.setattr(terminal, "read_container", lambda _: Container(sound=True))
    done = edgeomni("chat", omni(), "What?", "--video", clip, "--max-new", 2)
    assert done.code == 0
    assert f"the sound of {clip} is not heard; for that, ffmpeg -i {clip} {clip.with_suffix('.wav')}" in done.err


@pytest.mark.parametrize("home", [None, "", "relative", "/proc/none"])
def test_without_a_home_folder_weights_are_packed_anew(
    home: str | None, edgeomni: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(doctor.Path, "home", nobody if home is None else lambda: Path(home))
    monkeypatch.setenv("HOME", home or "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    done = edgeomni("chat", omni(), "Hi", "--greedy", "--max-new", 2)
    assert done.code == 0 and "Traceback" not in done.err
    assert ("packed anew" in done.err) == (home != "/proc/none")
    assert "Traceback" not in edgeomni("doctor").err


def test_a_place_that_cannot_be_used_is_one_message(edgeomni: Run, tmp_path: Path) -> None:
    for arguments in (
        ("chat", "x" * 300 + "/b", "Hi"),
        ("inspect", "x" * 300),
        ("chat", omni(), "Hi", "--image", "x" * 300),
        ("chat", omni(), "Hi", "--audio", "~nobody-of-this-name/a.wav"),
        ("chat", omni(), "Hi", "--max-new", 2, "--speak", "x" * 300),
    ):
        done = edgeomni(*arguments)
        assert done.code == 2 and "Traceback" not in done.err, (arguments, done)


class Terminal:
    """A person at a terminal: types, reads what appears, presses Ctrl-C."""

    def __init__(self, *arguments: object, cache: Path):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "XDG_CACHE_HOME": str(cache)}
        self.process = process(
            *arguments,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            # tests that run in the background of a shell are deaf to Ctrl-C, and so would be what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)
        self.seen = ""

    def expect(self, text: str, seconds: float = 60) -> str:
        """Read until `text` has appeared; returns what came since the last call, up to and with it."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, until - time.monotonic()))
            assert ready, f"{text!r} did not appear in {self.seen!r}"
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def see_something(self) -> None:
        """Wait for the next character, whatever it is."""
        if not self.seen:
            self.seen = os.read(self.master, 1).decode(errors="replace")

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def leave(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self.master)
        return code


def test_at_a_terminal_ctrl_c_interrupts_the_answer_and_not_the_program(tmp_path: Path) -> None:
    person = Terminal("chat", omni(), "--seed", 1, "--max-new", 4000, cache=tmp_path)
    person.expect("/help for commands")
    person.expect("> ")
    person.type("/help")
    person.expect("/audio PATH")
    person.expect("> ")
    person.type("/nonsense")
    person.expect("there is no command /nonsense")
    person.expect("> ")
    person.type("Hello")
    person.expect("Hello\r\n")
    person.see_something()
    person.interrupt()
    person.expect("interrupted")
    person.expect("> ")
    time.sleep(0.5)  # readline shows its prompt a moment before it listens
    person.interrupt()
    person.expect("Ctrl-D or /quit to leave")
    person.type("/quit")
    assert person.leave() == 0


def test_ctrl_c_ends_a_single_answer_without_a_traceback(tmp_path: Path) -> None:
    person = Terminal("chat", omni(), "Hello", "--seed", 1, "--max-new", 8000, cache=tmp_path)
    person.expect("not quality\r\n")
    person.see_something()
    person.interrupt()
    assert person.process.wait(timeout=60) == 130
    seen = os.read(person.master, 65536)
    assert b"Traceback" not in seen
    assert b"tokens/s" not in seen
    person.leave()


# Doctor


def test_doctor_describes_this_machine_and_finds_nothing_wrong(edgeomni: Run) -> None:
    record = json.loads(edgeomni("doctor", "--json").out)
    assert "CPUExecutionProvider" in record["providers"]
    assert record["onnxruntime"]
    assert record["problems"] == []
    assert "no problems found" in edgeomni("doctor").out


@pytest.mark.parametrize(
    ("wheels", "providers", "found"),
    [
        ({}, (), "edgeomni[cpu]"),
        ({"onnxruntime": "1", "onnxruntime-gpu": "1"}, ("CPUExecutionProvider",), "pip uninstall -y onnxruntime onnx"),
        ({"onnxruntime-gpu": "1"}, ("CPUExecutionProvider",), "no CUDA provider"),
        ({"onnxruntime": "1"}, (), "cannot be imported"),
    ],
)
def test_doctor_says_what_to_do_about_a_broken_onnx_runtime(wheels, providers, found: str) -> None:
    (problem,) = doctor.wheel_problems(wheels, providers)
    assert found in problem


def test_the_cache_lies_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor.cache_folder() == tmp_path / "edgeomni"
    for unusable in ("", "relative"):  # as the XDG specification asks
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert doctor.cache_folder() == Path.home() / ".cache" / "edgeomni"
