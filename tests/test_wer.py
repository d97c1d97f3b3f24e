"""Word and character errors against counts worked out by hand, and their properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jiwer")

from quant.comparison import wer


@pytest.mark.parametrize(
    ("ref", "said", "found"),
    [
        ("The cat sat.", "the CAT sat", (0, 0, 0, 3)),
        ("the cat sat", "the cat", (0, 0, 1, 3)),
        ("the cat sat", "a cat sat down", (1, 1, 0, 3)),
        ("don't", "dont", (0, 0, 0, 1)),
        ("今天天气好", "今天天气很好！", (0, 1, 0, 5)),
        ("我用 Python 写", "我用 python 写", (0, 0, 0, 4)),
        ("", "a b", (0, 2, 0, 0)),
        ("a b", "...", (0, 0, 2, 2)),
        ("", "", (0, 0, 0, 0)),
    ],
)
def test_known_word_errors(ref: str, said: str, found: tuple[int, int, int, int]) -> None:
    assert wer.word_errors(ref, said) == wer.Edits(*found)


def test_known_character_errors() -> None:
    assert wer.character_errors("kitten", "sitting").total == 3
    assert wer.character_errors("ＡＢ c", "abc") == wer.Edits(0, 0, 0, 3)
    assert wer.character_errors("一 二", "一三") == wer.Edits(1, 0, 0, 2)


def test_what_is_said_in_the_place_of_nothing_is_an_error_and_silence_in_its_place_is_none() -> None:
    assert wer.word_errors("", "one two").rate == 2
    assert wer.word_errors("", "").rate == 0
    assert wer.word_errors("one two", "").rate == 1


@given(st.text("abc", max_size=7), st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edits_are_a_distance(a: str, b: str, c: str) -> None:
    def between(ref: str, said: str) -> int:
        return wer.character_errors(ref, said).total

    assert between(a, b) == between(b, a)
    assert (between(a, b) == 0) == (a == b)
    assert between(a, c) <= between(a, b) + between(b, c)


@given(st.text(), st.text())
def test_any_text_can_be_compared_and_differs_from_itself_in_nothing(a: str, b: str) -> None:
    assert wer.word_errors(a, a).total == 0
    found = wer.word_errors(a, b)
    assert len(wer.words(b)) - found.insertions == found.count - found.deletions


def test_an_answer_is_right_when_its_words_stand_in_a_row() -> None:
    assert wer.contains_answer("It is Carbon-Dioxide, I think.", "carbon dioxide")
    assert wer.contains_answer("首都是北京。", "北京")
    assert not wer.contains_answer("The price is nice.", "ice")
    assert not wer.contains_answer("Any text at all.", "?!")
