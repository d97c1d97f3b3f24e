"""A checkpoint of the real architecture's full size with random weights: every name and shape follows from its config.

Tokenizer, token ids and the rest of config.json are golden set A's, so that prompts have a tokenizer that fits.
"""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from export.checkpoint import open_checkpoint
from export.families import baichuan_omni_1_5
from export.vad import vad_tensors
from runtime.errors import EdgeOmniError
from tests.tiny import CHECKPOINT

SHARD = 5_000_000_000  # bytes that a shard holds at most, unless one tensor is larger
PIECE = 1 << 22  # values that are in memory at once
TYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}

TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 3584}
# What Baichuan-Omni-1.5's config.json states otherwise than golden set A's.
FULL: dict[str, Any] = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128,
    "audio_config": {
        "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
        "max_audio_seconds": 30, "decoder_layers": 8, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120,
        "audio_head_transformer_layers": 3,
        "vq_config": {"codebook_sizes": [8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024]},
    },
    "visual_config": {**TOWER, "max_pixels": 3211264},
    "video_config": {**TOWER, "max_pixels": 602112, "max_frame_num": 32},
    "flow_matching_config": {
        "prenet_in_dim": 1280, "prenet_d_model": 512, "prenet_attention_heads": 8, "prenet_ffn_dim": 2048,
        "prenet_nlayers": 12, "prenet_max_source_positions": 5000, "channels": [256], "n_blocks": 4,
        "num_mid_blocks": 12, "num_heads": 8, "attention_head_dim": 64,
    },
}  # fmt: skip
VOCODER = {"base_channels": 512, "f0_cond_channels": 512}
# The same widths, and of each kind of layer one.
ONE_LAYER: dict[str, Any] = {
    "num_hidden_layers": 1,
    "audio_config": {"encoder_layers": 1, "decoder_layers": 1},
    "visual_config": {"depth": 1},
    "video_config": {"depth": 1},
    "flow_matching_config": {"prenet_nlayers": 1, "n_blocks": 1, "num_mid_blocks": 1},
}
# The official model's parameters in model*.safetensors that no graph of ours has, which are left out here: the 16 kHz
# mel branch, a position table that is never read and biases that are never added.
LEFT_OUT = 1_416_512 + 2_560_000 + 32_256
OFFICIAL_PARAMETERS = 11_022_352_024

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    key: str
    dtype: Literal["BF16", "F32"]
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.parameters * TYPES[self.dtype].itemsize

    def pieces(self, seed: int) -> Iterator[np.ndarray]:
        """Values that depend on seed, key and shape alone: matrices keep the scale of what they multiply, norms lie
        around 1."""
        rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(self.key.encode())]))
        vector = len(self.shape) == 1
        scale = 0.1 if vector else math.prod(self.shape[1:]) ** -0.5
        middle = np.float32(1.0 if vector and "norm" in self.key else 0.0)
        for start in range(0, self.parameters, PIECE):
            values = rng.standard_normal(min(PIECE, self.parameters - start), np.float32)
            values *= np.float32(scale)
            yield (values + middle if middle else values).astype(TYPES[self.dtype])


def write_checkpoint(
    folder: Path,
    changes: dict[str, Any],
    vocoder: dict[str, Any] = VOCODER,
    seed: int = 0,
    progress: Progress = lambda file: None,
) -> list[Spec]:
    """Write a checkpoint of golden set A's form into the new `folder`, with `changes` of its config.json and `vocoder`
    of its hift_config.json.

    Returns what model*.safetensors hold. EdgeOmniError, before a byte is written, if the disk is too small.
    """
    folder.mkdir(parents=True)
    write_configs(folder, changes, vocoder)
    model, hift = specs(folder)
    needed, free = sum(spec.nbytes for spec in (*model, *hift)), shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeOmniError(f"{folder} has {free / 1e9:.1f} GB free, the checkpoint needs {needed / 1e9:.1f} GB")
    parts = shards(model)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        progress(name)
        write_safetensors(folder / name, part, seed)
    index = {spec.key: name for name, part in zip(names, parts, strict=True) for spec in part}
    total = {"total_size": sum(spec.nbytes for spec in model)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
    write_safetensors(folder / "hift.safetensors", hift, seed)
    return model


def write_configs(folder: Path, changes: dict[str, Any], vocoder: dict[str, Any] = VOCODER) -> None:
    for file in CHECKPOINT.glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, folder)
    config = merged(json.loads((CHECKPOINT / "config.json").read_text()), changes)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    hift = {**json.loads((CHECKPOINT / "hift_config.json").read_text()), **vocoder}
    (folder / "hift_config.json").write_text(json.dumps(hift, indent=1))


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`config` with `changes`, objects inside objects likewise."""
    return {**config, **{k: merged(config[k], v) if isinstance(v, dict) else v for k, v in changes.items()}}


def specs(folder: Path) -> tuple[list[Spec], list[Spec]]:
    """The tensors that the graphs of the configs in `folder` ask for: of model*.safetensors, and of the vocoder.

    Codebooks come with the averages that training keeps of them, which a real checkpoint holds too.
    """
    write_safetensors(folder / "model.safetensors", [], 0)  # an opened checkpoint must have weights
    config = baichuan_omni_1_5.read_config(open_checkpoint(folder))
    (folder / "model.safetensors").unlink()
    found = {}
    for graph in baichuan_omni_1_5.subgraphs(config, "cpu"):
        for source in map(graph.source_of, graph.parameters()):
            found.update(zip(source.keys, source.shapes, strict=True))
    for key, shape in tuple(found.items()):
        if key.endswith(".codebook.embed"):
            found[f"{key}_avg"], found[f"{key.removesuffix('embed')}cluster_size"] = shape, shape[:1]
    prefix = baichuan_omni_1_5.HIFT
    model = [Spec(k, "BF16", v) for k, v in found.items() if not k.startswith(prefix) and k not in vad_tensors()]
    return model, [Spec(k.removeprefix(prefix), "F32", v) for k, v in found.items() if k.startswith(prefix)]


def shards(every: list[Spec]) -> list[list[Spec]]:
    """The tensors in their order, in as many parts as keep each below SHARD bytes."""
    parts: list[list[Spec]] = [[]]
    for spec in every:
        if parts[-1] and sum(other.nbytes for other in parts[-1]) + spec.nbytes > SHARD:
            parts.append([])
        parts[-1].append(spec)
    return parts


def write_safetensors(path: Path, tensors: list[Spec], seed: int) -> None:
    header, at = {}, 0
    for spec in tensors:
        header[spec.key] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for spec in tensors:
            for piece in spec.pieces(seed):
                out.write(piece.view(np.uint8).data)
