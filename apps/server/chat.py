"""POST /v1/chat/completions: one answer, whole or as server-sent events."""

import json
import secrets
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apps.server.answering import Done, Started, Told
from apps.server.chat_request import ChatRequest
from apps.server.failures import ApiError
from apps.server.leaving import Streamed, while_there
from apps.server.remembered import Remembered
from apps.server.requests import as_api_error, read_body
from apps.server.served import Served
from apps.server.sound import Format, whole
from apps.server.worker import Job
from runtime.audio import Wave
from runtime.events import AudioChunk, Finish, TextDelta

EVENTS = "text/event-stream"
FINISHES: dict[Finish, str] = {
    "end": "stop",
    "unaddressed": "stop",
    "length": "length",
    "context": "length",
    "repeats": "length",  # it was cut, which is what clients ask this for
}


async def chat_completions(request: Request) -> Response | Streamed:
    """Answer a conversation. 400 for one that cannot be read, 429 where all places are taken."""
    served: Served = request.app.state.served
    wanted = await read_body(request, ChatRequest)
    served.check_model(wanted.model)
    sound = wanted.sound() if wanted.spoken else None
    dialogue, how = wanted.dialogue(served.settings.limits, served.remembered), wanted.how()
    job = served.worker.submit(served.answerer.answer(dialogue, how))
    reply = Spoken(served.settings.name, served.remembered, sound) if sound else Reply(served.settings.name)
    try:
        reply.take(await while_there(request.receive, anext(job)))  # from here on nothing is wrong with the request
        if not wanted.stream:
            await while_there(request.receive, take_all(reply, job))
            return JSONResponse(reply.whole())
    except BaseException:
        job.close()
        raise
    with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
    return Streamed(events(reply, job, with_usage), EVENTS, job.close, served.settings.limits.stall_seconds)


async def take_all(reply: "Reply", job: Job[Told]) -> None:
    async for told in job:
        reply.take(told)


async def events(reply: "Reply", job: Job[Told], with_usage: bool) -> AsyncIterator[bytes]:
    """The answer as server-sent events; an error on the way is the last of them."""
    yield event(reply.chunk(reply.opening()))
    try:
        async for told in job:
            reply.take(told)
            for delta in reply.deltas(told):
                yield event(reply.chunk(delta))
    except Exception as error:  # the status is sent already, so this is the only place left for it
        yield event(as_api_error(error).body)
        return
    yield event(reply.chunk({}, FINISHES[reply.done.finish]))
    if with_usage:
        yield event({**reply.chunk({}), "choices": [], "usage": reply.usage()})
    yield b"data: [DONE]\n\n"


def event(record: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


@dataclass
class Reply:
    """An answer in the API's words, as it comes together."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}", kw_only=True)
    created: int = field(default_factory=lambda: int(time.time()), kw_only=True)
    text: list[str] = field(default_factory=list, kw_only=True)
    prompt: int = field(default=0, kw_only=True)
    cached: int = field(default=0, kw_only=True)
    end: Done | None = field(default=None, kw_only=True)

    def take(self, told: Told) -> None:
        match told:
            case Started(prompt, cached):
                self.prompt, self.cached = prompt, cached
            case TextDelta(text):
                self.text.append(text)
            case Done():
                self.end = told

    @property
    def done(self) -> Done:
        if self.end is None:
            raise ApiError(500, "the answer ended without an end")
        return self.end

    def opening(self) -> dict[str, Any]:
        return {"role": "assistant", "content": ""}

    def deltas(self, told: Told) -> Iterator[dict[str, Any]]:
        """What of it a client that reads a stream is told."""
        if isinstance(told, TextDelta):
            yield {"content": told.text}

    def usage(self) -> dict[str, Any]:
        count = self.done.completion
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": count,
            "total_tokens": self.prompt + count,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": "".join(self.text), "refusal": None}

    def whole(self) -> dict[str, Any]:
        finish = FINISHES[self.done.finish]
        choice = {"index": 0, "message": self.message(), "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass
class Spoken(Reply):
    """An answer in speech, whose words are its transcript. It is remembered by the id of its audio."""

    remembered: Remembered
    format: Format
    waves: list[Wave] = field(default_factory=list, kw_only=True)
    rate: int = field(default=24_000, kw_only=True)

    def __post_init__(self) -> None:
        self.audio_id, self.expires = self.remembered.new()

    def take(self, told: Told) -> None:
        super().take(told)
        match told:
            case AudioChunk(samples, rate):
                self.waves.append(samples)
                self.rate = rate
            case Done(aloud=aloud):
                self.remembered.keep(self.audio_id, self.expires, aloud)

    def opening(self) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "audio": {"id": self.audio_id}}

    def deltas(self, told: Told) -> Iterator[dict[str, Any]]:
        match told:
            case TextDelta(text):
                yield {"audio": {"id": self.audio_id, "transcript": text}}
            case AudioChunk(samples, rate):
                self.waves.clear()  # it is sent
                yield {"audio": {"id": self.audio_id, "data": b64encode(whole(samples, rate, "pcm16")).decode()}}
            case Done():
                yield {"audio": {"id": self.audio_id, "expires_at": self.expires}}

    def message(self) -> dict[str, Any]:
        data = whole(np.concatenate([np.zeros(0, np.float32), *self.waves]), self.rate, self.format)
        sound = {"id": self.audio_id, "data": b64encode(data).decode(), "expires_at": self.expires}
        return {**super().message(), "content": None, "audio": {**sound, "transcript": "".join(self.text)}}
