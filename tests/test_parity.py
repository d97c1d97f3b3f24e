"""Parity: every recorded stage of the official code holds, none is left unexplained, and what differs is found."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.parity.golden import Golden, Replayed
from export.parity.replay import Parity, judge, parity
from runtime.errors import EdgeOmniError
from tests import tiny_llama
from tests.tiny import GOLDEN, omni_bundle


@pytest.fixture(scope="module")
def whole() -> Parity:
    return parity(omni_bundle(), GOLDEN)


def test_every_stage_of_the_golden_set_holds(whole: Parity) -> None:
    assert [verdict for verdict in whole.verdicts if not verdict.passed] == []
    assert whole.passed


def test_every_recorded_array_is_replayed_or_excused_by_name(whole: Parity) -> None:
    assert whole.unexplained == ()
    assert {verdict.name for verdict in whole.verdicts} | set(whole.uncovered) == set(GOLDEN.names)
    assert len(whole.verdicts) > 0.8 * len(GOLDEN.names)


def test_all_eleven_groups_are_compared(whole: Parity) -> None:
    assert len(whole.stages()) == 11


@pytest.fixture
def altered(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN.folder, folder, ignore=shutil.ignore_patterns("checkpoint"))
    yield folder


@pytest.mark.parametrize(
    ("group", "name", "change"),
    [
        ("g02_audio_encoder", "w0.seg0.codes", lambda a: a + (np.indices(a.shape).sum(0) == 0)),
        ("g03_vision", "i0.block1", lambda a: a * 1.001),
        ("g08_flow_matching", "long.mel", lambda a: np.roll(a, 1, axis=1)),
    ],
    ids=["one code", "a thousandth", "one frame late"],
)
def test_a_recorded_array_that_was_altered_is_found(altered: Path, group: str, name: str, change) -> None:
    arrays = load_file(altered / f"{group}.safetensors")
    arrays[name] = change(arrays[name]).astype(arrays[name].dtype)
    save_file(arrays, altered / f"{group}.safetensors")
    found = parity(omni_bundle(), Golden(altered))
    assert [verdict.name for verdict in found.verdicts if not verdict.passed] == [f"{group}/{name}"]


def test_an_array_that_nothing_replays_or_excuses_fails_the_whole(altered: Path) -> None:
    manifest = altered / "manifest.json"
    added = '{"file": "g03_vision.safetensors", "name": "i9.unheard", "shape": [1], "dtype": "float32", "meaning": ""}'
    manifest.write_text(manifest.read_text().rstrip().removesuffix("]") + f", {added}]")
    found = parity(omni_bundle(), Golden(altered))
    assert found.unexplained == ("g03_vision/i9.unheard",)
    assert not found.passed


def test_not_a_number_never_passes() -> None:
    assert not judge(Replayed("g/x", np.array([np.nan])), np.array([1.0])).passed


def test_another_shape_is_said_and_never_passes() -> None:
    verdict = judge(Replayed("g/x", np.zeros((2, 3))), np.zeros((3, 2)))
    assert not verdict.passed
    assert "[2, 3]" in verdict.problem and "[3, 2]" in verdict.problem


def test_a_text_model_is_refused_before_anything_is_replayed() -> None:
    with pytest.raises(EdgeOmniError, match="family llama, which neither listens nor speaks"):
        parity(tiny_llama.bundle(), GOLDEN)
