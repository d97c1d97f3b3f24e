"""Data sets as other publishers and programs write them: separators, marks, columns and pictures in their places."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jiwer")

from quant.comparison.score import options, score
from quant.comparison.suites import read_suite
from quant.media import Embedded
from quant.turn import Turn, read_turns, shown_in
from runtime.errors import EdgeOmniError
from tests import suite_files
from tests.test_suites import refused

SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x1cf"
BOM = "\ufeff"


def test_unicode_line_separators_and_a_byte_order_mark_end_no_turn(tmp_path: Path) -> None:
    line = json.dumps({"text": SEPARATORS.replace("\x0b", " ").replace("\x1c", " ")}, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_text(f"{BOM}{line}\r\n\n{line}\n", encoding="utf-8")
    first, second = read_turns(tmp_path / "t.jsonl")
    assert first.text == second.text == "a\u2028b\u2029c\u0085d e f"


def test_a_mistake_in_a_line_of_turns_is_said_by_the_number_that_an_editor_shows(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a\u2028b"}\n\n{"said": 1}\n', encoding="utf-8")
    with pytest.raises(EdgeOmniError, match="line 3: said: unknown"):
        read_turns(tmp_path / "t.jsonl")


def test_a_table_may_begin_with_a_byte_order_mark_before_a_quoted_name(tmp_path: Path) -> None:
    text = f'{BOM}"question",A,B,answer\n"Is it\u2028so?\u0085",yes,no,A\n'
    (tmp_path / "q.csv").write_text(text, encoding="utf-8")
    (turn,) = read_suite("mcq", tmp_path)
    assert "Is it\u2028so?" in turn.text and turn.answers == ("A",)


def test_mmlu_as_published_is_read_from_its_test_split_without_a_heading(tmp_path: Path) -> None:
    notes: list[str] = []
    (turn,) = read_suite("mcq", suite_files.published(tmp_path), say=notes.append)
    assert turn.text == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Which is 2, or 1 + 1?\nA. 2, of course\nB. 3\nC. 4\nD. 5\nAnswer:"
    )
    assert (turn.answers, turn.group) == (("A",), "abstract_algebra")
    assert len(notes) == 1 and "of its splits only test is read" in notes[0]


def test_ceval_as_published_is_read_from_val_since_its_test_has_no_answers(tmp_path: Path) -> None:
    named = ("id", "question", "A", "B", "C", "D")
    suite_files.table(tmp_path / "test" / "law_test.csv", named, [(0, "甲？", "1", "2", "3", "4")])
    lines = [(7, "乙？", "1", "2", "3", "4", "C", "因为")]
    suite_files.table(tmp_path / "val" / "law_val.csv", (*named, "answer", "explanation"), lines)
    (turn,) = read_suite("mcq", tmp_path)
    assert (turn.answers, turn.group, turn.item) == (("C",), "law", "law_val 7")
    assert "因为" not in turn.text


def test_cmmlu_as_published_numbers_its_rows_and_writes_its_names_large(tmp_path: Path) -> None:
    columns = ("", "Question", "A", "B", "C", "D", "Answer")
    suite_files.table(tmp_path / "test" / "anatomy.csv", columns, [(0, "哪个？", "1", "2", "3", "4", "D")])
    (turn,) = read_suite("mcq", tmp_path)
    assert (turn.answers, turn.group) == (("D",), "anatomy")


def test_a_column_that_would_change_the_question_is_refused_and_one_out_of_the_way_is_not(tmp_path: Path) -> None:
    good = {"question": "?", "A": "x", "B": "y", "answer": "A", "explanation": "so", "_mine": "z"}
    suite_files.json_lines(tmp_path / "q.jsonl", [good])
    assert len(read_suite("mcq", tmp_path)) == 1
    suite_files.json_lines(tmp_path / "q.jsonl", [good, good | {"passage": "Read this."}, good | {"passage": "This."}])
    message = refused("mcq", tmp_path)
    assert message.count("passage") == 2 and "row 2: column 'passage' is not read here" in message


@pytest.mark.parametrize(
    ("suite", "make", "file", "column"),
    [
        ("vlmevalkit", suite_files.mmbench, "MMBench_DEV_EN.tsv", "context"),
        ("openaudiobench", suite_files.openaudiobench, "eval_datas/llama_questions/llama_questions.csv", "context"),
    ],
)
def test_a_context_in_a_table_is_refused_in_every_suite(
    suite: str, make, file: str, column: str, tmp_path: Path
) -> None:
    path = make(tmp_path) / file
    separator = "\t" if path.suffix == ".tsv" else ","
    head, *lines = path.read_text(encoding="utf-8").split("\n")
    if suite == "vlmevalkit":  # a quoted field with a line of its own: the second column is where a word may go
        text = path.read_text(encoding="utf-8").replace("index\tquestion\thint", f"index\tquestion\t{column}")
    else:
        text = "\n".join([head + separator + column, *(line + separator + "told" for line in lines if line)]) + "\n"
    path.write_text(text, encoding="utf-8")
    assert f"column {column!r} is not read here" in refused(suite, tmp_path)


def test_common_voice_is_read_from_its_test_table_and_a_quotation_mark_is_a_character(tmp_path: Path) -> None:
    notes: list[str] = []
    turns = read_suite("asr", suite_files.common_voice(tmp_path), say=notes.append)
    assert [turn.answers for turn in turns] == [('"Wait, he said.',), ("Good morning.",), ('The "old" house.',)]
    assert [turn.audio for turn in turns] == [tmp_path / "clips" / f"{number}.wav" for number in (1, 2, 3)]
    assert "only test.tsv is read" in notes[0]
    assert len(read_suite("asr", tmp_path / "train.tsv")) == 3


def test_a_mark_of_quotation_that_nothing_closes_is_refused_where_marks_quote(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('question,A,B,answer\n"What?,x,y,A\nAnd?,x,y,B\n', encoding="utf-8")
    assert "q.csv cannot be read" in refused("mcq", tmp_path)


def test_a_row_of_more_fields_than_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("path\tsentence\na.wav\tone\ttwo\n", encoding="utf-8")
    assert "row 1: has 3 fields, and the table 2 columns" in refused("asr", tmp_path)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data.list", {"key": "utt1", "wav": "a.wav", "txt": "good morning"}),
        ("metadata.jsonl", {"file_name": "a.wav", "transcription": "good morning"}),
        ("hf.jsonl", {"audio": {"path": "a.wav", "bytes": None, "sampling_rate": 16000}, "sentence": "good morning"}),
        ("manifest.json", {"audio_filepath": "a.wav", "duration": 0.6, "offset": 0.0, "text": "good morning"}),
    ],
)
def test_manifests_of_other_programs_are_read(file: str, line: dict[str, object], tmp_path: Path) -> None:
    suite_files.tone(tmp_path / "a.wav")
    suite_files.json_lines(tmp_path / file, [line])
    (turn,) = read_suite("asr", tmp_path)
    assert (turn.audio, turn.answers) == (tmp_path / "a.wav", ("good morning",))


def test_a_metadata_table_of_hugging_face_is_read(tmp_path: Path) -> None:
    suite_files.tone(tmp_path / "a.wav")
    suite_files.table(tmp_path / "metadata.csv", ("file_name", "transcription"), [("a.wav", 'he said "no", twice')])
    assert read_suite("asr", tmp_path)[0].answers == ('he said "no", twice',)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"offset": 2.5}, "offset is 2.5, and a part of a recording is not read"),
        ({"start": 0.0, "end": 1.5}, "end is 1.5, and a part"),
        ({"audio": {"array": [0.0], "sampling_rate": 16000}}, "audio holds array, sampling_rate and no path"),
        ({"prompt": "Translate."}, "column 'prompt' is not read here"),
    ],
)
def test_what_a_manifest_says_beyond_a_whole_recording_is_refused(
    more: dict[str, object], message: str, tmp_path: Path
) -> None:
    suite_files.tone(tmp_path / "a.wav")
    suite_files.json_lines(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "x"} | more])
    assert message in refused("asr", tmp_path)


def test_pictures_of_mmmu_stand_where_the_text_has_them(tmp_path: Path) -> None:
    turn = read_suite("vlmevalkit", suite_files.mmmu(tmp_path))[0]
    one, two = suite_files.png(5), suite_files.png(6)
    assert [picture.read() for picture in turn.images if isinstance(picture, Embedded)] == [two, one, one]
    pieces = ["Question: What joins ", 0, " and ", 1, " ?\nOptions:\nA. red\nC. ", 2]
    last = "\nPlease select the correct answer from the options above. \n"
    assert list(shown_in(turn.text, turn.cuts)) == [*pieces, last]


def test_a_gap_in_the_options_keeps_the_letters_and_nan_is_neither_hint_nor_option(tmp_path: Path) -> None:
    turn = read_suite("vlmevalkit", suite_files.mmmu(tmp_path))[0]
    assert options(turn) == {"A": "red", "C": "<image 1>"} and turn.answers == ("C",)
    assert "Hint" not in turn.text and "nan" not in turn.text


def test_open_questions_of_mmmu_are_right_where_an_answer_stands_in_the_text(tmp_path: Path) -> None:
    _, many, fast = read_suite("vlmevalkit", suite_files.mmmu(tmp_path))
    assert many.text == "Question: How many?\n" and many.answers == ("24",)
    assert fast.answers == ("1/2", "0.5")
    for turn, said, right in ((many, "It is 24.", True), (many, "It is 240.", False), (fast, "about 0.5", True)):
        found = score(turn, said)
        assert found is not None and found.right == right


def test_rows_without_a_picture_are_left_out_with_a_word(tmp_path: Path) -> None:
    notes: list[str] = []
    turns = read_suite("vlmevalkit", suite_files.mmmu(tmp_path), say=notes.append)
    assert [turn.item for turn in turns] == ["1", "2", "3"]
    assert notes == ["MMMU_DEV_VAL.tsv: 1 of 4 rows have no picture and are left out"]


def test_a_place_for_a_picture_that_there_is_not_is_refused(tmp_path: Path) -> None:
    path = suite_files.mmmu(tmp_path) / "MMMU_DEV_VAL.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("<image 2>", "<image 3>"), encoding="utf-8")
    assert "row 1: asks about <image 3>, and has 2 pictures" in refused("vlmevalkit", tmp_path)


@pytest.mark.parametrize(
    ("name", "columns", "keys"),
    [
        ("ScienceQA_circular", ("index",), ((3,), (1000003,))),
        ("CCBench", ("index",), ((3,), (1000003,))),
        ("MMCR", ("index", "g_index"), ((3, 3), (9, 3))),
        ("MyTable", ("index", "g_index"), ((5, 3), (9, 3))),
    ],
)
def test_rotated_rows_of_every_circular_table_are_one_item(
    name: str, columns: tuple[str, ...], keys: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    suite_files.picture(tmp_path / "p.png")
    lines = [(*key, "?", "x", "y", "A", "p.png") for key in keys]
    suite_files.table(tmp_path / f"{name}.tsv", (*columns, "question", "A", "B", "answer", "image_path"), lines)
    assert [turn.item for turn in read_suite("vlmevalkit", tmp_path)] == ["3", "3"]


def test_loose_aqa_finds_whole_words_as_its_registry_asks(tmp_path: Path) -> None:
    suite_files.ultraeval(tmp_path)
    registry = tmp_path / "registry" / "dataset" / "mine.yaml"
    text = registry.read_text().replace("default_task: aqa", "default_task: loose-aqa")
    registry.write_text(text)
    turn = read_suite("ultraeval-audio", tmp_path)[2]
    assert (turn.text, turn.metric, turn.answers) == ("", "exists", ("tone", "beep"))
    found = [score(turn, said) for said in ("A TONE, I think", "a stone")]
    assert [one.right for one in found if one] == [True, False]


def test_an_argument_of_a_registry_that_is_not_read_is_refused(tmp_path: Path) -> None:
    suite_files.ultraeval(tmp_path)
    registry = tmp_path / "registry" / "dataset" / "mine.yaml"
    registry.write_text(registry.read_text().replace("ref_col: Transcript", "ref_col: Transcript, filter: x"))
    assert "mine-asr: filter is not read, and may change what is asked" in refused("ultraeval-audio", tmp_path)


def test_a_turn_without_places_shows_its_text_whole() -> None:
    assert list(shown_in("ab", ())) == ["ab"]
    assert list(shown_in("ab", (0, 2))) == [0, "ab", 1]
    assert Turn("ab").cuts == () and np.iterable(shown_in("", (0,)))
