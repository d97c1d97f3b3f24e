"""What both sides said, line by line as it comes, and cut to what was heard."""

from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.live.events import Caption, LiveEvent, ReplyEnded, Transition

Who = Literal["user", "assistant"]
NAMES: dict[Who, str] = {"user": "you", "assistant": "model"}
SPOKEN = "(spoken)"  # what stands for speech of which the bundle makes no transcript
CUT = "[interrupted]"


@dataclass
class Line:
    """One turn of one side; `open` while more of it may come."""

    who: Who
    text: str
    open: bool = True
    cut: bool = False
    heard_ms: float | None = None

    def shown(self) -> str:
        return f"{self.text.strip()} {CUT}".strip() if self.cut else self.text.strip()


@dataclass
class Captions:
    lines: list[Line] = field(default_factory=list)

    def take(self, event: LiveEvent) -> bool:
        """Count one event in; whether what is shown has changed."""
        match event:
            case Transition(event=name) if name.startswith("G(QUERY"):
                self.lines.append(Line("user", SPOKEN))
            case Transition(state="IDLE", event="V_ON"):
                return self._give_up_transcripts()
            case Caption("user", text):
                self._said(text)
            case Caption("assistant", text):
                self._saying(text)
            case ReplyEnded():
                self._ended(event)
            case _:
                return False
        return True

    def as_text(self) -> str:
        return "".join(f"{NAMES[line.who]}: {line.shown()}\n" for line in self.lines)

    def as_records(self) -> list[dict[str, Any]]:
        """For machines; `heard_ms` is null for what was not played."""
        return [
            {"who": line.who, "text": line.text.strip(), "interrupted": line.cut, "heard_ms": line.heard_ms}
            for line in self.lines
        ]

    def _said(self, text: str) -> None:
        """A transcript may come long after its turn; they come in the order of the turns."""
        waiting = next((line for line in self.lines if line.who == "user" and line.open), None)
        if waiting is None:
            self.lines.append(Line("user", text, open=False))
        else:
            waiting.text, waiting.open = text, False

    def _give_up_transcripts(self) -> bool:
        """Who speaks again when all is quiet is heard before what was said is written down: that is dropped then."""
        for line in self.lines:
            line.open = line.open and line.who == "assistant"
        return False

    def _saying(self, text: str) -> None:
        line = self._open_reply()
        if line is None:
            self.lines.append(Line("assistant", text))
        else:
            line.text += text

    def _ended(self, ended: ReplyEnded) -> None:
        line = self._open_reply()
        if line is None:
            if not ended.text or ended.finish == "reset":  # it belongs to the conversation before
                return
            line = Line("assistant", ended.text)
            self.lines.append(line)
        line.open, line.cut, line.heard_ms = False, ended.interrupted, ended.heard_ms
        line.text = ended.heard if ended.interrupted else ended.text or line.text

    def _open_reply(self) -> Line | None:
        return next((line for line in reversed(self.lines) if line.who == "assistant" and line.open), None)
