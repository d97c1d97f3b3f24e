"""Work for a client that may leave: it ends with the client; and what is sent is sent no faster than it is taken."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from apps.server.guard import Receive, Scope, Send

T = TypeVar("T")


class Left(Exception):
    """The client is gone, so there is nobody to answer."""


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled where the client leaves first; Left then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Left
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed:
    """A response in pieces, as an ASGI application; `close` is called at its end, however it ends."""

    def __init__(self, pieces: AsyncIterator[bytes], kind: str, close: Callable[[], object], stall: float):
        self._pieces, self._kind, self._close, self._stall = pieces, kind, close, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_there(receive, self._send_all(send))
        except Left:
            pass  # the connection is closed, since the response is not complete
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        headers = [(b"content-type", self._kind.encode()), (b"cache-control", b"no-store")]
        await self._taken(send({"type": "http.response.start", "status": 200, "headers": headers}))
        async for piece in self._pieces:
            await self._taken(send({"type": "http.response.body", "body": piece, "more_body": True}))
        await self._taken(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _taken(self, sending: Awaitable[None]) -> None:
        """Left where the client does not take it in time."""
        try:
            async with asyncio.timeout(self._stall):
                await sending
        except TimeoutError:
            raise Left from None
