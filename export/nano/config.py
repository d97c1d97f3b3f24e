"""The small checkpoint's sizes: config.json and hift_config.json read into the exporter's own dataclasses."""

from dataclasses import dataclass
from pathlib import Path

from export.config import AudioConfig, DecoderConfig, FlowMatchingConfig, VisionConfig, VocoderConfig, parse
from export.files import read_json_object


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the torch model's shapes need; the last four size tensors that inference does not use."""

    decoder: DecoderConfig
    audio: AudioConfig
    flow: FlowMatchingConfig
    vision: VisionConfig
    vocoder: VocoderConfig
    picture_tokens: tuple[int, ...]  # ids whose rows come from the projector: image pads, video places
    post_net_channels: tuple[int, ...]
    post_net_bins: int
    decoder_stride_size: int
    prenet_positions: int

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each RVQ level."""
        return self.audio.vq_config.codebook_sizes


def read_config(folder: Path) -> ModelConfig:
    """Read a checkpoint folder's config.json and hift_config.json (absent: the official vocoder's sizes).

    Raises:
        CheckpointError: fields are missing or wrong; all are named.
    """
    path = folder / "config.json"
    raw = read_json_object(path)
    hift = folder / "hift_config.json"
    audio, flow, mel = raw["audio_config"], raw["flow_matching_config"], raw["vocoder_config"]
    return ModelConfig(
        decoder=parse(DecoderConfig, raw, str(path)),
        audio=parse(AudioConfig, audio, str(path)),
        flow=parse(FlowMatchingConfig, flow, str(path)),
        vision=parse(VisionConfig, raw["visual_config"], str(path)),
        vocoder=parse(VocoderConfig, read_json_object(hift) if hift.exists() else {}, str(hift)),
        picture_tokens=(raw["visual_config"]["image_pad_token_id"], raw["video_config"]["video_place_token_id"]),
        post_net_channels=tuple(mel["channels"]),
        post_net_bins=mel["num_mel_bins"],
        decoder_stride_size=audio["decoder_stride_size"],
        prenet_positions=flow["prenet_max_source_positions"],
    )
