"""Quantizing a checkpoint in one pass: the bytes are those of export and quantize one after the other."""

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from export import convert
from export.streamed import StreamedTensor
from quant import quantize
from quant.plan import Decided, PlannedGraph, open_bundle, plan
from quant.scheme import Recipe, parse_recipe, read_recipe
from runtime.bundle import Profile, read_bundle
from runtime.errors import EdgeOmniError
from runtime.verify import refuse_failed, verify
from tests import smollm2, tiny_llama
from tests.tiny import CHECKPOINT

MOST = parse_recipe(
    "most",
    """[weights]
"hift.*" = "keep"
"vad.*" = "keep"
"*" = { bits = 4, group_size = [32, 16] }
""",
)
HEAD = parse_recipe("head", '[weights]\n"lm_head.*" = { bits = 8, group_size = 32 }')


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_two_passes(checkpoint: Path, folder: Path, recipe: Recipe, profile: Profile = "cpu") -> Path:
    convert.export(checkpoint, folder / "float", profile, standalone=True, random=True)
    quantize.quantize(folder / "float", folder / "two", recipe, standalone=True)
    return folder / "two"


def in_one_pass(checkpoint: Path, folder: Path, recipe: Recipe, link: bool = False, profile: Profile = "cpu") -> Path:
    source = convert.stream(convert.plan(checkpoint, profile), random=True)
    quantize.write(plan(source, recipe), folder / "one", standalone=not link, link=link)
    return folder / "one"


def tied(folder: Path) -> Path:
    tensors = tiny_llama.tensors()
    del tensors["lm_head.weight"]
    return tiny_llama.save(folder, tensors, tie_word_embeddings=True)


SOURCES: dict[str, Callable[[Path], Path]] = {
    "omni": lambda folder: CHECKPOINT,
    "llama": tiny_llama.save,
    "tied llama": tied,
    "gguf": lambda folder: tiny_llama.save_gguf(folder.with_suffix(".gguf"), tiny_llama.tensors()),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("recipe", [read_recipe("int4-rtn"), read_recipe("fp16"), MOST], ids=lambda recipe: recipe.name)
def test_one_pass_writes_what_export_and_quantize_write(source: str, recipe: Recipe, tmp_path: Path) -> None:
    checkpoint = SOURCES[source](tmp_path / "checkpoint")
    one, two = (way(checkpoint, tmp_path, recipe) for way in (in_one_pass, in_two_passes))
    assert contents(one) == contents(two)


def test_weights_of_a_real_checkpoint_are_those_of_its_bundle() -> None:
    streamed = plan(convert.stream(convert.plan(smollm2.gguf_path(), "cpu")), MOST)
    written = plan(open_bundle(smollm2.bundle()), MOST)
    pairs = [(a, b) for one, two in zip(streamed.graphs, written.graphs, strict=True) for a, b in both(one, two)]
    assert len(pairs) > 150
    for ours, theirs in pairs:
        assert (ours.weight.name, ours.scheme, ours.reason) == (theirs.weight.name, theirs.scheme, theirs.reason)
        size = ours.weight.shape[0]
        for start, stop in ((0, size // 8), (size - 2, size)):
            np.testing.assert_array_equal(ours.weight.rows(start, stop), theirs.weight.rows(start, stop))


def both(one: PlannedGraph, two: PlannedGraph) -> Iterator[tuple[Decided, Decided]]:
    yield from zip(one.decided, two.decided, strict=True)


def test_one_pass_for_cuda_writes_the_same_as_well(tmp_path: Path) -> None:
    recipe = read_recipe("int4-rtn")
    one, two = (way(CHECKPOINT, tmp_path, recipe, profile="cuda") for way in (in_one_pass, in_two_passes))
    assert contents(one) == contents(two)


def test_what_stays_float_is_linked_from_the_checkpoint_where_its_bytes_fit(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    linked, copied = (in_one_pass(checkpoint, tmp_path / str(link), HEAD, link) for link in (True, False))
    assert (linked / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert not (copied / "model.safetensors").exists()
    for folder in (linked, copied):
        refuse_failed(folder, list(verify(folder, read_bundle(folder))))
    answers = [tiny_llama.logits(folder, [5, 6, 7]) for folder in (linked, copied)]
    np.testing.assert_array_equal(answers[0], answers[1])
    assert read_bundle(linked).quantization == read_bundle(copied).quantization


def test_a_shard_of_which_most_is_quantized_is_not_kept_alive_by_a_link(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    assert not (in_one_pass(checkpoint, tmp_path, MOST, link=True) / "model.safetensors").exists()


def test_only_slabs_of_a_checkpoint_are_ever_in_memory(tmp_path: Path) -> None:
    tensors, wide = tiny_llama.tensors(), 1 << 17
    for key in [key for key in tensors if ".mlp." in key]:
        tensors[key] = np.zeros((tiny_llama.HIDDEN, wide) if "down" in key else (wide, tiny_llama.HIDDEN), np.float32)
        tensors[key][0] = 1
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", tensors, intermediate_size=wide)
    largest = max(array.nbytes for array in tensors.values())
    recipe = parse_recipe("one", '[weights]\n"*.1.mlp.up_proj.*" = { bits = 4, group_size = 32 }')
    del tensors
    tracemalloc.start()
    manifest = quantize.write(plan(convert.stream(convert.plan(checkpoint, "cpu")), recipe), tmp_path / "one", True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert manifest.weight_bytes > 5 * largest
    assert peak < largest < 20e6


def test_a_weight_with_nan_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    tensors = tiny_llama.tensors()
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = np.nan
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", tensors)
    with pytest.raises(EdgeOmniError, match=r"model\.layers\.1\.self_attn\.W_pack\.weight holds nan"):
        in_one_pass(checkpoint, tmp_path, MOST)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_recipe_that_names_nothing_names_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    recipe = parse_recipe("mine", '[weights]\n"transformer.h.*" = { bits = 4, group_size = 32 }')
    with pytest.raises(EdgeOmniError, match=f"the recipe mine cannot quantize {checkpoint}"):
        in_one_pass(checkpoint, tmp_path, recipe)


def test_rows_of_a_streamed_tensor_are_those_of_the_whole(tmp_path: Path) -> None:
    planned = convert.plan(tiny_llama.save(tmp_path / "checkpoint"), "cuda")
    models = convert.stream(planned).models.values()
    values = [value.const_value for model in models for value in model.graph.initializers.values()]
    streamed = [value for value in values if isinstance(value, StreamedTensor)]
    assert len(streamed) > 5
    for tensor in streamed:
        whole = tensor.numpy()
        for start, stop in ((0, 1), (1, 9), (7, len(whole)), (0, len(whole))):
            np.testing.assert_array_equal(tensor.rows(start, stop), whole[start:stop])
        with pytest.raises(ValueError, match="declared"):
            tensor.rows(0, len(whole) + 1)


def test_turns_that_are_longer_than_the_context_are_cut(tmp_path: Path) -> None:
    recipe = parse_recipe("gptq", '[weights]\n"model.layers.0.*" = { bits = 4, group_size = 32, method = "gptq" }')
    manifest = quantize.quantize(tiny_llama.bundle(), tmp_path / "small", recipe)  # on the turns that come along
    assert manifest.quantization is not None
    assert {weight.method for weight in manifest.quantization.quantized} == {"gptq"}
