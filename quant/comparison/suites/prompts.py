"""What several suites ask in common: options by letter, and the words that are said in an audio."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")

# The prompts asr-en and asr-zh of UltraEval-Audio (registry/prompt/asr.yaml).
WRITE_DOWN = "Please focus on the audio clip and write down everything you hear."
WRITE_DOWN_CHINESE = "请仔细听取音频片段，并将内容准确记录下来。"


def is_chinese(text: str) -> bool:
    return bool(_CHINESE.search(text))


def write_down(text: str) -> str:
    """The prompt for a transcription, in the language of what is said."""
    return WRITE_DOWN_CHINESE if is_chinese(text) else WRITE_DOWN


def lettered(options: Sequence[str]) -> str:
    """A line for each option: A. text. A letter whose option is "" is left out."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False) if option)
