"""What was worked on and when, as the JSON that Chrome's tracing page and Perfetto open."""

from dataclasses import dataclass, field
from typing import Any

PROCESS = 1


@dataclass
class Trace:
    """Spans and instants in milliseconds of the conversation's clock, each on a named track.

    Bounded: beyond `limit` entries the oldest half is dropped and counted, since a conversation may last for hours.
    With a limit of 0 nothing is kept.
    """

    limit: int = 500_000
    dropped: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    tracks: dict[str, int] = field(default_factory=dict)

    def span(self, track: str, name: str, start: float, end: float, **details: object) -> None:
        """Work that took from `start` to `end`."""
        timing = {"ph": "X", "ts": _microseconds(start), "dur": _microseconds(max(0.0, end - start))}
        self._add(track, name, timing, details)

    def instant(self, track: str, name: str, at: float, **details: object) -> None:
        """Something that takes no time: a transition, a cancel, an underrun."""
        self._add(track, name, {"ph": "i", "s": "t", "ts": _microseconds(at)}, details)

    def counter(self, name: str, at: float, value: float) -> None:
        """A figure that is drawn over time, such as milliseconds of audio that wait to be played."""
        self._add(name, name, {"ph": "C", "ts": _microseconds(at)}, {name: value})

    def record(self) -> dict[str, Any]:
        """The whole file: a name for each track, then the entries in the order of their times."""
        names = [
            {"ph": "M", "pid": PROCESS, "tid": number, "name": "thread_name", "args": {"name": track}}
            for track, number in self.tracks.items()
        ]
        entries = sorted(self.entries, key=lambda entry: entry["ts"])
        return {"displayTimeUnit": "ms", "otherData": {"dropped": self.dropped}, "traceEvents": [*names, *entries]}

    def _add(self, track: str, name: str, timing: dict[str, Any], details: dict[str, object]) -> None:
        if not self.limit:
            return
        number = self.tracks.setdefault(track, len(self.tracks) + 1)
        self.entries.append({"name": name, "pid": PROCESS, "tid": number, **timing, "args": details})
        if len(self.entries) > self.limit:
            self.dropped += len(self.entries) // 2
            del self.entries[: len(self.entries) // 2]


def _microseconds(milliseconds: float) -> float:
    return round(milliseconds * 1000, 1)
