"""Held-out questions as turns for `edgeomni compare`: python -m export.nano.turns DATA_FOLDER OUT_FOLDER [--each N].

Writes turns.jsonl with N unseen sentences of each held-out set of voices and N questions about fresh pictures, beside
the recordings (flac) and pictures (png) that it names; and question.flac with picture.png, which it asks about.
"""

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import soundfile
from PIL import Image

from export.nano import corpus, pictures
from export.nano.corpus import Recording
from export.nano.features import HEARD_RATE
from export.nano.split import read_split

VOICES = ("test_espeak", "test_flite", "test_festival", "test_kokoro")


def unseen(recordings: list[Recording]) -> list[Recording]:
    """The first turns whose sentence was kept out of training."""
    heldout = read_split().sentence_is_heldout
    return [r for r in recordings if r.clip.turn == 0 and r.clip.key is not None and heldout(r.clip.key)]


def spoken_turns(data: Path, out: Path, each: int) -> list[dict[str, Any]]:
    """Questions in held-out voices; their recordings are written to `out`."""
    turns = []
    for name in VOICES:
        found = unseen(corpus.recordings(data / name))
        Random(f"turns/{name}").shuffle(found)
        for i, recording in enumerate(found[:each]):
            file = f"{name.removeprefix('test_')}-{i:03d}.flac"
            soundfile.write(out / file, recording.wave(), HEARD_RATE, subtype="PCM_16")
            turns.append({"audio": file, "answer": recording.clip.answer})
    return turns


def seen_turns(out: Path, each: int) -> list[dict[str, Any]]:
    """Typed questions about drawn pictures, digits among them held-out ones; the pictures are written to `out`."""
    rng, turns = Random("turns/pictures"), []
    for i in range(each):
        picture = pictures.draw_picture(rng, heldout=True)
        question, answer = pictures.draw_question(rng, pictures.questions(picture))
        file = f"picture-{i:03d}.png"
        Image.fromarray(picture.pixels).save(out / file)
        turns.append({"text": question, "image": file, "answer": answer})
    return turns


def question_about_picture(data: Path, out: Path) -> None:
    """A held-out voice asks about a picture; both are written to `out`.

    Raises:
        LookupError: no such recording is among the held-out sets.
    """
    asked = [r for name in VOICES for r in corpus.recordings(data / name) if r.clip.intent == "look"]
    rng = Random("turns/question")
    for recording in asked:
        for picture in (pictures.draw_picture(rng, heldout=True) for _ in range(20)):
            if len(picture.shapes) > 1 and recording.clip.text in dict(pictures.questions(picture)):
                soundfile.write(out / "question.flac", recording.wave(), HEARD_RATE, subtype="PCM_16")
                Image.fromarray(picture.pixels).save(out / "picture.png")
                return
    raise LookupError(f"no held-out voice in {data} asks about a picture; make the sets {', '.join(VOICES)} first")


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--each", type=int, default=500, help="items of each kind")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    turns = spoken_turns(arguments.data, arguments.out, arguments.each) + seen_turns(arguments.out, arguments.each)
    question_about_picture(arguments.data, arguments.out)
    lines = (json.dumps(turn, ensure_ascii=False) for turn in turns)
    (arguments.out / "turns.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(turns)} turns in {arguments.out / 'turns.jsonl'}")


if __name__ == "__main__":
    main()
