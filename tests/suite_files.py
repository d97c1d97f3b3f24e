"""Small data sets in the layouts that their authors publish, made up here: two to four items each."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.audio import write_wav

RATE = 16000


def tone(path: Path, hertz: float = 220.0, seconds: float = 0.6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(RATE * seconds)) / RATE
    write_wav(path, (0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32), RATE)
    return path


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))
    return path


def json_lines(path: Path, lines: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def table(path: Path, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        out.writerows([columns, *lines])
    return path


def mmlu(folder: Path) -> Path:
    """As the data set's own JSON Lines: the answer is the option's number."""
    json_lines(
        folder / "mmlu.jsonl",
        [
            {
                "question": "Which animal barks?",
                "subject": "zoology",
                "choices": ["cat", "dog", "cow", "hen"],
                "answer": 1,
            },
            {"question": "What is 2 + 2?", "subject": "abstract_algebra", "choices": ["3", "5", "6", "4"], "answer": 3},
        ],
    )
    return folder


def ceval(folder: Path) -> Path:
    """As C-Eval's: options in columns of their own, the answer a letter, and a text with U+2028 in it."""
    lines = [
        {
            "id": 0,
            "question": "法国的首都是哪里？",
            "A": "柏林",
            "B": "巴黎",
            "C": "马德里",
            "D": "罗马",
            "answer": "B",
        },
        {"id": 1, "question": "水的\u2028化学式是", "A": "H2O", "B": "CO2", "C": "O2", "D": "NaCl", "answer": "A"},
    ]
    json_lines(folder / "high_school_geography_val.jsonl", lines)
    return folder


def mmbench(folder: Path) -> Path:
    """MMBench's manner: rotated copies of a question bear its index plus millions and name the first one's picture."""
    image = base64.b64encode(png(1)).decode()
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image", "split")
    lines = [
        (7, "What is it?\nLook well.", "noise", "noise", "a cat", "", "", "A", "object", "coarse", image, "dev"),
        (1000007, "What is it?\nLook well.", "noise", "a cat", "noise", "", "", "B", "object", "coarse", "7", "dev"),
        (
            8,
            "And this?",
            "",
            "red",
            "blue",
            "green",
            "grey",
            "D",
            "colour",
            "fine",
            base64.b64encode(png(2)).decode(),
            "dev",
        ),
    ]
    table(folder / "MMBench_DEV_EN.tsv", columns, lines)
    return folder


def medical(folder: Path) -> Path:
    picture(folder / "Images" / "ct" / "1.png", 3)
    picture(folder / "Images" / "mri" / "2.png", 4)
    columns = ("index", "image_path", "question", "A", "B", "C", "D", "answer", "category")
    lines = [
        (0, "ct/1.png", "Which modality is this?", "CT", "MRI", "", "", "A", "CT-set"),
        (1, "['mri/2.png', 'ct/1.png']", "Which comes first?", "CT", "MRI", "X-ray", "none", "B", "MRI-set"),
    ]
    table(folder / "OpenMMMedical.tsv", columns, lines)
    return folder


def omnibench(folder: Path) -> Path:
    tone(folder / "mm_data" / "audio" / "1_1.wav")
    picture(folder / "mm_data" / "image" / "1_1.png")
    line = {
        "task type": "Action and Activity",
        "audio type": "speech",
        "question": "What is the man doing?",
        "audio content": "A: Good morning.",
        "image content": "A man stands at a door.",
        "audio_path": "1_1.wav",
        "image_path": "1_1.png",
        "answer": "A man is greeting someone.",
        "options": ["He sleeps.", "A man is greeting someone.", "He eats.", "He runs."],
    }
    lines = [line | {"index": 0}, line | {"index": 1, "audio type": "music", "answer": "He runs."}]
    json_lines(folder / "dataset" / "batch-5_1142_20240817.jsonl", lines)
    return folder


def openaudiobench(folder: Path) -> Path:
    sets = {
        "llama_questions": (("Questions", "Answer"), [("What is the capital of France?", "Paris")]),
        "web_questions": (("question", "answers"), [("Who led the Panthers?", "George Seifert;Dom Capers")]),
        "trivia_qa": (
            ("question", "answer_normalized_value", "answer_normalized_aliases"),
            [("Which city?", "paris", "city of paris, paris france")],
        ),
        "alpaca_eval": (("instruction", "output"), [("Tell me a story.", "Once upon a time.")]),
    }
    for name, (columns, lines) in sets.items():
        place = folder / "eval_datas" / name
        files = [
            tone(place / "audios" / f"{name}_{number}.wav", 200 + 50 * number).name for number in range(len(lines))
        ]
        rows = [(*line, file) for line, file in zip(lines, files, strict=True)]
        table(place / f"{name}.csv", (*columns, "audio_filename"), rows)
    return folder


def ultraeval(folder: Path) -> Path:
    tone(folder / "wav" / "1.wav")
    tone(folder / "wav" / "2.wav", 300)
    lines = [
        {"WavPath": "1.wav", "Transcript": "good morning", "q": "What is it?", "labels": ["tone", "beep"]},
        {"WavPath": "2.wav", "Transcript": "good evening", "q": "And now?", "labels": ["tone"]},
    ]
    json_lines(folder / "data" / "mine.jsonl", lines)
    registry = folder / "registry" / "dataset" / "mine.yaml"
    registry.parent.mkdir(parents=True)
    registry.write_text(
        """
mine-asr:
  class: audio_evals.dataset.dataset.RelativePath
  args: {default_task: asr, f_name: data/mine.jsonl, ref_col: Transcript, file_path_prefix: wav/}
mine-aqa:
  class: audio_evals.dataset.dataset.RelativePath
  args:
    default_task: aqa
    f_name: data/mine.jsonl
    ref_col: labels
    file_path_prefix: wav
    col_aliases: {q: QuestionText}
a-model:
  class: audio_evals.models.model.Model
""",
        encoding="utf-8",
    )
    return folder


def manifest(folder: Path) -> Path:
    tone(folder / "a.wav")
    tone(folder / "clips" / "b.wav", 300)
    json_lines(folder / "en.jsonl", [{"audio": "a.wav", "text": "Good morning."}])
    table(folder / "zh.tsv", ("client_id", "path", "sentence"), [("x", "clips/b.wav", "早上好")])
    return folder


def published(folder: Path) -> Path:
    """As MMLU's archive unpacks: dev and test, CSV without a heading, a file for each subject."""
    for split, question in (("dev", "An example?"), ("test", "Which is 2, or 1 + 1?")):
        table(folder / split / f"abstract_algebra_{split}.csv", (question, "2, of course", "3", "4", "5", "A"), [])
    return folder


def common_voice(folder: Path) -> Path:
    """Common Voice: a table for each split, recordings in clips/, quotation marks as they stand in a sentence."""
    columns = ("client_id", "path", "sentence_id", "sentence", "up_votes", "accents", "locale", "segment")
    said = {"1.wav": '"Wait, he said.', "2.wav": "Good morning.", "3.wav": 'The "old" house.'}
    lines = [("x", name, "s", text, "2", "", "en", "") for name, text in said.items()]
    (folder / "clips").mkdir(parents=True)
    for name in said:
        tone(folder / "clips" / name)
    text = "".join("\t".join(line) + "\n" for line in [columns, *lines])
    (folder / "test.tsv").write_text(text, encoding="utf-8")
    (folder / "train.tsv").write_text(text, encoding="utf-8")
    return folder


def mmmu(folder: Path) -> Path:
    """MMMU as VLMEvalKit's table: several pictures placed in the text, open questions, and a row without a picture."""
    first, second = (base64.b64encode(png(seed)).decode() for seed in (5, 6))
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "image", "question_type", "split", "category")
    lines = [
        (1, "What joins <image 2> and <image 1> ?", "nan", "red", "", "<image 1>", "nan", "C", str([first, second]),
         "multiple-choice", "validation", "Art"),
        (2, "How many?", "", "", "", "", "", "24", first, "open", "validation", "Math"),
        (3, "How fast?", "", "", "", "", "", "['1/2', '0.5']", first, "open", "validation", "Math"),
        (4, "And without?", "", "x", "y", "", "", "A", "", "multiple-choice", "validation", "Math"),
    ]  # fmt: skip
    table(folder / "MMMU_DEV_VAL.tsv", columns, lines)
    return folder
