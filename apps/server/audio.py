"""POST /v1/audio/transcriptions and /v1/audio/speech: the words of a recording, and a text read aloud."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from apps.server.answering import Started, Told
from apps.server.chat import EVENTS, Reply, event, take_all
from apps.server.chat_request import VoiceId, Wire
from apps.server.dialogue import How
from apps.server.failures import refused
from apps.server.leaving import Streamed, while_there
from apps.server.requests import as_api_error, read_body, read_form
from apps.server.served import Served
from apps.server.sound import KINDS, Encoder, Format
from apps.server.worker import Job
from runtime.events import AudioChunk, TextDelta
from runtime.sampling import SamplingOptions


class TranscriptionRequest(Wire):
    """The fields of the form beside the file. A language is taken down, and is not needed to understand one."""

    model: str
    language: str | None = Field(default=None, max_length=16)
    response_format: Literal["json", "text", "verbose_json"] = "json"
    temperature: float | None = Field(default=None, ge=0, le=2)
    stream: bool = False
    timestamp_granularities: list[Literal["segment"]] | None = None
    prompt: Literal[""] | None = None  # the model takes none with a recording


async def transcriptions(request: Request) -> Response | Streamed:
    """Write down a recording. 400 for what is none, or where the bundle has no prompt for it."""
    served: Served = request.app.state.served
    wanted, file = await read_form(request, TranscriptionRequest, served.settings.limits)
    served.check_model(wanted.model)
    if not file:
        raise refused("the file is empty", "file")
    if wanted.stream and wanted.response_format != "json":
        raise refused("a stream has the format json", "response_format")
    how = How(sampling=SamplingOptions(wanted.temperature))
    job = served.worker.submit(served.answerer.write_down(file, how))
    reply = Reply(served.settings.name)
    try:
        started = await while_there(request.receive, anext(job))
        assert isinstance(started, Started)
        reply.take(started)
        if not wanted.stream:
            await while_there(request.receive, take_all(reply, job))
            return written(wanted, reply, started.seconds)
    except BaseException:
        job.close()
        raise
    return Streamed(text_events(reply, job), EVENTS, job.close, served.settings.limits.stall_seconds)


def written(wanted: TranscriptionRequest, reply: Reply, seconds: float) -> Response:
    text = "".join(reply.text).strip()
    if wanted.response_format == "text":
        return PlainTextResponse(text + "\n")
    if wanted.response_format == "json":
        return JSONResponse({"text": text, "usage": token_usage(reply)})
    usage = {"type": "duration", "seconds": round(seconds, 3)}
    language = wanted.language or "und"  # which one it is, the model does not say
    return JSONResponse(
        {"task": "transcribe", "language": language, "duration": round(seconds, 3), "text": text, "usage": usage}
    )


async def text_events(reply: Reply, job: Job[Told]) -> AsyncIterator[bytes]:
    """The words as server-sent events; an error on the way is the last of them."""
    try:
        async for told in job:
            reply.take(told)
            if isinstance(told, TextDelta):
                yield event({"type": "transcript.text.delta", "delta": told.text})
    except Exception as error:
        yield event(as_api_error(error).body)
        return
    text = "".join(reply.text).strip()
    yield event({"type": "transcript.text.done", "text": text, "usage": token_usage(reply)})
    yield b"data: [DONE]\n\n"


def token_usage(reply: Reply) -> dict[str, Any]:
    usage = reply.usage()
    return {
        "type": "tokens",
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
    }


class SpeechRequest(Wire):
    model: str
    input: str = Field(min_length=1)
    voice: str | VoiceId  # a bundle has one
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = "mp3"
    speed: Annotated[float, Field(ge=1, le=1)] = 1.0
    instructions: Literal[""] | None = None
    stream_format: Literal["audio"] = "audio"


async def speech(request: Request) -> Streamed:
    """Read a text aloud. 400 where the bundle cannot, or for a text that is blank or too long."""
    served: Served = request.app.state.served
    wanted = await read_body(request, SpeechRequest)
    served.check_model(wanted.model)
    limits = served.settings.limits
    if len(wanted.input) > limits.speech_characters:
        raise refused(f"{len(wanted.input)} characters; at most {limits.speech_characters} are read aloud", "input")
    job = served.worker.submit(served.answerer.read_aloud(wanted.input))
    try:
        await while_there(request.receive, anext(job))
    except BaseException:
        job.close()
        raise
    kind: Format = "pcm16" if wanted.response_format == "pcm" else wanted.response_format
    return Streamed(sound(job, kind), KINDS[kind], job.close, limits.stall_seconds)


async def sound(job: Job[Told], kind: Format) -> AsyncIterator[bytes]:
    """The speech as it comes. An error on the way breaks the stream off: its format has no word for it."""
    encoder: Encoder | None = None
    try:
        async for told in job:
            if isinstance(told, AudioChunk):
                encoder = encoder or Encoder(kind, told.sampling_rate)
                if piece := encoder.push(told.samples):
                    yield piece
    except Exception as error:
        as_api_error(error)  # notes a fault of ours
        raise
    if encoder is not None and (piece := encoder.finish()):
        yield piece
