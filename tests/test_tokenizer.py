"""Text to ids and back on the golden tokenizer: no user text names a special token, and streamed equals whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from runtime.errors import BundleError, EdgeOmniError, PromptError
from runtime.tokenizer import TextStream, Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "a"
PATH = GOLDEN / "checkpoint" / "tokenizer.json"
TOKENIZER = Tokenizer(PATH)
ORIGINAL = tokenizers.Tokenizer.from_file(str(PATH))  # as the official code uses it, special tokens parsed
ADDED = {token.content: i for i, token in ORIGINAL.get_added_tokens_decoder().items()}
KNOWN = ORIGINAL.get_vocab_size()

token_ids = st.lists(st.integers(0, KNOWN + 5), max_size=30)
fragments = st.one_of(st.sampled_from(sorted(ADDED)), st.text(max_size=6), st.sampled_from(["<", "|", ">", " ", "\n"]))
mixtures = st.lists(fragments, max_size=8).map("".join)


def normalised(text):
    return ORIGINAL.normalizer.normalize_str(text)


@pytest.mark.parametrize("text", sorted(ADDED))
def test_a_special_string_in_user_text_stays_visible_text(text):
    for written in (text, f"a {text}b", text + text):
        ids = TOKENIZER.encode(written, special=False)
        assert not set(ids.tolist()) & set(ADDED.values())
        assert TOKENIZER.decode(ids) == written


@given(mixtures)
def test_no_mixture_of_user_text_names_a_special_token(text):
    ids = TOKENIZER.encode(text, special=False)
    assert not set(ids.tolist()) & set(ADDED.values())
    assert TOKENIZER.decode(ids) == normalised(text)


@given(mixtures)
def test_template_strings_are_parsed_as_the_official_tokenizer_does(text):
    assert TOKENIZER.encode(text, special=True).tolist() == ORIGINAL.encode(text, add_special_tokens=False).ids


@given(st.text().filter(lambda t: not any(a in t for a in ADDED)))
def test_text_without_special_strings_is_encoded_as_the_official_tokenizer_does(text):
    assert TOKENIZER.encode(text, special=False).tolist() == ORIGINAL.encode(text, add_special_tokens=False).ids


@given(token_ids, st.booleans())
def test_decoding_is_that_of_the_official_tokenizer(ids, skip):
    assert TOKENIZER.decode(ids, skip) == ORIGINAL.decode(ids, skip_special_tokens=skip)


@given(token_ids, st.booleans())
def test_streamed_text_equals_whole_text(ids, skip):
    stream = TOKENIZER.stream(skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == TOKENIZER.decode(ids, skip)


@given(st.text(max_size=12))
def test_a_character_is_streamed_whole_or_not_at_all(text):
    stream = TextStream(TOKENIZER)
    shown = ""
    for token in TOKENIZER.encode(text, special=False):
        shown += stream.push(int(token))
        assert normalised(text).startswith(shown)
    assert shown == normalised(text)
    assert stream.flush() == ""


def test_an_incomplete_character_waits_and_a_flushed_stream_starts_anew():
    first, *rest = TOKENIZER.encode("将", special=False).tolist()
    stream = TOKENIZER.stream()
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert "".join(stream.push(i) for i in (first, *rest)) == "将"


def test_a_broken_character_is_given_up_by_the_token_that_breaks_it():
    first, letter = TOKENIZER.encode("将", special=False)[0], TOKENIZER.encode("a", special=False)[0]
    stream = TOKENIZER.stream()
    assert [stream.push(int(first)), stream.push(int(letter))] == ["", "\ufffda"]


@pytest.mark.parametrize("name", ["text", "tts"])
def test_prompts_of_the_official_code_come_out(name):
    text = json.loads((GOLDEN / "tables.json").read_text("utf-8"))["prompts"][name]["text"]
    expected = load_file(GOLDEN / "g04_llm.safetensors")[f"{name}.input_ids"][0]
    np.testing.assert_array_equal(TOKENIZER.encode(text, special=True), expected)


def test_ids_of_special_tokens_are_those_of_the_checkpoint():
    table = json.loads((GOLDEN / "tables.json").read_text("utf-8"))["special_ids"]
    assert {name: TOKENIZER.id_of(name) for name in table} == table


def test_an_unknown_special_token_is_an_error_that_names_the_known_ones():
    with pytest.raises(EdgeOmniError, match=r"<no_such>.*<C_Q>"):
        TOKENIZER.id_of("<no_such>")


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(PromptError, match=r"U\+D83D at position 3"):
        TOKENIZER.encode("abc\ud83d", special=False)


def test_an_empty_text_has_no_ids():
    assert TOKENIZER.encode("", special=False).dtype == np.int64
    assert TOKENIZER.encode("", special=True).shape == (0,)


@pytest.mark.parametrize("content", ["", "{}", "no json"])
def test_a_broken_tokenizer_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a readable"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_file_is_one_clear_error(tmp_path):
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a readable"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match="expected ByteLevel"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_added_tokens_parses_nothing(tmp_path):
    plain = json.loads(PATH.read_text("utf-8")) | {"added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("<C_Q>hello", special=True)) == "<C_Q>hello"
