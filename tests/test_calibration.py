"""Calibration: pieces of a graph give what the whole gives, what was stored is known again, and refusals say why."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apps import one_pass
from export.convert import export
from quant import spill
from quant.calibration import REACHED, Calibration, Unfinished, Walk
from quant.examples import BUILT_IN, DEFAULT, Calibrating, Example, conversation, examples
from quant.plan import open_bundle
from quant.quantize import quantize, write
from quant.rewrite import Model, weights
from quant.scheme import parse_recipe, read_recipe
from quant.spill import Values
from quant.stages import stages
from quant.synthetic import picture, voice
from quant.taps import exposed
from quant.turn import Turn, read_turns
from runtime.bundle import Port, read_bundle
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.journal import Journal
from runtime.session import InMemory
from runtime.verify import refuse_failed, verify
from tests import tiny_llama
from tests.test_resume import computed, contents, run
from tests.tiny import omni_bundle, spoken_turns


def matrices(model: Model) -> list[str]:
    found = [weight for weight in weights(model) if weight.obstacle() is None]
    return [weight.name for weight in found if "embed" not in weight.name]


def few(folder: Path) -> tuple[Example, ...]:
    """Two of the default's examples: one that is heard and answered aloud, one that is seen."""
    heard, seen = examples(None, read_bundle(folder))[:2]
    return replace(heard, audio=voice(1.0, 16000, 1), aloud=voice(1.0, 16000, 2)), seen


def calibration(folder: Path, work: Path) -> Calibration:
    manifest = read_bundle(folder)
    journal = Journal.taken_up(work, "test") or Journal.begun(work, "test")
    engine = Unfinished(folder, manifest, folder / manifest.tokenizer)
    made = Calibration(few(folder), engine, work, journal)
    for name, model in open_bundle(folder).models.items():
        made.finished(name, model)
    return made


def walked(name: str, work: Path) -> Walk:
    folder = omni_bundle()
    return calibration(folder, work).walk(name, read_bundle(folder).graphs[name], open_bundle(folder).models[name])


@pytest.mark.parametrize("name", REACHED)
def test_pieces_give_what_the_whole_graph_gives(name: str, tmp_path: Path) -> None:
    walk = walked(name, tmp_path)
    graph = read_bundle(omni_bundle()).graphs[name]
    order = stages(walk.model, matrices(walk.model))
    wanted = [value for stage in order for value in stage.inputs]
    inner = [value for value in wanted if value not in {port.name for port in graph.inputs}]
    whole = InMemory(*exposed(open_bundle(omni_bundle()).models[name], graph, inner))
    feeds = {port.name: walk.samples.feed(1, port) for port in graph.inputs}
    expected = {**feeds, **whole.run_for(inner, feeds)} if inner else feeds
    for place, stage in enumerate(order):
        walk.reach(str(place), stage.inputs, [value for later in order[place + 1 :] for value in later.inputs])
        for value in stage.inputs:
            got = walk.gram([value], 16).parts
            assert np.isfinite(got).all() and got.any()
            found = walk.value(1, value)
            limit = 2e-6 * max(1.0, float(np.abs(expected[value]).max()))
            np.testing.assert_allclose(found, expected[value], atol=limit, err_msg=value)


def test_every_matrix_comes_once_and_behind_what_it_depends_on(tmp_path: Path) -> None:
    model = walked("audio_head", tmp_path).model
    order = stages(model, matrices(model))
    names = [weight for stage in order for weight in stage.weights]
    assert sorted(names) == sorted(matrices(model))
    shared = "audio_head.transformer_layers.0.self_attention.in_proj_weight"
    assert len(next(stage for stage in order if shared in stage.weights).inputs) == 8  # it is read at every depth
    first = names.index(shared)
    for later in ("0.self_attention.out_proj.weight", "0.linear1.7.weight", "1.self_attention.in_proj_weight"):
        assert first < names.index(f"audio_head.transformer_layers.{later}")


def test_gate_and_up_are_one_stage_since_they_multiply_the_same(tmp_path: Path) -> None:
    model = walked("decoder", tmp_path).model
    groups = [{name.rsplit(".", 2)[1] for name in stage.weights} for stage in stages(model, matrices(model))]
    assert groups == [{"W_pack"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}] * (len(groups) // 4)


def test_what_no_later_piece_needs_leaves_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SWEEP", 0.0)
    walk = walked("decoder", tmp_path)
    order, most = stages(walk.model, matrices(walk.model)), 0
    for place, stage in enumerate(order):
        walk.reach(str(place), stage.inputs, [value for later in order[place + 1 :] for value in later.inputs])
        most = max(most, len(list(tmp_path.glob("decoder.*"))))
    assert most <= 3  # what is multiplied, and the residual


def test_a_run_that_was_killed_finds_its_values_again(tmp_path: Path) -> None:
    walk = walked("decoder", tmp_path)
    order = stages(walk.model, matrices(walk.model))
    later = [value for stage in order[1:] for value in stage.inputs]
    walk.reach("0", order[0].inputs, later)
    before = walk.gram(order[0].inputs, 32).parts
    walk.values.journal.sync()
    again = walked("decoder", tmp_path)
    recalled = again.values.recall("decoder.0")
    assert recalled is not None
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("decoder.*")}
    again.reach("0", order[0].inputs, later)
    assert np.array_equal(again.gram(order[0].inputs, 32).parts, before)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("decoder.*")} == stamps


def test_stored_values_come_back_sample_by_sample(tmp_path: Path) -> None:
    runs = [{"a": np.arange(n, dtype=np.float32).reshape(n, 1), "b": np.full(n, n)} for n in (3, 0, 2)]
    Values(tmp_path, journal := Journal.begun(tmp_path, "test")).store("label", ("a", "b"), runs)
    found = Values(tmp_path, journal).recall("label")
    assert found is not None
    for number, values in enumerate(runs):
        assert all(np.array_equal(found[name].sample(number), values[name]) for name in values)
        assert all(found[name].sample(number).dtype == values[name].dtype for name in values)


def test_frames_of_a_spoken_answer_are_those_behind_the_question() -> None:
    folder = omni_bundle()
    manifest = read_bundle(folder)
    engine = Unfinished(folder, manifest, folder / manifest.tokenizer)
    sound = voice(1.0, 16000, seed=1)
    read = conversation(Example("hello", sound, (), "good day", sound), engine)
    assert len(read.codes) == len(engine.hear(sound).codes) == len(read.frames)
    assert np.array_equal(read.codes, engine.hear(sound).codes)
    start = int(np.flatnonzero(read.prompt.ids == manifest.tokens.audiogen_start)[0])
    assert (read.frames == start + 1 + np.arange(len(read.frames))).all()


def test_the_default_lets_an_omni_model_hear_see_and_speak_and_a_text_model_read() -> None:
    omni = examples(None, read_bundle(omni_bundle()))
    assert any(one.audio is not None for one in omni)
    assert any(one.images for one in omni)
    assert any(one.aloud is not None for one in omni)
    plain = examples(None, read_bundle(tiny_llama.bundle()))
    assert len(plain) == len(omni) > 30
    assert all(one.audio is None and one.aloud is None and not one.images and one.answer for one in plain)


def test_text_alone_is_refused_for_an_omni_model_unless_insisted_on() -> None:
    turns = (Turn("Where is the station?", answers=("Over there.",)),)
    manifest = read_bundle(omni_bundle())
    with pytest.raises(EdgeOmniError, match=r"never let .* hear or see or speak: .*--partial-calibration"):
        examples(turns, manifest)
    assert len(examples(turns, manifest, partial=True)) == 1
    assert len(examples(turns, read_bundle(tiny_llama.bundle()))) == 1


def test_turns_that_the_model_cannot_take_and_files_without_turns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgeOmniError, match="needs a model that can speak"):
        examples((Turn("Say it aloud", spoken=True),), read_bundle(tiny_llama.bundle()))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(EdgeOmniError, match="no turn in it"):
        read_turns(tmp_path / "empty.jsonl")


def test_an_audio_head_without_spoken_answers_says_what_it_lacks(tmp_path: Path) -> None:
    made = calibration(omni_bundle(), tmp_path)
    made.examples = (Example("hello", answer="good day"),)
    head = read_bundle(omni_bundle()).graphs["audio_head"]
    with pytest.raises(EdgeOmniError, match="no turn is answered aloud"):
        made.walk("audio_head", head, open_bundle(omni_bundle()).models["audio_head"])


def test_sounds_and_pictures_are_the_same_each_time_and_differ_by_seed() -> None:
    assert np.array_equal(voice(1.5, 16000, 3), voice(1.5, 16000, 3))
    assert not np.array_equal(voice(1.5, 16000, 3), voice(1.5, 16000, 4))
    assert len(voice(1.5, 16000, 3)) == 24000
    assert 0.1 < np.abs(voice(5, 16000, 5)).max() < 1.5
    assert picture(64, 48, 1) == picture(64, 48, 1) != picture(64, 48, 2)


def test_the_decoder_is_fed_an_empty_cache_as_long_as_the_turn(tmp_path: Path) -> None:
    walk = walked("decoder", tmp_path)
    length = walk.samples.feed(0, Port("inputs_embeds", "float32", ())).shape[1]
    past = next(port for port in read_bundle(omni_bundle()).graphs["decoder"].inputs if port.name.startswith("past."))
    assert walk.samples.feed(0, past).shape == tuple(length if dim == "cache" else dim for dim in past.shape)
    assert int(walk.samples.feed(0, Port("total_sequence_length", "int32", ()))) == length


GPTQ = """
[weights]
"model.embed_tokens.weight" = { bits = 8, group_size = 32 }
"*" = { bits = 4, group_size = [32, 16], method = "gptq" }
"""


def along(folder: Path, turn: Turn) -> np.ndarray:
    """Scores of the tiny Llama at places of a turn."""
    ids = conversation(Example(turn.text, answer=turn.answers[0]), Engine(folder)).prompt.ids.tolist()
    return np.array([tiny_llama.logits(folder, ids[:length]) for length in range(20, len(ids), 30)])


def test_gptq_moves_scores_less_than_rounding_does(tmp_path: Path) -> None:
    *turns, held_out = read_turns(DEFAULT)[:12]
    exact, moved = along(tiny_llama.bundle(), held_out), {}
    for method in ("rtn", "gptq"):
        recipe = parse_recipe(method, GPTQ.replace('"gptq"', f'"{method}"'))
        calibrating = Calibrating(tuple(turns)) if method == "gptq" else BUILT_IN
        manifest = quantize(tiny_llama.bundle(), tmp_path / method, recipe, calibrating=calibrating)
        assert manifest.quantization is not None
        assert {w.method for w in manifest.quantization.quantized if w.graph == "decoder"} == {method}
        moved[method] = float(np.square(along(tmp_path / method, held_out) - exact).mean())
    assert moved["gptq"] < 0.8 * moved["rtn"]


def test_an_omni_bundle_is_calibrated_through_decoder_and_audio_head(tmp_path: Path) -> None:
    turns = read_turns(spoken_turns(tmp_path))
    recipe = read_recipe("int4")
    manifest = quantize(omni_bundle(), tmp_path / "small", recipe, calibrating=Calibrating(turns))
    refuse_failed(tmp_path / "small", list(verify(tmp_path / "small", manifest)))
    assert manifest.quantization is not None
    methods = {weight.graph: weight.method for weight in manifest.quantization.quantized if weight.bits == 4}
    assert methods == {"decoder": "gptq", "audio_head": "gptq"}
    larger = {weight.name for weight in manifest.quantization.quantized if (weight.bits, weight.method) == (8, "gptq")}
    layers = range(manifest.cache.layers)  # so few that each is an outer one
    matrices = ("self_attn.W_pack", "mlp.down_proj")
    assert larger == {f"model.layers.{layer}.{matrix}.weight" for layer in layers for matrix in matrices}


@pytest.mark.parametrize("kill", [("write_matrix", 4), ("append", 12), ("save_graph", 2)])
def test_a_calibrated_run_that_is_killed_ends_with_the_bytes_of_one_that_is_not(
    kill: tuple[str, int], tmp_path: Path
) -> None:
    rest = [tiny_llama.bundle(), "--recipe", "int4"]
    whole = computed(run("quantize", *rest, "-o", tmp_path / "whole"))
    assert run("quantize", *rest, "-o", tmp_path / "killed", kill=kill).code == -signal.SIGKILL
    assert computed(run("quantize", *rest, "-o", tmp_path / "killed")) < whole
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_checkpoint_is_calibrated_in_one_pass_to_the_bytes_of_two(tmp_path: Path) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "float", random=True)
    quantize(tmp_path / "float", tmp_path / "two", read_recipe("int4"), standalone=True)
    planned = one_pass.plan(checkpoint, "cpu", read_recipe("int4"), random=True)[1]
    assert planned is not None
    write(planned, tmp_path / "one", standalone=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_no_turn_reaches_and_what_multiplies_nothing_is_refused_by_name(tmp_path: Path) -> None:
    text = '[weights]\n"*" = { bits = 8, group_size = [32, 16], method = "gptq" }'
    with pytest.raises(EdgeOmniError) as refused:
        quantize(omni_bundle(), tmp_path / "small", parse_recipe("all", text.replace('"*"', '"*.fc1.weight"')))
    assert "fc1.weight is in audio_encoder; turns are led through decoder, lm_head, audio_head" in str(refused.value)
    with pytest.raises(EdgeOmniError, match=r"embed_tokens.weight is in embed_tokens"):
        quantize(tiny_llama.bundle(), tmp_path / "small", parse_recipe("all", text))
    with pytest.raises(EdgeOmniError, match=r"audio_embed_layers.0.weight is a table in which rows are looked up"):
        quantize(
            omni_bundle(), tmp_path / "small", parse_recipe("all", text.replace('"*"', '"*.audio_embed_layers.*"'))
        )
    assert not list(tmp_path.iterdir())


def test_turns_for_a_recipe_that_calibrates_nothing_are_refused(tmp_path: Path) -> None:
    calibrating = Calibrating((Turn("Hello", answers=("Good day",)),))
    with pytest.raises(EdgeOmniError, match="int4-rtn calibrates no matrix"):
        quantize(tiny_llama.bundle(), tmp_path / "small", read_recipe("int4-rtn"), calibrating=calibrating)


def test_other_turns_are_another_job() -> None:
    one, two = (Calibrating((Turn("Hello", answers=(answer,)),)) for answer in ("yes", "no"))
    assert one.fingerprint() != two.fingerprint() == two.fingerprint() != Calibrating().fingerprint()
