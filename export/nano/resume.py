"""Lays out a run folder from a finished checkpoint: python -m export.nano.resume CHECKPOINT RUN_FOLDER.

The inverse of `assemble`, so that a stage can be trained further without the stages before it. The tokenizer and the
vision tower count as done; decoder, vocoder and language model stand at step 0 with the checkpoint's weights, for a
run with steps and a learning rate of its own: `decoder_stage --steps 0 --flow-steps 0` only samples mels for the
vocoder, `language_stage --speech-from 0 --pictures-from 0` trains on everything at once. What a checkpoint does not
hold, label heads, optimizers and running means, starts anew.
"""

import argparse
from pathlib import Path

from torch import Tensor, nn

from export.nano import training
from export.nano.assemble import SPEAKING, renamed
from export.nano.config import read_config
from export.nano.language_stage import LanguageTrainer
from export.nano.model import load_checkpoint
from export.nano.tokenizer_stage import TokenizerTrainer
from export.nano.vision_stage import VisionTrainer

_DONE = 10**6  # a step past the end of every schedule


def _filled(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fresh module's state with whatever of it `state` holds."""
    fresh = module.state_dict()
    return fresh | {name: tensor for name, tensor in state.items() if name in fresh}


def lay_out(checkpoint: Path, run: Path) -> None:
    """Write tokenizer.pt, vision.pt, decoder.pt, vocoder.pt and language.pt into `run`.

    Raises:
        FileExistsError: one of them is there already.
        RuntimeError: the checkpoint does not fit the configuration.
    """
    omni, hift = load_checkpoint(checkpoint)
    state, config = omni.state_dict(), read_config(checkpoint)
    network = "audio_tokenizer.audio_flow_matching_decoder.conditional_decoder."
    speaking = [renamed(state, "audio_tokenizer." + place, f"{i}.") for i, place in enumerate(SPEAKING)]
    files = {
        "tokenizer": {"model": _filled(TokenizerTrainer(), renamed(state, "audio_tokenizer.", "tokenizer."))},
        "vision": {"model": _filled(VisionTrainer(config), renamed(state, "model.visual", "visual"))},
        "decoder": {"speaking": speaking[0] | speaking[1] | speaking[2], "network": renamed(state, network, "")},
        "vocoder": {"model": hift.state_dict()},
        "language": {"model": _filled(LanguageTrainer(None), {f"omni.{name}": t for name, t in state.items()})},
    }
    if there := [name for name in files if (run / f"{name}.pt").exists()]:
        raise FileExistsError(f"{run} holds {', '.join(there)} already; name an empty folder")
    for name, kept in files.items():
        training.save_state(run / f"{name}.pt", step=_DONE if name in ("tokenizer", "vision") else 0, **kept)


def main() -> None:
    """Lay it out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    lay_out(arguments.checkpoint, arguments.run)


if __name__ == "__main__":
    main()
