"""Multiple-choice questions like those of MMLU, C-Eval and CMMLU: zero-shot, by the likelihood of letters."""

import csv
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase

from quant.comparison.suites.prompts import is_chinese, lettered
from quant.comparison.suites.rows import Form, Found, Row, files_in, rows, said
from quant.media import table_rows
from quant.turn import Turn

SUFFIXES = (".jsonl", ".csv")
LISTS = ("choices", "options")  # the second is MMLU-Pro's
# MMLU's own files name no columns, and CMMLU's begin with a capital.
TABLE = Form({"Question": "question", "Answer": "answer"}, headless=("question", *"ABCD", "answer"))
# Told of a question, and no part of a zero-shot prompt; the first is the number of the row.
HARMLESS = frozenset(
    ("", "Unnamed: 0", "explanation", "cot_content", "answer_index", "question_id", "category", "src", "split", "level")
)
KNOWN = frozenset(("question", "answer", "subject", "id", *LISTS, *ascii_uppercase, *HARMLESS))

# Hendrycks et al. 2021, and Huang et al. 2023: the prompts without their examples.
_ENGLISH = "The following are multiple choice questions (with answers){about}.\n\n{question}\n{options}\nAnswer:"
_CHINESE = "以下是中国关于{about}考试的单项选择题，请选出其中的正确答案。\n\n{question}\n{options}\n答案："


def read(data: Path, found: Found) -> Iterator[Turn]:
    """JSON Lines or the publishers' CSV. MMLU: question, choices, answer (number or letter), subject; C-Eval and
    CMMLU: question, A to D, answer, id. Of a folder of splits the one that has answers, test before val, is read."""
    for path in files_in(_split(data, found), SUFFIXES, f"the suite {found.suite}"):
        for row in rows(path, ("question", "answer"), found, TABLE):
            if turn := _turn(row, found):
                yield turn


def _split(data: Path, found: Found) -> Path:
    """Where the questions lie in what an archive unpacks to: dev, test and val; C-Eval's test has no answers."""
    splits = [data / name for name in ("test", "val") if (data / name).is_dir()]
    if not splits or any(path.name.endswith(SUFFIXES) for path in data.glob("*")):
        return data
    chosen = next((split for split in splits if _is_solved(split)), splits[0])
    found.notes.append(f"{found.what}: of its splits only {chosen.name} is read; name another folder with --data")
    return chosen


def _is_solved(folder: Path) -> bool:
    """Whether the first of a folder's tables has answers: a heading that names a question names an answer as well."""
    for path in sorted(folder.glob("*.csv"))[:1]:
        with path.open("rb") as file:
            try:
                heading = {name.strip().casefold() for name in next(table_rows(file, ","), [])}
            except (UnicodeDecodeError, csv.Error):  # told when it is read
                return True
        return "question" not in heading or "answer" in heading
    return True


def _turn(row: Row, found: Found) -> Turn | None:
    found.refuse_unread(row, KNOWN)
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
    subject = row.text("subject") or _subject(row.file)
    return Turn(
        text=_prompt(row.text("question"), options, subject.replace("_", " ")),
        answers=(answer,),
        metric="letter",
        choices=tuple(options),
        item=f"{row.file.stem} {row.text('id') or row.number}",
        group=subject,
    )


def _subject(file: Path) -> str:
    """A file's name, of a publisher's table without the split that it is of."""
    name = file.stem
    if file.suffix != ".csv":
        return name
    return next((name.removesuffix(end) for end in ("_test", "_val", "_dev") if name.endswith(end)), name)


def _options(row: Row) -> list[str]:
    for listed in map(row.fields.get, LISTS):
        if isinstance(listed, list):
            return [said(option) for option in listed]
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
