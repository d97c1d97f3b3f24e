"""What a server serves: one open bundle under a name, and the thread that it runs in."""

import time
from dataclasses import dataclass, field

from apps.server.answering import Answerer
from apps.server.failures import ApiError
from apps.server.metrics import Metrics
from apps.server.remembered import Remembered
from apps.server.settings import ServerSettings
from apps.server.worker import Worker


@dataclass
class Served:
    settings: ServerSettings
    answerer: Answerer
    worker: Worker
    remembered: Remembered
    metrics: Metrics
    conversations: int = 0  # realtime clients that are there
    since: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str) -> None:
        """ApiError for a model that is not this one."""
        if name != self.settings.name:
            raise ApiError(404, f"this server has one model: {self.settings.name!r}", "model_not_found", "model")

    def model_record(self) -> dict[str, object]:
        return {"id": self.settings.name, "object": "model", "created": self.since, "owned_by": "edgeomni"}
