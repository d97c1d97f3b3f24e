"""The terminal interface of a live conversation: what is going on, what was said, and a key for each thing to do."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult, ScreenStackError
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.css.query import NoMatches
from textual.message import Message
from textual.widgets import Footer, Input, Static

from apps.audio_loop import AudioLoop, Order, Shown, Status, What
from apps.captions import CUT, NAMES, Captions
from apps.level import Level, bar
from apps.terminal import UNPRINTABLE
from runtime.live.events import Notice, State, TurnTimes

SHOWN_LINES = 100  # captions; all of them are kept for saving
JOIN_SECONDS = 3.0  # that the loop may take to close its devices
HUNG_SECONDS = 3.0  # without a word from the loop, after which that is said
STATES: dict[State, tuple[str, str]] = {
    "IDLE": ("listening", "green"),
    "HEAR": ("hearing you", "bright_green"),
    "GATE": ("hearing you", "bright_green"),
    "THINK": ("thinking", "yellow"),
    "SPEAK": ("speaking", "bright_cyan"),
    "R_HEAR": ("hearing you over the answer", "bright_green"),
    "R_GATE": ("hearing you over the answer", "bright_green"),
    "CLOSED": ("closed", "red"),
}
COLOURS = {"user": "bold cyan", "assistant": "bold green"}


class Came(Message):
    """Something that the loop's thread has to show."""

    def __init__(self, what: Shown):
        super().__init__()
        self.what = what


class TalkApp(App[None]):
    """Shows one AudioLoop, which runs in a thread of its own and is told of keys through its queue."""

    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None
    CSS = """
    Screen { layout: vertical; }
    #state, #level, #times, #notice { height: auto; padding: 0 1; }
    #state { background: $panel; }
    #state, #level, #times { text-wrap: nowrap; text-overflow: ellipsis; }
    #captions { height: 1fr; padding: 1 2; border: round $primary; }
    #notice { color: $warning; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "order('mute')", "mute"),
        Binding("space", "order('push')", "push to talk", key_display="space"),
        Binding("i", "order('interrupt')", "interrupt"),
        Binding("c", "order('camera')", "camera"),
        Binding("s", "order('snapshot')", "snapshot"),
        Binding("n", "order('new')", "new chat"),
        Binding("w", "order('save')", "save"),
        Binding("t", "type", "type"),
        Binding("q", "quit", "quit"),
        Binding("escape", "leave_typing", "keys", show=False),
        Binding("ctrl+c", "quit", "quit", show=False, priority=True),
        Binding("up", "scroll(-3)", show=False),
        Binding("down", "scroll(3)", show=False),
    ]

    def __init__(self, open_loop: Callable[[Callable[[Shown], None]], AudioLoop], about: str):
        """`open_loop` makes the loop around the function that shows something; `about`: what answers."""
        super().__init__()
        self.about = about
        self.captions = Captions()  # the interface's own: the loop's belong to its thread
        self.status = Status()
        self.loop = open_loop(self._came)
        self.worker = threading.Thread(target=self._work, name="audio loop", daemon=True)
        self.shown_at = time.monotonic()  # when the loop was last heard of

    def compose(self) -> ComposeResult:
        yield Static(id="state")
        yield Static(id="level")
        with VerticalScroll(id="captions", can_focus=False):
            yield Static(id="said")
        yield Static("last turn: none yet", id="times")
        yield Static(id="notice")
        yield Input(placeholder="t: type instead of speaking; Enter sends it, Escape goes back to the keys", id="typed")
        yield Footer()

    def on_mount(self) -> None:
        self.title = "edgeomni talk"
        self._show_status()
        self._show_level(Level(-120, -120))
        self._show_captions()
        self.worker.start()
        self.set_interval(1.0, self._watch)

    def on_unmount(self) -> None:
        self.loop.orders.put(Order("quit"))
        if self.worker.is_alive():
            self._join()

    def on_came(self, came: Came) -> None:
        with suppress(NoMatches, ScreenStackError):  # it came while the interface was being taken down
            self.shown_at = time.monotonic()
            self._take(came.what)

    def _take(self, what: Shown) -> None:
        match what:
            case Level():
                self._show_level(what)
            case Status():
                self._take_status(what)
            case TurnTimes():
                self._static("times").update(times_line(what))
            case Notice(_, _, text):
                self._notice(text)
            case event:
                if self.captions.take(event):
                    self._show_captions()

    async def action_quit(self) -> None:
        """The loop first: it may have something to close and to say."""
        self.loop.orders.put(Order("quit"))
        await asyncio.to_thread(self._join)
        self.exit()

    def _join(self) -> None:
        """Wait for the loop; what runs and runs is halted."""
        self.worker.join(JOIN_SECONDS)
        if self.worker.is_alive():
            self.loop.live.halt()
            self.worker.join(JOIN_SECONDS)

    def _watch(self) -> None:
        """A loop that is not heard of is busy: a hop takes 32 ms."""
        if self.worker.is_alive() and time.monotonic() - self.shown_at > HUNG_SECONDS:
            self._notice("the model is busy with one step and hears nothing meanwhile; q leaves")

    def on_input_submitted(self, typed: Input.Submitted) -> None:
        if text := typed.value.strip():
            self.loop.orders.put(Order("say", text))
        typed.input.clear()

    def action_order(self, what: What) -> None:
        if what == "new":
            self.captions.lines.clear()
            self._show_captions()
        self.loop.orders.put(Order(what))

    def action_type(self) -> None:
        self.set_focus(self.query_one(Input))

    def action_leave_typing(self) -> None:
        self.set_focus(None)

    def action_scroll(self, lines: int) -> None:
        self.query_one(VerticalScroll).scroll_relative(y=lines, animate=False)

    def _came(self, what: Shown) -> None:
        """From the loop's thread to ours."""
        self.post_message(Came(what))

    def _work(self) -> None:
        """The loop's thread: what nobody foresaw becomes one line, and the interface stays to save and to quit."""
        try:
            self.loop.run()
        except Exception as error:
            self.post_message(Came(Notice(0, "ended", f"the conversation ended: {type(error).__name__}: {error}")))

    def _take_status(self, status: Status) -> None:
        lost = status.text_only and not self.status.text_only
        self.status = status
        self._show_status()
        if lost:
            self.action_type()

    def _show_status(self) -> None:
        self._static("state").update(status_line(self.status, self.about))

    def _show_level(self, level: Level) -> None:
        colour = "red" if level.hint else "green"
        text = Text.assemble(
            "microphone ", (bar(level), colour), f" {level.rms_db:4.0f} dB  ", (level.hint, "bold red")
        )
        self._static("level").update(text)

    def _show_captions(self) -> None:
        self._static("said").update(captions_text(self.captions))
        self.query_one(VerticalScroll).scroll_end(animate=False)

    def _notice(self, text: str) -> None:
        self._static("notice").update(Text(" ".join(text.split())))

    def _static(self, name: str) -> Static:
        return self.query_one(f"#{name}", Static)


def status_line(status: Status, about: str) -> Text:
    """State, microphone, camera and what answers, in one line."""
    word, colour = STATES[status.state]
    parts = [(f"● {word}", f"bold {colour}"), _mouth(status), _camera(status)]
    if status.text_only:
        parts.append(("text only", "bold red"))
    if status.half_duplex:
        parts.append(("half duplex", "yellow"))
    parts.append((f"underruns {status.underruns}", "red" if status.underruns else "dim"))
    parts.append((f"{about}, on this device", "dim"))
    return Text("   ").join(Text(text, style) for text, style in parts)


def _mouth(status: Status) -> tuple[str, str]:
    if not status.hearing:
        return "no microphone", "bold red"
    if status.muted:
        return "MUTED", "bold red"
    if status.push_to_talk:
        return ("talk now, space ends", "bold green") if status.pushed else ("space to talk", "bold yellow")
    return "microphone on", "green"


def _camera(status: Status) -> tuple[str, str]:
    return ("CAMERA ON", "bold red") if status.camera else ("camera off", "dim")


def captions_text(captions: Captions) -> Text:
    """The newest lines of both sides; what was not heard of an answer is not in it."""
    shown = Text()
    for line in captions.lines[-SHOWN_LINES:]:
        shown.append(f"{NAMES[line.who]:>6}  ", COLOURS[line.who])
        shown.append(line.text.strip().translate(UNPRINTABLE))
        shown.append(f" {CUT}" if line.cut else "", "bold red")
        shown.append("\n")
    return shown if captions.lines else Text("say something", "dim")


def times_line(times: TurnTimes) -> str:
    """Milliseconds from the end of the speech to each stage of the turn."""
    stages = [("pause noticed", times.soft_ms), ("understood", times.verdict_ms), ("turn over", times.end_ms)]
    shown = [f"{name} +{at - times.speech_end_ms:.0f}" for name, at in stages if at is not None]
    return f"last turn, ms after your speech: {' · '.join(shown)} · first sound +{times.after_speech_ms:.0f}"
