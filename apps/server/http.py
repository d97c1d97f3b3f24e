"""The routes of the server, and around them what guards them and what is logged of them."""

import logging
import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute

from apps.server.answering import Answerer
from apps.server.audio import speech, transcriptions
from apps.server.chat import chat_completions
from apps.server.failures import ApiError
from apps.server.guard import App, Guard, Message, Receive, Scope, Send
from apps.server.leaving import Left
from apps.server.metrics import KIND, Metrics
from apps.server.realtime import realtime
from apps.server.remembered import Remembered
from apps.server.requests import answer_error, log_fault
from apps.server.served import Served
from apps.server.settings import ServerSettings
from apps.server.worker import Worker
from runtime.engine import Engine
from runtime.errors import EdgeOmniError

log = logging.getLogger("edgeomni.server")


async def healthz(request: Request) -> Response:
    served: Served = request.app.state.served
    return JSONResponse({"status": "ok", "active": served.worker.active, "places": served.worker.places})


async def models(request: Request) -> Response:
    served: Served = request.app.state.served
    return JSONResponse({"object": "list", "data": [served.model_record()]})


async def model(request: Request) -> Response:
    served: Served = request.app.state.served
    served.check_model(request.path_params["name"])
    return JSONResponse(served.model_record())


async def metrics(request: Request) -> Response:
    served: Served = request.app.state.served
    served.metrics.active.set(served.worker.active)
    return Response(served.metrics.text(), media_type=KIND)


ROUTES = [
    Route("/healthz", healthz, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{name:path}", model, methods=["GET"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
    Route("/v1/audio/speech", speech, methods=["POST"]),
    WebSocketRoute("/v1/realtime", realtime),
]


def serve(engine: Engine, settings: ServerSettings) -> Served:
    """Open every graph and start the thread that they run in."""
    engine.open_all()
    measured = Metrics()
    answerer = Answerer(engine, settings.limits, measured)
    return Served(settings, answerer, Worker(settings.sessions), Remembered(settings.limits), measured)


def application(served: Served) -> App:
    """The server as an ASGI application."""
    told = (ApiError, EdgeOmniError, HTTPException, Left, ClientDisconnect, Exception)
    inner = Starlette(routes=ROUTES, exception_handlers=dict.fromkeys(told, answer_error))
    inner.state.served = served
    return Logged(Guard(inner, served.settings), served.metrics)


class Logged:
    """One line a request: what was asked for, the status and the time; nothing of what was said."""

    def __init__(self, app: App, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if status in (0, 101):  # else it was answered, and noted
                log_fault(error)
        finally:
            route = scope.get("route")
            where = getattr(route, "path", "(unknown)")
            self._metrics.requests.labels(where, status).inc()
            log.info(
                "%s %s %d %.0f ms",
                scope.get("method", "WebSocket"),
                where,
                status,
                1000 * (time.perf_counter() - start),
            )
