"""Which families there are, and which one a checkpoint belongs to."""

from export.checkpoint import Checkpoint
from export.families import baichuan_omni_1_5, llama
from export.families.family import Blueprint, Family
from export.problems import shown
from runtime.bundle import Profile
from runtime.errors import CheckpointError

FAMILIES: tuple[Family, ...] = (baichuan_omni_1_5.FAMILY, llama.FAMILY)


def read_family(checkpoint: Checkpoint, profile: Profile) -> Blueprint:
    """Find the family that a checkpoint belongs to and let it read the checkpoint."""
    for family in FAMILIES:
        if family.recognises(checkpoint):
            return family.read(checkpoint, profile)
    found = ", ".join(checkpoint.architectures) or checkpoint.config.get("model_type")
    found = found or checkpoint.metadata.get("general.architecture") or "no architecture"
    names = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"{checkpoint.folder}: config.json names {shown(found)}; the families that can be exported: {names}"
    )
