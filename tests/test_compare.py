"""Comparisons of real small bundles: nothing is lost where nothing changed, and what was changed is found."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

pytest.importorskip("scipy")

from quant.answer import Answer, Taken
from quant.comparison import defects, gates, stored
from quant.comparison.compare import Comparison, Machine, compare
from quant.comparison.figures import TurnResult, answer_figures, known
from quant.comparison.record import Live, choices
from quant.comparison.stored import Stored
from quant.comparison.task_figures import task_figures
from quant.comparison.verdict import verdict
from quant.limits import Limits
from quant.observe import Observed
from quant.quantize import quantize
from quant.scheme import parse_recipe, read_recipe
from quant.turn import DEFAULT, Turn, read_turns, refuse_unfit
from runtime.audio import write_wav
from runtime.bundle import read_bundle, write_manifest
from runtime.errors import EdgeOmniError
from runtime.repetition import loops
from runtime.session import Options
from tests import tiny_llama
from tests.tiny import omni_bundle

LIMITS = Limits(max_new=6, max_frames=4)
MACHINE = Machine("a CPU", "onnxruntime", "3", 1, "")
HEAD_ONLY = '[weights]\n"lm_head.weight" = { bits = 4, group_size = 32 }\n'


@cache
def turns() -> tuple[Turn, ...]:
    folder = Path(mkdtemp(prefix="edgeomni-test-"))
    rng, time = np.random.default_rng(0), np.arange(12000) / 16000
    wave = 0.3 * np.sin(2 * np.pi * 220 * time) + 0.05 * rng.standard_normal(len(time))
    write_wav(folder / "tone.wav", wave.astype(np.float32), 16000)
    return (
        Turn("Hello there", answers=("x",)),
        Turn("Say a", spoken=True),
        Turn("", audio=folder / "tone.wav", answers=("y",)),
    )


def opened(folder: Path) -> Observed:
    return Observed(folder, Options(threads=1), LIMITS)


@cache
def float_bundle() -> Observed:
    return opened(omni_bundle())


@cache
def small_bundle() -> Observed:
    folder = Path(mkdtemp(prefix="edgeomni-test-")) / "int4"
    quantize(omni_bundle(), folder, read_recipe("int4-rtn"))
    return opened(folder)


@cache
def compared() -> Comparison:
    return compare(Live(float_bundle(), turns()), small_bundle(), MACHINE)


def value(found: Comparison, name: str) -> float:
    figure = found.figure(name)
    assert figure is not None, f"{name} was not measured; there are {[f.name for f in found.figures]}"
    return figure.value


def test_a_bundle_loses_nothing_against_itself() -> None:
    found = compare(Live(float_bundle(), turns()), opened(omni_bundle()), MACHINE)
    for name in ("text.kl", "codes.kl", "code7.kl", "answers.wer", "speech.log_mel"):
        assert value(found, name) == pytest.approx(0, abs=1e-9)
    for name in ("text.top1", "codes.frames", "heard0", "answers.exact", "cost.bytes_ratio", "speech.duration_ratio"):
        assert value(found, name) == 1
    assert value(found, "graphs.worst_sqnr") == float("inf")
    assert {error.sqnr for error in found.layers} == {float("inf")}
    assert found.swaps == ()


def test_following_its_own_answer_a_bundle_would_choose_it_again() -> None:
    """Text, then speech with the history of both: a slip of one position would show. Only what was there before may
    differ, since the repetition penalty makes it less likely."""
    engine, turn = float_bundle(), turns()[1]
    prompt = engine.prompt(turn)
    answer = engine.answer(prompt, spoken=True)
    assert {step.kind for step in answer.steps} == {"text", "audio"}
    banned = engine.writer(np.random.default_rng(0), greedy=True).banned
    for step, logits in zip(answer.steps, engine.follow(prompt, answer.steps).logits, strict=True):
        if step.kind == "text":
            logits[0][:, banned] = -np.inf
        for scores, chosen in zip(logits, choices(step), strict=True):
            likeliest = scores.argmax(-1)
            before = [*step.inputs] if step.kind == "text" else []
            for place in np.flatnonzero(likeliest != chosen):
                assert likeliest[place] in [*before, *chosen[:place]]
            assert (likeliest == chosen).mean() >= 0.5


def test_a_context_that_is_full_ends_an_answer_without_empty_steps() -> None:
    engine = opened(omni_bundle())
    used = len(engine.prompt(turns()[1]))
    for room in range(1, 4):
        engine.manifest = replace(engine.manifest, cache=replace(engine.manifest.cache, max_positions=used + room))
        found = compare(Live(engine, turns()[1:2]), engine, MACHINE)
        assert all(len(step) for step in found.results[0].reference.steps)


def test_a_smaller_bundle_loses_something_everywhere() -> None:
    found = compared()
    assert value(found, "text.kl") > 1e-4
    assert value(found, "codes.kl") > 1e-4
    assert value(found, "cost.bytes_ratio") < 1
    assert value(found, "graphs.worst_sqnr") < 40
    assert [error.sqnr for error in found.tensors] == sorted(error.sqnr for error in found.tensors)


def test_a_bundle_that_only_writes_is_compared_too() -> None:
    engine = opened(tiny_llama.bundle())
    found = compare(Live(engine, [Turn("ab")]), opened(tiny_llama.bundle()), MACHINE)
    assert value(found, "text.kl") == pytest.approx(0, abs=1e-9)
    assert not [figure for figure in found.figures if figure.name.startswith(("code", "heard", "speech"))]


def test_layers_of_the_decoder_are_compared_one_by_one() -> None:
    outputs = {error.output for error in compared().tensors if error.graph == "decoder"}
    layers = float_bundle().manifest.cache.layers
    assert outputs >= {"hidden", *(f"present.{layer}.key" for layer in range(layers))}


def test_what_leaves_each_layer_is_compared_in_order_and_decoders_and_encoders_have_some() -> None:
    decoder = [error for error in compared().layers if error.graph == "decoder"]
    assert [error.place for error in decoder] == [*range(float_bundle().manifest.cache.layers)]
    assert [error.layer for error in decoder] == [f"model.layers.{error.place}" for error in decoder]
    assert all(0 < error.sqnr < 60 and 0.5 < error.cosine < 1 for error in decoder)
    encoder = [error for error in compared().layers if error.graph == "audio_encoder"]
    assert encoder and all(error.sqnr == float("inf") for error in encoder)  # it stays float
    assert "vocoder" not in {error.graph for error in compared().layers}


def test_looking_into_a_graph_leaves_no_file_beside_it(tmp_path: Path) -> None:
    shutil.copytree(omni_bundle(), tmp_path / "read-only")
    before = sorted(path.name for path in (tmp_path / "read-only").iterdir())
    engine = opened(tmp_path / "read-only")
    assert engine.session("audio_head").graph.outputs[-1].name == engine.code_taps[-1]
    assert sorted(path.name for path in (tmp_path / "read-only").iterdir()) == before


def test_every_swapped_graph_costs_less_than_all_of_them_and_one_that_took_no_part_is_left_out() -> None:
    found = compared()
    kl = [swap.text_kl or 0.0 for swap in found.swaps]
    assert 0 < max(kl) < 2 * value(found, "text.kl")
    assert {"decoder", "lm_head", "audio_head"} <= {swap.graph for swap in found.swaps}
    assert "vad" not in {swap.graph for swap in found.swaps}


def test_the_one_graph_that_was_changed_is_named(tmp_path: Path) -> None:
    quantize(omni_bundle(), tmp_path / "head", parse_recipe("head", HEAD_ONLY))
    found = compare(Live(float_bundle(), turns()[:1]), opened(tmp_path / "head"), MACHINE)
    guilty, *others = found.swaps
    assert guilty.graph == "lm_head"
    assert guilty.text_kl == pytest.approx(value(found, "text.kl"))
    assert not any(other.text_kl for other in others)
    assert verdict(found)[-1].startswith("Most is lost in lm_head")


def test_a_stored_reference_gives_the_same_figures(tmp_path: Path) -> None:
    live = compared()
    stored.record(Live(float_bundle(), turns(), 10_000), tmp_path / "ref")
    found = compare(Stored(tmp_path / "ref"), small_bundle(), MACHINE)
    timed = {"cost.prefill_ratio", "cost.decode_ratio"}  # of two machines they would say nothing
    assert {figure.name for figure in live.figures} - {figure.name for figure in found.figures} == timed
    for figure in found.figures:
        if not figure.name.endswith(("_p50", "_p95")):  # times, too
            assert figure.value == pytest.approx(value(live, figure.name), rel=1e-9, nan_ok=True), figure.name
    assert found.stored and found.swaps == ()
    assert [error.sqnr for error in found.tensors] == pytest.approx([error.sqnr for error in live.tensors])
    assert found.layers == live.layers


def test_a_cut_reference_gives_less_divergence_and_the_same_of_all_else(tmp_path: Path) -> None:
    live = compared()
    stored.record(Live(float_bundle(), turns(), 8), tmp_path / "ref")
    found = compare(Stored(tmp_path / "ref"), small_bundle(), MACHINE)
    for name in ("text.kl", "codes.kl"):
        assert 0 < value(found, name) < value(live, name)
    for name in ("text.top1", "text.rms_delta_p", "text.perplexity_ratio", "code3.top1", "answers.exact", "heard0"):
        assert value(found, name) == pytest.approx(value(live, name), rel=1e-9)


def test_a_damaged_or_foreign_record_is_refused(tmp_path: Path) -> None:
    stored.record(Live(float_bundle(), turns()[:1], 8), tmp_path / "ref")
    with pytest.raises(EdgeOmniError, match="exists; name a folder that does not"):
        stored.record(Live(float_bundle(), turns()[:1], 8), tmp_path / "ref")
    with (tmp_path / "ref" / "turn-0000.npz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(EdgeOmniError, match=r"is damaged: turn-0000\.npz; record it again"):
        Stored(tmp_path / "ref")
    with pytest.raises(EdgeOmniError, match="cannot be read"):
        Stored(tmp_path)
    (tmp_path / "reference.json").write_text("{}")
    with pytest.raises(EdgeOmniError, match="is no stored reference of this version; record it again:\n  version: "):
        Stored(tmp_path)


def test_bundles_of_other_families_and_tokenizers_are_not_compared() -> None:
    reference, candidate = Live(float_bundle(), turns()), small_bundle()
    reference.side = replace(reference.side, family="llama", tokenizer_sha256="0" * 64)
    with pytest.raises(EdgeOmniError, match=r"(?s)of the family llama, the candidate of .*tokenizer is 000000000000…"):
        compare(reference, candidate, MACHINE)


def test_broken_arithmetic_comes_first(tmp_path: Path) -> None:
    shutil.copytree(omni_bundle(), tmp_path / "broken")
    manifest = read_bundle(tmp_path / "broken")
    for name in manifest.graphs["lm_head"].weights:
        size = (tmp_path / "broken" / name).stat().st_size
        (tmp_path / "broken" / name).write_bytes(np.full(size // 4, np.nan, np.float32).tobytes())
    write_manifest(tmp_path / "broken", replace(manifest, notes=("broken",)))
    found = compare(Live(float_bundle(), turns()[:1]), opened(tmp_path / "broken"), MACHINE)
    assert "1 of 1 answers of the candidate are degenerate (failed)" in verdict(found)[0]
    assert value(found, "text.non_finite") == LIMITS.max_new
    assert found.tensors[0].non_finite > 0
    assert found.figure("text.kl") is None


@pytest.mark.parametrize(
    ("items", "found"),
    [
        (list("abcabcabcabc"), True),
        (list("start of it, then nanananananananana"), True),
        (list("aaaaaaaaaaa"), False),  # too short
        (list("a long text with many other words, then hahahahahaha"), False),  # under half of it
        (list("every word is another one here, and none comes back"), False),
        ([], False),
    ],
)
def test_a_loop_is_what_repeats_to_the_end_over_half_of_an_answer(items: list[str], found: bool) -> None:
    assert loops(items) is found


def test_silence_and_clicks_are_counted_and_mel_distance_is_in_decibels() -> None:
    time = np.arange(24000) / 24000
    tone = (0.3 * np.sin(2 * np.pi * 300 * time)).astype(np.float32)
    assert defects.silence(np.concatenate([tone, np.zeros(24000, np.float32)])) == pytest.approx(0.5, abs=0.03)
    assert defects.clicks(tone) == 0
    clicked = tone.copy()
    clicked[1000] += 0.9
    assert defects.clicks(clicked) > 0
    noise = np.random.default_rng(0).normal(0, 0.1, 24000).astype(np.float32)
    assert defects.log_mel_distance(noise, noise, 24000) == 0
    assert defects.log_mel_distance(noise, noise * np.float32(0.1), 24000) == pytest.approx(20, abs=0.1)


def test_an_empty_or_silent_answer_is_degenerate() -> None:
    nothing = np.empty(0, np.float32)
    assert defects.degeneracies(Answer(" ", (), nothing), spoken=False) == ("empty",)
    assert defects.degeneracies(Answer("words", (), nothing), spoken=True) == ("silent",)
    assert defects.degeneracies(Answer("words", (), nothing), spoken=False) == ()


def test_few_turns_cannot_show_that_nothing_was_lost() -> None:
    found = compared()
    assert any(
        sentence.startswith("Cannot say that nothing was lost: ") and "on 2 turns" in sentence
        for sentence in verdict(found)
    )


def judged(before: list[bool], after: list[bool]) -> Comparison:
    """A comparison of nothing but right and wrong answers."""
    results = []
    for pair in zip(before, after, strict=True):
        words = [Answer("yes" if right else "no", (), np.empty(0, np.float32)) for right in pair]
        turn, nothing = Turn("?", answers=("aye", "yes")), np.empty(0)
        result = TurnResult(
            turn, words[0], words[1], {}, nothing.astype(bool), nothing, nothing.astype(np.float32), (1, 1), (1, 1)
        )
        results.append(result)
    found = compared()
    figures = (*answer_figures(results, 0), *task_figures(results, 0))
    return replace(found, results=tuple(results), figures=figures, swaps=(), margin=0.02)


def test_a_loss_that_chance_does_not_explain_is_a_regression() -> None:
    found = judged([True] * 40, [False] * 10 + [True] * 30)
    assert verdict(found)[0].startswith("Regression: accuracy changed by -25.0% on 40 turns")
    assert value(found, "answers.accuracy_loss") == 0.25


def test_no_loss_among_few_turns_still_leaves_room_for_one() -> None:
    loss = judged([True] * 20, [True] * 20).figure("answers.accuracy_loss")
    assert loss is not None and loss.low is not None and loss.high is not None
    assert -loss.low == loss.high == pytest.approx(0.139, abs=1e-3)


def test_many_turns_without_a_loss_show_that_none_is_above_the_margin() -> None:
    assert verdict(judged([True] * 400, [True] * 400))[0].startswith("No regression beyond 2.0%")
    assert verdict(judged([True] * 40, [True] * 40))[0].startswith("Cannot say")


def test_gates_hold_figures_to_their_limits_and_fail_for_what_was_not_measured(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text('[max]\n"text.kl" = 0.03\ncode0.kl = 1\n[min]\n"text.top1" = 0.9\n')
    found = gates.judge(gates.read_gates(tmp_path / "g.toml"), [known("text.kl", 0.02, 1), known("text.top1", 0.8, 1)])
    assert [(j.gate.figure, j.passed) for j in found] == [("text.kl", True), ("code0.kl", False), ("text.top1", False)]


def test_everything_wrong_with_a_gates_file_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text('[max]\n"text.kll" = 1\n"text.kl" = "low"\n[most]\nx = 1\n')
    with pytest.raises(EdgeOmniError, match=r"(?s)\[most\]: unknown.*text\.kll: no such figure.*found 'low'"):
        gates.read_gates(tmp_path / "g.toml")


def test_everything_wrong_with_a_turns_file_is_said_at_once(tmp_path: Path) -> None:
    lines = ['{"text": "fine", "answer": ["a", "b"]}', '{"txt": "x"}', "{", '{"text": " "}', '{"audio": "none.wav"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(EdgeOmniError) as error:
        read_turns(tmp_path / "t.jsonl")
    for mistake in ("line 2: txt: unknown", "line 3:", "line 4: empty", "line 5: there is no file"):
        assert mistake in str(error.value)


def test_the_turns_that_come_along_are_in_two_languages_and_some_are_spoken() -> None:
    read = read_turns(DEFAULT)
    assert len(read) == 40
    assert any(turn.spoken for turn in read)
    assert any("中" in turn.text for turn in read)


def test_a_turn_may_have_several_right_answers(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "How many?", "answer": ["seven", "7"]}\n{"text": "a", "answer": "b"}\n')
    assert [turn.answers for turn in read_turns(tmp_path / "t.jsonl")] == [("seven", "7"), ("b",)]


def test_turns_that_a_bundle_cannot_take_are_named_all_at_once() -> None:
    manifest = replace(float_bundle().whole, speech=None, image=None)
    with pytest.raises(EdgeOmniError, match=r"(?s)2 of the turns:.*turn 1: .* speak.*turn 3: .* see"):
        refuse_unfit([Turn("a", spoken=True), Turn("b"), Turn("c", images=(Path("x"),))], manifest)


def test_another_prompt_is_not_compared_position_by_position() -> None:
    step = Taken("text", np.array([1, 2, 3]), np.array([4]))
    with pytest.raises(EdgeOmniError, match="spell the same turn differently"):
        float_bundle().follow(float_bundle().prompt(turns()[0]), [step])
