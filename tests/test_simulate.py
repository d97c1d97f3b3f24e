"""A conversation from files: with a scripted model in all detail, and with the embedded one from end to end."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from apps import talk_command
from apps.cli import main
from apps.conversation import Voice, open_live
from apps.embedded import CHECKPOINT, embedded_bundle
from apps.simulate import Simulation, read_frames, simulate, write
from runtime.audio import Wave, load_mono
from runtime.engine import Engine
from runtime.errors import EdgeOmniError, MediaError
from runtime.live.clock import VirtualClock, WallClock
from runtime.live.settings import RATE, Settings
from runtime.live.turn_taking import TABLE
from tests.live_stand_ins import ScriptedModel, scene, scripted
from tests.test_video import FRONT, levels, still, write_video

SAMPLES = CHECKPOINT.parent / "samples"
QUESTION = scene(("silence", 500), ("speech", 1000), ("silence", 500))
INTERRUPTED = scene(("silence", 500), ("speech", 1000), ("silence", 1500), ("speech", 1500), ("silence", 500))
Conversation = tuple[Path, dict[str, Any]]  # where its files lie, and its record
COUNTING = ["one ", "two ", "three ", "four ", "five ", "six ", "seven ", "eight"]


def steps(log: list[dict[str, Any]]) -> list[str]:
    """The states in their order, without those in which nothing changed."""
    return [line["next"] for line in log if line["state"] != line["next"]]


def run(wave: Wave, model: ScriptedModel | None = None, **given: Any) -> Simulation:
    return simulate(scripted(model or ScriptedModel(), clock=VirtualClock()), wave, **given)


def test_a_question_is_answered_after_it_and_the_conversation_comes_to_rest() -> None:
    found = run(QUESTION)
    assert steps(found.log) == ["HEAR", "GATE", "SPEAK", "IDLE"]
    assert [reply.heard for reply in found.replies] == ["the light is on"]
    assert found.underruns == 0


def test_each_line_of_the_log_has_a_time_a_state_an_event_and_the_next_state() -> None:
    found = run(INTERRUPTED, ScriptedModel(COUNTING))
    events = {row.event for row in TABLE} | {"REPLY_ENDED", "TURN_TIMES", "NOTICE", "CAPTION"}
    for line in found.log:
        assert list(line)[:4] == ["t", "state", "event", "next"] and line["event"] in events
    states = [line["state"] for line in found.log[1:]]
    assert states == [line["next"] for line in found.log[:-1]]


def test_an_interruption_cuts_the_answer_in_the_log_and_in_the_recording() -> None:
    found = run(INTERRUPTED, ScriptedModel(COUNTING))
    first, second = found.replies
    assert first.interrupted and 0 < first.heard_ms < len(COUNTING) * 400
    assert "".join(COUNTING).startswith(first.heard) and first.heard != "".join(COUNTING)
    assert not second.interrupted and second.heard == "".join(COUNTING)
    onset = next(line["t"] for line in found.log if line["next"] == "R_HEAR")
    verdict = next(line["t"] for line in found.log if line["event"] == "G(QUERY)" and line["state"] == "R_GATE")
    loud, paused = level(found, onset - 300, onset - 100), level(found, verdict - 100, verdict)
    assert loud > 0.1 and paused == 0


def level(found: Simulation, start: float, end: float) -> float:
    """Of the loudspeaker's side between two times in ms."""
    part = found.played[int(start * found.rate / 1000) : int(end * found.rate / 1000)]
    return float(np.abs(part).max(initial=0))


def test_a_noise_during_an_answer_does_not_change_what_is_answered() -> None:
    found = run(INTERRUPTED, ScriptedModel(COUNTING, verdicts=["QUERY", "NOISE"]))
    assert steps(found.log) == ["HEAR", "GATE", "SPEAK", "R_HEAR", "R_GATE", "SPEAK", "IDLE"]
    assert [reply.heard for reply in found.replies] == ["".join(COUNTING)]


def test_pictures_are_seen_in_their_order_while_the_person_speaks() -> None:
    model = ScriptedModel()
    frames = [(0.0, b"before"), (1000.0, b"while"), (9000.0, b"after")]
    run(scene(("silence", 500), ("speech", 3000), ("silence", 500)), model, frames=frames)
    assert list(dict.fromkeys(model.seen)) == [b"before", b"while"]


def test_in_real_time_a_conversation_takes_as_long_as_it_sounds() -> None:
    live = scripted(ScriptedModel(["on"]), clock=WallClock())
    found = simulate(live, scene(("silence", 200), ("speech", 500)), fast=False)
    assert steps(found.log) == ["HEAR", "GATE", "SPEAK", "IDLE"]
    assert found.wall_seconds == pytest.approx(len(found.played) / found.rate, abs=0.3)


def test_the_recording_has_the_person_left_and_the_answer_right(tmp_path: Path) -> None:
    live = scripted(ScriptedModel())
    found = simulate(live, QUESTION)
    write(found, live.trace, tmp_path / "both.wav", tmp_path / "log.jsonl", tmp_path / "trace.json")
    both, rate = soundfile.read(tmp_path / "both.wav")
    assert rate == 24_000
    said, played = (np.flatnonzero(np.abs(side) > 0.05) / rate for side in both.T)
    assert said[0] == pytest.approx(0.5, abs=0.01) and said[-1] == pytest.approx(1.5, abs=0.01)
    assert played[0] > said[-1] and played[-1] - played[0] == pytest.approx(1.6, abs=0.01)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == found.log


def test_the_trace_shows_states_jobs_and_what_was_cancelled(tmp_path: Path) -> None:
    live = scripted(ScriptedModel(COUNTING))
    simulate(live, INTERRUPTED)
    events = live.trace.record()["traceEvents"]
    names = {(event["ph"], event["name"]) for event in events}
    assert {("X", "SPEAK"), ("X", "judge"), ("X", "reply"), ("i", "V_ON"), ("i", "cancelled")} <= names
    assert all(event["ph"] == "M" or event["ts"] >= 0 for event in events)


def test_a_simulation_that_fails_leaves_no_work_behind() -> None:
    live = scripted(ScriptedModel(failing=True))
    with pytest.raises(RuntimeError, match="broken"):
        simulate(live, QUESTION)
    assert live.duplex.state == "CLOSED" and live.duplex.scheduler.idle


def test_frames_are_a_folders_pictures_one_a_second() -> None:
    frames = read_frames(SAMPLES, FRONT)
    assert [t for t, _ in frames] == [1000.0 * number for number in range(len(frames))]
    assert frames[0][1] == (SAMPLES / "picture-000.png").read_bytes()


def test_frames_are_a_videos_seconds(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [still(2 * number) for number in range(25)], 10)
    frames = read_frames(path, FRONT)
    assert [t for t, _ in frames] == [0.0, 1000.0, 2000.0]
    assert levels([frame for _, frame in frames if not isinstance(frame, bytes)]) == pytest.approx([0, 20, 40], abs=6)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(MediaError, match="holds no pictures"):
        read_frames(tmp_path, FRONT)
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(MediaError, match=r"broken\.png"):
        read_frames(tmp_path, FRONT)


def test_files_that_cannot_be_written_are_refused_before_the_conversation(tmp_path: Path) -> None:
    missing, same = tmp_path / "missing" / "a.wav", tmp_path / "same"
    with pytest.raises(EdgeOmniError, match=r"missing.*no folder.*same file"):
        talk_command.check_files(talk_command.Files(tmp_path / "in.wav", out=missing, log=same, trace=same))


def talk(*arguments: object, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    command = [sys.executable, "-m", "apps", "talk", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


def in_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["edgeomni", "talk", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_explain_prints_every_row_and_every_parameter(capsys, monkeypatch) -> None:
    code, out, _ = in_process(capsys, monkeypatch, "--explain")
    assert code == 0
    for row in TABLE:
        assert row.event in out
    for name in asdict(Settings()):
        assert name.replace("_", " ") in out
    code, out, _ = in_process(capsys, monkeypatch, "--explain", "--json")
    explained = json.loads(out)
    assert len(explained["table"]) == len(TABLE) and explained["settings"]["t_end"] == Settings().t_end


def test_what_belongs_to_a_simulation_is_refused_without_one(capsys, monkeypatch) -> None:
    code, _, err = in_process(capsys, monkeypatch, "--out", "a.wav", "--log", "b.jsonl")
    assert code == 2 and "--out, --log" in err and "--simulate" in err


def test_a_conversation_needs_a_terminal(capsys, monkeypatch) -> None:
    code, _, err = in_process(capsys, monkeypatch, "nowhere")
    assert code == 2 and "needs a terminal" in err and "--simulate" in err


def test_a_file_that_is_not_there_is_one_line(capsys, monkeypatch, tmp_path: Path) -> None:
    code, _, err = in_process(capsys, monkeypatch, "--simulate", str(tmp_path / "missing.wav"))
    assert code == 2 and "missing.wav" in err and "Traceback" not in err


# From end to end, with the embedded model


def spoken(name: str) -> Wave:
    return load_mono(SAMPLES / name, RATE)


def pause(ms: float) -> Wave:
    return np.zeros(int(ms * RATE / 1000), np.float32)


def cough(seed: int = 0) -> Wave:
    """A burst of noise of 0.4 s that dies away."""
    noise = np.random.default_rng(seed).normal(0, 0.2, int(0.4 * RATE))
    return (noise * np.linspace(1, 0, len(noise)) ** 2).astype(np.float32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def said() -> Wave:
    """A question; a cough after its answer; another question, and the first once more over the answer to it."""
    first, second = spoken("kokoro-000.flac"), spoken("kokoro-001.flac")
    parts = [pause(500), first, pause(4500), cough(), pause(2000), second, pause(600), first, pause(500)]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def conversation(tmp_path_factory: pytest.TempPathFactory, cache: Path, said: Wave) -> Conversation:
    folder = tmp_path_factory.mktemp("talk")
    soundfile.write(folder / "said.wav", said, RATE)
    files = ("--out", folder / "out.wav", "--log", folder / "log.jsonl", "--trace", folder / "trace.json")
    given = ("--simulate", folder / "said.wav", "--fast", "--greedy", "--seed", 0, "--json")
    done = talk(*given, *files, cache=cache)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_a_whole_conversation_is_held_from_the_command_line(conversation: Conversation) -> None:
    folder, record = conversation
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps(log)[:2] == ["HEAR", "GATE"] and steps(log)[-1] == "IDLE"
    assert record["replies"][0]["heard"].strip() == "the bedroom light is yellow"
    assert sum(line["event"] == "REPLY_ENDED" for line in log) == len(record["replies"]) >= 2


def test_its_recording_has_both_sides_and_its_trace_its_jobs_and_graphs(conversation: Conversation) -> None:
    folder, record = conversation
    both, rate = soundfile.read(folder / "out.wav")
    assert rate == 24_000 and both.shape[1] == 2
    assert (np.abs(both).max(axis=0) > 0.05).all()
    assert both.shape[0] / rate == pytest.approx(record["seconds"], abs=0.1)
    names = {event["name"] for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"judge", "reply", "SPEAK", "V_ON", "decoder", "vocoder"} <= names


def test_the_embedded_model_is_interrupted_by_a_question_and_not_by_a_cough(
    conversation: Conversation, cache: Path, said: Wave, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which work costs nothing, so that how fast this machine is changes nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    engine = Engine(embedded_bundle())
    live = open_live(engine, Settings(), VirtualClock(), Voice(seed=0, greedy=True), "bundle", aec=False)
    found = simulate(live, said)
    answered = [step for step in steps(found.log) if step in ("SPEAK", "R_HEAR", "THINK")]
    assert answered == ["SPEAK", "SPEAK", "R_HEAR", "THINK", "SPEAK"]
    first, cut, last = found.replies
    assert cut.interrupted and not first.interrupted and not last.interrupted
    assert cut.text.startswith(cut.heard) and len(cut.heard) < len(cut.text)
    assert [reply.heard.strip() for reply in (first, last)] == 2 * ["the bedroom light is yellow"]
    assert found.underruns == 0
