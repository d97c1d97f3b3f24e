"""Replays group g03: picture files to patches, patches through the vision tower and the projector to rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.parity.golden import Golden, Replayed
from export.parity.graphs import Graphs
from export.vision_encoder import ENCODER
from runtime.bundle import Manifest, VisionFrontEnd
from runtime.image import Grid, patches, read_image, resize, rotary_positions

GROUP = "g03_vision"
UNCOVERED: dict[str, str] = {}

Parts = dict[str, np.ndarray]  # what one run gives, by the names of the recording


@dataclass(frozen=True)
class Picture:
    """A picture or video frame of the golden set, read and cut."""

    rgb: np.ndarray
    patches: np.ndarray
    grid: Grid
    front: VisionFrontEnd


def replay(golden: Golden, graphs: Graphs, manifest: Manifest) -> Iterator[Replayed]:
    """Patches from the files, every inner value from the recorded patches, rows also from the files."""
    if manifest.image is not None and manifest.video_frames is not None:
        yield from replay_pictures(golden, graphs, manifest.image, manifest.video_frames)


def replay_pictures(golden: Golden, graphs: Graphs, image: VisionFrontEnd, frame: VisionFrontEnd) -> Iterator[Replayed]:
    recorded = golden.arrays(GROUP)
    pictures = _read(golden, image, frame)
    taps = _taps(recorded)
    for name, picture in pictures.items():
        for part, ours in _replay_picture(name, picture, recorded, graphs, taps):
            if f"{name}.{part}" in recorded:
                yield Replayed(f"{GROUP}/{name}.{part}", ours)
    together = [pictures[name] for name in golden.mentioned(f"{GROUP}/multi.grid_thw", pictures)]
    if together:
        yield Replayed(f"{GROUP}/multi.grid_thw", np.array([picture.grid for picture in together]))
        rows = [_rows(graphs, picture) for picture in together]
        yield Replayed(f"{GROUP}/multi.projector_out", np.concatenate(rows))


def _read(golden: Golden, image: VisionFrontEnd, frame: VisionFrontEnd) -> dict[str, Picture]:
    files = {name: (row["file"], image) for name, row in golden.tables["images"].items()}
    files |= {Path(row["file"]).stem: (row["file"], frame) for row in golden.tables["frames"]}
    pictures = {}
    for name, (file, front) in files.items():
        rgb = read_image(golden.input(file), official=True)
        pictures[name] = Picture(rgb, *patches(rgb, front), front)
    return pictures


def _taps(recorded: Parts) -> dict[str, str]:
    """Recorded name -> name in the graph, of every inner value."""
    blocks = {part for name in recorded if (part := name.split(".")[-1]).startswith("block")}
    return {
        "rotary_angles": f"{ENCODER}.rotary_angles",
        "patch_embed": f"{ENCODER}.patch_embed.out",
        **{block: f"{ENCODER}.blocks.{block.removeprefix('block')}.out" for block in sorted(blocks)},
    }


def _replay_picture(
    name: str, picture: Picture, recorded: Parts, graphs: Graphs, taps: dict[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    yield "resized_rgb", resize(picture.rgb, picture.front)
    yield "patches", picture.patches
    cut = recorded.get(f"{name}.patches", picture.patches)
    results = graphs.run("vision_encoder", _feeds(cut, picture), tuple(taps.values()))
    for part, tap in taps.items():
        yield part, results[tap].reshape(len(cut), -1)
    yield "vit_out", results["features"]
    if f"{name}.vit_out" in recorded:
        yield "projector_out", graphs.run("vision_projector", {"features": recorded[f"{name}.vit_out"]})["rows"]
    yield "projector_out", _rows(graphs, picture)


def _feeds(cut: np.ndarray, picture: Picture) -> dict[str, np.ndarray]:
    return {"patches": cut, "positions": rotary_positions(picture.grid, picture.front.merge_size)}


def _rows(graphs: Graphs, picture: Picture) -> np.ndarray:
    """What stands for a picture in the language model, from its file."""
    features = graphs.run("vision_encoder", _feeds(picture.patches, picture))["features"]
    return graphs.run("vision_projector", {"features": features})["rows"]
