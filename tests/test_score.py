"""How answers are judged: the published rules for options, aliases and transcriptions, against answers read by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jiwer")

from quant.comparison.score import last_option_named, option_named, score
from quant.turn import Metric, Turn

OPTIONS = {"A": "a red bus", "B": "a blue tram", "C": "a boat"}


def turn(metric: Metric, *answers: str) -> Turn:
    return Turn("?", answers=answers, metric=metric, choices=tuple(OPTIONS.values()))


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("The answer is B", "B"),
        ("B. a blue tram", "B"),
        ("The correct answer is **B**, as the tram is of that colour there", "B"),
        ("A tram, so the answer is b: it is blue and runs on rails", "B"),
        ("The answer is unclear to me, whatever one may see in this picture", ""),
        ("The answer is D, I should say, of what there is to be chosen from", ""),  # which is no option here
        ("B is what one sees here I think", ""),  # too far from the end, and no option's text
        ("A or B", ""),  # two letters, and no option's text
        ("It shows A Blue Tram.", "A"),  # the published rule takes the capital for an option
        ("a blue tram", "B"),
        ("a boat, not a red bus", ""),
        ("It is a boat. " + "Very much so. " * 6, ""),  # twice as long as all options
        ("", ""),
    ],
)
def test_the_option_that_vlmevalkit_finds(said: str, taken: str) -> None:
    assert option_named(said, OPTIONS) == taken


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) no, (C)", "C"),
        ("First B and then A", "A"),
        ("A man drives it", "A"),  # the published rule takes the article for an option
        ("what one can see here is clearly a blue tram", "B"),
        ("it is a boat", ""),  # too short to be searched for texts
        ("nothing of that kind at all is there", ""),
    ],
)
def test_the_option_that_omnibench_finds(said: str, taken: str) -> None:
    assert last_option_named(said, OPTIONS) == taken


@given(st.text())
def test_any_answer_names_an_option_or_none(said: str) -> None:
    assert option_named(said, OPTIONS) in (*OPTIONS, "")
    assert last_option_named(said, OPTIONS) in (*OPTIONS, "")


@pytest.mark.parametrize(
    ("metric", "answers", "said", "right", "taken"),
    [
        ("contains", ("New York", "NYC"), "I like new-york.", True, "New York"),
        ("contains", ("ice",), "nice", False, ""),
        ("exists", ("ice",), "NICE", False, ""),
        ("exists", ("U.S.", "Café"), "In the cafe\u0301 it is.", True, "Café"),
        ("exists", ("US",), "the U.S. then", False, ""),  # a mark is a token of its own, unlike in `contains`
        ("prefix", ("yes",), " Yes, it is", True, "yes"),
        ("prefix", ("yes",), "Oh yes", False, ""),
        ("letter", ("B",), "B", True, "B"),
        ("option", ("B",), "The answer is C.", False, "C"),
        ("omnibench", ("C",), "(C)", True, "C"),
        ("wer", ("good morning",), "Good morning!", True, "Good morning!"),
        ("wer", ("good morning",), "good evening", False, "good evening"),
        ("cer", ("早上好",), "早上 好。", True, "早上 好。"),
    ],
)
def test_known_judgements(metric: Metric, answers: tuple[str, ...], said: str, right: bool, taken: str) -> None:
    found = score(turn(metric, *answers), said)
    assert found is not None
    assert (found.right, found.taken) == (right, taken)


def test_a_transcription_counts_its_errors() -> None:
    found = score(turn("wer", "one two three"), "one too")
    assert found is not None and found.edits is not None
    assert (found.edits.total, found.edits.count) == (2, 3)


def test_what_only_another_model_could_judge_has_no_score() -> None:
    assert score(turn("judge", "a story"), "a story") is None
    assert score(turn("contains"), "anything") is None
