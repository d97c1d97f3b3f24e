"""`edgeomni serve`: a bundle behind a socket until somebody stops it."""

import logging
import socket
from collections.abc import Callable

import uvicorn

from apps.server.http import application, serve
from apps.server.served import Served
from apps.server.settings import ServerSettings
from runtime.engine import Engine
from runtime.errors import EdgeOmniError

GRACE = 5  # seconds that connections have to end when the server is stopped


class Server(uvicorn.Server):
    """A server that ends the replies in the making before it waits for their connections."""

    def __init__(self, served: Served, on_ready: Callable[[str], None]):
        config = uvicorn.Config(
            application(served),
            host=served.settings.host,
            port=served.settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE,
        )
        super().__init__(config)
        self._served, self._on_ready = served, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            host = self._served.settings.host
            self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._served.worker.close()
        await super().shutdown(sockets)


def serve_command(engine: Engine, settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. EdgeOmniError where the address cannot be listened on."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # its tracebacks may hold what a client sent
    with listening(settings) as bound:
        served = serve(engine, settings)
        try:
            Server(served, lambda address: say(f"{settings.name} is served at {address}/v1")).run([bound])
        finally:
            served.worker.close()


def listening(settings: ServerSettings) -> socket.socket:
    """A socket at the address. EdgeOmniError where it is taken, not ours, or none of this machine's."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(kind, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise EdgeOmniError(
            f"{settings.host} port {settings.port} cannot be listened on: {why}; choose others with --host and --port"
        ) from None
    return bound
