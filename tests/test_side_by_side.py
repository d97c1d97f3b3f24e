"""Quality beside cost, and what is plainly wrong before any average: page, Markdown, JSON and terminal."""

import base64
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from apps import compare_command
from apps.cli import app
from apps.report import findings, report, side_by_side, sound_report
from apps.report.spectrogram import HIGH, WIDEST, spectrogram
from quant.answer import Answer
from quant.comparison import stored
from quant.comparison.compare import Comparison, compare
from quant.comparison.cost import cost, percentiles
from quant.comparison.each_turn import streamed_error
from quant.comparison.memory import Memory, Task, measured
from quant.comparison.record import Live
from quant.comparison.speech_figures import speech_figures
from quant.comparison.spoken import heard
from quant.comparison.stored import Stored
from runtime.errors import EdgeOmniError
from runtime.events import Timings
from tests import tiny_llama
from tests.recording import beckett
from tests.test_compare import LIMITS, MACHINE, compared, float_bundle, small_bundle, turns
from tests.test_spoken import RATE, Parrot, answer, result
from tests.tiny import omni_bundle


def with_real_speech() -> Comparison:
    """A comparison whose answers are a recording, once as it is and once gone silent."""
    said = answer(beckett(RATE))
    fine, silent = result(said, said), result(said, answer(np.zeros(RATE), text="<nothing>"))
    fine = replace(fine, recognised=heard(Parrot("ever <b>tried"), said, said, RATE))
    figures = (*compared().figures, *speech_figures([fine, silent], 0))
    return replace(compared(), results=(fine, silent), figures=figures, recogniser="parrot")


def test_what_is_plainly_wrong_stands_before_every_average(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = with_real_speech()
    compare_command.show(found, tmp_path)
    printed, page, text = capsys.readouterr().out, report.page(found), findings.markdown(found)
    for shown in (printed, page, text):
        assert 0 <= shown.index("silent") < shown.index("text.kl")
        assert "turn 2" in shown[: shown.index("text.kl")]
    record = json.loads(findings.as_json(found))
    assert next(iter(record)) == "degenerate"
    assert record["degenerate"] == [
        {"item": "turn 2", "side": "candidate", "defects": ["silent"], "question": "Read it."}
    ]


def test_an_answer_has_players_spectrograms_and_what_was_heard() -> None:
    found = with_real_speech()
    ours, theirs = sound_report.sounds(found.results[0])
    for side in (ours, theirs):
        assert side.count("<audio") == side.count("<img") == 1
        assert "ever &lt;b&gt;tried" in side and "11 of 12 words wrong" in side
    record = json.loads(findings.as_json(found))["turns"][0]
    assert record["recognised"]["candidate"] == "ever <b>tried"
    assert record["speech"]["cents"] == 0


def decoded(tag: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(tag.split("base64,")[1].rstrip('">'))))


def test_a_spectrogram_is_a_picture_with_a_tone_where_it_belongs_and_none_of_what_is_broken() -> None:
    time = np.arange(RATE) / RATE
    heights = []
    for hertz in (200, 2000, 8000):
        tag = spectrogram((0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32), RATE, "A tone")
        drawn = decoded(tag)
        assert drawn.size[1] == HIGH and drawn.size[0] <= WIDEST
        bright = np.asarray(drawn.convert("L"), np.float64).mean(axis=1)
        heights.append(int(bright.argmax()))
    assert heights[0] > heights[1] > heights[2]  # high is up
    silent = spectrogram(np.zeros(RATE, np.float32), RATE, "Silence")
    assert np.asarray(decoded(silent).convert("L")).max() < 40
    assert spectrogram(np.array([np.nan], np.float32), RATE, "") == ""
    assert spectrogram(np.empty(0, np.float32), RATE, "") == ""


def test_both_sides_cost_is_in_one_table_with_quality() -> None:
    rows = {row.what: (row.reference, row.candidate) for row in side_by_side.pairs(compared())}
    assert rows["peak memory"] == ("not measured", "not measured")
    assert rows["measured on"] == ("this machine", "this machine")
    assert rows["KL divergence, nats a token"][0] == "–"
    assert all(value.endswith(" ms") for value in rows["first token, P50 / P95"])
    assert float(rows["bits a weight"][1]) < float(rows["bits a weight"][0])


def test_a_stored_reference_brings_its_own_costs_and_names_its_machine(tmp_path: Path) -> None:
    memory, there = Memory(3_000_000, 2_000_000, 1_000_000), replace(MACHINE, cpu="a large machine")
    stored.record(Live(float_bundle(), turns()[:1], 8, memory), tmp_path / "ref", machine=there)
    found = compare(Stored(tmp_path / "ref"), small_bundle(), MACHINE)
    rows = {row.what: (row.reference, row.candidate) for row in side_by_side.pairs(found)}
    assert rows["peak memory"] == ("3.00 MB", "not measured")
    assert rows["measured on"][0].startswith("a large machine")
    assert found.costs[0].first_token is not None and found.costs[0].machine == there


def test_percentiles_of_times_are_their_slow_end_and_of_rates_too() -> None:
    values = list(np.linspace(1, 101, 101))
    slow, rate = percentiles(values, rate=False), percentiles(values, rate=True)
    assert slow is not None and (slow.p50, slow.p95, slow.n) == (51, 96, 101)
    assert rate is not None and (rate.p50, rate.p95) == (51, 6)
    nothing = np.empty(0, np.float32)
    timed = Timings(1, 0.1, 0.25, 0.5, 0.5, 1.1, 10, 4, 24000, 24000)
    found = cost(
        [Answer("a", (), nothing, timings=timed), Answer("", (), nothing, "failed", timings=timed)], None, None
    )
    assert found.first_token and (found.first_token.p50, found.first_token.n) == (0.25, 1)
    assert found.real_time_factor and found.real_time_factor.p50 == pytest.approx(1.0)
    assert found.tokens_per_second and found.tokens_per_second.p50 == 20


def test_an_answer_is_timed_from_the_question_on_and_is_the_same_each_time() -> None:
    engine = float_bundle()
    (_, first), (_, again) = engine.ask(turns()[1]), engine.ask(turns()[1])
    assert (first.ids, first.codes) == (again.ids, again.codes)
    np.testing.assert_array_equal(first.wave, again.wave)
    times = again.timings
    assert times.first_token and times.first_audio
    assert 0 < times.prefill < times.first_token < times.first_audio <= times.total
    assert times.samples == len(again.wave)


def test_speech_made_as_it_was_spoken_is_that_made_at_once_and_a_difference_would_show() -> None:
    engine = float_bundle()
    _, said = engine.ask(turns()[1])
    assert streamed_error(engine, said) < 1e-6
    assert streamed_error(engine, replace(said, wave=said.wave + np.float32(0.25))) == pytest.approx(0.25, abs=1e-6)
    assert streamed_error(engine, replace(said, wave=said.wave[1:])) == np.inf


def test_memory_is_that_of_a_process_of_its_own_and_none_where_the_bundle_cannot_answer(tmp_path: Path) -> None:
    task = Task(str(omni_bundle()), 1, None, LIMITS.max_new, LIMITS.max_frames)
    omni, text = measured(task), measured(replace(task, bundle=str(tiny_llama.bundle())))
    assert omni is not None and text is not None
    assert omni.peak > omni.empty > 0
    assert omni.private > text.private  # which lacks most graphs
    assert measured(replace(task, bundle=str(tmp_path))) is None


def test_who_listens_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "turns.jsonl").write_text('{"text": "Say a", "spoken": true}\n')
    (tmp_path / "ear.py").write_text("print('what the ear heard')")
    arguments = ["compare", omni_bundle(), omni_bundle(), "--report", tmp_path / "out", "--turns"]
    arguments += [tmp_path / "turns.jsonl", "--max-new", 6, "--max-frames", 4, "--no-cache", "--threads", 1, "--json"]
    arguments += ["--recogniser", f"{sys.executable} {tmp_path / 'ear.py'}"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    record = json.loads(done.output)
    assert record["recogniser"].endswith("ear.py")
    assert record["turns"][0]["recognised"]["candidate"] == "what the ear heard"
    assert record["costs"]["candidate"]["memory"]["peak"] > 0


def test_a_recogniser_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    arguments = ["compare", str(omni_bundle()), str(small_bundle().folder), "--report", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*arguments, "--recogniser", "no-such-ear"])
    assert isinstance(refused.exception, EdgeOmniError)
    assert "there is no recogniser 'no-such-ear'" in str(refused.exception)
    assert not (tmp_path / "out").exists()
