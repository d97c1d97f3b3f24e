"""The checkpoint of the real architecture's size: its names, shapes and numbers; and, when asked, what it costs."""

import fnmatch
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from export.checkpoint import open_checkpoint
from export.convert import plan
from export.families import baichuan_omni_1_5
from runtime.errors import EdgeOmniError
from tests import full_size_checkpoint
from tests.full_size import Run, table
from tests.full_size_checkpoint import (
    FULL,
    LEFT_OUT,
    OFFICIAL_PARAMETERS,
    ONE_LAYER,
    Spec,
    merged,
    specs,
    write_checkpoint,
    write_configs,
)
from tests.full_size_gptq import measure
from tests.tiny import CHECKPOINT, golden_config
from tests.watched import watched

FOLDER = "EDGEOMNI_FULL_SIZE"  # names the folder in which the real thing is measured
MOST_MEMORY = 1.5e9  # bytes of an export with a recipe


def test_with_a_golden_sets_own_config_every_name_and_shape_is_the_golden_checkpoints(tmp_path: Path) -> None:
    made = {spec.key: spec.shape for spec in write_checkpoint(tmp_path / "checkpoint", {}, {})}
    golden = {key: tensor.shape for key, tensor in open_checkpoint(CHECKPOINT).items()}
    left_out = golden.keys() - made.keys()
    assert all(any(fnmatch.fnmatchcase(key, pattern) for pattern in baichuan_omni_1_5.UNUSED) for key in left_out)
    assert made == {key: golden[key] for key in golden.keys() - left_out}


def test_what_is_written_can_be_exported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", {}, {})
    planned = plan(tmp_path / "checkpoint", "cpu")
    assert planned.blueprint.hidden_size == plan(CHECKPOINT, "cpu").blueprint.hidden_size
    tensor = planned.checkpoint["model.layers.0.mlp.gate_proj.weight"].read().astype(np.float32)
    assert tensor.std() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.05)


def test_at_full_size_it_has_the_official_number_of_parameters(tmp_path: Path) -> None:
    write_configs(tmp_path, FULL)
    model, hift = specs(tmp_path)
    assert sum(spec.parameters for spec in model) == OFFICIAL_PARAMETERS - LEFT_OUT
    assert sum(spec.parameters for spec in hift) == 20_821_295
    assert sum(spec.nbytes for spec in model) == pytest.approx(22e9, rel=0.01)


def test_one_layer_of_each_kind_keeps_the_full_widths(tmp_path: Path) -> None:
    write_configs(tmp_path, merged(FULL, ONE_LAYER))
    shapes = {spec.key: spec.shape for spec in specs(tmp_path)[0]}
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (3584, 18944)
    assert "model.layers.1.mlp.down_proj.weight" not in shapes


def test_values_depend_on_key_and_seed_alone() -> None:
    spec = Spec("model.layers.0.input_layernorm.weight", "BF16", (64,))
    first, again, other = (np.concatenate(list(spec.pieces(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.abs(first.astype(np.float32) - 1).max() < 0.6


def test_a_disk_that_is_too_small_is_refused_before_a_tensor_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000_000})
    monkeypatch.setattr(full_size_checkpoint.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(EdgeOmniError, match=r"1\.0 GB free, the checkpoint needs 6\.6 GB"):
        write_checkpoint(tmp_path / "checkpoint", merged(FULL, ONE_LAYER))
    assert not list((tmp_path / "checkpoint").glob("*.safetensors"))


def test_memory_of_a_process_is_told_by_kind(tmp_path: Path) -> None:
    code = "import time; kept = bytearray(200_000_000); time.sleep(0.5); print('done')"
    run = watched([sys.executable, "-c", code], tmp_path)
    assert 200e6 < run.anonymous < 260e6
    assert run.anonymous < run.resident < 300e6
    assert (tmp_path / "output.txt").read_text() == "done\n"
    assert run.seconds > 0.5


def test_a_process_that_fails_is_told_with_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 3:\nno luck"):
        watched([sys.executable, "-c", "print('no luck'); raise SystemExit(3)"], tmp_path)


def test_every_matrix_that_gptq_solves_is_counted_with_its_time() -> None:
    found = measure({}, rows=16, positions=16)
    config = golden_config()
    layers, depths = (
        config.audio_config.audio_head_transformer_layers,
        len(config.audio_config.vq_config.codebook_sizes),
    )
    assert sum(row.count for row in found if row.graph == "audio_head") == layers * (2 + 2 * depths)
    assert sum(row.count for row in found if row.graph == "decoder") == 5 * config.decoder.num_hidden_layers
    assert all(row.seconds > 0 for row in found)


@pytest.mark.slow
@pytest.mark.skipif(FOLDER not in os.environ, reason=f"takes an hour and 45 GB of disk; asked for by {FOLDER}=FOLDER")
def test_export_at_full_size_stays_within_its_memory() -> None:
    folder = Path(os.environ[FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    result = Run(folder, "int4-rtn", one_layer=False).whole([1, 2])
    print(table(result))
    assert result.export is not None
    assert result.export.resident < MOST_MEMORY
