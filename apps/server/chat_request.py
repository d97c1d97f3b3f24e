"""The body of POST /v1/chat/completions, checked, and what of it the engine is asked.

What would change the answer and is not done here is refused by name; what only concerns the service is let through.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from apps.server.dialogue import Answered, Asked, Dialogue, Given, Heard, How, Said, Shown
from apps.server.failures import refused
from apps.server.media import decoded, decoded_url
from apps.server.remembered import Remembered
from apps.server.settings import Limits
from apps.server.sound import Format
from runtime.sampling import SamplingOptions


class Wire(BaseModel):
    """A JSON object of which every key is known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(Wire):
    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"  # the bundle has one size


class ImagePart(Wire):
    type: Literal["image_url"]
    image_url: ImageUrl


class AudioData(Wire):
    data: str
    format: str = "wav"  # what it is, it says itself


class AudioPart(Wire):
    type: Literal["input_audio"]
    input_audio: AudioData


Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]


class SystemMessage(Wire):
    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Wire):
    role: Literal["user"]
    content: str | list[Part]
    name: str | None = None


class AudioId(Wire):
    """An answer in speech of this server; what else an SDK repeats of it is not needed."""

    id: str
    data: str | None = None
    transcript: str | None = None
    expires_at: int | None = None


class AssistantMessage(Wire):
    role: Literal["assistant"]
    audio: AudioId | None = None
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: bool = False


class VoiceId(Wire):
    id: str


class AudioOut(Wire):
    format: Format
    voice: str | VoiceId = ""  # a bundle has one


class PlainText(Wire):
    type: Literal["text"]


class ChatRequest(Wire):
    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 31)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 31)
    stop: str | list[str] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
    modalities: list[Literal["text", "audio"]] | None = Field(default=None, min_length=1)
    audio: AudioOut | None = None
    # Only in the form that asks for nothing:
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    response_format: PlainText | None = None
    # Of the service, not of the answer:
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None

    @property
    def spoken(self) -> bool:
        return "audio" in (self.modalities or [])

    def sound(self) -> Format:
        """The format of an answer in speech. ApiError where none is named, or one that cannot be streamed here."""
        if self.audio is None:
            raise refused('say how the speech shall be sent, as in audio={"voice": "any", "format": "wav"}', "audio")
        if self.stream and self.audio.format != "pcm16":
            raise refused("a streamed answer in speech is pcm16, at 24 kHz", "audio.format")
        return self.audio.format

    def how(self) -> How:
        """ApiError for stop strings that could never be, or that are too many."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > 4 or not all(given):
            raise refused("expected at most 4 stop strings, none of them empty", "stop")
        if self.spoken and given:
            raise refused("an answer in speech cannot be cut at a stop string; leave them out", "stop")
        seed = None if self.seed is None else self.seed % (1 << 64)
        sampling = SamplingOptions(self.temperature, self.top_p)
        return How(self.max_completion_tokens or self.max_tokens, tuple(given), sampling, seed, self.spoken)

    def dialogue(self, limits: Limits, remembered: Remembered) -> Dialogue:
        """ApiError where the messages are too many or too long, or stand in an order that is no conversation."""
        if len(self.messages) > limits.messages:
            raise refused(f"{len(self.messages)} messages; at most {limits.messages} are read", "messages")
        ahead = next((i for i, m in enumerate(self.messages) if not isinstance(m, SystemMessage)), len(self.messages))
        systems = [message for message in self.messages[:ahead] if isinstance(message, SystemMessage)]
        system = "\n\n".join(_text(message.content) for message in systems) if systems else None
        turns: list[Asked | Answered] = []
        for index, message in enumerate(self.messages[ahead:], ahead):
            _put(turns, _turn(message, f"messages[{index}]", remembered))
        if not turns or not isinstance(turns[-1], Asked):
            raise refused("the last message must be the user's: it is what is answered", "messages")
        if not isinstance(turns[0], Asked):
            raise refused("the first message, behind the system's, must be the user's", "messages")
        _check_size(system or "", turns, limits)
        return Dialogue(system, tuple(turns))


def _turn(message: Message, at: str, remembered: Remembered) -> Asked | Answered:
    if isinstance(message, SystemMessage):
        raise refused("a system message may stand at the beginning only, since the model reads it there", at)
    if isinstance(message, UserMessage):
        content = message.content
        if isinstance(content, str):
            return Asked((Said(content),))
        return Asked(tuple(_given(part, f"{at}.content[{i}]") for i, part in enumerate(content)))
    if message.audio is not None:
        return Answered("", remembered.find(message.audio.id, f"{at}.audio.id"))
    if message.content is None:
        raise refused("an assistant's message without content", f"{at}.content")
    return Answered(_text(message.content))


def _given(part: Part, at: str) -> Given:
    match part:
        case TextPart(text=text):
            return Said(text)
        case ImagePart(image_url=image):
            return Shown(decoded_url(image.url, f"{at}.image_url.url"))
        case AudioPart(input_audio=audio):
            return Heard(decoded(audio.data, f"{at}.input_audio.data"))


def _put(turns: list[Asked | Answered], turn: Asked | Answered) -> None:
    """Behind the other turns; two of one side are one turn, since the model knows no other order."""
    match turns[-1:], turn:
        case [Asked(before)], Asked(parts):
            turns[-1] = Asked((*before, Said("\n"), *parts))
        case [Answered(before, None)], Answered(text, None):
            turns[-1] = Answered(f"{before}\n{text}")
        case [Answered()], Answered():
            raise refused(
                "an answer in speech stands beside another answer; put the user's message between", "messages"
            )
        case _:
            turns.append(turn)


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _check_size(system: str, turns: list[Asked | Answered], limits: Limits) -> None:
    parts = [part for turn in turns if isinstance(turn, Asked) for part in turn.parts]
    said = [part.text for part in parts if isinstance(part, Said)]
    said += [turn.text for turn in turns if isinstance(turn, Answered)]
    characters, pictures = len(system) + sum(map(len, said)), sum(isinstance(part, Shown) for part in parts)
    if characters > limits.characters:
        raise refused(f"{characters} characters of text; at most {limits.characters} are read", "messages")
    audios = sum(isinstance(part, Heard) for part in parts)
    if audios > limits.audios:
        raise refused(f"{audios} recordings; at most {limits.audios} are heard", "messages")
    if pictures > limits.pictures:
        raise refused(f"{pictures} pictures; at most {limits.pictures} are looked at", "messages")
