"""Published data sets as turns: what is asked, shown and expected, and what is said of files that are wrong."""

import base64
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("jiwer")

from apps.turn_sources import turn_sources
from quant.comparison.suites import SUITES, drawn, read_suite
from quant.media import Embedded
from quant.turn import Turn
from runtime.errors import EdgeOmniError
from tests import suite_files

Make = Callable[[Path], Path]
LAYOUTS: tuple[tuple[str, Make, int], ...] = (
    ("mcq", suite_files.mmlu, 2),
    ("mcq", suite_files.ceval, 2),
    ("vlmevalkit", suite_files.mmbench, 3),
    ("openmm-medical", suite_files.medical, 2),
    ("omnibench", suite_files.omnibench, 2),
    ("omnibench-caption", suite_files.omnibench, 2),
    ("omnibench-transcript", suite_files.omnibench, 2),
    ("omnibench-text", suite_files.omnibench, 2),
    ("openaudiobench", suite_files.openaudiobench, 4),
    ("openaudiobench-spoken", suite_files.openaudiobench, 4),
    ("ultraeval-audio", suite_files.ultraeval, 4),
    ("asr", suite_files.manifest, 2),
    ("transcribe", suite_files.manifest, 2),
)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("suite", "make", "count"), LAYOUTS)
def test_a_layout_is_read_whole_and_nothing_is_written_beside_it(
    suite: str, make: Make, count: int, tmp_path: Path
) -> None:
    before = files_of(make(tmp_path))
    turns = read_suite(suite, tmp_path)
    assert len(turns) == count
    assert all(turn.suite and turn.item and (turn.text or turn.audio) for turn in turns)
    assert files_of(tmp_path) == before


def test_every_suite_that_is_offered_is_read_here() -> None:
    assert {suite for suite, _, _ in LAYOUTS} == set(SUITES)


def test_mmlu_is_asked_by_subject_with_lettered_options(tmp_path: Path) -> None:
    dog, four = read_suite("mcq", suite_files.mmlu(tmp_path))
    assert dog.text == (
        "The following are multiple choice questions (with answers) about zoology.\n\n"
        "Which animal barks?\nA. cat\nB. dog\nC. cow\nD. hen\nAnswer:"
    )
    assert (dog.answers, dog.metric, dog.group) == (("B",), "letter", "zoology")
    assert (four.answers, four.group) == (("D",), "abstract_algebra")
    assert "about abstract algebra." in four.text


def test_ceval_is_asked_in_chinese_and_a_line_separator_ends_no_line(tmp_path: Path) -> None:
    paris, water = read_suite("mcq", suite_files.ceval(tmp_path))
    assert paris.text.startswith("以下是中国关于high school geography val考试的单项选择题")
    assert paris.text.endswith("A. 柏林\nB. 巴黎\nC. 马德里\nD. 罗马\n答案：")
    assert (paris.answers, water.answers) == (("B",), ("A",))
    assert "水的\u2028化学式是" in water.text


def test_pictures_in_a_table_are_read_when_they_are_looked_at(tmp_path: Path) -> None:
    first, rotated, second = read_suite("vlmevalkit", suite_files.mmbench(tmp_path))
    (picture,) = first.images
    assert isinstance(picture, Embedded)
    assert picture.read() == suite_files.png(1)
    assert rotated.images == first.images
    assert isinstance(second.images[0], Embedded) and second.images[0].read() == suite_files.png(2)


def test_a_table_of_pictures_is_never_in_memory_whole(tmp_path: Path) -> None:
    picture = base64.b64encode(bytes(300_000)).decode()
    lines = [(number, "?", "x", "y", "A", picture) for number in range(60)]
    suite_files.table(tmp_path / "t.tsv", ("index", "question", "A", "B", "answer", "image"), lines)
    tracemalloc.start()
    turns = read_suite("vlmevalkit", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(turns) == 60
    assert peak < 10 * len(picture)  # all of them would be sixty times that


def test_vlmevalkit_is_asked_with_its_hint_and_only_the_options_that_there_are(tmp_path: Path) -> None:
    first, rotated, _ = read_suite("vlmevalkit", suite_files.mmbench(tmp_path))
    assert first.text == (
        "Hint: noise\nQuestion: What is it?\nLook well.\nOptions:\nA. noise\nB. a cat\n"
        "Please select the correct answer from the options above. \n"
    )
    assert (first.suite, first.item, rotated.item) == ("MMBench_DEV_EN", "7", "7")
    assert (first.group, rotated.answers) == ("coarse", ("B",))


def test_pictures_of_openmm_medical_lie_in_a_folder_and_may_be_several(tmp_path: Path) -> None:
    one, two = read_suite("openmm-medical", suite_files.medical(tmp_path))
    assert one.images == (tmp_path / "Images" / "ct" / "1.png",)
    assert two.images == (tmp_path / "Images" / "mri" / "2.png", tmp_path / "Images" / "ct" / "1.png")
    assert (two.answers, two.choices, two.group) == (("B",), ("CT", "MRI", "X-ray", "none"), "MRI-set")


def test_omnibench_gives_media_or_texts_in_their_place(tmp_path: Path) -> None:
    data = suite_files.omnibench(tmp_path)
    whole, caption, transcript, text = (
        read_suite(f"omnibench{kind}", data)[0] for kind in ("", "-caption", "-transcript", "-text")
    )
    assert whole.audio and whole.images and "Content:" not in whole.text
    assert caption.audio and not caption.images and "Image Content: A man stands at a door." in caption.text
    assert not transcript.audio and transcript.images and "Audio Content: A: Good morning." in transcript.text
    assert not text.audio and not text.images
    assert whole.text.startswith("Please answer the following question based on the given image and audio:\nWhat is")
    assert whole.answers == ("B",)  # not A, although its text begins with that letter


def test_omnibench_may_hold_its_options_in_one_text(tmp_path: Path) -> None:
    file = next((suite_files.omnibench(tmp_path) / "dataset").iterdir())
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["options"] = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", line["options"], strict=True))
        line["answer"] = line["answer"].replace(" ", "  ")
    suite_files.json_lines(file, lines)
    assert [turn.answers for turn in read_suite("omnibench", tmp_path)] == [("B",), ("D",)]


def test_openaudiobench_is_heard_and_each_of_its_sets_has_its_own_answers(tmp_path: Path) -> None:
    turns = {turn.suite: turn for turn in read_suite("openaudiobench", suite_files.openaudiobench(tmp_path))}
    assert turns["openaudiobench/web_questions"].answers == ("George Seifert", "Dom Capers")
    assert turns["openaudiobench/trivia_qa"].answers == ("paris", "city of paris", "paris france")
    assert turns["openaudiobench/alpaca_eval"].metric == "judge"
    assert all(turn.text == "" and turn.audio and not turn.spoken for turn in turns.values())
    spoken = read_suite("openaudiobench-spoken", tmp_path)
    assert all(turn.spoken and turn.suite.endswith("-spoken") for turn in spoken)


def test_ultraeval_asks_as_its_registry_says(tmp_path: Path) -> None:
    turns = read_suite("ultraeval-audio", suite_files.ultraeval(tmp_path))
    asr, aqa = turns[0], turns[2]
    assert (asr.suite, asr.metric, asr.answers) == ("mine-asr", "wer", ("good morning",))
    assert asr.audio == tmp_path / "wav" / "1.wav"
    assert (aqa.suite, aqa.metric, aqa.answers) == ("mine-aqa", "prefix", ("tone", "beep"))
    assert aqa.text == "answer the question without explain\n# Question: What is it?"


def test_a_manifest_is_asked_in_the_language_of_what_is_said(tmp_path: Path) -> None:
    english, chinese = read_suite("asr", suite_files.manifest(tmp_path))
    assert english.audio == tmp_path / "a.wav" and "write down" in english.text
    assert chinese.audio == tmp_path / "clips" / "b.wav" and "记录" in chinese.text
    assert all(turn.transcribe and not turn.text for turn in read_suite("transcribe", tmp_path))


def test_a_draw_repeats_with_its_seed_and_keeps_the_turns_of_an_item_together() -> None:
    turns = [Turn("?", suite="s", item=str(place % 50)) for place in range(100)]
    some = drawn(turns, 10, seed=3)
    assert some == drawn(turns, 10, seed=3) != drawn(turns, 10, seed=4)
    assert len(some) == 20 and len({turn.item for turn in some}) == 10
    assert [turn for turn in turns if turn in some] == list(some)
    assert drawn(turns, 0, seed=0) == drawn(turns, 500, seed=0) == tuple(turns)


def test_a_recording_that_comes_twice_is_two_items(tmp_path: Path) -> None:
    suite_files.tone(tmp_path / "a.wav")
    suite_files.json_lines(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "one"}] * 2)
    assert [turn.item for turn in read_suite("asr", tmp_path)] == ["a.wav", "a.wav #2"]


def refused(suite: str, data: Path) -> str:
    with pytest.raises(EdgeOmniError) as error:
        read_suite(suite, data)
    return str(error.value)


def test_a_suite_that_does_not_exist_is_told_which_do(tmp_path: Path) -> None:
    assert "there is no suite mmlu; there are mcq, vlmevalkit" in refused("mmlu", tmp_path)


@pytest.mark.parametrize("suite", SUITES)
def test_a_folder_without_the_data_set_is_refused(suite: str, tmp_path: Path) -> None:
    assert str(tmp_path) in refused(suite, tmp_path)
    assert "name" in refused(suite, tmp_path / "nowhere") or "there is no" in refused(suite, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("suite", "make", "lost"),
    [
        ("asr", suite_files.manifest, ["a.wav", "clips/b.wav"]),
        ("openaudiobench", suite_files.openaudiobench, ["eval_datas/trivia_qa/audios/trivia_qa_0.wav"]),
        ("omnibench", suite_files.omnibench, ["mm_data/audio/1_1.wav", "mm_data/image/1_1.png"]),
        ("openmm-medical", suite_files.medical, ["Images/mri/2.png"]),
    ],
)
def test_files_that_are_not_there_are_named_all_at_once(
    suite: str, make: Make, lost: list[str], tmp_path: Path
) -> None:
    make(tmp_path)
    for name in lost:
        (tmp_path / name).unlink()
    message = refused(suite, tmp_path)
    assert f"lacks {len(lost)} of" in message
    assert all(Path(name).name in message for name in lost)


def test_everything_wrong_with_questions_is_said_at_once(tmp_path: Path) -> None:
    good = {"question": "?", "choices": ["a", "b"], "answer": 0}
    lines = [good, good | {"answer": 2}, good | {"choices": []}, {"question": "?"}, good | {"answer": "E"}]
    suite_files.json_lines(tmp_path / "q.jsonl", lines)
    with (tmp_path / "q.jsonl").open("a") as file:
        file.write("{\n[1]\n")
    message = refused("mcq", tmp_path)
    for mistake in ("row 2: answer is 2", "row 3: has no options", "row 4: has no answer", "row 5: answer is 'E'",
                    "row 6: is no JSON object (", "row 7: is no JSON object"):  # fmt: skip
        assert mistake in message


def test_everything_wrong_with_a_table_is_said_at_once(tmp_path: Path) -> None:
    columns = ("index", "question", "A", "B", "C", "answer", "image")
    image = base64.b64encode(suite_files.png()).decode()
    lines = [
        (0, "?", "x", "y", "", "C", image),
        (1, "?", "x", "", "z", "B", image),
        (2, "?", "x", "y", "", "A", "no base64 at all!" * 9),
        (3, "?", "x", "y", "", "A", "77"),
        (4, "", "x", "y", "", "A", image),
    ]
    suite_files.table(tmp_path / "t.tsv", columns, lines)
    message = refused("vlmevalkit", tmp_path)
    for mistake in ("row 1: answer is 'C'", "the options are A, C", "row 3: image is no base64",
                    "row 4: has no picture", "row 5: says nothing under question"):  # fmt: skip
        assert mistake in message


def test_columns_that_a_table_lacks_are_named_with_those_it_has(tmp_path: Path) -> None:
    suite_files.table(tmp_path / "t.tsv", ("id", "question"), [(0, "?")])
    assert "t.tsv: has no column index, answer; it has id, question" in refused("vlmevalkit", tmp_path)
    suite_files.openaudiobench(tmp_path)
    suite_files.table(tmp_path / "eval_datas/web_questions/web_questions.csv", ("question", "audio"), [("?", "x")])
    assert "web_questions.csv: has no column audio_filename, answers" in refused("openaudiobench", tmp_path)


def test_a_table_without_rows_is_empty(tmp_path: Path) -> None:
    suite_files.table(tmp_path / "t.tsv", ("index", "question", "answer"), [])
    assert "is empty" in refused("vlmevalkit", tmp_path)


def test_an_answer_that_is_none_of_the_options_is_refused(tmp_path: Path) -> None:
    suite_files.omnibench(tmp_path)
    file = next((tmp_path / "dataset").iterdir())
    file.write_text(file.read_text().replace('"answer": "He runs."', '"answer": "He flies."'))
    assert "row 2: answer 'He flies.' is none of the options" in refused("omnibench", tmp_path)


def test_tasks_that_another_model_would_judge_are_refused_by_name(tmp_path: Path) -> None:
    suite_files.ultraeval(tmp_path)
    registry = tmp_path / "registry" / "dataset" / "mine.yaml"
    registry.write_text(registry.read_text().replace("default_task: aqa", "default_task: speech-chatbot"))
    assert "mine-aqa: default_task speech-chatbot cannot be judged here; asr" in refused("ultraeval-audio", tmp_path)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes("index\tquestion\tanswer\tA\tB\n0\tcafé\tA\tx\ty\n".encode("latin-1"))
    assert "t.tsv cannot be read" in refused("vlmevalkit", tmp_path)


def test_a_limit_without_a_suite_to_draw_from_is_refused() -> None:
    with pytest.raises(EdgeOmniError, match="--limit draws from a --suite"):
        turn_sources(None, None, None, 3, 0)
