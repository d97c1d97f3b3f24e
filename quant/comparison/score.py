"""Whether an answer is right, as the metric of its turn asks: pure functions of texts.

Extraction of options from free text follows the published scripts of VLMEvalKit (vlmeval/utils/matching_util.py as of
June 2026, without a model to match what the rules do not) and OmniBench (inference/answer_parsing.py); `exists` and
`prefix` are the qa-exist-match and prefix-match of UltraEval-Audio (audio_evals/evaluator).
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from quant.comparison.wer import Edits, character_errors, contains_answer, word_errors
from quant.turn import Turn

_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


@dataclass(frozen=True)
class Score:
    """Whether an answer is right, what was taken for the answer in it, and the errors of a transcription."""

    right: bool
    taken: str
    edits: Edits | None = None


def score(turn: Turn, text: str) -> Score | None:
    """Judge an answer's text; None where nothing was expected or only another model could tell."""
    if turn.metric == "judge" or not turn.answers:
        return None
    match turn.metric:
        case "contains":
            return _held(text, turn.answers, contains_answer)
        case "exists":
            return _held(text, turn.answers, lambda said, wanted: _in_a_row(tokens(wanted), tokens(said)))
        case "prefix":
            return _held(text, turn.answers, lambda said, wanted: _plain(said).startswith(_plain(wanted)))
        case "letter":
            taken = text.strip()
        case "option":
            taken = option_named(text, options(turn))
        case "omnibench":
            taken = last_option_named(text, options(turn))
        case "wer" | "cer":
            edits = (word_errors if turn.metric == "wer" else character_errors)(turn.answers[0], text)
            return Score(edits.total == 0, text, edits)
    return Score(taken in turn.answers, taken)


def _held(text: str, answers: tuple[str, ...], holds: Callable[[str, str], bool]) -> Score:
    found = next((wanted for wanted in answers if holds(text, wanted)), None)
    return Score(found is not None, found or "")


def _plain(text: str) -> str:
    return text.strip().lower()


def tokens(text: str) -> list[str]:
    """Runs of letters, digits and marks, and every other visible character by itself, of the NFD in lower case.

    The tokenizer of UltraEval-Audio's qa-exist-match, which is that of DPR (Karpukhin et al. 2020).
    """
    found, within = [], False
    for mark in unicodedata.normalize("NFD", text).lower():
        kind = unicodedata.category(mark)[0]
        if within and kind in "LNM":
            found[-1] += mark
        elif kind not in "ZC":
            found.append(mark)
        within = kind in "LNM"
    return found


def _in_a_row(wanted: Sequence[str], said: Sequence[str]) -> bool:
    """Whether `wanted`, of which there must be some, stands in a row in `said`."""
    return bool(wanted) and any(
        said[start : start + len(wanted)] == wanted for start in range(len(said) - len(wanted) + 1)
    )


def options(turn: Turn) -> dict[str, str]:
    """Letter -> text of each option; letters may be left out."""
    return {letter: text for letter, text in zip(ascii_uppercase, turn.choices, strict=False) if text}


def option_named(text: str, options: dict[str, str]) -> str:
    """The one option whose letter stands among the last four words, else the one that `answer is` names anywhere, else
    the one whose text the answer holds; or "".

    Of an answer that says `answer is`, only the letters A to D count, in either case and also as a word's first. An
    answer more than twice as long as all options together is not searched for their texts. (VLMEvalKit)
    """
    words = text.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if (said_so := _ANSWER_IS.search(text)) and (letter := said_so[1].upper()) in options:
        return letter
    said = text.lower()
    if len(said) > 2 * sum(map(len, options.values())):
        return ""
    held = [letter for letter, option in options.items() if option.lower() in said]
    return held[0] if len(held) == 1 else ""


def last_option_named(text: str, options: dict[str, str]) -> str:
    """The option that is named last: as (A), else as A before a space, else as A., else by its text; or "". (OmniBench)

    An answer of five words or fewer is not searched for the options' texts.
    """
    said = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if form.format(letter) in said]
        if found:
            return max(found, key=lambda letter: said.rfind(place.format(letter)))
    found = [letter for letter, option in options.items() if option.lower() in said.lower()]
    if not found or len(said.split()) <= 5:
        return ""
    return max(found, key=lambda letter: said.lower().rfind(options[letter].lower()))
