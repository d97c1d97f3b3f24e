"""What was lost is attributed to the weights that lost it, and to the line of the recipe that decided for them."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

pytest.importorskip("scipy")

from quant.cache import quantize_cache
from quant.comparison.advice import Advice, advice, governing, line_of
from quant.comparison.compare import Comparison, compare
from quant.comparison.each_turn import varied
from quant.comparison.mixing import Mixer
from quant.comparison.record import Live, all_feeds
from quant.comparison.verdict import verdict
from quant.comparison.within import BLOCKS, Loss, Within, by_kind, by_layers, spread
from quant.observe import Observed
from quant.quantize import quantize
from quant.scheme import parse_recipe, read_recipe
from quant.taps import Model, in_memory, load
from quant.turn import Turn
from runtime.bundle import Quantization, QuantizedWeight, read_bundle
from runtime.session import InMemory, Options
from tests import tiny_llama
from tests.test_compare import MACHINE, compared, float_bundle, opened, small_bundle, turns
from tests.tiny import omni_bundle

ONE_MATRIX = """description = "one matrix"

[weights]
"model.layers.1.mlp.down_proj.*" = { bits = 4, group_size = 32 }
"""


def made(recipe: str) -> Path:
    folder = Path(mkdtemp(prefix="edgeomni-test-")) / "made"
    quantize(omni_bundle(), folder, parse_recipe("made", recipe))
    return folder


def questions() -> tuple[Turn, ...]:
    """Turns of one kind, and enough of them that a gain in all is surely one."""
    return tuple(Turn(f"{word} there") for word in ("Hello", "Who is", "What is", "Say", "Go", "Look", "Stay", "Not"))


@cache
def one_matrix() -> Comparison:
    return compare(Live(float_bundle(), questions()), opened(made(ONE_MATRIX)), MACHINE)


def losses(found: Comparison) -> tuple[Loss, ...]:
    assert found.within is not None
    return found.within.losses


def mixer() -> Mixer:
    graphs = (engine.manifest.graphs["decoder"] for engine in (float_bundle(), small_bundle()))
    return Mixer(*(load(engine.folder, g) for engine, g in zip((float_bundle(), small_bundle()), graphs, strict=True)))


def hidden(engine: Observed, model: Model) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((1, 9, engine.manifest.hidden_size)).astype(np.float32)
    session = InMemory(*in_memory(model, engine.manifest.graphs["decoder"]), Options(threads=1))
    return session.run(**all_feeds(engine, "decoder", {"inputs_embeds": rows}))["hidden"]


def test_a_graph_mixed_of_nothing_is_the_reference_and_of_everything_the_candidate() -> None:
    mix, (ours, theirs) = mixer(), (float_bundle(), small_bundle())
    none, every = hidden(ours, mix.mixed([])), hidden(ours, mix.mixed(mix.differing()))
    np.testing.assert_array_equal(none, hidden(ours, mix.reference))
    np.testing.assert_array_equal(every, hidden(theirs, mix.candidate))
    assert np.abs(none - every).max() > 1e-3


def test_a_mixed_graph_reads_only_the_weights_that_were_asked_for_from_the_candidate() -> None:
    mix = mixer()
    one, *others = mix.differing()
    initializers = mix.mixed([one]).graph.initializers
    assert f"{one}.codes" in initializers and one not in initializers
    assert all(name in initializers and f"{name}.codes" not in initializers for name in others)


def test_scales_that_moved_between_weights_are_noticed() -> None:
    mix = mixer()
    assert mix.rescaled() == []
    norm = mix.candidate.graph.initializers["model.norm.weight"]
    norm.const_value = mix.reference.graph.initializers["model.layers.0.input_layernorm.weight"].const_value
    assert mix.rescaled() == ["model.norm.weight"]


def test_the_one_matrix_that_was_rounded_loses_everything() -> None:
    found = one_matrix()
    assert found.within is not None and found.within.whole > 0
    named = [loss for loss in losses(found) if loss.group == "model.layers.*.mlp.down_proj.weight"]
    assert [loss.weights for loss in losses(found)] == [("model.layers.1.mlp.down_proj.weight",)]
    assert named[0].alone == pytest.approx(found.within.whole)
    assert named[0].without == pytest.approx(0, abs=1e-12)


def test_groups_of_both_graphs_are_tried_alone_and_left_out() -> None:
    found = compared()
    assert found.within is not None
    assert {loss.graph for loss in losses(found)} == {"decoder", "lm_head", "audio_head"}
    kinds = {loss.group for loss in losses(found) if loss.graph == "decoder" and loss.by == "kind"}
    parts = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert kinds == {f"model.layers.*.{part}.weight" for part in parts}
    assert all(0 <= loss.alone < 2 * found.within.whole for loss in losses(found))
    assert min(loss.without for loss in losses(found)) < found.within.whole


def test_a_text_model_is_attributed_within_its_decoder() -> None:
    folder = Path(mkdtemp(prefix="edgeomni-test-")) / "small"
    quantize(tiny_llama.bundle(), folder, read_recipe("int4-rtn"))
    found = compare(Live(opened(tiny_llama.bundle()), turns()[:1]), opened(folder), MACHINE)
    assert {loss.graph for loss in losses(found)} == {"decoder", "lm_head"}


def test_weights_are_attributed_also_where_the_candidate_remembers_in_8_bits() -> None:
    folder = Path(mkdtemp(prefix="edgeomni-test-")) / "both"
    quantize_cache(made(ONE_MATRIX), folder, options=Options(threads=1))
    found = compare(Live(float_bundle(), questions()), opened(folder), MACHINE)
    assert [loss.weights for loss in losses(found)] == [("model.layers.1.mlp.down_proj.weight",)]
    of_weights = one_matrix().within
    assert of_weights is not None and found.within is not None
    assert found.within.whole == pytest.approx(of_weights.whole)
    assert {error.output for error in found.tensors if error.graph == "decoder"} == {"hidden"}


def test_nothing_is_attributed_where_nothing_was_lost() -> None:
    found = compare(Live(float_bundle(), turns()[:1]), opened(omni_bundle()), MACHINE)
    assert found.within is None and found.governing == () and found.advice == ()


def test_the_line_of_the_recipe_that_decided_is_named_with_its_number() -> None:
    guilty = one_matrix().governing
    assert [(line.line, line.share) for line in guilty] == [(4, 1.0)]
    assert guilty[0].text == ONE_MATRIX.splitlines()[3]
    recipe = read_recipe("int4-rtn")
    number, text = line_of(recipe, "model.layers.*")
    assert recipe.text.splitlines()[number - 1] == text == '"model.layers.*" = "int4"'


def raised(recipe: str, one: Advice) -> str:
    lines = recipe.splitlines()
    return "\n".join([*lines[: one.before - 1], *one.lines, *lines[one.before - 1 :]]) + "\n"


def test_advice_followed_costs_the_bytes_that_it_says_and_gives_most_of_what_it_promises() -> None:
    found = one_matrix()
    best, *_ = found.advice
    assert best.lines == ('"model.layers.*.mlp.down_proj.weight" = { bits = 8, group_size = 32 }',)
    folder = made(raised(ONE_MATRIX, best).replace("layers.*.mlp", "layers.1.mlp"))
    before = next(graph.weight_bytes for graph in found.candidate.graphs if graph.name == "decoder")
    assert read_bundle(folder).graphs["decoder"].weight_bytes - before == best.extra_bytes
    again = compare(Live(float_bundle(), turns()[:2]), opened(folder), MACHINE, swap_turns=2)
    assert again.within is not None and again.within.whole < 0.1 * best.kl_now


def test_a_name_that_a_recipe_has_for_the_next_bits_is_used_and_the_best_for_its_bytes_comes_first() -> None:
    found = compare(Live(float_bundle(), questions()), small_bundle(), MACHINE).advice
    assert [one.per_megabyte for one in found] == sorted((one.per_megabyte for one in found), reverse=True)
    assert all(line.endswith((' = "int8"', ' = "keep"')) for one in found for line in one.lines)
    assert any(one.lines == ('"model.layers.0.*" = "int8"',) for one in found)


def test_the_verdict_says_which_line_is_guilty_and_what_to_put_before_it() -> None:
    said = verdict(one_matrix())[-1]
    assert "line 4 of the recipe" in said and "100% of what was lost" in said
    assert 'To raise first: "model.layers.*.mlp.down_proj.weight" = { bits = 8, group_size = 32 } before line 4' in said


def test_turns_for_swapping_are_of_every_kind() -> None:
    plain, spoken, heard = Turn("a"), Turn("b", spoken=True), Turn("c", audio=Path("d.wav"))
    asked = [plain, plain, plain, spoken, spoken, heard]
    assert varied(asked, 3) == [0, 3, 5]
    assert varied(asked, 4) == [0, 1, 3, 5]
    assert varied(asked, 99) == [*range(6)] and varied(asked, 0) == []


def test_a_gain_that_may_be_chance_is_not_advised() -> None:
    within, manifest = compared().within, small_bundle().manifest
    assert within is not None and advice(within, manifest)
    unsure = tuple(replace(loss, error=within.whole) for loss in within.losses)
    assert advice(replace(within, losses=unsure), manifest) == ()


def test_every_weight_is_in_one_kind_and_one_block_of_layers() -> None:
    names = [f"model.layers.{layer}.mlp.{part}.weight" for layer in range(30) for part in ("up", "down")]
    kinds, blocks = by_kind(names, {}), by_layers(names)
    assert {*kinds} == {"model.layers.*.mlp.up.weight", "model.layers.*.mlp.down.weight"}
    assert sorted(name for names in blocks.values() for name in names) == sorted(names)
    assert len(blocks) == BLOCKS and "layer 0" in blocks and "layer 29" in blocks
    assert [*by_layers(names[:4])] == ["layer 0", "layer 1"]
    assert by_layers(names[:2]) == {} and by_layers(["lm_head.weight"]) == {}


def test_weights_of_a_kind_that_are_stored_unlike_are_tried_apart() -> None:
    names = [f"model.layers.{layer}.mlp.up.weight" for layer in range(4)]
    stored = {name: "int8 by 32, rtn" if name in (names[0], names[3]) else "int4 by 32, rtn" for name in names}
    assert by_kind(names, stored) == {
        "model.layers.*.mlp.up.weight (int8 by 32, rtn)": [names[0], names[3]],
        "model.layers.*.mlp.up.weight (int4 by 32, rtn)": names[1:3],
    }


def test_a_line_is_blamed_and_raised_for_its_own_weights_alone() -> None:
    names = [f"model.layers.{layer}.mlp.up.weight" for layer in range(4)]
    text = '[weights]\n"model.layers.0.*" = { bits = 8, group_size = 32 }\n"*" = { bits = 4, group_size = 32 }\n'
    quantized = tuple(
        QuantizedWeight("decoder", name, 1000, 8 if name == names[0] else 4, 32, True, "rtn", "int8", 9.0)
        for name in names
    )
    quantization = Quantization("mixed", text, quantized, ())
    lost = [Loss("decoder", "first", "kind", (names[0],), 0.01, 0.2, 0.0)]
    lost += [Loss("decoder", "others", "kind", tuple(names[1:]), 0.09, 0.1, 0.0)]
    within = Within(0.3, 10, tuple(lost))
    blamed = governing(within, quantization)
    assert [(line.line, round(line.share, 3)) for line in blamed] == [(3, 0.9), (2, 0.1)]
    raised = advice(within, replace(small_bundle().manifest, quantization=quantization))
    lines = {one.before: one.lines for one in raised}
    assert lines[3] == ('"model.layers.*.mlp.up.weight" = { bits = 8, group_size = 32 }',)
    assert lines[2] == (f'"{names[0]}" = "keep"',)


def test_choices_of_one_answer_count_as_one_drawing() -> None:
    rng = np.random.default_rng(0)
    apart = rng.normal(size=40)
    each = spread(apart, np.arange(40))
    assert each == pytest.approx(2.02 * apart.std(ddof=1) / np.sqrt(40), rel=1e-2)
    assert spread(np.repeat(apart, 24), np.repeat(np.arange(40), 24)) == pytest.approx(each)
    assert spread(apart, np.zeros(40, np.int64)) == np.inf
