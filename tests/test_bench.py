"""Bench on tiny bundles: it measures all that it promises and refuses what it cannot measure; no time is judged."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from apps.bench import bench as module
from apps.bench import rounds as bench_rounds
from apps.bench import turn as bench_turn
from apps.bench.audio_head import Spread
from apps.bench.bench import STARTS, Bench, bench, record
from apps.bench.floor import node_kinds, write_floor
from apps.bench.rounds import TOKENS, Case, Decode, Prefill, Reader, Speaker, moved_bytes
from apps.bench.show import show
from apps.bench.start import Start, start
from apps.bench.turn import TEXT_TOKENS, TimedEngine, measure_turn
from export.convert import export
from quant.quantize import quantize
from quant.scheme import read_recipe
from runtime.bundle import read_bundle
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.session import Options
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
    assert [turn.threads for turn in result.turns] == [1, 2]
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
    names = ("int4-rtn", "second start, from the cache", "8 positions", "behind 3", "overhead", "load", "roofline")
    for expected in (*names, "A written answer"):
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
    speaker = Speaker(Engine(int4), 5)
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
    from apps.bench import floor as bench_floor

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


def test_a_bundle_may_be_named_from_where_one_stands(int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(int4.parent)
    assert start(Path(int4.name), 1, None).seconds > 0


def test_a_bundle_that_cannot_be_opened_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(EdgeOmniError, match=r"could not be opened in a process of its own:\n[\s\S]*is not a bundle"):
        start(tmp_path, 1, None)


def test_what_cannot_be_measured_is_said_at_once(int4: Path, tmp_path: Path) -> None:
    export(tiny_llama.save(tmp_path / "checkpoint"), tmp_path / "cuda", profile="cuda")
    with pytest.raises(EdgeOmniError, match=r"is for cuda, and this measures the CPU; threads, lengths"):
        bench(tmp_path / "cuda", threads=(0,))
    with pytest.raises(EdgeOmniError, match=r"512 \+ 16 positions do not fit its context of 128"):
        bench(int4)


def test_a_token_moves_every_weight_of_decoder_and_head_and_the_cache() -> None:
    """Counted from the shapes of the tiny model: two norms and seven matrices a layer, the last norm, head and row."""
    manifest = read_bundle(tiny_llama.bundle())
    decoder, head = (manifest.graphs[name].parameters for name in ("decoder", "lm_head"))
    position = 2 * manifest.cache.layers * manifest.cache.kv_heads * manifest.cache.head_dim
    expected = 4 * (decoder + head + manifest.hidden_size + 10 * position)
    assert moved_bytes(manifest, 10) == expected


def test_a_smaller_cache_moves_fewer_bytes_and_no_other_part_of_the_rotary_tables() -> None:
    manifest = read_bundle(tiny_llama.bundle())
    small = replace(manifest, cache=replace(manifest.cache, dtype="int8", calibrated_positions=1))
    saved = 10 * (manifest.cache.bytes_per_position - small.cache.bytes_per_position)
    assert moved_bytes(manifest, 10) - moved_bytes(small, 10) == saved > 0


def test_a_share_of_bandwidth_is_the_time_of_reading_by_that_of_a_token() -> None:
    engine = Engine(tiny_llama.bundle(), Options(threads=1))
    case = Case(engine, engine, 3, Reader(1))
    clocks = {"decode": 8.0, "reading": 2.0, "floor": 1.0, "sampling": 0.5, "prefill": 1.0}
    case.kept = {name: [(ms, ms), (2 * ms, ms)] for name, ms in clocks.items()}
    line = case.decode().roofline
    assert line.share == Spread(0.25, 0.25, 0.25)
    assert line.moved_bytes == moved_bytes(engine.manifest, 3 + TOKENS // 2)
    assert line.moved_bytes / line.bandwidth.high == pytest.approx(1e-3 * 2.0, rel=0.1)


def test_more_bytes_than_the_buffer_holds_take_longer_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rounds, "MOST_READ", 1000)
    monkeypatch.setattr(bench_rounds, "timed", lambda work: (work(), (3.0, 2.0))[1])
    assert Reader(5000).read(5000, 2) == (15.0, 10.0)
    assert Reader(500).read(500, 1) == (3.0, 2.0)


def test_a_turn_times_every_graph_that_it_runs_and_names_the_others() -> None:
    turn = measure_turn(TimedEngine(omni_bundle(), Options(threads=1)))
    graphs = set(read_bundle(omni_bundle()).graphs)
    assert {row.graph for row in turn.graphs} | set(turn.not_run) == graphs
    assert {"audio_encoder", "vision_encoder", "decoder", "audio_head", "vocoder"} <= {row.graph for row in turn.graphs}
    assert turn.not_run == ("vad",)
    assert sum(row.share for row in turn.graphs) < 1
    assert sum(row.total_ms for row in turn.graphs) < 1e3 * turn.total
    decoder = {row.rows: row.calls for row in turn.graphs if row.graph == "decoder"}
    assert decoder["1"] > turn.frames > 0
    assert len(decoder) == 2
    assert turn.first_token is not None and turn.first_audio is not None
    assert turn.understood < turn.first_token < turn.first_audio <= turn.total
    assert turn.audio_seconds > 0


def test_a_frame_that_takes_longer_than_it_sounds_is_over_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TimedEngine(omni_bundle(), Options(threads=1))
    found = {}
    for budget in (1e9, 0.0):
        monkeypatch.setattr(bench_turn, "frame_budget_ms", lambda speech, budget=budget: budget)
        turn = measure_turn(engine)
        found[budget] = (turn.frames, turn.frames_over_budget)
    assert found[1e9][1] == 0 < found[0.0][0] == found[0.0][1]


def test_a_text_bundle_writes_its_answer(result: Bench) -> None:
    for turn in result.turns:
        assert not turn.spoken and turn.frames == 0 and turn.first_audio is None and turn.real_time_factor is None
        heads = [row.calls for row in turn.graphs if row.graph == "lm_head"]
        assert 1 <= sum(heads) <= TEXT_TOKENS
        assert turn.not_run == ()
