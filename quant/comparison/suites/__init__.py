"""Data sets in the layouts that their authors publish, as turns: `read_suite` is READ FIRST."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quant.comparison.suites import choices, omnibench, openaudiobench, speech, ultraeval, vlmevalkit
from quant.comparison.suites.rows import Found
from quant.turn import Turn, listed
from runtime.errors import EdgeOmniError


@dataclass(frozen=True)
class Suite:
    """A layout: what it needs at --data, how it is judged, and its reader."""

    name: str
    needs: str
    judged: str
    read: Callable[[Path, Found], Iterable[Turn]]


_OPTION = "the option that the answer names, found by the published rules; what they cannot find is wrong"
_OMNIBENCH = (
    f"{_OPTION}. The right option is looked up, where the published script searches the answer's text for a letter and "
    "takes the article A for one"
)
_HEARD = (
    "llama_questions, web_questions and trivia_qa: one of the answers stands in the text (published: a model decides); "
    "reasoning_qa and alpaca_eval: not judged, as only a model could"
)
_WER = "word error rate, in Chinese and Japanese of characters; case and punctuation do not count, numbers stay as said"

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "mcq",
            "MMLU, C-Eval or CMMLU: their publishers' CSV, or JSON Lines: question, choices or A to D, answer, subject",
            "zero-shot, the likeliest letter as the first token of the answer: MMLU's own measure, which needs no "
            "extraction and so loses nothing to a model that chats",
            choices.read,
        ),
        Suite(
            "vlmevalkit",
            "a VLMEvalKit TSV: index, question, A to D, answer, image (base64) or image_path; rotated rows count as "
            "one question (g_index, or the index of MMBench and the like), <image 1> is shown where it stands",
            f"{_OPTION} (exact matching, no GPT). MMMU's open questions: the answer stands in the text (published: "
            "asked for as the first of two options)",
            vlmevalkit.read,
        ),
        Suite(
            "openmm-medical",
            "OpenMMMedical.tsv, and Images.zip unpacked beside it",
            f"{_OPTION} (exact matching, no GPT)",
            vlmevalkit.read_medical,
        ),
        *(
            Suite(
                context.suite,
                f"dataset/*.jsonl and mm_data of its repository; the model is given {context.given}",
                _OMNIBENCH,
                context.read,
            )
            for context in omnibench.CONTEXTS
        ),
        Suite("openaudiobench", "eval_datas: NAME/NAME.csv and NAME/audios", _HEARD, openaudiobench.read),
        Suite(
            "openaudiobench-spoken",
            "the same, answered aloud",
            f"{_HEARD}; of the text that is spoken (published: of a transcription)",
            openaudiobench.read_spoken,
        ),
        Suite(
            "ultraeval-audio",
            f"a YAML file that registers JSON Lines with WavPath; default_task one of {', '.join(ultraeval.TASKS)}",
            "word or character error rate, prefix or substring, as the task asks",
            ultraeval.read,
        ),
        Suite(
            "asr",
            "a manifest in JSON Lines or TSV: audio (a path), text; also NeMo's, WeNet's data.list, a metadata.jsonl "
            "and a folder of Common Voice",
            _WER,
            speech.read,
        ),
        Suite(
            "transcribe", "the same, asked with the bundle's own prompt for it (-Base)", _WER, speech.read_transcribe
        ),
    )
}

ROTATED = ("vlmevalkit", "openmm-medical")  # one question may be several turns of one name there


def read_suite(
    name: str, data: Path, limit: int = 0, seed: int = 0, say: Callable[[str], None] = lambda note: None
) -> tuple[Turn, ...]:
    """A suite's turns; with `limit`, that many items of each of its data sets, drawn with `seed`, in their own order.

    `say` is told what of the data set is left out.
    EdgeOmniError for a suite or a folder that does not exist, and with all that is wrong in its files or lacks.
    """
    if name not in SUITES:
        raise EdgeOmniError(
            f"there is no suite {name}; there are {', '.join(SUITES)} (edgeomni compare --suites tells more)"
        )
    found = Found(name, data)
    turns = [replace(turn, suite=turn.suite or name) for turn in SUITES[name].read(data, found)]
    found.refuse()
    for note in found.notes:
        say(note)
    if not turns:
        raise EdgeOmniError(f"the suite {name} at {data} is empty; {SUITES[name].needs}")
    chosen = drawn(turns if name in ROTATED else told_apart(turns), limit, seed)
    refuse_missing(name, data, chosen)
    return chosen


def told_apart(turns: Sequence[Turn]) -> list[Turn]:
    """Items that happen to have one name, with a number behind all but the first."""
    seen: Counter[tuple[str, str]] = Counter()
    apart = []
    for turn in turns:
        seen[turn.suite, turn.item] += 1
        times = seen[turn.suite, turn.item]
        apart.append(replace(turn, item=f"{turn.item} #{times}") if times > 1 else turn)
    return apart


def drawn(turns: Sequence[Turn], limit: int, seed: int) -> tuple[Turn, ...]:
    """At most `limit` items of each data set, all turns of an item together; 0: all."""
    items: dict[str, list[str]] = {}
    for turn in turns:
        of = items.setdefault(turn.suite, [])
        if not of or of[-1] != turn.item:
            of.append(turn.item)
    kept = {(suite, item) for suite, of in items.items() for item in _some(list(dict.fromkeys(of)), limit, seed)}
    return tuple(turn for turn in turns if (turn.suite, turn.item) in kept)


def _some(names: list[str], limit: int, seed: int) -> list[str]:
    if not limit or limit >= len(names):
        return names
    return [names[place] for place in np.random.default_rng(seed).choice(len(names), limit, replace=False)]


def refuse_missing(name: str, data: Path, turns: Sequence[Turn]) -> None:
    """EdgeOmniError that names the files which are not there."""
    media = {file for turn in turns for file in (turn.audio, *turn.images) if isinstance(file, Path)}
    missing = sorted(str(file) for file in media if not file.is_file())
    if missing:
        raise EdgeOmniError(
            f"the suite {name} at {data} lacks {len(missing)} of {len(media)} files:\n"
            + listed([f"  {file}" for file in missing])
        )
