"""A checkpoint's config.json as frozen dataclasses, spelled as the file spells it."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from export.problems import refuse, shown

READ = ConfigDict(extra="ignore")
MOST = 1 << 24  # of anything that is counted here: no dimension of a known model comes near, and fp32 counts so far
Count = Annotated[int, Field(gt=0, le=MOST, strict=True)]
Layers = Annotated[int, Field(gt=0, le=10_000, strict=True)]
Positions = Annotated[int, Field(gt=0, le=1 << 22, strict=True)]  # 4 Mi: rotary tables of a GB or two
Real = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Base = Annotated[float, Field(gt=1, le=1e15, allow_inf_nan=False, strict=True)]  # of rotary frequencies
T = TypeVar("T")


@dataclass(frozen=True, config=READ)
class DecoderConfig:
    """The text decoder: Llama-like, grouped queries, rotary positions (Qwen2 layout when the qkv bias is on)."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    rope_theta: Base
    rms_norm_eps: Real
    max_position_embeddings: Positions
    attention_qkv_bias: bool = False
    head_norms: bool = False  # RMSNorm of each head's queries and keys before they turn (Qwen3)
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    rope_frequencies: tuple[float, ...] = ()  # radians a position of each pair; empty: as rope_theta has them
    rope_length: float = 1.0  # that cosines and sines are multiplied by
    rope_interleaved: bool = False  # pairs (0, 1), (2, 3), ...; False: halves
    windows: tuple[int, ...] = ()  # of each layer, how many positions it attends to, its own among them; 0: all
    first_position: int = 0  # the omni model counts from 1: generate() passes the running sum of the mask

    @property
    def qkv_size(self) -> int:
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim


@dataclass(frozen=True, config=READ)
class VQConfig:
    codebook_sizes: tuple[Count, ...]


@dataclass(frozen=True, config=READ)
class AudioConfig:
    """Whisper-style encoder, bridge and RVQ, and the audio decoder (HF WhisperConfig field names)."""

    sampling_rate: Count
    n_fft: Count
    hop_length: Count
    num_mel_bins: Count
    max_audio_seconds: Count
    d_model: Count
    encoder_layers: Count
    encoder_attention_heads: Count
    encoder_ffn_dim: Count
    kernel_size: Count
    stride_size: Count
    avg_pooler: Annotated[int, Field(gt=1)]  # the official lengths are undefined for 1
    vq_config: VQConfig
    decoder_layers: Count
    decoder_attention_heads: Count
    decoder_ffn_dim: Count
    decoder_kernel_size: Count
    audio_head_transformer_layers: Count
    audio_start_token_id: int
    audio_end_token_id: int
    audio_pad_token_id: int
    audiogen_start_token_id: int
    audiogen_end_token_id: int
    split_overlap: float = 0.0

    @property
    def bridge_dim(self) -> int:
        """Width of the RVQ: avg_pooler encoder frames side by side."""
        return self.avg_pooler * self.d_model

    @property
    def max_frames(self) -> int:
        """Log-mel frames of the longest segment."""
        return self.max_audio_seconds * self.sampling_rate // self.hop_length


@dataclass(frozen=True, config=READ)
class CFMParams:
    inference_cfg_rate: float
    t_scheduler: str = "cosine"
    solver: str = "euler"


@dataclass(frozen=True, config=READ)
class FlowMatchingConfig:
    prenet_in_dim: Count
    prenet_d_model: Count
    prenet_attention_heads: Count
    prenet_ffn_dim: Count
    prenet_nlayers: Count
    prenet_out_dim: Count
    in_channels: Count
    channels: Annotated[tuple[Count, ...], Field(min_length=1, max_length=1)]  # one level: no down- or up-sampling
    n_blocks: Count
    num_mid_blocks: Count
    num_heads: Count
    attention_head_dim: Count
    diffusion_steps: Count
    cfm_params: CFMParams
    sampling_rate: Count = 24000
    hop_length: Count = 480
    use_hidden_states_before_dconv2: bool = True


@dataclass(frozen=True, config=READ)
class VisionConfig:
    """Qwen2-VL vision tower without its merger; the CLIP fields of the same JSON object are leftovers."""

    depth: Count
    embed_dim: Count
    num_heads: Count
    mlp_ratio: float
    patch_size: Count
    temporal_patch_size: Count
    spatial_merge_size: Count
    hidden_size: Count  # width of the projector's output
    min_pixels: Count
    max_pixels: Count
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    image_start_token_id: int
    image_end_token_id: int
    image_pad_token_id: int
    in_channels: Count = 3
    hidden_act: str = "quick_gelu"
    enable: bool = True
    video_place_token_id: int | None = None
    max_frame_num: int = 32
    decode_way: str = "1fps"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclass(frozen=True, config=READ)
class VocoderConfig:
    """HiFT constructor arguments. The official repository has no file for them; these defaults are its code's."""

    in_channels: Count = 80
    base_channels: Count = 512
    nb_harmonics: Count = 8
    sampling_rate: Count = 24000
    nsf_alpha: float = 0.1
    nsf_sigma: float = 0.003
    nsf_voiced_threshold: float = 10.0
    upsample_rates: tuple[Count, ...] = (8, 5, 3)
    upsample_kernel_sizes: tuple[Count, ...] = (16, 11, 7)
    istft_n_fft: Count = 16
    istft_hop: Count = 4
    resblock_kernel_sizes: tuple[Count, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[Count, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_resblock_kernel_sizes: tuple[Count, ...] = (7, 7, 11)
    source_resblock_dilation_sizes: tuple[tuple[Count, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99
    f0_cond_channels: Count = 512

    @property
    def samples_per_frame(self) -> int:
        product = self.istft_hop
        for rate in self.upsample_rates:
            product *= rate
        return product


@dataclass(frozen=True, config=READ)
class OmniConfig:
    """Baichuan-Omni-1.5: everything that the graphs need, from config.json."""

    decoder: DecoderConfig
    audio_config: AudioConfig
    flow_matching_config: FlowMatchingConfig
    vocoder: VocoderConfig
    visual_config: VisionConfig | None = None
    video_config: VisionConfig | None = None


def parse(kind: type[T], fields: Mapping[str, Any], where: str, spelled: Mapping[str, str] | None = None) -> T:
    """Fill the dataclass `kind` from `fields`; CheckpointError names every field that is missing or wrong.

    `spelled`: how the file at `where` spells fields that are called otherwise there.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(fields))
    except ValidationError as error:
        problems = list(dict.fromkeys(_problem(detail, spelled or {}) for detail in error.errors()))
        refuse(f"{where} does not describe a model that can be exported", problems)
        raise


def _problem(detail: Mapping[str, Any], spelled: Mapping[str, str]) -> str:
    name = ".".join(spelled.get(str(part), str(part)) for part in detail["loc"]) or "(top)"
    found = "missing" if detail["type"] == "missing" else shown(detail["input"])
    return f"{name} is {found}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"
