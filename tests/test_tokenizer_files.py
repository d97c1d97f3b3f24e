"""One tokenizer.json from a folder's older files or from GGUF metadata: same ids as the tokenizer it came from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from export.gguf_file import read_gguf
from export.tokenizer_files import known_tokens, tokenizer_json, tokenizer_json_from_gguf
from runtime.errors import CheckpointError
from runtime.tokenizer import BYTE_OF
from tests.smollm2 import gguf_path

CHECKPOINT = Path(__file__).parent / "golden" / "a" / "checkpoint"
GOLDEN = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
ADDED = sorted(t.content for t in GOLDEN.get_added_tokens_decoder().values())

fragments = st.one_of(
    st.sampled_from(ADDED), st.text(max_size=6), st.sampled_from([" the", " answer", "你好", "\n", "’s"])
)
mixtures = st.lists(fragments, max_size=8).map("".join)

OLDER_FILES = {
    "all files": ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"),
    "ids in tokenizer_config.json": ("vocab.json", "merges.txt", "tokenizer_config.json"),
    "ids in added_tokens.json": ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
}


@pytest.fixture
def folder(tmp_path):
    return copy_of(tmp_path, OLDER_FILES["all files"])


def copy_of(folder, names):
    for name in names:
        shutil.copy(CHECKPOINT / name, folder)
    return folder


@pytest.fixture(scope="module", params=OLDER_FILES)
def built(request, tmp_path_factory):
    folder = copy_of(tmp_path_factory.mktemp("older"), OLDER_FILES[request.param])
    return Tokenizer.from_str(tokenizer_json(folder))


def edit_json(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content))


@given(texts=st.lists(mixtures, min_size=5, max_size=5))
def test_a_tokenizer_built_from_older_files_encodes_as_the_shipped_one(built, texts):
    for text in texts:
        expected = GOLDEN.encode(text, add_special_tokens=False).ids
        assert built.encode(text, add_special_tokens=False).ids == expected
        assert built.decode(expected) == GOLDEN.decode(expected)


def test_a_tokenizer_built_from_older_files_has_the_vocabulary_of_the_shipped_one(built):
    assert built.get_vocab() == GOLDEN.get_vocab()
    flags = {i: token.special for i, token in built.get_added_tokens_decoder().items()}
    assert flags == {i: token.special for i, token in GOLDEN.get_added_tokens_decoder().items()}


def test_a_shipped_tokenizer_json_is_taken_as_it_is():
    assert tokenizer_json(CHECKPOINT) == (CHECKPOINT / "tokenizer.json").read_text("utf-8")


def test_known_tokens_end_after_the_last_id_that_has_a_text():
    assert known_tokens(tokenizer_json(CHECKPOINT)) == 379


def test_added_tokens_keep_ids_that_leave_gaps(folder):
    (folder / "tokenizer_config.json").unlink()
    edit_json(folder / "added_tokens.json", lambda ids: ids.update({"<late>": 1000}))
    text = tokenizer_json(folder)
    assert Tokenizer.from_str(text).encode("<late>").ids == [1000]
    assert known_tokens(text) == 1001


def test_two_files_that_disagree_on_an_id_are_refused(folder):
    edit_json(folder / "added_tokens.json", lambda ids: ids.update({"<C_Q>": 1000}))
    with pytest.raises(CheckpointError, match=r"'<C_Q>' is 344 in tokenizer_config.json, 1000 in added_tokens.json"):
        tokenizer_json(folder)


def test_two_added_tokens_of_one_id_are_refused(folder):
    (folder / "tokenizer_config.json").unlink()
    edit_json(folder / "added_tokens.json", lambda ids: ids.update({"<twin>": ids["<C_Q>"]}))
    with pytest.raises(CheckpointError, match=r"two tokens have the id 344"):
        tokenizer_json(folder)


def test_another_kind_of_tokenizer_without_tokenizer_json_is_refused(folder):
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="LlamaTokenizer"))
    with pytest.raises(CheckpointError, match=r"only a Qwen2Tokenizer can be built, not a LlamaTokenizer"):
        tokenizer_json(folder)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        tokenizer_json(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", '{"a": "x"}', r"vocab.json .*valid integer"),
        ("vocab.json", "[]", r"vocab.json"),
        ("added_tokens.json", '{"<C_Q>": null}', r"added_tokens.json .*<C_Q>"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": 5}}',
            r"tokenizer_config.json .*added_tokens_decoder",
        ),
        ("special_tokens_map.json", '{"eos_token": {}}', r"special_tokens_map.json .*eos_token"),
        ("merges.txt", "#version: 0.2\na b c\n", r"merge 'a b c'"),
        ("merges.txt", "q zz\n", r"cannot be built.*zz"),
        ("tokenizer.json", "{}", r"tokenizer.json.*cannot be built"),
    ],
)
def test_a_broken_file_is_one_clear_error(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_json(folder)


# ---- GGUF ----

BYTES = list(BYTE_OF)
PIECES = ["12", "123", "he", "Ġ1", "hello"]
MERGES = ["Ġ 1", "1 2", "12 3", "h e"]


def toy_metadata(pre):
    """Every byte, a few merges, "hello" without a merge that leads to it, and one token of each further type."""
    tokens = [*BYTES, *PIECES, "<|end|>", "<tool>", "[PAD]"]
    types = [1] * (len(BYTES) + len(PIECES)) + [3, 4, 5]
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": MERGES, "token_type": np.array(types, np.int32)}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def pieces(pre, text):
    return Tokenizer.from_str(tokenizer_json_from_gguf(toy_metadata(pre))).encode(text).tokens


@pytest.mark.parametrize(
    ("pre", "digits", "after_blank"),
    [
        ("gpt-2", ["123", "4"], ["Ġ1", "2"]),
        ("default", ["123", "4"], ["Ġ1", "2"]),
        ("smollm", ["1", "2", "3", "4"], ["Ġ", "1", "2"]),
        ("qwen2", ["1", "2", "3", "4"], ["Ġ", "1", "2"]),
        ("llama-bpe", ["123", "4"], ["Ġ", "12"]),
    ],
)
def test_digits_are_cut_as_the_family_does(pre, digits, after_blank):
    assert pieces(pre, "1234") == digits
    assert pieces(pre, " 12") == after_blank


def test_only_llama_takes_a_piece_of_the_vocabulary_without_merges():
    assert pieces("llama-bpe", "hello") == ["hello"]
    assert pieces("qwen2", "hello") == ["he", "l", "l", "o"]


def test_only_qwen_composes_characters():
    assert len(pieces("qwen2", "e\u0301")) == 2
    assert len(pieces("smollm", "e\u0301")) == 3


def test_ids_and_kinds_of_tokens_are_those_of_the_file():
    text = tokenizer_json_from_gguf(toy_metadata("qwen2"))
    tokenizer, first = Tokenizer.from_str(text), len(BYTES) + len(PIECES)
    assert tokenizer.encode("<|end|>h<tool>").ids == [first, BYTES.index("h"), first + 1]
    assert {i: t.special for i, t in tokenizer.get_added_tokens_decoder().items()} == {first: True, first + 1: False}
    assert tokenizer.id_to_token(first + 2) is None  # unused
    assert known_tokens(text) == first + 2


@given(st.text(), st.sampled_from(["smollm", "llama-bpe", "gpt-2"]))
def test_decoding_gives_the_text_back(text, pre):
    tokenizer = Tokenizer.from_str(tokenizer_json_from_gguf(toy_metadata(pre)))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "llama", r"tokenizer.ggml.model is 'llama', expected 'gpt2'"),
        ("pre", "falcon", r"pre is 'falcon', expected 'gpt-2' or .*'smollm'"),
        ("pre", None, r"pre is None"),
        ("tokens", 5, r"tokens missing or no array of strings"),
        ("merges", [1], r"merges missing or no array of strings"),
        ("merges", ["ab"], r"the merge 'ab' is not a pair"),
        ("merges", ["a ?!"], r"cannot be built"),
        ("token_type", np.array([1.0]), r"token_type missing or no array of integers"),
        ("token_type", np.array([1]), r"264 tokens but 1 token types"),
        ("token_type", np.full(264, 9), r"unknown token types \[9\]"),
        ("tokens", ["a"] * 264, r"263 of the 264 tokens occur more than once"),
    ],
)
def test_metadata_that_cannot_be_used_is_one_clear_error(key, value, message):
    metadata = toy_metadata("smollm") | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(CheckpointError, match=message):
        tokenizer_json_from_gguf(metadata)


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(CheckpointError, match=r"(?s)4 problems.*model.*pre.*tokens and .*merges.*token_type"):
        tokenizer_json_from_gguf({})


SMOLLM2_IDS = {  # recorded from llama.cpp's tokenizer on the same file
    "Hello, world! It's 42 o'clock; we'LL see.": (
        [19556, 28, 905, 17, 657, 506, 216, 36, 34, 263, 23, 17466, 43, 392, 23, 16421, 963, 30]
    ),
    "  two  spaces\n\n\tand a tab \r\n": [216, 827, 216, 5600, 1116, 197, 397, 253, 10147, 216, 2738],
    "你好，世界！": [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230, 8083, 219],
    "Привет 12345 ½": [155, 249, 46879, 16464, 32547, 216, 33, 34, 35, 36, 37, 216, 16738],
    "def f(x):\n    return x**2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198],
    "naïve café 🙂👩\u200d👧": [3546, 46494, 37366, 47526, 10813, 235, 119, 321, 231, 10813, 235, 117],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
}


@pytest.fixture(scope="module")
def smollm2():
    return Tokenizer.from_str(tokenizer_json_from_gguf(read_gguf(gguf_path()).metadata))


def test_a_real_gguf_file_encodes_as_llama_cpp_does(smollm2):
    assert {text: smollm2.encode(text).ids for text in SMOLLM2_IDS} == SMOLLM2_IDS
    assert all(smollm2.decode(ids, skip_special_tokens=False) == text for text, ids in SMOLLM2_IDS.items())
