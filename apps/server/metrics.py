"""What a server has done, in numbers that Prometheus reads; nothing in them tells what was said."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

KIND = CONTENT_TYPE_LATEST


class Metrics:
    """One server's numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered.", ["route", "status"])
        self.prompt = self._counter("prompt_tokens", "Positions of the conversations that were asked about.")
        self.lookups = self._counter("prefix_lookups", "Conversations whose beginning was looked for.")
        self.hits = self._counter("prefix_hits", "Conversations that continued from a kept context.")
        self.reused = self._counter("prefix_reused_tokens", "Positions that were not read again.")
        self.saved = self._counter("prefix_saved_seconds", "What reading them would have taken, at this server's pace.")
        self.read = self._counter("prefill_tokens", "Positions that were read.")
        self.reading = self._counter("prefill_seconds", "What reading them took, other clients' turns not counted.")
        self.active = Gauge("edgeomni_active", "Replies that are being made.", registry=self.registry)
        self.kept_bytes = Gauge("edgeomni_kept_bytes", "Memory of kept contexts.", registry=self.registry)
        self._read_positions, self._read_seconds = 0, 0.0

    def _counter(self, name: str, words: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"edgeomni_{name}", words, labels or [], registry=self.registry)

    def note_prompt(self, positions: int, reused: int) -> None:
        self.prompt.inc(positions)
        self.lookups.inc()
        if reused:
            self.hits.inc()
            self.reused.inc(reused)
            if self._read_positions:
                self.saved.inc(reused * self._read_seconds / self._read_positions)

    def note_read(self, positions: int, seconds: float) -> None:
        self._read_positions += positions
        self._read_seconds += seconds
        self.read.inc(positions)
        self.reading.inc(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
