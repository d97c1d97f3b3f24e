"""Baichuan-Omni-1.5 and its Base: where its parameters lie, how its prompts read, and how its answers are sampled."""

from collections.abc import Mapping

from export.checkpoint import Checkpoint
from export.config import OmniConfig, parse
from export.families.family import Blueprint, Family
from export.files import read_json_object
from export.lazy_tensor import LazyTensor
from runtime.bundle import Profile

HIFT = "hift."  # the vocoder lies in a file of its own, whose keys have no prefix


def read_config(checkpoint: Checkpoint) -> OmniConfig:
    """config.json, and hift_config.json where a checkpoint has one; CheckpointError names everything wrong in them."""
    fields = {**checkpoint.config}
    fields["decoder"] = {**checkpoint.config, "first_position": 1}
    fields["vocoder"] = read_json_object(checkpoint.hift_config) if checkpoint.hift_config else {}
    return parse(OmniConfig, fields, str(checkpoint.folder / "config.json"))


def tensors(checkpoint: Checkpoint) -> Mapping[str, LazyTensor]:
    """All tensors under the names that the graphs use."""
    return {**checkpoint, **{HIFT + key: tensor for key, tensor in (checkpoint.hift or {}).items()}}


def recognises(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") == "omni" and "audio_config" in checkpoint.config


def read(checkpoint: Checkpoint, profile: Profile) -> Blueprint:
    raise AssertionError


FAMILY = Family("baichuan_omni_1_5", recognises, read)
