"""Baichuan-Omni-1.5 and its Base: where its parameters lie, how its prompts read, and how its answers are sampled."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from export.audio_decoder import audio_decoder, frames_short
from export.audio_encoder import audio_encoder
from export.audio_head import audio_head
from export.checkpoint import Checkpoint
from export.config import AudioConfig, OmniConfig, VisionConfig, parse
from export.decoder import cache_layout, decoder, embed_audio, embed_tokens, lm_head
from export.families.family import Blueprint, Family
from export.files import read_json_object
from export.flow_matching import CHUNK_FRAMES, flow_estimator, flow_prenet
from export.graph import Subgraph
from export.lazy_tensor import LazyTensor
from export.tokenizer_files import tokenizer_json
from export.unet import time_steps
from export.vad import vad, vad_tensors
from export.vision_encoder import vision_encoder, vision_projector
from export.vocoder import receptive_frames, vocoder, vocoder_f0
from runtime.bundle import (
    AudioFrontEnd,
    Gate,
    GenerationDefaults,
    Profile,
    PromptTemplate,
    Sampling,
    SpecialTokens,
    SpeechLayout,
    Step,
    VideoRules,
    VisionFrontEnd,
)
from runtime.errors import CheckpointError

HIFT = "hift."  # the vocoder lies in a file of its own, whose keys have no prefix

# Stored, but not needed to answer: averages that training keeps of the codebooks, biases that the audio head's
# forward never adds, the 16 kHz mel branch that flow matching replaced, and a position table that is never read.
UNUSED = (
    "*.codebook.embed_avg",
    "*.codebook.cluster_size",
    "audio_head.transformer_layers.*.linear1.bias",
    "audio_head.transformer_layers.*.linear2.bias",
    "audio_tokenizer.audio_decoder.dconv2.*",
    "audio_tokenizer.audio_decoder.post_net.*",
    "audio_tokenizer.audio_flow_matching_decoder.prenet.positional_embedding",
    "*.rotary_emb.inv_freq",
    "hift.stft_window",
)

TEMPLATE = PromptTemplate(
    system=("<B_SYS>", ""),
    user=("<C_Q>", ""),
    assistant=("<C_A>", ""),
    spoken_assistant=("<audiotext_start_baichuan><C_A>", ""),
    transcribe="将语音转录为文本:{audio}",
    speak="{text}<audiogen_start_baichuan>",
    default_system="请用【邻家女声】这个声音回答问题。",
)

AUDIO_BEGINS = "<audiogen_start_baichuan>"
PAUSES = (",", "!", "?", "，", "。", "！", "？", ". ")

# The constants of the official demos (web_demo/*.py).
GENERATION = GenerationDefaults(
    text=Step(Sampling(0.8, 20, 0.85, 1.1), max_new=1024, stop=("<|endoftext|>",)),
    first_text=Step(Sampling(0.8, 20, 0.85, 1.1), max_new=50, stop=(AUDIO_BEGINS, "<|endoftext|>")),
    later_text=Step(Sampling(0.3, 20, 0.85, 1.05), max_new=50, stop=(AUDIO_BEGINS, *PAUSES)),
    audio=Step(Sampling(0.5, 5, 0.85, 1.3), max_new=500),
    transcribe=Step(Sampling(repetition_penalty=1.3, greedy=True), max_new=700, stop=("<|endoftext|>",)),
)
OVERLAP_SECONDS = 0.01  # cross-fade between the waves of two segments


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Declared:
    """What a checkpoint says of itself under "edgeomni" in generation_config.json; the official ones say nothing."""

    not_addressed_token_id: int | None = None  # it begins its answer with this when nobody spoke to it
    sampling: dict[Literal["text", "first_text", "later_text", "audio", "transcribe"], Sampling] = Field(
        default_factory=dict
    )  # instead of the official demos' values, which suit the official codebooks
    gate: Gate = Gate()

    def generation(self) -> GenerationDefaults:
        steps = {
            name: replace(getattr(GENERATION, name), sampling=sampling) for name, sampling in self.sampling.items()
        }
        return replace(GENERATION, **steps)


def recognises(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") == "omni" and "audio_config" in checkpoint.config


def read_config(checkpoint: Checkpoint) -> OmniConfig:
    """config.json, and hift_config.json where a checkpoint has one; CheckpointError names everything wrong in them."""
    fields = {**checkpoint.config}
    fields["decoder"] = {**checkpoint.config, "first_position": 1}
    fields["vocoder"] = read_json_object(checkpoint.hift_config) if checkpoint.hift_config else {}
    for name in ("visual_config", "video_config"):
        if not (fields.get(name) or {}).get("enable", True):
            fields[name] = None
    return parse(OmniConfig, fields, str(checkpoint.folder / "config.json"))


def tensors(checkpoint: Checkpoint) -> Mapping[str, LazyTensor]:
    """All tensors under the names that the graphs use. The voice activity detector is ours: no checkpoint has one."""
    hift = {HIFT + key: tensor for key, tensor in (checkpoint.hift or {}).items()}
    return {**checkpoint, **hift, **vad_tensors()}


def subgraphs(config: OmniConfig, profile: Profile) -> Iterator[Subgraph]:
    """The graphs in the order of the model's figure; a checkpoint without vision (Baichuan-Audio) has fewer."""
    yield audio_encoder(config.audio_config, profile)
    if config.visual_config is not None:
        yield vision_encoder(config.visual_config, profile)
        yield vision_projector(config.visual_config, profile)
    yield embed_tokens(config.decoder, profile)
    yield embed_audio(config.decoder, config.audio_config.vq_config.codebook_sizes, profile)
    yield decoder(config.decoder, profile)
    yield lm_head(config.decoder, profile)
    yield audio_head(config, profile)
    yield audio_decoder(config.audio_config, profile)
    yield flow_prenet(config.flow_matching_config, profile)
    yield flow_estimator(config.flow_matching_config, profile)
    yield vocoder_f0(config.vocoder)
    yield vocoder(config.vocoder)
    yield vad()


def read(checkpoint: Checkpoint, profile: Profile) -> Blueprint:
    if checkpoint.hift is None:
        raise CheckpointError(
            f"{checkpoint.folder} has no vocoder: expected hift.pt or hift.safetensors beside the weights "
            "(the official repository keeps it under third_party; copy it here)"
        )
    config, found, declared = read_config(checkpoint), tensors(checkpoint), read_declared(checkpoint)
    return Blueprint(
        family=FAMILY.name,
        subgraphs=tuple(subgraphs(config, profile)),
        tensors=found,
        unused=UNUSED,
        tokenizer_json=tokenizer_json(checkpoint.folder),
        vocab_size=config.decoder.vocab_size,
        hidden_size=config.decoder.hidden_size,
        cache=cache_layout(config.decoder, profile),
        tokens=replace(special_tokens(checkpoint, config), not_addressed=declared.not_addressed_token_id),
        template=TEMPLATE,
        generation=declared.generation(),
        audio=audio_front_end(config.audio_config),
        image=config.visual_config and vision_front_end(config.visual_config),
        video_frames=config.video_config and vision_front_end(config.video_config),
        video=config.video_config and video_rules(config.video_config),
        speech=speech_layout(config, found),
        gate=declared.gate,
    )


def read_declared(checkpoint: Checkpoint) -> Declared:
    """The checkpoint's own settings; CheckpointError names what is wrong with them."""
    path = checkpoint.folder / "generation_config.json"
    return parse(Declared, read_json_object(path).get("edgeomni", {}), f"{path}, edgeomni,")


def special_tokens(checkpoint: Checkpoint, config: OmniConfig) -> SpecialTokens:
    """Ids from config.json; the end token from generation_config.json, for config.json's own are leftovers."""
    path = checkpoint.folder / "generation_config.json"
    stated = read_json_object(path).get("eos_token_id")
    ends = tuple(end for end in (stated if isinstance(stated, list) else [stated]) if isinstance(end, int))
    if not ends:
        raise CheckpointError(f"{path} has eos_token_id {stated!r}, expected the id (or ids) that end an answer")
    audio, visual, video = config.audio_config, config.visual_config, config.video_config
    return SpecialTokens(
        eos=ends,
        audio_start=audio.audio_start_token_id,
        audio_end=audio.audio_end_token_id,
        audio_pad=audio.audio_pad_token_id,
        img_start=visual and visual.image_start_token_id,
        img_end=visual and visual.image_end_token_id,
        img_pad=visual and visual.image_pad_token_id,
        video_place=video and video.video_place_token_id,
        audiogen_start=audio.audiogen_start_token_id,
        audiogen_end=audio.audiogen_end_token_id,
    )


def audio_front_end(config: AudioConfig) -> AudioFrontEnd:
    return AudioFrontEnd(
        sampling_rate=config.sampling_rate,
        n_fft=config.n_fft,
        hop_length=config.hop_length,
        num_mel_bins=config.num_mel_bins,
        max_audio_seconds=config.max_audio_seconds,
        split_overlap=config.split_overlap,
        avg_pooler=config.avg_pooler,
        stride=config.stride_size,
        codebook_sizes=config.vq_config.codebook_sizes,
    )


def vision_front_end(config: VisionConfig) -> VisionFrontEnd:
    return VisionFrontEnd(
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
        image_mean=config.image_mean,
        image_std=config.image_std,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )


def video_rules(config: VisionConfig) -> VideoRules:
    return VideoRules(max_frame_num=config.max_frame_num, decode_way=config.decode_way)


def speech_layout(config: OmniConfig, found: Mapping[str, LazyTensor]) -> SpeechLayout:
    audio, flow, hift = config.audio_config, config.flow_matching_config, config.vocoder
    f0_context, wave_context = receptive_frames(hift)
    positions = found.get("audio_tokenizer.audio_decoder.positional_embedding")
    return SpeechLayout(
        codebook_sizes=audio.vq_config.codebook_sizes,
        frames_per_code=audio.avg_pooler,
        frames_short=frames_short(audio),
        mel_bins=flow.in_channels,
        sampling_rate=hift.sampling_rate,
        samples_per_frame=hift.samples_per_frame,
        time_steps=tuple(float(t) for t in time_steps(flow)),
        chunk_frames=CHUNK_FRAMES,
        harmonics=hift.nb_harmonics + 1,
        f0_context=f0_context,
        wave_context=wave_context,
        max_frames=positions.shape[0] if positions and positions.shape else 1,  # a missing table is reported as such
        overlap_samples=round(OVERLAP_SECONDS * hift.sampling_rate),
    )


FAMILY = Family("baichuan_omni_1_5", recognises, read)
