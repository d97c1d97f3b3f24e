"""What a client of /v1/realtime may send: the events of the GA protocol, checked."""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from apps.server.chat_request import VoiceId, Wire


class Pcm(Wire):
    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24_000] = 24_000


class ServerVad(Wire):
    type: Literal["server_vad"]
    threshold: float | None = Field(0.5, ge=0, le=1)
    prefix_padding_ms: int | None = Field(300, ge=0, le=2_000)
    silence_duration_ms: int | None = Field(500, ge=32, le=10_000)
    create_response: bool | None = True
    interrupt_response: bool | None = True
    idle_timeout_ms: None = None


class SemanticVad(Wire):
    type: Literal["semantic_vad"]
    eagerness: Literal["low", "medium", "high", "auto"] | None = "auto"
    create_response: bool | None = True
    interrupt_response: bool | None = True


TurnDetection = Annotated[ServerVad | SemanticVad, Field(discriminator="type")]


class AudioInput(Wire):
    format: Pcm | None = None
    noise_reduction: dict[str, Any] | None = None
    transcription: dict[str, Any] | None = None
    turn_detection: TurnDetection | None = None


class AudioOutput(Wire):
    format: Pcm | None = None
    voice: str | VoiceId | None = None
    speed: Annotated[float, Field(ge=1, le=1)] | None = None


class Audio(Wire):
    input: AudioInput | None = None
    output: AudioOutput | None = None


Modalities = Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=1)]
MaxTokens = Annotated[int, Field(ge=1)] | Literal["inf"]


class Session(Wire):
    """What of a session may be changed; what is not here stays as it is."""

    type: Literal["realtime"] = "realtime"
    model: str | None = None  # there is one
    instructions: str | None = None
    output_modalities: Modalities | None = None
    audio: Audio | None = None
    max_output_tokens: MaxTokens | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Any = None
    tracing: Any = None
    include: list[Any] | None = Field(default=None, max_length=0)
    prompt: None = None
    reasoning: Any = None


class Content(Wire):
    type: Literal["input_text", "input_audio", "input_image", "output_text", "text"]
    text: str | None = None
    audio: str | None = None
    image_url: str | None = None
    transcript: str | None = None
    detail: str | None = None


class Item(Wire):
    type: Literal["message"]
    role: Literal["user", "assistant", "system"]
    content: list[Content] = Field(min_length=1, max_length=64)
    id: str | None = Field(default=None, min_length=1, max_length=64)
    object: Literal["realtime.item"] | None = None
    status: str | None = None


class ResponseParams(Wire):
    conversation: Literal["auto", "none"] | None = None
    instructions: str | None = None
    output_modalities: Modalities | None = None
    audio: Audio | None = None
    max_output_tokens: MaxTokens | None = None
    metadata: dict[str, str] | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["auto", "none"] | None = None


class ClientEvent(Wire):
    event_id: str | None = Field(default=None, max_length=512)


class SessionUpdate(ClientEvent):
    type: Literal["session.update"]
    session: Session


class Append(ClientEvent):
    type: Literal["input_audio_buffer.append"]
    audio: str


class Commit(ClientEvent):
    type: Literal["input_audio_buffer.commit"]


class Clear(ClientEvent):
    type: Literal["input_audio_buffer.clear"]


class CreateItem(ClientEvent):
    type: Literal["conversation.item.create"]
    item: Item
    previous_item_id: str | None = None


class RetrieveItem(ClientEvent):
    type: Literal["conversation.item.retrieve"]
    item_id: str


class DeleteItem(ClientEvent):
    type: Literal["conversation.item.delete"]
    item_id: str


class TruncateItem(ClientEvent):
    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: int
    audio_end_ms: int = Field(ge=0)


class CreateResponse(ClientEvent):
    type: Literal["response.create"]
    response: ResponseParams | None = None


class CancelResponse(ClientEvent):
    type: Literal["response.cancel"]
    response_id: str | None = None


Client = Annotated[
    SessionUpdate
    | Append
    | Commit
    | Clear
    | CreateItem
    | RetrieveItem
    | DeleteItem
    | TruncateItem
    | CreateResponse
    | CancelResponse,
    Field(discriminator="type"),
]
CLIENT: TypeAdapter[Client] = TypeAdapter(Client)
