"""Baichuan-Omni-1.5 and its Base: where its parameters lie, how its prompts read, and how its answers are sampled."""

from collections.abc import Mapping

from export.checkpoint import Checkpoint
from export.config import OmniConfig, parse, read_json
from export.lazy_tensor import LazyTensor

HIFT = "hift."  # the vocoder lies in a file of its own, whose keys have no prefix


def read_config(checkpoint: Checkpoint) -> OmniConfig:
    """config.json, and hift_config.json where a checkpoint has one; CheckpointError names everything wrong in them."""
    fields = {**checkpoint.config}
    fields["decoder"] = {**checkpoint.config, "first_position": 1}
    fields["vocoder"] = read_json(checkpoint.hift_config) if checkpoint.hift_config else {}
    return parse(OmniConfig, fields, str(checkpoint.folder / "config.json"))


def tensors(checkpoint: Checkpoint) -> Mapping[str, LazyTensor]:
    """All tensors under the names that the graphs use."""
    return {**checkpoint, **{HIFT + key: tensor for key, tensor in (checkpoint.hift or {}).items()}}
