"""Weights stored as fp16: the graph gives what it gives with weights rounded to fp16, from half the bytes."""

from pathlib import Path

import numpy as np
import pytest

from apps.options import RECIPES
from export.convert import export
from quant.quantize import halved, quantize
from quant.rewrite import Weight, open_graph, weights
from quant.scheme import parse_recipe, read_recipe, shipped_recipes
from runtime.bundle import read_bundle
from runtime.errors import EdgeOmniError
from runtime.verify import refuse_failed, verify
from tests import tiny_llama


def rounded_bundle(folder: Path) -> Path:
    """A float bundle whose matrices hold values that fp16 has numbers for."""
    tensors = {
        name: array.astype(np.float16).astype(np.float32) if array.ndim == 2 else array
        for name, array in tiny_llama.tensors().items()
    }
    del tensors["lm_head.weight"]
    export(tiny_llama.save(folder / "checkpoint", tensors, tie_word_embeddings=True), folder / "float", random=True)
    return folder / "float"


def test_it_computes_with_the_same_numbers_and_stores_a_shared_table_once(tmp_path: Path) -> None:
    source = rounded_bundle(tmp_path)
    manifest = quantize(source, tmp_path / "half", read_recipe("fp16"))
    refuse_failed(tmp_path / "half", list(verify(tmp_path / "half", manifest)))
    exact, found = (tiny_llama.logits(folder, [1, 2, 3, 4]) for folder in (source, tmp_path / "half"))
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
    assert manifest.graphs["embed_tokens"].weights == manifest.graphs["lm_head"].weights
    assert manifest.weight_bytes < 0.56 * read_bundle(source).weight_bytes


def test_the_manifest_says_which_weights_are_fp16(tmp_path: Path) -> None:
    text = '[weights]\n"*.mlp.*" = "fp16"'
    quantization = quantize(tiny_llama.bundle(), tmp_path / "half", parse_recipe("some", text)).quantization
    assert quantization is not None
    halves = {weight.name for weight in quantization.kept if weight.bits_per_weight == 16}
    assert halves == {weight.name for weight in quantization.kept if ".mlp." in weight.name}
    assert {weight.reason for weight in quantization.kept if weight.name in halves} == {"made fp16 by '*.mlp.*'"}
    assert not quantization.quantized


def test_a_cuda_bundle_is_fp16_already(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "cuda", profile="cuda", random=True)
    with pytest.raises(EdgeOmniError, match="for cuda are fp16 already"):
        quantize(tmp_path / "cuda", tmp_path / "half", read_recipe("fp16"))


def test_what_fp16_has_no_number_for_is_refused_by_name() -> None:
    weight: Weight = next(w for w in weights(open_graph(tiny_llama.bundle() / "decoder.onnx")) if len(w.shape) == 2)
    assert halved(np.array([[65504.0]], np.float32), weight).dtype == np.float16
    with pytest.raises(EdgeOmniError, match=rf"{weight.name} holds 70000\.0, and fp16 ends at 65504"):
        halved(np.array([[1.0, -7e4]], np.float32), weight)


def test_the_help_lists_the_recipes_that_come_along() -> None:
    assert set(RECIPES.split(", ")) == set(shipped_recipes())
