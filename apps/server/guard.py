"""What stands before every request: whose page it comes from, whether it shows the token, and how much it sends.

A page of another site that is open in somebody's browser can send requests to this machine. Such a request names its
site in Origin; or, where a name of that site was made to point here (DNS rebinding), in Host.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from apps.server.failures import ApiError, Busy
from apps.server.settings import ServerSettings, is_address

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/healthz"})  # tells nothing, so it needs no token
SUBPROTOCOL = "openai-insecure-api-key."  # in which a browser, that cannot set headers of a WebSocket, gives a token
UNAUTHORISED = 1008  # WebSocket's code for a client that is refused


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, settings: ServerSettings):
        self.app, self.settings = app, settings
        self._names = settings.names
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        try:
            self._check(scope)
            if self._open >= self.settings.limits.open_requests:
                raise Busy(self.settings.limits.open_requests)
        except ApiError as error:
            return await refuse(scope, receive, send, error)
        self._open += 1
        try:
            limited = Body(receive, self.settings).receive if scope["type"] == "http" else receive
            return await self.app(scope, limited, send)
        finally:
            self._open -= 1

    def _check(self, scope: Scope) -> None:
        headers = _single(scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise ApiError(403, "the Host header names no address of this server; use its IP address or localhost")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "requests from pages of other sites are refused (Origin is not this server)")
        if self.settings.token is not None and scope["path"] not in OPEN and not self._shows_token(headers):
            raise ApiError(
                401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN", "invalid_api_key"
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.settings.limits.body:
            raise _too_long(self.settings)

    def _is_ours(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        if not colon or host.endswith("]"):
            name, port = host, "0"
        name = name[1:-1] if name.startswith("[") and name.endswith("]") else name
        return port.isdecimal() and (name.lower() in self._names or is_address(name))

    def _shows_token(self, headers: dict[str, str]) -> bool:
        kind, _, shown = headers.get("authorization", "").partition(" ")
        given = [shown.strip()] if kind.lower() == "bearer" else []
        protocols = (one.strip() for one in headers.get("sec-websocket-protocol", "").split(","))
        given += [one.removeprefix(SUBPROTOCOL) for one in protocols if one.startswith(SUBPROTOCOL)]
        wanted = (self.settings.token or "").encode()
        return any(hmac.compare_digest(one.encode("latin-1", "replace"), wanted) for one in given)


class Body:
    """The body of a request as it comes, no longer and no slower than allowed."""

    def __init__(self, receive: Receive, settings: ServerSettings):
        self._receive, self._settings = receive, settings
        self._deadline = asyncio.get_running_loop().time() + settings.limits.body_seconds
        self._count, self._complete = 0, False

    async def receive(self) -> Message:
        """The next message; ApiError for a body that is too long or takes too long."""
        if self._complete:  # what comes now is the client's leaving, which may take its time
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self._settings.limits.body_seconds:g} s") from None
        self._count += len(message.get("body", b""))
        if self._count > self._settings.limits.body:
            raise _too_long(self._settings)
        self._complete = not message.get("more_body", False)
        return message


def _too_long(settings: ServerSettings) -> ApiError:
    return ApiError(
        413, f"the request is longer than the {settings.limits.body} bytes that are read", "request_too_large"
    )


def _single(scope: Scope) -> dict[str, str]:
    """Headers by name. ApiError where one that is looked at here stands twice, since others may read the other one."""
    headers: dict[str, str] = {}
    for name, value in ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]):
        if name in headers and name in ("host", "origin", "authorization", "content-length"):
            raise ApiError(400, f"the header {name} stands twice")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


async def refuse(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """Answer a request, or what would become a WebSocket, with an error."""
    answer = "http.response" if scope["type"] == "http" else "websocket.http.response"
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in scope.get("extensions", {}):
            return await send({"type": "websocket.close", "code": UNAUTHORISED, "reason": error.message})
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": f"{answer}.start", "status": error.status, "headers": raw})
    return await send({"type": f"{answer}.body", "body": body})
