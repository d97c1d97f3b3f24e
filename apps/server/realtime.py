"""/v1/realtime: a conversation over a WebSocket, in the events of the GA protocol."""

import asyncio
import json
import secrets
from base64 import b64encode
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np
from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from apps.server.answering import Aloud, Done, Started
from apps.server.dialogue import Heard, How
from apps.server.failures import ApiError, misread, refused
from apps.server.guard import SUBPROTOCOL
from apps.server.media import decoded
from apps.server.realtime_ear import SENT_RATE, Ear
from apps.server.realtime_items import Item, Items, new_id, read_item
from apps.server.realtime_wire import (
    CLIENT,
    Append,
    CancelResponse,
    Clear,
    Client,
    Commit,
    CreateItem,
    CreateResponse,
    DeleteItem,
    ResponseParams,
    RetrieveItem,
    Session,
    SessionUpdate,
    TruncateItem,
)
from apps.server.requests import as_api_error
from apps.server.served import Served
from apps.server.sound import whole
from runtime.audio import Wave
from runtime.events import AudioChunk, TextDelta
from runtime.live.endpointer import Found
from runtime.live.vad import open_detector
from runtime.prompt import Text

FULL, IDLE = 1013, 1000  # WebSocket's codes: try again later; the normal end
SHORTEST_MS = 100  # of audio that may be committed
Event = dict[str, Any]


async def realtime(socket: WebSocket) -> None:
    """Hold one conversation, until its client leaves or says nothing for long."""
    served: Served = socket.app.state.served
    offered = socket.scope.get("subprotocols", [])
    await socket.accept("realtime" if "realtime" in offered or any(SUBPROTOCOL in one for one in offered) else None)
    if served.conversations >= served.settings.sessions:
        return await socket.close(FULL, "all places of this server are taken; try again in a moment")
    served.conversations += 1
    try:
        detector = await asyncio.to_thread(open_detector, "auto", served.answerer.engine)
        conversation = Conversation(served, Ear(detector), Line(socket, served.settings.limits.stall_seconds).send)
        await conversation.hold(lambda: next_event(socket, served.settings.limits.idle_seconds))
    except TimeoutError:  # it said nothing, or took nothing, for too long
        with suppress(Exception):
            await socket.close(IDLE, "nothing happened for too long")
    except (WebSocketDisconnect, asyncio.CancelledError):
        pass
    finally:
        served.conversations -= 1
    return None


async def next_event(socket: WebSocket, idle: float) -> str | bytes:
    async with asyncio.timeout(idle):
        message = await socket.receive()
    if message["type"] != "websocket.receive":
        raise WebSocketDisconnect(message.get("code", 1000))
    return message.get("text") or message.get("bytes") or b""


class Line:
    """What is sent, one event after the other; TimeoutError where the client does not take it in time."""

    def __init__(self, socket: WebSocket, stall: float):
        self._socket, self._stall, self._lock = socket, stall, asyncio.Lock()

    async def send(self, event: Event) -> None:
        text = json.dumps({"event_id": new_id("event"), **event}, ensure_ascii=False).encode("utf-8", "replace")
        async with self._lock, asyncio.timeout(self._stall):
            if self._socket.application_state is WebSocketState.CONNECTED:
                await self._socket.send_text(text.decode())


class Conversation:
    """One client's session, items, audio buffer and response; nothing of it is reached by another client."""

    def __init__(self, served: Served, ear: Ear, send: Callable[[Event], Awaitable[None]]):
        self._served, self._ear, self._send = served, ear, send
        self._items = Items(served.settings.limits.messages)
        self._speaks = served.answerer.engine.manifest.speech is not None
        self._session = opening(served.settings.name, self._speaks)
        self._response: Response | None = None
        self._said: str | None = None  # id of the item that is being said
        self._tasks: set[asyncio.Task[None]] = set()
        self._detect()

    async def hold(self, receive: Callable[[], Awaitable[str | bytes]]) -> None:
        try:
            await self._send({"type": "session.created", "session": self._session})
            while True:
                await self._take(await receive())
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, text: str | bytes) -> None:
        """One event of the client; what is wrong with it is told as an event."""
        name: str | None = None
        try:
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                raise refused("the event is no JSON that can be read; expected one object") from None
            name = record.get("event_id") if isinstance(record, dict) else None
            try:
                event = CLIENT.validate_python(record)
            except ValidationError as error:
                raise misread(error) from None
            await self._do(event)
        except (TimeoutError, WebSocketDisconnect, asyncio.CancelledError):
            raise
        except Exception as error:
            await self._send(error_event(as_api_error(error), name if isinstance(name, str) else None))

    async def _do(self, event: Client) -> None:
        match event:
            case SessionUpdate(session=session):
                await self._update(session)
            case Append(audio=audio):
                await self._hear(decoded(audio, "audio"))
            case Commit():
                await self._commit(self._ear.take(), None)
            case Clear():
                self._ear.clear()
                self._said = None
                await self._send({"type": "input_audio_buffer.cleared"})
            case CreateItem(item=given, previous_item_id=before):
                await self._add(read_item(given), before)
            case RetrieveItem(item_id=name):
                await self._send({"type": "conversation.item.retrieved", "item": self._items.find(name).record})
            case DeleteItem(item_id=name):
                self._items.delete(name)
                await self._send({"type": "conversation.item.deleted", "item_id": name})
            case TruncateItem():
                await self._truncate(event)
            case CreateResponse(response=params):
                await self._respond(params or ResponseParams())
            case CancelResponse(response_id=name):
                if self._response is None or name not in (None, self._response.id):
                    raise refused("no such response is being made", "response_id", "response_cancel_not_active")
                await self._cancel("client_cancelled")

    async def _update(self, session: Session) -> None:
        given = session.model_dump(exclude_unset=True, mode="json")
        if given.get("output_modalities") == ["audio"] and not self._speaks:
            raise refused("this model answers in text only", "session.output_modalities")
        before = self._session["audio"]["input"]["turn_detection"]
        merge(self._session, given)
        if self._session["audio"]["input"]["turn_detection"] != before:
            self._detect()
        await self._send({"type": "session.updated", "session": self._session})

    def _detect(self) -> None:
        wanted = Session.model_validate(
            {"audio": {"input": {"turn_detection": self._session["audio"]["input"]["turn_detection"]}}}
        )
        assert wanted.audio is not None and wanted.audio.input is not None
        self._turns = wanted.audio.input.turn_detection
        self._ear.detect(self._turns)

    async def _hear(self, samples: bytes) -> None:
        if len(samples) % 2:
            raise refused("the audio ends within a sample of 16 bits", "audio", "invalid_audio")
        wave = np.frombuffer(samples, "<i2").astype(np.float32) * np.float32(1 / 32768)
        longest = self._served.settings.limits.buffer_seconds
        if self._ear.held_ms / 1000 + len(wave) / SENT_RATE > longest:
            raise refused(f"the audio buffer holds at most {longest:g} s; commit or clear it", "audio", "buffer_full")
        for found in self._ear.push(wave):
            await self._found(found)

    async def _found(self, found: Found) -> None:
        """Somebody began or ended to speak."""
        assert self._turns is not None
        match found.kind:
            case "V_ON":
                self._said, self._ear.began = new_id("item"), found.at
                begin = {"audio_start_ms": round(found.at), "item_id": self._said}
                await self._send({"type": "input_audio_buffer.speech_started", **begin})
                if self._turns.interrupt_response is not False and self._response is not None:
                    await self._cancel("turn_detected")
            case "V_END" | "V_BLIP" | "V_MAX" if self._said is not None and self._ear.began is not None:
                name, wave = self._said, self._ear.wave(self._ear.began, found.at)
                self._said = None
                self._ear.close()
                end = {"audio_end_ms": round(found.at), "item_id": name}
                await self._send({"type": "input_audio_buffer.speech_stopped", **end})
                if found.kind != "V_BLIP":
                    await self._commit(wave, name)
                    if self._turns.create_response is not False:
                        await self._cancel("turn_detected")
                        await self._respond(ResponseParams())

    async def _commit(self, wave: Wave, name: str | None) -> None:
        if len(wave) < 16 * SHORTEST_MS:
            raise refused(
                f"the audio buffer holds {len(wave) / 16:.0f} ms, at least {SHORTEST_MS} are needed",
                None,
                "buffer_too_small",
            )
        heard = Heard(wave)
        item = Item("user", [{"type": "input_audio", "transcript": None}], (heard,), id=name or new_id("item"))
        before = self._items.put(item)
        await self._send({"type": "input_audio_buffer.committed", "item_id": item.id, "previous_item_id": before})
        await self._tell_item(item, before)
        if self._session["audio"]["input"]["transcription"] is not None:
            self._start(self._write_down(item, wave))

    async def _write_down(self, item: Item, wave: Wave) -> None:
        """The words of what was said, for the client to show."""
        at, words, usage = {"item_id": item.id, "content_index": 0}, "", {}
        kind = "conversation.item.input_audio_transcription"
        try:
            job = self._served.worker.submit(self._served.answerer.write_down(wave, How()))
            try:
                prompt = 0
                async for told in job:
                    match told:
                        case Started(prompt):
                            pass
                        case TextDelta(text):
                            words += text
                            await self._send({"type": f"{kind}.delta", **at, "delta": text})
                        case Done(completion=count):
                            usage = {"type": "tokens", "input_tokens": prompt, "output_tokens": count}
            finally:
                job.close()
        except (TimeoutError, WebSocketDisconnect, asyncio.CancelledError):
            raise
        except Exception as error:
            told_error = as_api_error(error).body["error"]
            return await self._send({"type": f"{kind}.failed", **at, "error": told_error})
        item.content[0]["transcript"] = words.strip()
        usage["total_tokens"] = usage["input_tokens"] + usage["output_tokens"]
        return await self._send({"type": f"{kind}.completed", **at, "transcript": words.strip(), "usage": usage})

    async def _add(self, item: Item, behind: str | None) -> None:
        await self._tell_item(item, self._items.put(item, behind))

    async def _tell_item(self, item: Item, before: str | None) -> None:
        for what in ("added", "done"):
            await self._send({"type": f"conversation.item.{what}", "item": item.record, "previous_item_id": before})

    async def _truncate(self, event: TruncateItem) -> None:
        item, layout = self._items.find(event.item_id), self._served.answerer.engine.manifest.speech
        if item.role != "assistant" or not item.spoken or event.content_index != 0 or layout is None:
            raise refused("only the audio of an answer can be truncated", "item_id", "invalid_item")
        if self._response is not None and self._response.item is item:
            await self._cancel("client_cancelled")
        item.truncate(event.audio_end_ms, layout)
        at = {"item_id": item.id, "content_index": 0, "audio_end_ms": event.audio_end_ms}
        await self._send({"type": "conversation.item.truncated", **at})

    async def _respond(self, params: ResponseParams) -> None:
        if self._response is not None:
            raise refused("a response is being made already", None, "conversation_already_has_active_response")
        wanted = {**self._session, **params.model_dump(exclude_none=True, mode="json")}
        if wanted["output_modalities"] == ["audio"] and not self._speaks:
            raise refused("this model answers in text only", "response.output_modalities")
        dialogue = self._items.dialogue(wanted["instructions"] or None)
        response = self._response = Response(wanted, self._send)
        keep = None if params.conversation == "none" else self._items

        async def make() -> None:
            try:
                job = self._served.worker.submit(self._served.answerer.answer(dialogue, response.how))
                try:
                    await response.make(job, keep)
                finally:
                    job.close()
            except (WebSocketDisconnect, asyncio.CancelledError):
                raise
            except Exception as error:
                await response.end("failed", as_api_error(error))
            finally:
                if self._response is response:
                    self._response = None

        await response.begin()
        response.task = self._start(make())

    async def _cancel(self, reason: str) -> None:
        """End the response that is being made, if one is."""
        response, self._response = self._response, None
        if response is None or response.task is None or response.ended:
            return
        response.task.cancel()
        await asyncio.gather(response.task, return_exceptions=True)
        if not response.ended:
            await response.end("cancelled", reason=reason)

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Response:
    """One answer, as the events that tell of it."""

    def __init__(self, wanted: dict[str, Any], send: Callable[[Event], Awaitable[None]]):
        self.id = new_id("resp")
        self._wanted, self._send = wanted, send
        self._spoken = wanted["output_modalities"] == ["audio"]
        most = wanted.get("max_output_tokens")
        self.how = How(None if most in (None, "inf") else most, spoken=self._spoken, seed=secrets.randbits(32))
        self.item: Item | None = None
        self.task: asyncio.Task[None] | None = None
        self.ended = False
        self._kept = False  # as an item of the conversation
        self._text = ""
        self._usage: dict[str, int] | None = None

    async def begin(self) -> None:
        await self._send({"type": "response.created", "response": self._record("in_progress")})

    async def make(self, job: Any, items: Items | None) -> None:
        prompt = 0
        async for told in job:
            match told:
                case Started(prompt):
                    pass
                case TextDelta(text):
                    await self._open(items)
                    self._text += text
                    kind = "output_audio_transcript" if self._spoken else "output_text"
                    await self._part(f"response.{kind}.delta", delta=text)
                case AudioChunk(samples, rate):
                    await self._open(items)
                    data = b64encode(whole(samples, rate, "pcm16")).decode()
                    await self._part("response.output_audio.delta", delta=data)
                case Aloud(piece):
                    item = await self._open(items)
                    item.pieces = (*item.pieces, piece)
                case Done(finish, count):
                    total = prompt + count
                    self._usage = {"input_tokens": prompt, "output_tokens": count, "total_tokens": total}
                    full = finish in ("length", "context", "repeats")
                    await self.end("incomplete" if full else "completed", reason="max_output_tokens" if full else None)

    async def _open(self, items: Items | None) -> Item:
        """The item of the answer, told of when it begins."""
        if self.item is None:
            self._kept = items is not None
            self.item = Item("assistant", [], spoken=self._spoken, status="in_progress")
            before = items.put(self.item) if items is not None else None
            output = {"response_id": self.id, "output_index": 0, "item": self.item.record}
            await self._send({"type": "response.output_item.added", **output})
            if items is not None:
                added = {"item": self.item.record, "previous_item_id": before}
                await self._send({"type": "conversation.item.added", **added})
            part = {"type": "audio", "transcript": ""} if self._spoken else {"type": "text", "text": ""}
            await self._part("response.content_part.added", part=part)
        return self.item

    async def end(self, status: str, error: ApiError | None = None, reason: str | None = None) -> None:
        self.ended = True
        item = self.item
        if item is not None:
            item.status = "completed" if status == "completed" else "incomplete"
            said = {"transcript": self._text} if self._spoken else {"text": self._text}
            item.content = [{"type": "output_audio" if self._spoken else "output_text", **said}]
            item.pieces = item.pieces if self._spoken else (Text(self._text),)
            if self._spoken:
                await self._part("response.output_audio.done")
                await self._part("response.output_audio_transcript.done", transcript=self._text)
            else:
                await self._part("response.output_text.done", text=self._text)
            await self._part("response.content_part.done", part={"type": "audio" if self._spoken else "text", **said})
            output = {"response_id": self.id, "output_index": 0, "item": item.record}
            await self._send({"type": "response.output_item.done", **output})
            if self._kept:
                await self._send({"type": "conversation.item.done", "item": item.record})
        await self._send({"type": "response.done", "response": self._record(status, error, reason)})

    async def _part(self, kind: str, **more: Any) -> None:
        assert self.item is not None
        at = {"response_id": self.id, "item_id": self.item.id, "output_index": 0, "content_index": 0}
        await self._send({"type": kind, **at, **more})

    def _record(self, status: str, error: ApiError | None = None, reason: str | None = None) -> dict[str, Any]:
        details: dict[str, Any] | None = None
        if error is not None:
            told = error.body["error"]
            details = {"type": "failed", "error": {"type": told["type"], "code": told["code"] or told["message"]}}
        elif reason is not None:
            details = {"type": status, "reason": reason}
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": [] if self.item is None else [self.item.record],
            "output_modalities": self._wanted["output_modalities"],
            "max_output_tokens": self._wanted["max_output_tokens"],
            "metadata": self._wanted.get("metadata"),
            "usage": self._usage,
        }


def opening(name: str, speaks: bool) -> dict[str, Any]:
    """A session before anything of it was changed."""
    turns = {
        "type": "server_vad",
        "threshold": 0.5,
        "prefix_padding_ms": 300,
        "silence_duration_ms": 500,
        "create_response": True,
        "interrupt_response": True,
    }
    pcm = {"type": "audio/pcm", "rate": SENT_RATE}
    heard = {"format": pcm, "noise_reduction": None, "transcription": None, "turn_detection": turns}
    return {
        "type": "realtime",
        "object": "realtime.session",
        "id": new_id("sess"),
        "model": name,
        "instructions": "",
        "output_modalities": ["audio"] if speaks else ["text"],
        "audio": {"input": heard, "output": {"format": dict(pcm), "voice": "bundle", "speed": 1.0}},
        "max_output_tokens": "inf",
        "tools": [],
        "tool_choice": "auto",
    }


def merge(session: dict[str, Any], given: dict[str, Any]) -> None:
    """Put what is given in the place of what was; objects are merged, but how turns are detected is one setting."""
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(session.get(key), dict) and key != "turn_detection":
            merge(session[key], value)
        else:
            session[key] = value


def error_event(error: ApiError, name: str | None) -> Event:
    told = error.body["error"]
    return {"type": "error", "error": {**told, "event_id": name}}
