"""The weights that bench hands to other programs are the bundle's own, and what it makes of their times adds up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.bench import against as module
from apps.bench.against import (
    OURS,
    PEERS,
    Running,
    Variant,
    against,
    agreement,
    gguf_forms,
    parameters,
    prepare,
    process,
)
from apps.bench.audio_head import Spread
from apps.bench.floor import floor_config
from apps.bench.genai import write_genai
from apps.bench.gguf_file import q4, write_gguf
from apps.bench.model import floats, half_apart, read_text_model, refuse, rope_theta, side_by_side
from apps.bench.show import show_against
from export.convert import export
from export.decoder import rotary_tables
from quant.affine import Quantized
from quant.quantize import quantize
from quant.scheme import parse_recipe, read_recipe
from runtime.bundle import read_bundle
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.session import Options
from tests import tiny_llama
from tests.tiny import omni_bundle

ZEROS = """
description = "with zero points"
[schemes]
int4 = { bits = 4, group_size = [32, 16], symmetric = false }
[weights]
"model.layers.*" = "int4"
"""


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("against") / "int4"
    quantize(tiny_llama.bundle(), folder, read_recipe("int4-rtn"))
    return folder


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as `tiny_llama.bundle()`, in the other order of rotary pairs."""
    home = tmp_path_factory.mktemp("gguf")
    export(tiny_llama.save_gguf(home / "tiny.gguf", tiny_llama.tensors()), home / "bundle")
    return home / "bundle"


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1"])
def test_llama_cpp_gets_the_bundles_own_codes(form: Any, int4: Path, tmp_path: Path) -> None:
    """The gguf package's own arithmetic gives each value back, but for scales of fp16."""
    model = read_text_model(int4)
    write_gguf(model, tmp_path / "m.gguf", form)
    found = tensors(tmp_path / "m.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == form and kinds["token_embd.weight"] == "Q8_0"
    for key, name in (("model.layers.1.mlp.down_proj", "blk.1.ffn_down"), ("model.embed_tokens", "token_embd")):
        ours = floats(model.matrices[f"{key}.weight"])
        np.testing.assert_allclose(found[f"{name}.weight"], ours, rtol=2e-3, atol=1e-3 * np.abs(ours).max())


def test_a_gguf_of_floats_is_the_file_that_the_bundle_came_from(from_gguf: Path, tmp_path: Path) -> None:
    source = tiny_llama.save_gguf(tmp_path / "source.gguf", tiny_llama.tensors())
    write_gguf(read_text_model(from_gguf), tmp_path / "again.gguf")
    expected, found = tensors(source), tensors(tmp_path / "again.gguf")
    assert found.keys() == expected.keys() - {"rope_freqs.weight"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_rotary_pairs_are_laid_side_by_side_for_llama_cpp(from_gguf: Path, tmp_path: Path) -> None:
    """A bundle from safetensors and one from GGUF hold the rows of query and key in different orders."""
    files = []
    for index, bundle in enumerate((tiny_llama.bundle(), from_gguf)):
        files.append(tmp_path / f"{index}.gguf")
        write_gguf(read_text_model(bundle), files[-1])
    one, other = map(tensors, files)
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        np.testing.assert_array_equal(one[name], other[name])


@given(st.integers(1, 5), st.integers(1, 8))
def test_the_two_orders_of_rotary_pairs_undo_each_other(heads: int, half: int) -> None:
    rows = 2 * heads * half
    assert (side_by_side(rows, 2 * half)[half_apart(rows, 2 * half)] == np.arange(rows)).all()


def test_the_shape_is_read_from_the_bundle(int4: Path) -> None:
    model = read_text_model(int4)
    assert (model.heads, model.kv_heads, model.head_dim) == (tiny_llama.HEADS, tiny_llama.KV_HEADS, tiny_llama.HEAD_DIM)
    assert (model.hidden_size, model.intermediate_size) == (tiny_llama.HIDDEN, tiny_llama.MLP)
    assert (model.layers, model.context, model.bits) == (tiny_llama.LAYERS, tiny_llama.CONTEXT, 4)
    assert sum(1 for _ in model.projections()) == 7 * tiny_llama.LAYERS


@pytest.mark.parametrize("base", [1e4, 1e5, 5e5, 1e6, 12345.0])
def test_the_base_of_rotary_positions_is_found_in_their_table(base: float) -> None:
    config = floor_config(tiny_llama.bundle(), read_bundle(tiny_llama.bundle()))
    tables = rotary_tables(replace(config, rope_theta=base, head_dim=64, max_position_embeddings=4))
    assert rope_theta(*tables) == base


def test_zero_points_fit_q4_1_alone(tmp_path: Path) -> None:
    quantize(tiny_llama.bundle(), tmp_path / "zeros", parse_recipe("zeros", ZEROS))
    model = read_text_model(tmp_path / "zeros")
    write_gguf(model, tmp_path / "m.gguf", "Q4_1")
    ours = floats(model.matrices["model.layers.0.mlp.up_proj.weight"])
    found = tensors(tmp_path / "m.gguf")["blk.0.ffn_up.weight"]
    np.testing.assert_allclose(found, ours, atol=2e-3 * np.abs(ours).max())
    with pytest.raises(EdgeOmniError, match="Q4_0 holds 4 bits around 0, this is 4 bits with zero points"):
        write_gguf(model, tmp_path / "n.gguf", "Q4_0")
    assert [variant.form for variant in gguf_forms(tmp_path / "zeros", tmp_path)] == ["Q4_1"]


def test_groups_that_fill_no_block_are_refused() -> None:
    matrix = Quantized(np.zeros((2, 32), np.uint8), np.ones((2, 2), np.float32), None, 4)
    with pytest.raises(EdgeOmniError, match="groups of 16 do not fill blocks of 32"):
        q4(matrix, "Q4_0")


def test_a_decoder_that_is_no_llama_is_refused_with_all_reasons() -> None:
    with pytest.raises(EdgeOmniError, match=r"cannot be given to other programs as a Llama: it has 1 biases.*from 0"):
        refuse(
            Path("bundle"),
            {"model.layers.0.self_attn.W_pack.bias": np.zeros(3)},
            np.full((2, 2), 0.5),
            np.full((2, 2), 0.5),
        )


def test_onnxruntime_genais_graph_computes_what_ours_do(int4: Path, tmp_path: Path) -> None:
    """The joined graph in plain ONNX Runtime, with that program's ports: a prompt, then one token behind it."""
    write_genai(int4, tmp_path)
    manifest, engine = read_bundle(int4), Engine(int4, Options(threads=1))
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids, cache = [5, 7, 11, 13], manifest.cache
    empty = np.zeros((1, cache.kv_heads, 0, cache.head_dim), np.float32)
    past = {f"past_key_values.{i}.{side}": empty for i in range(cache.layers) for side in ("key", "value")}
    names = [port.name for port in session.get_outputs()]
    context = engine.context()
    for start, piece in ((0, ids[:3]), (3, ids[3:])):
        mask = np.ones((1, start + len(piece)), np.int64)
        results = session.run(names, {"input_ids": np.array([piece]), "attention_mask": mask, **past})
        out: dict[str, Any] = dict(zip(names, results, strict=True))
        for token in piece:
            context.push(token)
        expected = engine.session("lm_head").run(hidden=context.hidden())["logits"]
        assert out["logits"].shape == (1, 1, manifest.vocab_size)
        np.testing.assert_allclose(out["logits"][0], expected, rtol=1e-4, atol=1e-4)
        past = {name: out[name.replace("past_key_values", "present")] for name in past}


@pytest.mark.oracle
@pytest.mark.parametrize("interleaved", [False, True])
def test_transformers_computes_what_the_bundle_does(interleaved: bool, from_gguf: Path, tmp_path: Path) -> None:
    """The one from safetensors has a rotary base that is not transformers' default."""
    import torch

    from apps.bench.transformers_model import load

    export(tiny_llama.save(tmp_path / "checkpoint", rope_theta=500.0), tmp_path / "bundle", random=True)
    bundle = from_gguf if interleaved else tmp_path / "bundle"
    engine, ids = Engine(bundle, Options(threads=1)), [5, 7, 11, 13]
    context = engine.context()
    for token in ids:
        context.push(token)
    expected = engine.session("lm_head").run(hidden=context.hidden())["logits"][0]
    with torch.inference_mode():
        found = load(bundle, torch.float32)(torch.tensor([ids])).logits[0, -1].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_without_other_programs_ours_is_measured_and_the_others_named(
    int4: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("PREFILL", 24), ("CONTEXT", 8), ("TOKENS", 3)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "installed", lambda peer: None)
    monkeypatch.chdir(int4.parent)
    result = against(Path(int4.name), list(PEERS), threads=(1,), rounds=2)
    (row,) = result.measured
    assert row.name == "edgeomni int4-rtn" and row.same_tokens == 1
    assert row.prefill_ms.median > 0 and row.decode_ms.median > 0 and row.private_bytes > 0
    assert row.bits_per_weight == pytest.approx(8 * read_bundle(int4).weight_bytes / parameters(read_bundle(int4)), 0.1)
    assert result.ratios == () and set(result.missing) == set(PEERS)
    show_against(result)
    assert "llama.cpp is not installed: pip install llama-cpp-python" in capsys.readouterr().out


def test_a_program_that_cannot_run_the_bundle_is_named_with_the_reason(tmp_path: Path) -> None:
    """Golden set A is no Llama: its positions count from 1."""
    variants, refused = prepare(omni_bundle(), read_bundle(omni_bundle()), ["llama.cpp", "transformers"], tmp_path)
    assert [variant.program for variant in variants] == [OURS]
    assert refused.keys() == {"llama.cpp", "transformers"}
    assert all("cannot be given to other programs as a Llama" in reason for reason in refused.values())


def test_a_ratio_is_their_time_by_ours_round_by_round() -> None:
    ours, theirs = (running(name, times) for name, times in ((OURS, (10.0, 20.0)), ("llama.cpp", (20.0, 40.0))))
    found = theirs.ratio(ours)
    assert found.prefill == found.decode == found.prefill_cpu == Spread(2.0, 2.0, 2.0)


def running(program: str, times: tuple[float, ...]) -> Running:
    variant = Variant(program, "form", "1", Path("model"), "", None)
    one = Running(variant, 1, child=None)  # type: ignore[arg-type]
    one.prefill = one.decode = [{"wall_ms": ms, "cpu_ms": ms, "tokens": [1, 2]} for ms in times]
    return one


@pytest.mark.parametrize(("tokens", "share"), [([1, 2, 3, 4], 1.0), ([1, 2, 9, 4], 0.5), ([9, 2, 3, 4], 0.0)])
def test_tokens_count_as_the_same_up_to_the_first_other_one(tokens: list[int], share: float) -> None:
    assert agreement(tokens, [1, 2, 3, 4]) == share


def test_a_program_that_does_not_start_is_named_with_what_it_said() -> None:
    variant = Variant("nothing", "at all", "1", Path("model"), "", None)
    with pytest.raises(EdgeOmniError, match="nothing at all does not start: ValueError: nothing"), process(variant, 1):
        pass


def test_what_cannot_be_compared_is_said_at_once(int4: Path) -> None:
    with pytest.raises(EdgeOmniError, match=r"'ollama' is none of llama\.cpp.*repeats.*do not fit its context of 128"):
        against(int4, ["ollama"], rounds=0)
