"""Open graphs: their messages, their state, their bound buffers, cancelling, and weights in the kernels' layout."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.audio_head import audio_head
from export.decoder import decoder, lm_head
from export.parity.graphs import Graphs
from export.vad import vad
from quant.quantize import quantize
from quant.scheme import read_recipe
from runtime.bundle import Graph
from runtime.errors import BundleError, EdgeOmniError
from runtime.session import Carried, Options, Session, cache_key, lies_aligned
from tests import tiny_llama
from tests.tiny import golden_config, golden_graphs


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    config = golden_config().decoder
    return golden_graphs(lm_head(config, "cpu"), decoder(config, "cpu"))


@pytest.fixture
def head(graphs: Graphs) -> Session:
    return graphs.session("lm_head")


def width(session: Session) -> int:
    last = session.graph.inputs[0].shape[-1]
    assert isinstance(last, int)
    return last


def test_a_feed_of_the_wrong_shape_is_named_with_the_shape_that_was_expected(head: Session) -> None:
    with pytest.raises(EdgeOmniError, match=r"hidden is float32\[1, 5\], expected float32\['n', \d+\]"):
        head.run(hidden=np.zeros((1, 5), np.float32))


def test_a_missing_feed_is_named(head: Session) -> None:
    with pytest.raises(EdgeOmniError, match="missing inputs hidden"):
        head.run()


def test_bound_buffers_are_read_and_written_in_place(head: Session) -> None:
    hidden = np.random.default_rng(0).standard_normal((1, width(head))).astype(np.float32)
    logits = np.zeros((1, head.run(hidden=hidden)["logits"].shape[1]), np.float32)
    bound = head.bind({"hidden": hidden, "logits": logits})
    bound.run()
    np.testing.assert_array_equal(logits, head.run(hidden=hidden)["logits"])
    hidden *= -1
    bound.run()
    np.testing.assert_array_equal(logits, head.run(hidden=hidden)["logits"])


def test_binding_a_port_that_does_not_exist_is_refused(head: Session) -> None:
    with pytest.raises(EdgeOmniError, match="no port nonsense"):
        head.bind({"nonsense": np.zeros(1, np.float32)})


def test_carried_state_begins_empty_grows_and_resets(graphs: Graphs) -> None:
    session = graphs.session("decoder")
    carried = Carried(session)
    assert {array.shape[2] for array in carried.state.values()} == {0}
    carried.state = {name: np.zeros((*array.shape[:2], 4, array.shape[3]), np.float32)
                     for name, array in carried.state.items()}  # fmt: skip
    rows = np.ones((1, 2, width(session)), np.float32)
    counts = {"seqlens_k": np.array([1], np.int32), "total_sequence_length": np.array(2, np.int32)}
    first = carried.run(inputs_embeds=rows, **counts)
    assert set(first) == {"hidden"}
    assert all(array[:, :, :2].any() for array in carried.state.values())
    carried.reset()
    assert {array.shape[2] for array in carried.state.values()} == {0}


def test_a_run_can_be_cancelled_from_another_thread_and_the_session_used_again(graphs: Graphs) -> None:
    session = graphs.session("decoder")
    length = 6000
    cache = {port.name: np.zeros((1, port.shape[1], length, port.shape[3]), np.float32)  # type: ignore[arg-type]
             for port in session.graph.inputs if port.name.startswith("past.")}  # fmt: skip
    feeds = {
        "inputs_embeds": np.ones((1, length, width(session)), np.float32),
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        **cache,
    }
    threading.Timer(0.05, session.cancel).start()
    started = time.perf_counter()
    with pytest.raises(EdgeOmniError, match=r"(?i)terminate"):
        for _ in range(100):
            session.run(**feeds)
    assert time.perf_counter() - started < 60
    session.rearm()
    assert np.isfinite(session.run(**feeds)["hidden"]).all()


def test_prepacked_weights_give_the_same_numbers(graphs: Graphs, tmp_path: Path) -> None:
    options = Options(threads=1, prepack_cache=tmp_path)
    graph = graphs.graphs["lm_head"]
    hidden = np.random.default_rng(1).standard_normal((3, width(graphs.session("lm_head")))).astype(np.float32)
    plain = Session(graphs.folder, graph, Options(threads=1)).run(hidden=hidden)["logits"]
    for _ in range(2):
        packed = Session(graphs.folder, graph, options)
        np.testing.assert_array_equal(packed.run(hidden=hidden)["logits"], plain)
    assert [path.name for path in tmp_path.iterdir()] == [cache_key(graphs.folder, graph, 1)]


@pytest.mark.parametrize("recipe", ["int8", "int4-rtn"])
def test_small_quantized_matrices_survive_packing(recipe: str, tmp_path: Path) -> None:
    quantize(tiny_llama.bundle(), tmp_path / "small", read_recipe(recipe))
    plain = tiny_llama.logits(tmp_path / "small", [72, 101, 5])
    for _ in range(2):
        packed = tiny_llama.logits(tmp_path / "small", [72, 101, 5], Options(prepack_cache=tmp_path / "cache"))
        np.testing.assert_array_equal(packed, plain)


def test_a_copy_whose_packed_weights_lie_askew_is_not_used(tmp_path: Path) -> None:
    graphs = golden_graphs(vad())  # its tables have odd sizes
    options, graph = Options(prepack_cache=tmp_path), graphs.graphs["vad"]
    for _ in range(2):
        session = Session(graphs.folder, graph, options)
        silence = {port.name: np.zeros([int(dim) for dim in port.shape], port.dtype) for port in graph.inputs}
        results = session.run(**silence)
        assert np.isfinite(results["probability"]).all()
    (home,) = tmp_path.iterdir()
    assert not list(home.iterdir())


def test_the_audio_head_has_a_copy_of_packed_weights_that_can_be_used(tmp_path: Path) -> None:
    graphs, config = golden_graphs(audio_head(golden_config(), "cpu")), golden_config()
    options, graph = Options(prepack_cache=tmp_path), graphs.graphs["audio_head"]
    codes = len(config.audio_config.vq_config.codebook_sizes)
    for _ in range(2):
        session = Session(graphs.folder, graph, options)
        feeds = {port.name: np.zeros([int(dim) for dim in port.shape], port.dtype) for port in graph.inputs}
        feeds |= {"temperature": np.ones((), np.float32), "forced": np.full(codes, -1, np.int64)}
        assert len(session.run(**feeds)["codes"]) == codes
    (home,) = tmp_path.iterdir()
    assert (home / "graph.onnx").is_file()


def test_where_a_written_model_points_to_is_read_from_its_bytes() -> None:
    def entry(key: bytes, value: bytes) -> bytes:
        return b"\x0a" + bytes([len(key)]) + key + b"\x12" + bytes([len(value)]) + value

    straight = entry(b"offset", b"1234567872") + entry(b"prepacked_0", b"MatMul+1|128;99;0")
    assert lies_aligned(straight)
    assert not lies_aligned(straight + entry(b"offset", b"1234567876"))
    assert not lies_aligned(straight + entry(b"prepacked_0", b"MatMul+1|132;99;0"))


def test_a_damaged_copy_of_packed_weights_is_thrown_away(graphs: Graphs, tmp_path: Path) -> None:
    options, graph = Options(threads=1, prepack_cache=tmp_path), graphs.graphs["lm_head"]
    hidden = np.ones((1, width(graphs.session("lm_head"))), np.float32)
    whole = Session(graphs.folder, graph, options).run(hidden=hidden)["logits"]
    (home,) = tmp_path.iterdir()
    (home / "graph.onnx").write_bytes(b"damaged")
    for _ in range(2):
        np.testing.assert_array_equal(Session(graphs.folder, graph, options).run(hidden=hidden)["logits"], whole)


def test_prepacked_weights_are_kept_apart_by_graph_and_threads(graphs: Graphs) -> None:
    both = [graphs.graphs[name] for name in ("lm_head", "decoder")]
    assert len({cache_key(graphs.folder, graph, threads) for graph in both for threads in (1, 2)}) == 4


def test_prepacked_weights_of_another_checkpoint_of_the_same_shape_are_not_taken(tmp_path: Path) -> None:
    keys = set()
    for name, content in (("one", b"weights"), ("other", b"altered")):
        graph = Graph("g.onnx", ("g.data",), (), (), "fp32", 0, 7)
        (tmp_path / name).mkdir()
        (tmp_path / name / "g.onnx").write_bytes(b"the same graph")
        (tmp_path / name / "g.data").write_bytes(content)
        keys.add(cache_key(tmp_path / name, graph, 1))
    assert len(keys) == 2


def test_a_cache_that_cannot_be_written_is_done_without(graphs: Graphs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    hidden = np.ones((1, width(graphs.session("lm_head"))), np.float32)
    plain = graphs.session("lm_head").run(hidden=hidden)["logits"]
    for nowhere in (tmp_path / "file" / "cache", Path("/proc/nowhere")):
        session = Session(graphs.folder, graphs.graphs["lm_head"], Options(prepack_cache=nowhere))
        np.testing.assert_allclose(session.run(hidden=hidden)["logits"], plain, rtol=1e-6)


def test_a_graph_that_is_no_onnx_file_says_what_to_do(graphs: Graphs, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="edgeomni verify"):
        Session(tmp_path, replace(graphs.graphs["lm_head"], file="broken.onnx"))


def test_a_bundle_for_cuda_names_the_extra_where_there_is_no_gpu(graphs: Graphs) -> None:
    with pytest.raises(EdgeOmniError, match=r"CUDAExecutionProvider.*install edgeomni\[cuda\]"):
        Session(graphs.folder, graphs.graphs["lm_head"], Options(provider="cuda"))


def test_the_module_that_opens_graphs_never_loads_the_exporter_or_torch() -> None:
    foreign = "{'torch', 'onnx', 'onnx_ir', 'onnxscript', 'export'}"
    code = f"import sys, runtime.engine; print(sorted({foreign} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
