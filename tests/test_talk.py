"""The conversation at the terminal: its loop, its interface as a pilot uses it, its files, its faults."""

import asyncio
import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from textual.events import Key
from textual.widgets import Input, Static

from apps import talk
from apps.audio_loop import AudioLoop, Order, Shown
from apps.captions import Captions
from apps.check_audio import check_audio
from apps.level import CLIPPING_HINT, DEAD_HINT, QUIET_HINT, Level, Meter, bar
from apps.saved import SaveError, save_json, save_lines, save_two_sides
from apps.talk import TalkApp
from runtime.errors import EdgeOmniError
from runtime.live.events import Caption, Notice, ReplyEnded, Transition, TurnTimes
from runtime.live.settings import HOP, HOP_MS, RATE
from runtime.live.sound_check import Finding
from runtime.trace import Trace
from tests.live_stand_ins import ScriptedModel, ScriptedSight, ScriptedSound, scene, scripted, tone

QUESTION = scene(("silence", 500), ("speech", 1000), ("silence", 1500))
INTERRUPTED = scene(("silence", 500), ("speech", 1000), ("silence", 1000), ("speech", 1500), ("silence", 3000))
ANSWER = "the light is on"


@dataclass
class Scene:
    """A loop with stand-ins for all that is outside, and what it showed."""

    loop: AudioLoop
    model: ScriptedModel
    sound: ScriptedSound
    sight: ScriptedSight
    shown: list[Shown]

    def hops(self, count: int) -> None:
        for _ in range(count):
            self.loop.hop()

    def hear(self, wave: np.ndarray, tail_ms: float = 4000) -> None:
        """Let the loop hear the wave and silence after it."""
        self.sound.wave, self.sound.hops = wave, 0
        self.loop._shift = None
        self.hops(int((len(wave) / RATE * 1000 + tail_ms) / HOP_MS))

    def order(self, what: Any, text: str = "") -> None:
        self.loop.orders.put(Order(what, text))
        self.hops(1)

    def notices(self) -> list[str]:
        return [event.text for event in self.shown if isinstance(event, Notice)]

    def states(self) -> list[str]:
        steps = [event for event in self.shown if isinstance(event, Transition)]
        return [step.next for step in steps if step.next != step.state]


def a_scene(folder: Path | None = None, model: ScriptedModel | None = None, broken: bool = False) -> Scene:
    model, sight, shown = model or ScriptedModel(), ScriptedSight(), []
    live = scripted(model)
    sound = ScriptedSound(live.player, broken=broken)
    loop = AudioLoop(live, sound, lambda: sight, shown.append, folder=folder or Path())
    return Scene(loop, model, sound, sight, shown)


def test_a_question_is_heard_and_answered_and_both_sides_are_captioned() -> None:
    scene = a_scene()
    scene.hear(QUESTION)
    assert scene.states() == ["HEAR", "GATE", "SPEAK", "IDLE"]
    assert scene.loop.captions.as_text() == f"you: is the light on\nmodel: {ANSWER}\n"
    [times] = [event for event in scene.shown if isinstance(event, TurnTimes)]
    assert 200 <= times.after_speech_ms <= 800


def test_an_interrupted_answer_is_captioned_as_far_as_it_was_heard() -> None:
    scene = a_scene(model=ScriptedModel(words=["one ", "two ", "three ", "four ", "five ", "six ", "seven ", "eight"]))
    scene.hear(INTERRUPTED)
    first, second = [line for line in scene.loop.captions.lines if line.who == "assistant"][:2]
    assert first.cut and first.text.strip() in ("one", "one two", "one two three")
    assert not second.cut and second.text == "one two three four five six seven eight"


def test_what_is_typed_is_answered_and_captioned() -> None:
    scene = a_scene()
    scene.order("say", "hello")
    scene.hops(80)
    assert scene.model.read_texts == ["hello"]
    assert scene.loop.captions.as_text() == f"you: hello\nmodel: {ANSWER}\n"


def test_a_muted_microphone_is_not_heard_and_its_sound_is_not_kept() -> None:
    scene = a_scene()
    scene.order("mute")
    scene.hear(QUESTION)
    assert scene.states() == [] and scene.loop.status().muted
    assert not any(said.any() for said, _ in scene.loop.recording)
    scene.order("mute")
    scene.hear(QUESTION)
    assert scene.states()[0] == "HEAR"


def test_push_to_talk_hears_only_while_it_is_pushed() -> None:
    scene = a_scene()
    scene.loop.push_to_talk = True
    scene.hear(QUESTION)
    assert scene.states() == []
    scene.order("push")
    scene.hear(QUESTION)
    assert scene.states() == ["HEAR", "GATE", "SPEAK", "IDLE"]


def test_the_interrupt_key_ends_an_answer_where_it_was_heard() -> None:
    scene = a_scene()
    scene.hear(QUESTION, tail_ms=0)
    assert scene.loop.live.duplex.state == "SPEAK"
    scene.order("interrupt")
    scene.hops(10)
    assert scene.loop.live.duplex.state == "IDLE"
    assert scene.loop.captions.lines[-1].cut


def test_a_camera_is_off_until_asked_for_and_its_frames_reach_the_model_before_the_speech_ends() -> None:
    scene = a_scene()
    scene.hear(QUESTION)
    assert scene.model.seen == [] and not scene.loop.status().camera
    scene.order("camera")
    assert scene.loop.status().camera
    scene.hear(QUESTION)
    assert scene.model.seen
    scene.order("camera")
    assert scene.sight.closed and not scene.loop.status().camera


def test_a_snapshot_is_seen_once_with_the_next_speech_and_leaves_the_camera_off() -> None:
    scene = a_scene()
    scene.order("snapshot")
    assert scene.sight.closed
    scene.hear(np.concatenate([QUESTION, np.zeros(4 * RATE, np.float32), QUESTION]))
    assert scene.model.seen == [b"frame 1"]


def test_a_lost_camera_is_one_line_and_the_conversation_goes_on() -> None:
    scene = a_scene()
    scene.order("camera")
    scene.sight.lost = True
    scene.hear(QUESTION)
    assert scene.notices() == ["the camera is gone; it is looked for"] and scene.loop.status().camera
    assert scene.loop.captions.lines[-1].text == ANSWER
    scene.sight.lost = False
    scene.hear(QUESTION)
    assert scene.notices()[1:] == ["the camera is back"] and scene.model.seen


def test_a_missing_sound_device_is_one_line_and_typing_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    scene = a_scene(broken=True)
    scene.order("say", "hello")
    scene.hops(200)
    assert scene.notices() == ["there is no microphone: connect one; type meanwhile"]
    assert scene.loop.status().text_only
    assert scene.loop.captions.as_text() == f"you: hello\nmodel: {ANSWER}\n"


def test_a_device_that_goes_away_and_comes_back_costs_two_lines_and_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    scene = a_scene()
    scene.hear(QUESTION)
    scene.sound.broken = True
    scene.hops(100)
    scene.sound.broken = False
    scene.hops(100)
    scene.hear(QUESTION)
    gone, back = scene.notices()
    assert "gone" in gone and "back" in back
    assert not scene.loop.status().text_only
    assert scene.loop.captions.as_text() == 2 * f"you: is the light on\nmodel: {ANSWER}\n"


def test_a_model_that_breaks_is_one_line_a_turn_and_the_next_turn_is_answered() -> None:
    scene = a_scene(model=ScriptedModel(failing=True))
    scene.hear(QUESTION)
    assert scene.notices() and all("the scripted model is broken" in line for line in scene.notices())
    scene.model.failing = False
    scene.hear(QUESTION)
    assert scene.loop.captions.lines[-1].text == ANSWER


def test_a_new_conversation_forgets_what_was_said() -> None:
    scene = a_scene()
    scene.hear(QUESTION)
    scene.order("new")
    scene.hops(2)
    assert scene.loop.captions.lines == [] and scene.model.resets == 1


def test_a_new_conversation_begins_without_the_answer_that_it_cut_off() -> None:
    scene = a_scene()
    scene.hear(QUESTION, tail_ms=0)
    assert scene.loop.live.duplex.state == "SPEAK"
    scene.order("new")
    scene.hops(20)
    assert scene.loop.captions.lines == [] and scene.loop.live.duplex.state == "IDLE"


def test_saving_writes_text_record_and_both_sides(tmp_path: Path) -> None:
    scene = a_scene(tmp_path)
    scene.hear(QUESTION)
    scene.order("save")
    text, record, sound = (next(tmp_path.glob(f"*.{ending}")) for ending in ("txt", "json", "wav"))
    assert text.read_text() == f"you: is the light on\nmodel: {ANSWER}\n"
    assert json.loads(record.read_text())["captions"][1]["text"] == ANSWER
    samples, rate = soundfile.read(sound)
    assert rate == RATE and samples.shape[1] == 2 and np.abs(samples).max(axis=0).min() > 0.1
    assert len(list(tmp_path.iterdir())) == 3
    assert any("saved" in line for line in scene.notices())


def test_saving_where_there_is_no_folder_is_one_line_and_the_conversation_goes_on(tmp_path: Path) -> None:
    scene = a_scene(tmp_path / "missing")
    scene.order("save")
    [line] = scene.notices()
    assert "cannot be written" in line and "No such file" in line
    scene.hear(QUESTION)
    assert scene.loop.captions.lines[-1].text == ANSWER


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_no_half_file_and_keeps_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / "both.wav"
    save_two_sides(target, tone(100), tone(50), RATE)
    before = target.read_bytes()
    with files_of_at_most(5000), pytest.raises(SaveError, match="cannot be written"):
        save_two_sides(target, tone(3000), tone(3000), RATE)
    assert target.read_bytes() == before and [target] == list(tmp_path.iterdir())


def test_lines_and_objects_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    save_lines(tmp_path / "log", [{"t": 1.5}, {"said": "ä\n"}])
    assert [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()] == [{"t": 1.5}, {"said": "ä\n"}]
    save_json(tmp_path / "one", {"a": None})
    assert json.loads((tmp_path / "one").read_text()) == {"a": None}


def test_the_loop_leaves_no_device_open_however_it_ends() -> None:
    scene = a_scene()
    scene.order("camera")
    scene.loop.orders.put(Order("quit"))
    scene.loop.run()
    assert scene.sound.closed and scene.sight.closed and scene.loop.live.duplex.state == "CLOSED"
    broken = a_scene()
    broken.loop.show = broken_screen
    with pytest.raises(ZeroDivisionError):
        broken.loop.run()
    assert broken.sound.closed


def broken_screen(shown: Shown) -> None:
    raise ZeroDivisionError


def test_a_transcript_that_comes_late_belongs_to_its_turn() -> None:
    captions = Captions()
    for event in (
        Transition(1, "GATE", "G(QUERY)", "THINK", 12, 0, 0, 1),
        Caption("assistant", "yes "),
        Caption("user", "is it on"),
        Caption("assistant", "it is"),
        ReplyEnded(2, "yes it is", "yes", 400, True, "interrupted"),
    ):
        assert captions.take(event)
    assert captions.as_text() == "you: is it on\nmodel: yes [interrupted]\n"
    assert not captions.take(Notice(3, "any", "line"))


def test_a_transcript_that_never_came_is_not_that_of_the_next_turn() -> None:
    captions = Captions()
    for t in (1, 3):
        captions.take(Transition(t, "IDLE", "V_ON", "HEAR", 1, 0, 0, 1))
        captions.take(Transition(t + 1, "GATE", "G(QUERY)", "THINK", 12, 0, 0, 1))
    captions.take(Caption("user", "the second"))
    assert captions.as_text() == "you: (spoken)\nyou: the second\n"


def test_the_meter_says_what_is_wrong_with_the_level() -> None:
    loud, quiet, dead = Meter(), Meter(), Meter()
    assert loud.measure(np.ones(HOP, np.float32), True).hint == CLIPPING_HINT
    hints = [quiet.measure(tone(HOP_MS, amplitude=0.002), True).hint for _ in range(40)]
    assert hints[0] == "" and hints[-1] == QUIET_HINT
    assert [dead.measure(np.zeros(HOP, np.float32), False).hint for _ in range(40)][-1] == DEAD_HINT
    good = Meter()
    assert {good.measure(tone(HOP_MS), True).hint for _ in range(40)} == {""}


def test_the_level_is_drawn_from_its_floor_to_full_scale() -> None:
    assert bar(Level(-80, -80), 10) == "·" * 10
    assert bar(Level(-30, -30), 10) == "█" * 5 + "·" * 5
    assert bar(Level(-30, -6), 10) == "█████···▏·"
    assert bar(Level(0, 0), 10) == "█" * 10


def test_a_trace_opens_in_chrome_and_keeps_the_newest() -> None:
    trace = Trace(limit=4)
    trace.span("judge", "judge", 10, 12.5, turn=1)
    trace.instant("events", "V_ON", 5)
    trace.counter("ms to play", 20, 300)
    names, *events = trace.record()["traceEvents"][0:1], *trace.record()["traceEvents"][3:]
    assert names[0]["args"] == {"name": "judge"}
    assert [(event["name"], event["ph"], event["ts"]) for event in events] == [
        ("V_ON", "i", 5000), ("judge", "X", 10000), ("ms to play", "C", 20000)
    ]  # fmt: skip
    assert events[1]["dur"] == 2500
    for t in range(20):
        trace.instant("events", "V_ON", t)
    assert len(trace.entries) <= 4 and trace.record()["otherData"]["dropped"] == 23 - len(trace.entries)


@dataclass
class CheckedDevice:
    finding: Finding
    failure: str = ""
    rate: int = 48_000
    mic_name: str = "a microphone"
    speaker_name: str = "a loudspeaker"
    closed: int = 0
    takes: list[Callable[[int], np.ndarray]] = field(default_factory=list)

    def open(self) -> None:
        if self.failure:
            raise EdgeOmniError(self.failure)

    def check(self, seconds: float) -> tuple[Finding, np.ndarray]:
        threading.Thread(target=lambda: [self.takes[0](2400) for _ in range(12) if not time.sleep(0.01)]).start()
        return self.finding, tone(200, 24_000)

    def close(self) -> None:
        self.closed += 1


def check_with(device: CheckedDevice) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    checked = check_audio(None, None, said.append, lambda take, mic, speaker: device.takes.append(take) or device)
    return checked, said


def test_the_check_records_plays_and_says_what_it_found() -> None:
    device = CheckedDevice(Finding("quiet", "too quiet: come closer", -40, -55))
    checked, said = check_with(device)
    assert not checked["ok"] and checked["kind"] == "quiet" and said[-1] == "too quiet: come closer"
    assert "a microphone" in said[0] and device.closed == 1
    good, _ = check_with(CheckedDevice(Finding("ok", "the microphone works", -10, -20)))
    assert good["ok"]


def test_the_check_says_that_there_is_no_device() -> None:
    checked, said = check_with(CheckedDevice(Finding("ok", "", 0, 0), "there is no microphone: connect one"))
    assert not checked["ok"] and said == ["there is no microphone: connect one"]


# The interface


def piloted(app: TalkApp, script: Callable[[Any], Any]) -> None:
    async def run() -> None:
        async with app.run_test(size=(110, 30)) as pilot:
            await script(pilot)
            await until(pilot, lambda: not app.worker.is_alive())  # each script ends with a key that quits

    asyncio.run(run())


async def until(pilot: Any, true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within twenty seconds")


def press(pilot: Any, *keys: str) -> None:
    """As the pilot does, which waits for a process that is idle: ours never is."""
    for key in keys:
        pilot.app.post_message(Key(key, key if len(key) == 1 else None))


def text_of(app: TalkApp, name: str) -> str:
    return str(app.query_one(f"#{name}", Static).render())


def an_app(wave: np.ndarray | None = None, folder: Path | None = None, **scripted_as: Any) -> tuple[TalkApp, Scene]:
    scene = a_scene(folder, **scripted_as)
    scene.sound.wave, scene.sound.pause = wave if wave is not None else np.zeros(0, np.float32), 0.004

    def open_loop(show: Callable[[Shown], None]) -> AudioLoop:
        scene.loop.show = show
        return scene.loop

    return TalkApp(open_loop, "nano"), scene


def test_the_interface_shows_both_sides_the_latency_and_ends_its_thread() -> None:
    app, scene = an_app(QUESTION)

    async def script(pilot: Any) -> None:
        await until(pilot, lambda: ANSWER in text_of(app, "said") and "is the light on" in text_of(app, "said"))
        await until(pilot, lambda: "first sound +" in text_of(app, "times"))
        assert "microphone on" in text_of(app, "state") and "nano, on this device" in text_of(app, "state")
        press(pilot, "q")

    piloted(app, script)
    assert not app.worker.is_alive() and scene.sound.closed


def test_each_key_does_what_its_label_says(tmp_path: Path) -> None:
    app, scene = an_app(folder=tmp_path)

    async def script(pilot: Any) -> None:
        press(pilot, "m")
        await until(pilot, lambda: "MUTED" in text_of(app, "state"))
        press(pilot, "m", "c")
        await until(pilot, lambda: "CAMERA ON" in text_of(app, "state"))
        press(pilot, "c", "space")
        await until(pilot, lambda: "talk now" in text_of(app, "state") and "camera off" in text_of(app, "state"))
        press(pilot, "space")
        await until(pilot, lambda: "space to talk" in text_of(app, "state"))
        press(pilot, "t")
        await until(pilot, lambda: app.query_one(Input).has_focus)
        press(pilot, *"mix")
        await until(pilot, lambda: app.query_one(Input).value == "mix")
        press(pilot, "enter")
        await until(pilot, lambda: "mix" in text_of(app, "said") and ANSWER in text_of(app, "said"))
        assert not scene.loop.muted  # the m of what was typed is no key
        press(pilot, "escape")
        await until(pilot, lambda: app.focused is None)
        press(pilot, "w")
        await until(pilot, lambda: "saved" in text_of(app, "notice"))
        press(pilot, "n")
        await until(pilot, lambda: "say something" in text_of(app, "said"))
        press(pilot, "q")

    piloted(app, script)
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_device_the_interface_says_so_and_waits_for_typing() -> None:
    app, _ = an_app(broken=True)

    async def script(pilot: Any) -> None:
        await until(pilot, lambda: "there is no microphone" in text_of(app, "notice"))
        await until(pilot, lambda: app.query_one(Input).has_focus and "text only" in text_of(app, "state"))
        press(pilot, *"hi")
        await until(pilot, lambda: app.query_one(Input).value == "hi")
        press(pilot, "enter")
        await until(pilot, lambda: ANSWER in text_of(app, "said"))
        press(pilot, "ctrl+c")

    piloted(app, script)
    assert not app.worker.is_alive()


def test_a_loop_that_dies_is_one_line_and_the_interface_stays(capfd: pytest.CaptureFixture[str]) -> None:
    app, scene = an_app(QUESTION, model=ScriptedModel(failing=True))
    scene.loop._step = lambda chunk, frame: 1 / 0  # type: ignore[method-assign]

    async def script(pilot: Any) -> None:
        await until(pilot, lambda: "the conversation ended: ZeroDivisionError" in text_of(app, "notice"))
        press(pilot, "q")

    piloted(app, script)
    assert scene.sound.closed and "Traceback" not in capfd.readouterr().err


def test_a_model_that_hangs_is_said_and_does_not_keep_the_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk, "HUNG_SECONDS", 0.5)
    monkeypatch.setattr(talk, "JOIN_SECONDS", 0.5)
    app, scene = an_app(QUESTION, model=ScriptedModel(hanging=True))

    async def script(pilot: Any) -> None:
        await until(pilot, lambda: "busy with one step" in text_of(app, "notice"))
        press(pilot, "q")

    piloted(app, script)
    assert scene.sound.closed and scene.model.halted.is_set()


def test_where_a_sound_leaves_the_loudspeaker_is_known_from_the_device() -> None:
    scene = a_scene()
    scene.sound.latency.played = 75.0
    scene.hear(QUESTION)
    assert scene.loop.live.player.latency_ms == 75.0


def test_what_a_model_writes_cannot_move_the_cursor() -> None:
    app, _ = an_app(QUESTION, model=ScriptedModel(words=["\x1b[2Jred", "[bold]"], transcript=None))

    async def script(pilot: Any) -> None:
        await until(pilot, lambda: "[bold]" in text_of(app, "said"))
        assert "\x1b" not in text_of(app, "said")
        press(pilot, "q")

    piloted(app, script)
