"""Exports of a small llama: repeatable, the same from every source, and never in the way of what is there."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from export.convert import export, plan
from runtime.bundle import MANIFEST, read_bundle
from runtime.bundle_writer import writing
from runtime.errors import EdgeOmniError
from tests import tiny_llama

IDS = [72, 101, 257, 256, 30, 5]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_llama.save(tmp_path / "checkpoint")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("how", [{}, {"standalone": True}, {"link": True}])
def test_two_exports_are_equal_to_the_byte(checkpoint: Path, tmp_path: Path, how: dict[str, bool]) -> None:
    for name in ("one", "two"):
        export(checkpoint, tmp_path / name, **how)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_linked_bundle_and_one_that_travels_say_the_same(checkpoint: Path, tmp_path: Path) -> None:
    linked, travels = tmp_path / "linked", tmp_path / "travels"
    assert "model.safetensors" in {file.path for file in export(checkpoint, linked, link=True).files}
    assert "model.safetensors" not in {file.path for file in export(checkpoint, travels, standalone=True).files}
    assert (linked / "model.safetensors").samefile(checkpoint / "model.safetensors")
    np.testing.assert_array_equal(tiny_llama.logits(linked, IDS), tiny_llama.logits(travels, IDS))


def test_a_linked_bundle_outlives_the_checkpoint_folder(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle", link=True)
    before = tiny_llama.logits(tmp_path / "bundle", IDS)
    shutil.rmtree(checkpoint)
    np.testing.assert_array_equal(tiny_llama.logits(tmp_path / "bundle", IDS), before)


def test_a_gguf_of_the_same_weights_gives_the_same_logits(tmp_path: Path) -> None:
    weights = tiny_llama.tensors()
    export(tiny_llama.save(tmp_path / "hf", weights), tmp_path / "from-hf")
    export(tiny_llama.save_gguf(tmp_path / "tiny.gguf", weights), tmp_path / "from-gguf")
    ours, theirs = (tiny_llama.logits(tmp_path / name, IDS) for name in ("from-hf", "from-gguf"))
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())
    one, other = (read_bundle(tmp_path / name) for name in ("from-hf", "from-gguf"))
    assert one.template == other.template
    assert one.tokens == other.tokens


def test_a_gguf_whose_queries_were_not_interleaved_would_be_noticed(tmp_path: Path, monkeypatch) -> None:
    weights = tiny_llama.tensors()
    export(tiny_llama.save(tmp_path / "hf", weights), tmp_path / "from-hf")
    monkeypatch.setattr(tiny_llama, "interleaved", lambda key, array: array)
    export(tiny_llama.save_gguf(tmp_path / "tiny.gguf", weights), tmp_path / "from-gguf")
    ours, theirs = (tiny_llama.logits(tmp_path / name, IDS) for name in ("from-hf", "from-gguf"))
    assert np.abs(ours - theirs).max() > 1e-2 * np.abs(ours).max()


def test_the_plan_counts_each_tensor_once_and_foretells_the_size(checkpoint: Path, tmp_path: Path) -> None:
    planned, weights = plan(checkpoint, "cpu"), tiny_llama.tensors()
    assert sum(row.parameters for row in planned.graphs) == sum(array.size for array in weights.values())
    assert sum(row.bytes_now for row in planned.graphs) == sum(array.nbytes for array in weights.values())
    written = export(checkpoint, tmp_path / "bundle", standalone=True).weight_bytes
    assert planned.bytes_after == pytest.approx(written, rel=0.3)  # small ones lie in the graphs, large ones on pages
    assert planned.memory_estimate(100) - planned.bytes_after == 100 * 2 * 2 * 2 * 16 * 4


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    weights = tiny_llama.tensors()
    del weights["lm_head.weight"]
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", weights, tie_word_embeddings=True)
    manifest = export(checkpoint, tmp_path / "bundle", standalone=True)
    assert manifest.graphs["lm_head"].weights == manifest.graphs["embed_tokens"].weights


def test_each_graph_is_reported_when_it_is_written(checkpoint: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    manifest = export(checkpoint, tmp_path / "bundle", progress=lambda name, nbytes: heard.append((name, nbytes)))
    assert heard == [(name, graph.weight_bytes) for name, graph in manifest.graphs.items()]


def test_a_bundle_is_replaced_only_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export(checkpoint, out)
    before = contents(out)
    with pytest.raises(EdgeOmniError, match="--force replaces it"):
        export(checkpoint, out, random=True)
    assert contents(out) == before
    assert export(checkpoint, out, force=True, random=True).source.random
    assert read_bundle(out).source.random


def test_a_folder_that_is_no_bundle_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeOmniError, match="exists and is not a bundle"):
        export(checkpoint, checkpoint, force=True)
    assert (checkpoint / "model.safetensors").is_file()
    assert not (checkpoint / MANIFEST).exists()


def test_a_folder_with_the_manifest_of_another_program_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / MANIFEST).write_text('{"manifest_version": 3, "name": "a browser extension"}')
    with pytest.raises(EdgeOmniError, match="exists and is not a bundle"):
        export(checkpoint, site, force=True)
    export(checkpoint, site / "bundle")  # below it there is room


def test_no_bundle_is_written_into_another(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle")
    with pytest.raises(EdgeOmniError, match="lies in the bundle"):
        export(checkpoint, tmp_path / "bundle" / "inner")


def test_what_a_new_parent_folder_brings_to_light_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("precious")
    with pytest.raises(EdgeOmniError, match="was not there before"), writing(tmp_path / "new" / ".." / "letters"):
        pass
    assert (tmp_path / "letters").read_text() == "precious"


def test_what_has_appeared_while_a_bundle_was_written_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(EdgeOmniError, match="was not there before"), writing(tmp_path / "out") as draft:
        (draft / "mine").write_text("")
        (tmp_path / "out").write_text("another's")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (tmp_path / "out").read_text() == "another's"


def test_nothing_but_the_bundle_is_left_beside_it(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "bundle"}
