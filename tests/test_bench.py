"""Bench on tiny bundles: it measures all that it promises and refuses what it cannot measure; no time is judged."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from apps import bench as module
from apps.bench import STARTS, Bench, Decode, Prefill, bench, record, show
from apps.bench_floor import node_kinds, write_floor
from apps.bench_start import Start, start
from export.convert import export
from quant.quantize import quantize
from quant.scheme import read_recipe
from runtime.bundle import read_bundle
from runtime.errors import EdgeOmniError
from runtime.verify import refuse_failed, verify
from tests import tiny_llama
from tests.tiny import omni_bundle


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "int4"
    quantize(tiny_llama.bundle(), folder, read_recipe("int4-rtn"))
    return folder


@pytest.fixture(scope="module")
def result(int4: Path) -> Bench:
    return bench(int4, threads=(1, 2), lengths=(3, 8), repeats=2)


def numbers(value: Any) -> list[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict | list):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_combination_is_measured(result: Bench) -> None:
    combinations = [(1, 3), (1, 8), (2, 3), (2, 8)]
    assert [(row.threads, row.positions) for row in result.prefill] == combinations
    assert [(row.threads, row.context) for row in result.decode] == combinations
    assert tuple(result.starts) == STARTS
    assert result.audio_frames == ()
    assert result.audio_head is None


def test_the_json_is_complete_and_holds_every_field(result: Bench) -> None:
    found = json.loads(json.dumps(record(result), allow_nan=False))
    assert {field.name for field in fields(Bench)} <= set(found)
    for kind, rows in ((Prefill, found["prefill"]), (Decode, found["decode"]), (Start, found["starts"].values())):
        assert all(set(row) == {field.name for field in fields(kind)} for row in rows)
    assert found["recipe"] == "int4-rtn"
    assert found["random"] is True
    assert found["machine"]["cores"] >= 1
    for row in (*found["prefill"], *found["decode"]):
        assert all(number > 0 for number in numbers({**row, "sampling": 1, "overhead": 1}))
    assert found["private_share_of_weights"] == result.private_share


def test_a_spread_is_in_order(result: Bench) -> None:
    for row in (*result.prefill, *result.decode):
        wall = row.timing.wall_ms
        assert 0 < wall.low <= wall.median <= wall.high
        assert row.per_second > 0


def test_the_table_names_what_was_measured(result: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    show(result)
    said = capsys.readouterr().out
    for expected in ("int4-rtn", "second start, from the cache", "8 positions", "behind 3", "overhead", "load"):
        assert expected in said


def test_audio_frames_are_measured_where_a_bundle_speaks() -> None:
    result = bench(omni_bundle(), threads=(1,), lengths=(3,), repeats=1)
    (row,) = result.audio_frames
    assert 0 < row.head.wall_ms.median < row.frame.wall_ms.median
    assert row.budget_ms == 80
    show(result)


def test_the_audio_heads_own_comparison_is_added_when_asked(
    int4: Path, monkeypatch: pytest.MonkeyPatch, result: Bench
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "bench_audio_head", lambda threads: asked.append(threads))
    monkeypatch.setattr(module, "start", lambda *_: result.starts[STARTS[0]])
    bench(int4, threads=(2,), lengths=(3,), repeats=1, audio_head=True)
    assert asked == [2]


def test_a_context_is_left_as_it_was_found(int4: Path) -> None:
    speaker = module.Speaker(module.Engine(int4), 5)
    speaker.prefill()
    for timing in (speaker.decode, speaker.sampling, speaker.decode):
        timing()
        speaker._rewind()
        assert speaker.context.ids == speaker.prompt.ids.tolist()


@pytest.mark.parametrize("quantized", [False, True])
def test_the_floor_has_the_nodes_and_the_vocabulary_of_the_bundle(quantized: bool, int4: Path, tmp_path: Path) -> None:
    bundle = int4 if quantized else tiny_llama.bundle()
    floor = write_floor(bundle, tmp_path / "floor")
    manifest = read_bundle(floor)
    refuse_failed(floor, list(verify(floor, manifest)))
    assert manifest.vocab_size == read_bundle(bundle).vocab_size
    assert node_kinds(floor / "decoder.onnx") == node_kinds(bundle / "decoder.onnx")
    assert ("MatMulNBits" in node_kinds(floor / "decoder.onnx")) == quantized


def test_a_floor_with_other_nodes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apps import bench_floor

    config = bench_floor.floor_config(tiny_llama.bundle(), read_bundle(tiny_llama.bundle()))
    monkeypatch.setattr(bench_floor, "floor_config", lambda *_: replace(config, num_hidden_layers=1))
    with pytest.raises(EdgeOmniError, match="the floor's decoder has the nodes"):
        write_floor(tiny_llama.bundle(), tmp_path / "floor")


def test_a_start_counts_private_and_mapped_memory(int4: Path, tmp_path: Path) -> None:
    """A quarter of a gigabyte of ballast in this process does not count in the measured one."""
    ballast = bytearray(256 << 20)
    found = start(int4, 1, tmp_path / "cache")
    assert 0 < found.seconds < found.first_token_seconds
    assert found.peak < len(ballast)
    assert list((tmp_path / "cache").iterdir())


def test_a_bundle_that_cannot_be_opened_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(EdgeOmniError, match=r"could not be opened in a process of its own:\n[\s\S]*is not a bundle"):
        start(tmp_path, 1, None)


def test_what_cannot_be_measured_is_said_at_once(int4: Path, tmp_path: Path) -> None:
    export(tiny_llama.save(tmp_path / "checkpoint"), tmp_path / "cuda", profile="cuda")
    with pytest.raises(EdgeOmniError, match=r"is for cuda, and this measures the CPU; threads, lengths"):
        bench(tmp_path / "cuda", threads=(0,))
    with pytest.raises(EdgeOmniError, match=r"512 \+ 16 positions do not fit its context of 128"):
        bench(int4)
