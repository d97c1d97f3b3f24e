"""POST /v1/chat/completions: one answer, whole or as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apps.server.answering import Done, Started, Told
from apps.server.chat_request import ChatRequest
from apps.server.failures import ApiError
from apps.server.leaving import Streamed, while_there
from apps.server.requests import as_api_error, read_body
from apps.server.served import Served
from apps.server.worker import Job
from runtime.events import Finish, TextDelta

FINISHES: dict[Finish, str] = {"end": "stop", "unaddressed": "stop", "length": "length", "context": "length"}


async def chat_completions(request: Request) -> Response | Streamed:
    """Answer a conversation. 400 for one that cannot be read, 429 where all places are taken."""
    served: Served = request.app.state.served
    wanted = await read_body(request, ChatRequest)
    served.check_model(wanted.model)
    dialogue, how = wanted.dialogue(served.settings.limits), wanted.how()
    job = served.worker.submit(served.answerer.answer(dialogue, how))
    reply = Reply(served.settings.name)
    try:
        started = await while_there(request.receive, anext(job))  # from here on nothing is wrong with the request
        reply.take(started)
        if not wanted.stream:
            await while_there(request.receive, _take_all(reply, job))
            return JSONResponse(reply.whole())
    except BaseException:
        job.close()
        raise
    with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
    return Streamed(
        events(reply, job, with_usage), "text/event-stream", job.close, served.settings.limits.stall_seconds
    )


async def _take_all(reply: "Reply", job: Job[Told]) -> None:
    async for told in job:
        reply.take(told)


async def events(reply: "Reply", job: Job[Told], with_usage: bool) -> AsyncIterator[bytes]:
    """The answer as server-sent events; an error on the way is the last of them."""
    yield _event(reply.chunk({"role": "assistant", "content": ""}))
    try:
        async for told in job:
            reply.take(told)
            if isinstance(told, TextDelta):
                yield _event(reply.chunk({"content": told.text}))
    except Exception as error:  # the status is sent already, so this is the only place left for it
        yield _event(as_api_error(error).body)
        return
    yield _event(reply.chunk({}, FINISHES[reply.done.finish]))
    if with_usage:
        yield _event({**reply.chunk({}), "choices": [], "usage": reply.usage()})
    yield b"data: [DONE]\n\n"


def _event(record: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


@dataclass
class Reply:
    """An answer in the API's words, as it comes together."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    text: list[str] = field(default_factory=list)
    prompt: int = 0
    end: Done | None = None

    def take(self, told: Told) -> None:
        match told:
            case Started(prompt):
                self.prompt = prompt
            case TextDelta(text):
                self.text.append(text)
            case Done():
                self.end = told

    @property
    def done(self) -> Done:
        if self.end is None:
            raise ApiError(500, "the answer ended without an end")
        return self.end

    def usage(self) -> dict[str, Any]:
        count = self.done.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": count, "total_tokens": self.prompt + count}

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(self.text), "refusal": None}
        finish = FINISHES[self.done.finish]
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
