"""What a checkpoint family tells the exporter, and which families there are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from export.checkpoint import Checkpoint
from export.graph import Subgraph
from export.lazy_tensor import LazyTensor
from runtime.bundle import (
    AudioFrontEnd,
    CacheLayout,
    Gate,
    GenerationDefaults,
    Profile,
    PromptTemplate,
    SpecialTokens,
    SpeechLayout,
    VideoRules,
    VisionFrontEnd,
)


@dataclass(frozen=True)
class Blueprint:
    """A checkpoint as its family reads it: graphs to fill, tensors that fill them, and what the runtime must know."""

    family: str
    subgraphs: tuple[Subgraph, ...]
    tensors: Mapping[str, LazyTensor]
    unused: tuple[str, ...]  # patterns of keys that inference does not need
    tokenizer_json: str
    vocab_size: int
    hidden_size: int
    cache: CacheLayout
    tokens: SpecialTokens
    template: PromptTemplate
    generation: GenerationDefaults
    audio: AudioFrontEnd | None = None
    image: VisionFrontEnd | None = None
    video_frames: VisionFrontEnd | None = None
    video: VideoRules | None = None
    speech: SpeechLayout | None = None
    gate: Gate = field(default_factory=Gate)
    notes: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Family:
    name: str
    recognises: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint, Profile], Blueprint]
