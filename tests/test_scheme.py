"""Recipes: patterns decide in order, every mistake is said at once, and what ships can be read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.scheme import Recipe, Rule, Scheme, parse_recipe, read_recipe, shipped_recipes
from runtime.errors import EdgeOmniError

TEXT = """
description = "an example"
[schemes]
int4 = { bits = 4, group_size = [64, 32] }
[weights]
"model.layers.0.*" = "keep"
"*.weight" = "int4"
"lm_head.weight" = { bits = 8, group_size = 32, symmetric = false, activations = "float" }
"""


def mistakes(text: str) -> str:
    with pytest.raises(EdgeOmniError) as error:
        parse_recipe("mine", text)
    return str(error.value)


def test_the_first_pattern_that_matches_decides() -> None:
    recipe = parse_recipe("mine", TEXT)
    assert recipe.rule_for("model.layers.0.mlp.weight") == Rule("model.layers.0.*", ())
    assert recipe.rule_for("lm_head.weight") == Rule("*.weight", (Scheme(4, 64), Scheme(4, 32)))
    assert recipe.rule_for("rotary.cos") is None
    assert recipe.rules[2].schemes == (Scheme(8, 32, symmetric=False, activations="float"),)
    assert (recipe.name, recipe.text, recipe.description) == ("mine", TEXT, "an example")


def test_names_are_matched_with_their_case() -> None:
    assert parse_recipe("mine", TEXT).rule_for("lm_head.WEIGHT") is None


def test_the_first_group_size_that_divides_the_columns_is_taken() -> None:
    rule = parse_recipe("mine", TEXT).rules[1]
    assert [rule.scheme_for(columns) for columns in (128, 96, 80)] == [Scheme(4, 64), Scheme(4, 32), None]


def test_every_mistake_is_said_at_once() -> None:
    said = mistakes(
        """
        descripton = "misspelt"
        [schemes]
        int3 = { bits = 3, group_size = [32, 20], groups = 1 }
        int2 = { bits = 2, group_size = 16 }
        empty = {}
        [weights]
        "a" = "int5"
        "b" = 7
        "*" = "int2"
        "c" = "keep"
        """
    )
    for expected in (
        "descripton: unknown; expected description, schemes, weights",
        "schemes.int3.bits: found 3, expected 2, 4 or 8",
        "schemes.int3.group_size: found 20, expected 16, 32, 64, 128 or 256",
        "schemes.int3.groups: unknown; expected bits, group_size, symmetric, method, activations",
        "schemes.int2: 2 bits multiply with int8 activations in groups of 32, 64 or 128 only",
        "schemes.empty.bits: missing",
        "schemes.empty.group_size: missing",
        'weights.\'a\': \'int5\' is no scheme; expected "keep" or "stored" or "fp16" or "int3"',
        "weights.'b': 7 is no scheme",
        "weights.'c': stands behind \"*\", which matches every name before it; put it first",
    ):
        assert expected in said
    assert len(said.splitlines()) == 1 + len(set(said.splitlines()[1:]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weights = 3", "weights: expected a table, found 3"),
        ("description = 3\n[weights]\n'*' = {bits=4, group_size=32}", "description: expected a text, found 3"),
        ("", "no pattern has a scheme, so nothing would be quantized"),
        ("[weights]\n'*' = 'keep'", "no pattern has a scheme, so nothing would be quantized"),
        ("[weights]\n'*' = {bits=4, group_size=[]}", "group_size: found [], expected 16, 32, 64, 128 or 256"),
        ("[weights]\n'*' = {bits=4, group_size=32, symmetric=1}", "symmetric: found 1"),
        ("[weights]\n'*' = {bits=4, group_size=32, method='magic'}", "method: found 'magic', expected 'rtn'"),
        ("schemes.fp16 = {bits=4, group_size=32}\n[weights]\n'*' = 'fp16'", "schemes.fp16: means something already"),
        ("[weights", "is no TOML"),
        ("[weights]\n'a' = 'keep'\n'a' = 'keep'", "is no TOML"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused(text: str, said: str) -> None:
    assert said in mistakes(text)


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_clear_refusal(text: str) -> None:
    try:
        assert isinstance(parse_recipe("mine", text), Recipe)
    except EdgeOmniError as error:
        assert str(error).startswith("the recipe mine ")


def test_every_shipped_recipe_can_be_read_and_says_what_it_is_for() -> None:
    assert {"int4-rtn", "int4-fast-cpu", "int8"} <= set(shipped_recipes())
    for name in shipped_recipes():
        recipe = read_recipe(name)
        assert recipe.name == name
        assert recipe.description


NEVER = (
    "hift.ups.0.weight",
    "audio_tokenizer.audio_bridge_model.vq_list.0.codebook.embed",
    "audio_tokenizer.audio_model.positional_embedding",
    "audio_tokenizer.audio_decoder.positional_embedding",
)
HEARD = "audio_tokenizer.audio_model.layers.0.fc1.weight"
ENCODERS = (HEARD, "audio_tokenizer.audio_bridge_model.gate_proj.weight", "model.visual_model.blocks.0.mlp.fc1.weight")


@pytest.mark.parametrize("name", shipped_recipes())
def test_only_recipes_for_all_touch_what_hears_and_sees_and_none_its_tables(name: str) -> None:
    recipe = read_recipe(name)
    touched = [bool((rule := recipe.rule_for(weight)) and rule.schemes) for weight in (*ENCODERS, *NEVER)]
    assert touched == [name.endswith("-all")] * len(ENCODERS) + [False] * len(NEVER)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.endswith("-all")])
def test_what_hears_multiplies_floats(name: str) -> None:
    rule = read_recipe(name).rule_for(HEARD)
    assert rule is not None
    assert {(scheme.bits, scheme.activations) for scheme in rule.schemes} == {(8, "float")}


def test_an_unknown_name_lists_the_recipes_that_ship() -> None:
    with pytest.raises(EdgeOmniError, match=r"no recipe 'int5': expected .*int4-rtn.* or a file NAME\.toml"):
        read_recipe("int5")


def test_a_recipe_is_read_from_a_file_and_named_by_it(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(TEXT)
    assert read_recipe(tmp_path / "mine.toml") == parse_recipe("mine", TEXT)
    (tmp_path / "broken.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(EdgeOmniError, match="cannot be read"):
        read_recipe(tmp_path / "broken.toml")


def test_bits_per_weight_count_the_scale_and_the_zero() -> None:
    assert Scheme(4, 32).bits_per_weight(scale_bits=32) == 5.0
    assert Scheme(4, 32).bits_per_weight(scale_bits=16) == 4.5
    assert Scheme(8, 128, symmetric=False).bits_per_weight(scale_bits=32) == 8 + 40 / 128


@pytest.mark.parametrize(
    ("count", "outer"), [(30, {0, 1, 2, 27, 28, 29}), (28, {0, 1, 2, 25, 26, 27}), (2, {0, 1}), (1, {0}), (0, set())]
)
def test_outer_stands_for_the_first_and_the_last_eighth_of_the_layers(count: int, outer: set[int]) -> None:
    text = '[weights]\n"model.layers.{outer}.mlp.down_proj.weight" = { bits = 8, group_size = 32 }\n"other" = "keep"'
    recipe = parse_recipe("mixed", text)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(count)]
    bound = recipe.bound([*names, "model.layers.99.mlp.up_proj.weight", "encoder.7.weight"])
    assert {layer for layer, name in enumerate(names) if bound.rule_for(name)} == outer
    assert bound.text == recipe.text
    assert not any(recipe.rule_for(name) for name in names)  # without the names it is not known which they are
