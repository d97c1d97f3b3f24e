"""Quantizing a bundle: whole or not at all, the same bytes each time, every mistake named, and what it cost is told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.convert import export
from quant.examples import BUILT_IN, Calibrating
from quant.plan import open_bundle, plan
from quant.quantize import SLAB, quantize, slabs
from quant.rewrite import Weight, open_graph, point, save_graph, weights
from quant.scheme import Recipe, parse_recipe, read_recipe, shipped_recipes
from quant.summary import summary
from quant.turn import read_turns
from runtime.bundle import altered_files, describe_file, read_bundle, write_manifest
from runtime.bundle_writer import Place
from runtime.errors import EdgeOmniError
from runtime.verify import refuse_failed, verify
from tests import tiny_llama
from tests.tiny import omni_bundle, spoken_turns

INT4 = parse_recipe("int4", '[weights]\n"*" = { bits = 4, group_size = 32 }')
INT8 = parse_recipe("int8", '[weights]\n"*" = { bits = 8, group_size = 32 }')


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A float bundle whose head is its embedding table."""
    tensors = tiny_llama.tensors()
    del tensors["lm_head.weight"]
    export(
        tiny_llama.save(tmp_path / "checkpoint", tensors, tie_word_embeddings=True), tmp_path / "tied", standalone=True
    )
    return tmp_path / "tied"


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_makes_a_bundle_that_verifies(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    calibrated = any(scheme.calibrated for rule in recipe.rules for scheme in rule.schemes)
    calibrating = Calibrating(read_turns(spoken_turns(tmp_path))) if calibrated else BUILT_IN
    manifest = quantize(omni_bundle(), tmp_path / "small", recipe, calibrating=calibrating)
    assert read_bundle(tmp_path / "small") == manifest
    refuse_failed(tmp_path / "small", list(verify(tmp_path / "small", manifest)))
    assert {graph.precision for graph in manifest.graphs.values()} == {"fp32", name}


def test_the_same_bundle_and_recipe_give_the_same_bytes(tmp_path: Path) -> None:
    for out in ("one", "two"):
        quantize(tiny_llama.bundle(), tmp_path / out, INT4)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.quantize.SLAB", 256)
    for threads in (1, 3):
        quantize(tiny_llama.bundle(), tmp_path / str(threads), INT4, threads=threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_eight_bits_change_the_scores_little_and_four_bits_more(tmp_path: Path) -> None:
    exact = tiny_llama.logits(tiny_llama.bundle(), [1, 2, 3, 4])
    losses = []
    for recipe in (INT8, INT4):
        quantize(tiny_llama.bundle(), tmp_path / recipe.name, recipe)
        losses.append(
            np.abs(tiny_llama.logits(tmp_path / recipe.name, [1, 2, 3, 4]) - exact).max() / np.abs(exact).max()
        )
    assert 0 < losses[0] < 0.05 < losses[1] < 0.6


def test_a_table_that_two_graphs_share_is_quantized_and_stored_once(tied: Path, tmp_path: Path) -> None:
    manifest = quantize(tied, tmp_path / "small", INT8)
    embed, head = (manifest.graphs[name] for name in ("embed_tokens", "lm_head"))
    assert embed.weights == head.weights
    assert embed.weight_bytes == head.weight_bytes
    assert manifest.weight_bytes < read_bundle(tied).weight_bytes / 2.5


def test_two_schemes_for_a_shared_table_are_both_stored(tied: Path, tmp_path: Path) -> None:
    text = '[weights]\n"lm_head.*" = { bits = 4, group_size = 32 }\n"*" = { bits = 8, group_size = 32 }'
    manifest = quantize(tied, tmp_path / "small", parse_recipe("mixed", text))
    assert manifest.graphs["embed_tokens"].weights != manifest.graphs["lm_head"].weights
    assert np.isfinite(tiny_llama.logits(tmp_path / "small", [1, 2])).all()


def test_the_manifest_says_what_was_quantized_how_and_what_was_left(tmp_path: Path) -> None:
    text = '[weights]\n"lm_head.weight" = "keep"\n"model.layers.*" = { bits = 4, group_size = 32, symmetric = false }'
    recipe = parse_recipe("mine", text)
    quantization = quantize(tiny_llama.bundle(), tmp_path / "small", recipe).quantization
    assert quantization is not None
    assert parse_recipe(quantization.recipe, quantization.recipe_toml) == recipe
    made = {weight.name: weight for weight in quantization.quantized}["model.layers.1.mlp.up_proj.weight"]
    assert (made.graph, made.bits, made.group_size, made.symmetric, made.method) == ("decoder", 4, 32, False, "rtn")
    assert made.bits_per_weight == 4 + 32 / 32 + 8 / 32  # one group a row: its 4-bit zero takes a whole byte
    reasons = {weight.name: weight.reason for weight in quantization.kept}
    assert reasons["lm_head.weight"] == "kept by 'lm_head.weight'"
    assert reasons["model.embed_tokens.weight"] == "no pattern names it"
    assert not any("layernorm" in name for name in reasons)


def test_graph_sizes_add_up_to_what_lies_on_disk(tmp_path: Path) -> None:
    manifest = quantize(tiny_llama.bundle(), tmp_path / "small", INT4)
    for name, graph in manifest.graphs.items():
        model = open_graph(tmp_path / "small" / graph.file)
        assert graph.weight_bytes == sum(weight.nbytes for weight in weights(model)), name
        stored = sum((tmp_path / "small" / file).stat().st_size for file in graph.weights)
        inside = sum(weight.nbytes for weight in weights(model) if weight.file is None)
        assert 0 <= stored - (graph.weight_bytes - inside) < 4096 * len(list(weights(model))), name


def test_files_that_stay_floats_are_linked_if_asked_and_copied_if_not(tmp_path: Path) -> None:
    quantize(omni_bundle(), tmp_path / "linked", read_recipe("int4-rtn"), link=True)
    quantize(omni_bundle(), tmp_path / "alone", read_recipe("int4-rtn"), standalone=True)
    inodes = {path.name: path.stat().st_ino for path in omni_bundle().iterdir()}
    linked = {path.name for path in (tmp_path / "linked").iterdir() if path.stat().st_ino == inodes.get(path.name)}
    assert {"vocoder.data", "audio_encoder.data"} <= linked
    for path in (tmp_path / "alone").iterdir():
        assert path.stat().st_nlink == 1
    assert not list(altered_files(tmp_path / "linked", read_bundle(tmp_path / "linked")))


def test_a_linked_and_a_copied_bundle_answer_alike(tmp_path: Path) -> None:
    recipe = parse_recipe("head", '[weights]\n"lm_head.*" = { bits = 8, group_size = 32 }')
    answers = []
    for link in (False, True):
        quantize(tiny_llama.bundle(), tmp_path / str(link), recipe, link=link)
        answers.append(tiny_llama.logits(tmp_path / str(link), [5, 6, 7]))
    np.testing.assert_array_equal(*answers)


def test_progress_counts_every_weight_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    quantize(tiny_llama.bundle(), tmp_path / "small", INT4, progress=lambda name, nbytes: told.append((name, nbytes)))
    float_bytes = sum(graph.weight_bytes for graph in read_bundle(tiny_llama.bundle()).graphs.values())
    assert sum(nbytes for _, nbytes in told) == float_bytes
    assert "model.layers.0.mlp.up_proj.weight" in dict(told)


def test_no_more_than_a_slab_of_a_weight_is_read_at_once(tmp_path: Path) -> None:
    values = np.arange(3 * SLAB, dtype=np.float32).reshape(-1, 96)
    (tmp_path / "w.data").write_bytes(values.tobytes())
    model = open_graph(tiny_llama.bundle() / "decoder.onnx")
    weight = Weight(next(weights(model)).value, "w", values.shape, values.dtype, tmp_path / "w.data", 0)
    parts = list(slabs(weight))
    assert max(part.size for part in parts) <= SLAB
    np.testing.assert_array_equal(np.concatenate(parts), values)


def refused(bundle: Path, out: Path, recipe: Recipe = INT4, force: bool = False) -> str:
    """The message of a refusal that leaves nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(EdgeOmniError) as error:
        quantize(bundle, out, recipe, force=force)
    assert sorted(out.parent.iterdir()) == before
    return str(error.value)


def test_quantizing_twice_is_refused(tmp_path: Path) -> None:
    quantize(tiny_llama.bundle(), tmp_path / "once", INT8)
    said = refused(tmp_path / "once", tmp_path / "twice")
    assert "is quantized already, by the recipe 'int8'" in said
    assert "give the float bundle" in said


def test_a_recipe_that_names_no_weight_is_refused_with_names_that_there_are(tmp_path: Path) -> None:
    recipe = parse_recipe("mine", '[weights]\n"transformer.h.*" = { bits = 4, group_size = 32 }')
    said = refused(tiny_llama.bundle(), tmp_path / "small", recipe)
    assert "no matrix is named by its patterns 'transformer.h.*'" in said
    assert "model.embed_tokens.weight" in said


def test_groups_that_do_not_divide_are_refused_with_sizes_that_would(tmp_path: Path) -> None:
    recipe = parse_recipe("mine", '[weights]\n"*" = { bits = 4, group_size = 64 }')
    said = refused(tiny_llama.bundle(), tmp_path / "small", recipe)
    assert "'*' asks for groups of 64, which do not divide the 32 columns of model.embed_tokens.weight and" in said
    assert "16 or 32 would" in said


def test_a_pattern_that_spells_out_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    text = '[weights]\n"rotary.cos" = { bits = 8, group_size = 16 }\n"lm_head.*" = { bits = 8, group_size = 16 }'
    said = refused(tiny_llama.bundle(), tmp_path / "small", parse_recipe("mine", text))
    assert "'rotary.cos' is read by GroupQueryAttention in a way that needs floats; keep it" in said


def test_a_codebook_is_quantized_only_by_a_pattern_that_means_it(tmp_path: Path) -> None:
    scheme = "{ bits = 8, group_size = 32 }"
    star, meant = (parse_recipe("r", f'[weights]\n"{name}" = {scheme}') for name in ("audio_*", "*.codebook.embed"))
    for recipe, expected in ((star, False), (meant, True)):
        decided = [item for graph in plan(open_bundle(omni_bundle()), recipe).graphs for item in graph.decided]
        assert any(item.scheme and item.weight.name.endswith("codebook.embed") for item in decided) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_with_nan_or_infinity_is_named_and_nothing_is_written(value: float, tmp_path: Path) -> None:
    tensors = tiny_llama.tensors()
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    export(tiny_llama.save(tmp_path / "checkpoint", tensors), tmp_path / "float")
    said = refused(tmp_path / "float", tmp_path / "small")
    assert f"model.layers.1.mlp.down_proj.weight holds {value}" in said


def test_a_graph_that_takes_a_weight_from_outside_its_bundle_is_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "float"
    bundle.mkdir()
    for name, data in contents(tiny_llama.bundle()).items():
        (bundle / name).write_bytes(data)
    model = open_graph(bundle / "lm_head.onnx")
    weight = next(weights(model))
    point(weight, Place("../secret", 0, weight.nbytes), bundle)
    save_graph(model, bundle / "lm_head.onnx")
    manifest = read_bundle(tiny_llama.bundle())
    described = tuple(describe_file(bundle, file.path) for file in manifest.files)
    write_manifest(bundle, replace(manifest, files=described))
    assert f"lm_head.weight lies in {bundle}/../secret, outside the bundle" in refused(bundle, tmp_path / "small")


def test_the_float_bundle_itself_is_never_replaced(tmp_path: Path) -> None:
    said = refused(tiny_llama.bundle(), tiny_llama.bundle(), force=True)
    assert "is the float bundle itself" in said


def test_another_bundle_is_replaced_only_by_force(tmp_path: Path) -> None:
    quantize(tiny_llama.bundle(), tmp_path / "small", INT4)
    assert "--force replaces it" in refused(tiny_llama.bundle(), tmp_path / "small", INT8)
    assert quantize(tiny_llama.bundle(), tmp_path / "small", INT8, force=True).quantization
    assert read_bundle(tmp_path / "small").graphs["decoder"].precision == "int8"


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_llama.bundle()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage())
    assert f"{tmp_path} has 0.00 GB free, the bundle needs" in refused(bundle, tmp_path / "small")


class Usage:
    free = 10


@pytest.fixture
def cuda(tmp_path: Path) -> Path:
    export(tiny_llama.save(tmp_path / "checkpoint"), tmp_path / "cuda", profile="cuda")
    return tmp_path / "cuda"


def test_the_cuda_profile_takes_only_what_its_kernels_know(cuda: Path, tmp_path: Path) -> None:
    for scheme in ("group_size = 16", "group_size = 32, symmetric = false"):
        recipe = parse_recipe("mine", f'[weights]\n"*" = {{ bits = 4, {scheme} }}')
        assert "the cuda profile takes 4 or 8 bits, symmetric, in groups of 32" in refused(cuda, tmp_path / "s", recipe)
    manifest = quantize(cuda, tmp_path / "small", INT4)
    assert manifest.quantization is not None
    assert {weight.bits_per_weight for weight in manifest.quantization.quantized} >= {4.5}


def test_a_bundle_whose_files_were_linked_is_whole_when_its_source_is_gone(tmp_path: Path) -> None:
    source = tmp_path / "float"
    source.mkdir()
    for name, data in contents(tiny_llama.bundle()).items():
        (source / name).write_bytes(data)
    recipe = parse_recipe("head", '[weights]\n"lm_head.*" = { bits = 8, group_size = 32 }')
    manifest = quantize(source, tmp_path / "small", recipe, link=True)
    for path in source.iterdir():
        path.unlink()
    refuse_failed(tmp_path / "small", list(verify(tmp_path / "small", manifest)))


def test_a_manifest_with_its_quantization_survives_a_round_trip(tmp_path: Path) -> None:
    manifest = quantize(tiny_llama.bundle(), tmp_path / "small", INT4)
    before = (tmp_path / "small" / "manifest.json").read_bytes()
    write_manifest(tmp_path / "small", manifest)
    assert (tmp_path / "small" / "manifest.json").read_bytes() == before
    assert describe_file(tmp_path / "small", "lm_head.onnx") in manifest.files


def test_the_summary_gathers_layers_and_loses_no_weight(tmp_path: Path) -> None:
    quantization = quantize(tiny_llama.bundle(), tmp_path / "small", read_recipe("int4-rtn")).quantization
    assert quantization is not None
    lines = {line.names: line for line in summary(quantization)}
    down = lines["model.layers.*.mlp.down_proj.weight"]
    assert (down.count, down.stored, down.bits_per_weight) == (2, "int4 by 32, rtn", 5.0)
    assert down.nbytes == 2 * tiny_llama.HIDDEN * tiny_llama.MLP * 5 / 8
    assert lines["rotary.cos"].stored == "float: no pattern names it"
    every = (*quantization.quantized, *quantization.kept)
    assert sum(line.parameters for line in lines.values()) == sum(weight.parameters for weight in every)
    assert sum(line.count for line in lines.values()) == len(every)
