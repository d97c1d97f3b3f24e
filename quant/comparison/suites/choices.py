"""Multiple-choice questions as JSON Lines, like those of MMLU and C-Eval: zero-shot, by the likelihood of letters."""

from pathlib import Path
from string import ascii_uppercase

from quant.comparison.suites.prompts import is_chinese, lettered
from quant.comparison.suites.rows import Found, Row, files_in, rows
from quant.turn import Turn

# Hendrycks et al. 2021, and Huang et al. 2023: the prompts without their examples.
_ENGLISH = "The following are multiple choice questions (with answers){about}.\n\n{question}\n{options}\nAnswer:"
_CHINESE = "以下是中国关于{about}考试的单项选择题，请选出其中的正确答案。\n\n{question}\n{options}\n答案："


def read(data: Path) -> tuple[Turn, ...]:
    """MMLU: question, choices, answer (number or letter), subject. C-Eval: question, A to D, answer, id."""
    found, turns = Found(f"the suite mcq at {data}"), []
    for path in files_in(data, (".jsonl",), "the suite mcq"):
        turns += [turn for row in rows(path, ("question", "answer"), found) if (turn := _turn(row, found))]
    found.refuse()
    return tuple(turns)


def _turn(row: Row, found: Found) -> Turn | None:
    options = _options(row)
    if len(options) < 2:
        found.wrong(row, "has no options; expected a list `choices`, or A, B, C and D")
        return None
    answer = _letter(row.fields["answer"], len(options))
    if answer is None:
        asked = f"a letter from A to {ascii_uppercase[len(options) - 1]} or a number from 0 to {len(options) - 1}"
        found.wrong(row, f"answer is {row.fields['answer']!r}; expected {asked}")
        return None
    if found.lacks(row, "question"):
        return None
    subject = row.text("subject") or row.file.stem
    return Turn(
        text=_prompt(row.text("question"), options, subject.replace("_", " ")),
        answers=(answer,),
        metric="letter",
        choices=tuple(options),
        item=f"{row.file.stem} {row.text('id') or row.number}",
        group=subject,
    )


def _options(row: Row) -> list[str]:
    listed = row.fields.get("choices")
    if isinstance(listed, list):
        return [str(option).strip() for option in listed]
    letters = [letter for letter in ascii_uppercase if row.text(letter)]
    return [row.text(letter) for letter in letters] if letters == list(ascii_uppercase[: len(letters)]) else []


def _letter(answer: object, count: int) -> str | None:
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return ascii_uppercase[answer] if 0 <= answer < count else None
    letter = str(answer).strip().upper()
    return letter if len(letter) == 1 and letter in ascii_uppercase[:count] else None


def _prompt(question: str, options: list[str], subject: str) -> str:
    if is_chinese(question):
        return _CHINESE.format(about=subject, question=question, options=lettered(options))
    return _ENGLISH.format(about=f" about {subject}", question=question, options=lettered(options))
