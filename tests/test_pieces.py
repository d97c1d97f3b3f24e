"""SentencePiece's pieces (Llama 2, TinyLlama, Mistral): the ids and texts of the tokenizers package, streamed too."""

import json
from pathlib import Path
from tempfile import mkdtemp

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import BundleError
from runtime.tokenizer import Tokenizer
from tests import tiny_pieces

FOLDER = Path(mkdtemp(prefix="edgeomni-test-"))
PATHS = {scheme: tiny_pieces.save(FOLDER / str(scheme), scheme) for scheme in (None, "first", "always", "never")}
OURS = {scheme: Tokenizer(path) for scheme, path in PATHS.items()}
THEIRS = {scheme: tokenizers.Tokenizer.from_file(str(path)) for scheme, path in PATHS.items()}
KNOWN = THEIRS[None].get_vocab_size()

schemes = st.sampled_from(list(PATHS))
texts = st.one_of(st.text(max_size=12), st.text(alphabet=" \u2581\nthe er[INST]é好", max_size=12))
token_ids = st.lists(st.integers(0, KNOWN + 3) | st.integers(3, 258) | st.sampled_from([1, 2, 259]), max_size=20)


def test_the_ids_of_a_prompt_are_these() -> None:
    prompt = OURS[None].encode("<s>[INST] the  tree [/INST]", special=True)
    assert prompt.tolist() == [1, 259, 312, 330, 313, 326, 259, 324, 277, 264, 264, 259, 312, 314, 330, 313]
    assert OURS["first"].encode("the</s>the", special=True).tolist() == [326, 2, 279, 325]


@given(schemes, st.lists(texts | st.sampled_from(tiny_pieces.SPECIAL), max_size=5).map("".join))
def test_template_strings_are_encoded_as_the_tokenizers_package_does(scheme: str | None, text: str) -> None:
    assert OURS[scheme].encode(text, special=True).tolist() == THEIRS[scheme].encode(text, add_special_tokens=False).ids


@given(schemes, token_ids, st.booleans())
def test_streamed_text_is_that_of_the_tokenizers_package(scheme: str | None, ids: list[int], skip: bool) -> None:
    whole = THEIRS[scheme].decode(ids, skip_special_tokens=skip)
    stream = OURS[scheme].stream(skip)
    for _ in range(2):  # once more with the same stream, which is as new after a flush
        assert "".join(stream.push(i) for i in ids) + stream.flush() == whole
    assert OURS[scheme].decode(ids, skip) == whole


@given(texts)
def test_a_text_comes_back_through_its_ids(text: str) -> None:
    stream, ids = OURS[None].stream(), OURS[None].encode(text, special=False).tolist()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == text.replace("\u2581", " ")


@pytest.mark.parametrize("special", tiny_pieces.SPECIAL)
@pytest.mark.parametrize("scheme", list(PATHS))
def test_a_special_string_in_user_text_stays_visible_text(scheme: str | None, special: str) -> None:
    ids = OURS[scheme].encode(f"a {special}b", special=False).tolist()
    assert not {0, 1, 2} & set(ids)
    assert OURS[scheme].decode(ids) == f"a {special}b"


def test_a_word_is_streamed_at_once_and_bytes_when_their_row_ends() -> None:
    stream, tokenizer = OURS[None].stream(), OURS[None]
    ids = tokenizer.encode("the 好e", special=False).tolist()
    assert [stream.push(i) for i in ids] == ["the", " ", "", "", "", "好e"]


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_named(tmp_path: Path, decoder: dict[str, object] | None) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(PATHS[None].read_text("utf-8")) | {"decoder": decoder}))
    with pytest.raises(BundleError, match=r"decodes by .*, expected ByteLevel, or Replace \+ ByteFallback"):
        Tokenizer(path)
