"""Joins what the stages have trained into one checkpoint of the official layout.

python -m export.nano.assemble RUN_FOLDER CHECKPOINT_FOLDER

The codebooks' running statistics (`embed_avg`, `cluster_size`) are left out: they serve nothing but training. A stage
that has not run yet leaves its part as it was initialised, and is named.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from export.nano import training, vocabulary
from export.nano.config import read_config
from export.nano.model import STATISTICS, Omni
from export.nano.vocoder import HiFT

_SHARD_BYTES = 16_000_000
_FILES = (
    "config.json hift_config.json generation_config.json tokenizer.json tokenizer_config.json vocab.json merges.txt "
    "added_tokens.json special_tokens_map.json"
).split()


# What the decoder stage trains first, in the order of its list of modules.
SPEAKING = ("audio_bridge_model.proj_decoder.", "audio_decoder.", "audio_flow_matching_decoder.prenet.")


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The tensors under prefix `old`, under prefix `new`."""
    return {new + name.removeprefix(old): tensor for name, tensor in state.items() if name.startswith(old)}


def _speaking(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder stage's list of modules by their official names."""
    out: dict[str, Tensor] = {}
    for i, place in enumerate(SPEAKING):
        out |= renamed(state, f"{i}.", "audio_tokenizer." + place)
    return out


def trained_tensors(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Tensors of the model and of the vocoder by official name, and the stages that are missing."""
    config, missing = read_config(vocabulary.FOLDER), []
    model, vocoder = Omni(config).state_dict(), HiFT(config.vocoder).state_dict()
    states = {name: training.load_state(run / f"{name}.pt") for name in ("tokenizer", "decoder", "language", "vocoder")}
    for name, state in states.items():
        if state is None:
            missing.append(name)
        elif name == "tokenizer":
            model |= renamed(state["model"], "tokenizer.", "audio_tokenizer.")
        elif name == "decoder":
            network = "audio_tokenizer.audio_flow_matching_decoder.conditional_decoder."
            model |= _speaking(state["speaking"]) | renamed(state["network"], "", network)
        elif name == "language":
            model |= renamed(state["model"], "omni.", "")
        else:
            vocoder = state["model"]
    return {n: t for n, t in model.items() if not n.endswith(STATISTICS)}, vocoder, missing


def write_checkpoint(model: dict[str, Tensor], vocoder: dict[str, Tensor], folder: Path) -> int:
    """Write bfloat16 shards with their index, the vocoder and the other files; returns bytes of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in sorted(model.items()):
        if sum(t.numel() * 2 for t in shards[-1].values()) + tensor.numel() * 2 > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.detach().bfloat16().contiguous().clone()
    index, total = {}, 0
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        total += sum(t.numel() * 2 for t in shard.values())
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1) + "\n")
    save_file({n: t.detach().bfloat16().contiguous() for n, t in vocoder.items()}, folder / "hift.safetensors")
    if folder.resolve() != vocabulary.FOLDER.resolve():
        for name in _FILES:
            shutil.copyfile(vocabulary.FOLDER / name, folder / name)
    return total + sum(t.numel() * 2 for t in vocoder.values())


def main() -> None:
    """Assemble."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, vocoder, missing = trained_tensors(arguments.run)
    size = write_checkpoint(model, vocoder, arguments.checkpoint)
    print(f"{size / 1e6:.1f} MB of weights in {arguments.checkpoint}")
    if missing:
        print(f"not trained yet, as initialised: {', '.join(missing)}")


if __name__ == "__main__":
    main()
