"""Bundles compared on published data sets: the tiny omni bundle hears and sees them, SmolLM2 chooses letters."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

pytest.importorskip("jiwer")

from typer.testing import CliRunner

from apps.cli import app
from apps.report import suite_report
from apps.turn_sources import turn_sources
from quant.answer import Answer
from quant.comparison import stored
from quant.comparison.compare import Comparison, compare
from quant.comparison.figures import TurnResult
from quant.comparison.gates import judge, read_gates
from quant.comparison.record import Live
from quant.comparison.stored import Stored
from quant.comparison.suites import read_suite
from quant.comparison.task_figures import holm, items_of, task_figures
from quant.comparison.task_verdict import task_sentences
from quant.comparison.verdict import verdict
from quant.media import Embedded
from quant.observe import Observed
from quant.turn import Metric, Turn, refuse_unfit
from runtime.errors import EdgeOmniError
from runtime.session import Options
from tests import smollm2, suite_files
from tests.test_compare import LIMITS, MACHINE, float_bundle, opened, small_bundle, value
from tests.tiny import omni_bundle

NOTHING = np.empty(0, np.float32)


@cache
def turns() -> tuple[Turn, ...]:
    """A turn or two of every kind that an omni model can take."""
    folder = Path(mkdtemp(prefix="edgeomni-test-"))
    return (
        *read_suite("omnibench", suite_files.omnibench(folder / "omni"), limit=1),
        *read_suite("vlmevalkit", suite_files.mmbench(folder / "mmbench"), limit=1),
        *read_suite("openmm-medical", suite_files.medical(folder / "medical")),
        *read_suite("transcribe", suite_files.manifest(folder / "asr")),
        *read_suite("mcq", suite_files.mmlu(folder / "mcq")),
        *read_suite("openaudiobench", suite_files.openaudiobench(folder / "heard")),
    )


def asked(metric: Metric) -> Turn:
    return next(turn for turn in turns() if turn.metric == metric)


@cache
def on_suites() -> Comparison:
    return compare(Live(float_bundle(), turns()), small_bundle(), MACHINE)


def test_every_data_set_has_its_figures_and_its_sentence() -> None:
    found = on_suites()
    judged = {"omnibench", "MMBench_DEV_EN", "OpenMMMedical", "transcribe", "mcq", "openaudiobench/trivia_qa"}
    for name in judged:
        assert 0 <= value(found, f"suite.{name}.accuracy") <= 1
        assert value(found, f"suite.{name}.detectable_loss") == 1  # so few items show nothing
    assert value(found, "suite.transcribe.error_rate_reference") > 0
    sentences = "\n".join(verdict(found))
    assert all(f"Cannot say that nothing was lost in {name}: " in sentences for name in judged)
    assert "Not judged in openaudiobench/alpaca_eval: " in sentences


def test_a_turn_of_several_pictures_is_longer_by_the_second() -> None:
    two = next(turn for turn in turns() if len(turn.images) == 2)
    one = replace(two, images=two.images[:1])
    assert len(float_bundle().prompt(two)) > len(float_bundle().prompt(one)) + 1


def test_a_picture_stands_in_the_prompt_where_the_text_has_its_place() -> None:
    engine, turn = float_bundle(), replace(asked("option"), text="one two")
    first, within = (
        np.flatnonzero(engine.prompt(replace(turn, cuts=cuts)).ids == engine.manifest.tokens.img_pad)
        for cuts in ((), (4,))
    )
    before = len(engine.tokenizer.encode("one ", special=False))
    assert before and np.array_equal(within, first + before)


def test_a_picture_out_of_a_table_is_seen_like_one_in_a_file(tmp_path: Path) -> None:
    turn = asked("option")
    copy = tmp_path / "copy.png"
    embedded = turn.images[0]
    assert isinstance(embedded, Embedded)
    copy.write_bytes(embedded.read())
    ours, theirs = float_bundle().prompt(turn), float_bundle().prompt(replace(turn, images=(copy,)))
    assert np.array_equal(ours.rows, theirs.rows) and np.array_equal(ours.ids, theirs.ids)


def test_a_transcription_is_asked_with_the_bundles_own_prompt() -> None:
    engine, turn = float_bundle(), asked("wer")
    prompt = engine.prompt(turn)
    assert turn.audio is not None
    assert np.array_equal(prompt.ids, engine.format.transcribe(engine.hear(turn.audio)).ids)


def test_a_letter_is_the_likeliest_of_those_that_are_options() -> None:
    engine, turn = float_bundle(), asked("letter")
    prompt = engine.prompt(turn)
    answer = engine.reply(prompt, turn)
    logits = engine.follow(prompt, answer.steps).logits[0][0][0]
    odds = np.array([np.exp(logits[engine.letter_ids(letter)]).sum() for letter in "ABCD"])
    assert answer.text == "ABCD"[odds.argmax()]
    assert answer.letters == pytest.approx(odds / odds.sum(), rel=1e-4)
    assert engine.choose(prompt, 1).text == "A"


def test_an_answer_may_be_longer_than_the_limits_where_its_suite_needs_it() -> None:
    engine, turn = float_bundle(), asked("option")
    assert len(engine.reply(engine.prompt(turn), replace(turn, max_new=2)).ids) <= LIMITS.max_new
    longer = engine.reply(engine.prompt(turn), replace(turn, max_new=LIMITS.max_new + 4))
    assert len(longer.ids) > LIMITS.max_new


def test_a_stored_reference_brings_its_data_sets_along(tmp_path: Path) -> None:
    live = on_suites()
    stored.record(Live(float_bundle(), turns(), 10_000), tmp_path / "ref")
    reference = Stored(tmp_path / "ref")
    kept = [(t.suite, t.item, t.metric, t.answers, t.choices, t.group, t.max_new, t.transcribe) for t in turns()]
    assert [(t.suite, t.item, t.metric, t.answers, t.choices, t.group, t.max_new, t.transcribe)
            for t in reference.turns] == kept  # fmt: skip
    found = compare(reference, small_bundle(), MACHINE)
    for figure in found.figures:
        if figure.name.startswith(("suite.", "answers.accuracy")):
            assert figure.value == pytest.approx(value(live, figure.name)), figure.name


def results(pairs: Sequence[tuple[str, str]], turn: Turn, items: Sequence[str] = ()) -> list[TurnResult]:
    """Answers of both sides and nothing else."""
    empty = np.empty(0)
    return [
        TurnResult(
            turn=replace(turn, item=items[place] if items else str(place)),
            reference=Answer(ours, (), NOTHING),
            candidate=Answer(theirs, (), NOTHING),
            stretches={},
            frames=empty.astype(bool),
            heard=empty,
            same_wave=NOTHING,
            prefill=(1, 1),
            decode=(1, 1),
        )
        for place, (ours, theirs) in enumerate(pairs)
    ]


CHOICE = Turn("?", suite="s", metric="option", answers=("A",), choices=("x", "y"))
SPEECH = Turn("?", suite="s", metric="wer", answers=("one two three four",))


def sentence(found: Sequence[TurnResult], margin: float = 0.02) -> str:
    figures = {figure.name: figure for figure in task_figures(found, 0)}
    return " ".join(task_sentences(figures.get, found, margin))


def test_rotated_questions_count_once_and_only_if_all_are_right() -> None:
    found = results([("A", "A"), ("A", "B"), ("B", "B"), ("A", "A")], CHOICE, ["1", "1", "2", "3"])
    items = items_of(found)
    assert [item.right for item in items] == [(True, False), (False, False), (True, True)]
    figures = {figure.name: figure.value for figure in task_figures(found, 0)}
    assert figures["suite.s.accuracy_reference"] == pytest.approx(2 / 3)
    assert figures["suite.s.accuracy_loss"] == pytest.approx(1 / 3)


def test_a_loss_in_one_of_many_data_sets_is_corrected_for_their_number() -> None:
    lost = results([("A", "B")] * 6 + [("A", "A")] * 20, CHOICE)  # p = 2 / 2^6
    assert sentence(lost).startswith("Regression in s: accuracy changed by -23.1% on 26 items")
    others = [r for name in "tuv" for r in results([("A", "A")] * 5, replace(CHOICE, suite=name))]
    assert "Regression" not in sentence([*lost, *others])
    assert "p = 0.125, Holm's correction for 4 data sets" in sentence([*lost, *others])


def test_holms_correction_is_his() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_error_rates_are_judged_by_their_difference() -> None:
    right, wrong = "one two three four", "one two three for"
    assert "Regression in s: the error rate went from 0.00% to 12.50% on 40 items" in sentence(
        results([(right, wrong), (right, right)] * 20, SPEECH)
    )
    assert "Improvement in s" in sentence(results([(wrong, right)] * 15 + [(wrong, wrong)] * 15, SPEECH))
    same = sentence(results([(right, right)] * 20, SPEECH))
    assert "Cannot say that nothing was lost in s: no transcription of 20 differs" in same and "13.9%" in same
    few = results([(right, wrong)] + [(wrong, right)] + [(right, right)] * 1000, SPEECH)
    assert "No regression beyond 2.0% in s" in sentence(few)
    assert "Cannot say that nothing was lost in s: the error rate" in sentence(few[:8])


def test_a_single_transcription_that_became_worse_is_not_said_to_be_the_same() -> None:
    said = sentence(results([("one two three four", "one two three for")], SPEECH))
    assert "went from 0.00% to 25.00% on 1 item," in said and "differs" not in said


def test_transcriptions_are_not_counted_among_the_data_sets_that_holm_corrects_for() -> None:
    lost = results([("A", "B")] * 6 + [("A", "A")] * 20, CHOICE)
    spoken = results([("one two three four", "one two three four")] * 5, replace(SPEECH, suite="t"))
    assert "Holm" not in sentence([*lost, *spoken]) and "p = 0.0312)" in sentence([*lost, *spoken])


def test_a_right_option_that_became_less_likely_is_told_although_no_answer_flipped() -> None:
    turn = replace(CHOICE, metric="letter")
    found = [
        replace(result, reference=replace(result.reference, letters=(0.9, 0.1)),
                candidate=replace(result.candidate, letters=(0.8 - 0.01 * place, 0.2 + 0.01 * place)))
        for place, result in enumerate(results([("A", "A")] * 10, turn))
    ]  # fmt: skip
    figures = {figure.name: figure.value for figure in task_figures(found, 0)}
    assert figures["suite.s.right_option_loss"] == pytest.approx(0.145)
    assert figures["suite.s.accuracy_loss"] == 0
    assert "The right option in s became less likely, by 14.5%" in sentence(found)


def test_error_rates_sum_edits_before_they_divide() -> None:
    long = replace(SPEECH, answers=("one two three four five six seven eight nine",))
    found = [*results([("nine", "nine")], SPEECH), *results([(long.answers[0], long.answers[0])], long, ["x"])]
    figures = {figure.name: figure.value for figure in task_figures(found, 0)}
    assert figures["suite.s.error_rate"] == pytest.approx(4 / 13)


def test_a_gate_may_hold_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text('[max]\n"suite.openaudiobench/trivia_qa.accuracy_loss" = 0.01\n')
    figures = [*task_figures(results([("A", "B")], replace(CHOICE, suite="openaudiobench/trivia_qa")), 0)]
    (gate,) = judge(read_gates(tmp_path / "g.toml"), figures)
    assert gate.found == 1 and not gate.passed


def test_the_page_names_what_flipped() -> None:
    flips = [("A", "B"), ("B", "I cannot say <so>"), ("no", "(A)")]
    answered = results(flips, CHOICE)
    found = replace(on_suites(), results=tuple(answered), figures=tuple(task_figures(answered, 0)))
    page = suite_report.suite_section(found)
    assert "right → wrong" in page and "wrong → right" in page and "1 lost, 1 gained" in page
    (record,) = suite_report.suite_record(found)
    assert [item["item"] for item in record["lost"]] == ["0"]
    assert record["gained"][0]["taken"] == ["", "A"]
    assert "<so>" not in page


def test_the_command_asks_several_data_sets_and_turns_at_once(tmp_path: Path) -> None:
    suite_files.mmlu(tmp_path / "mcq")
    suite_files.ceval(tmp_path / "mcq")
    suite_files.manifest(tmp_path / "asr")
    suite_files.json_lines(tmp_path / "own.jsonl", [{"text": "What is the capital of France?", "answer": "Paris"}])
    done = CliRunner().invoke(
        app,
        ["compare", str(omni_bundle()), str(small_bundle().folder), "--suite", "mcq", "--data", str(tmp_path / "mcq"),
         "--suite", "asr", "--data", str(tmp_path / "asr"), "--limit", "3", "--turns", str(tmp_path / "own.jsonl"),
         "--report", str(tmp_path / "report"), "--max-new", "4", "--swap-turns", "0", "--threads", "1", "--no-cache"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    named = [("own", "contains"), ("mcq", "letter"), ("asr", "wer")]
    assert [(suite["name"], suite["metric"]) for suite in record["suites"]] == named
    letters = [(turn["reference"], turn["candidate"]) for turn in record["turns"][1:4]]
    assert all(ours in "ABCD" and theirs in "ABCD" for ours, theirs in letters)
    assert "Data sets" in (tmp_path / "report" / "report.html").read_text()
    assert "| mcq | likeliest letter | 3 |" in (tmp_path / "report" / "report.md").read_text()


def test_smollm2_chooses_the_letter_that_its_mathematics_does(tmp_path: Path) -> None:
    engine = Observed(smollm2.bundle(), Options(threads=1), LIMITS)
    reference = smollm2.Reference(smollm2.gguf_path())
    ids = {letter: engine.letter_ids(letter) for letter in "ABCD"}
    for turn in read_suite("mcq", suite_files.mmlu(tmp_path)):
        prompt = engine.prompt(turn)
        logits = reference.logits(prompt.ids)[-1]
        odds = np.array([np.exp(logits[ids[letter]]).sum() for letter in "ABCD"])
        answer = engine.reply(prompt, turn)
        assert answer.text == "ABCD"[odds.argmax()]
        assert answer.letters == pytest.approx(odds / odds.sum(), rel=1e-2)


def test_the_command_says_what_suites_there_are_and_what_is_missing(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["compare", "--suites"])
    assert shown.exit_code == 0 and "openmm-medical" in shown.output and "not judged" in shown.output
    with pytest.raises(Exception, match="found 1 --suite and 0 --data"):
        CliRunner().invoke(
            app, ["record", str(omni_bundle()), "-o", str(tmp_path / "r"), "--suite", "asr"], catch_exceptions=False
        )


def test_what_is_wrong_with_several_sources_is_said_at_once(tmp_path: Path) -> None:
    asked = turn_sources([tmp_path / "t.jsonl"], ["asr", "mmlu"], [tmp_path / "x", tmp_path / "y"], 0, 0)
    with pytest.raises(EdgeOmniError, match=r"(?s)t\.jsonl cannot be read.*the suite asr is not at.*no suite mmlu"):
        asked.turns_for(float_bundle().whole)


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    suite_files.mmlu(tmp_path / "a")
    suite_files.ceval(tmp_path / "b")
    asked = turn_sources(None, ["mcq", "mcq"], [tmp_path / "a", tmp_path / "b"], 0, 0)
    with pytest.raises(EdgeOmniError, match="two sources give a data set called mcq"):
        asked.turns_for(float_bundle().whole)


def test_a_bundle_that_only_writes_is_not_asked_to_hear() -> None:
    engine = Observed(smollm2.bundle(), Options(threads=1), LIMITS)
    with pytest.raises(EdgeOmniError, match=r"(?s)omnibench .: needs a model that can listen and see.*transcribe"):
        refuse_unfit(turns(), engine.whole)


def test_two_bundles_that_are_the_same_lose_nothing_on_any_data_set() -> None:
    found = compare(Live(float_bundle(), turns()[:3]), opened(omni_bundle()), MACHINE)
    assert all(f.value == 0 for f in found.figures if f.name.endswith(("accuracy_loss", "error_rate_added")))
    assert all(not suite.lost and not suite.gained for suite in suite_report.suite_results(found))
