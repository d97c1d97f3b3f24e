"""A server on a real socket for tests: the embedded bundle, in a thread of its own, on a free port."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from openai import OpenAI

from apps.embedded import embedded_bundle
from apps.server.command import Server, listening
from apps.server.http import serve
from apps.server.served import Served
from apps.server.settings import ServerSettings
from runtime.bundle import Sampling
from runtime.engine import Engine
from runtime.session import Options

NAME = "nano"


@dataclass(frozen=True)
class Running:
    address: str  # http://127.0.0.1:PORT
    served: Served
    server: Server

    def client(self, key: str = "none", retries: int = 0) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=retries, timeout=60)

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])


@cache
def nano() -> Engine:
    return Engine(embedded_bundle(), Options(threads=1))


@contextmanager
def running(settings: ServerSettings | None = None, engine: Engine | None = None) -> Iterator[Running]:
    """A server that is up; stopped at the end as a signal would."""
    settings = settings or ServerSettings(NAME, port=0)
    addresses: list[str] = []
    up = threading.Event()

    def ready(address: str) -> None:
        addresses.append(address)
        up.set()

    served = serve(engine or nano(), settings)
    with listening(settings) as bound:
        server = Server(served, ready)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])), daemon=True)
        thread.start()
        try:
            assert up.wait(20), "the server did not start"
            yield Running(addresses[0], served, server)
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive(), "the server did not stop"


@cache
def talker() -> Engine:
    """The engine with a model that ends no written answer by itself and, as it draws its words, goes in no loop."""
    return endless(nano().folder)


def endless(folder: Path) -> Engine:
    engine = Engine(folder, nano().options)
    given = engine.manifest
    drawn = Sampling(temperature=8)
    text = replace(given.generation.text, sampling=drawn, stop=(), max_new=given.cache.max_positions)
    generation = replace(given.generation, text=text)
    engine.manifest = replace(given, tokens=replace(given.tokens, eos=(), not_addressed=None), generation=generation)
    return engine
