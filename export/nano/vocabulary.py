"""Learns the byte-level BPE of the closed world and writes the tokenizer files: python -m export.nano.vocabulary.

Merges are learnt from the domain's own words with nearly equal weights, so that nearly every word is one token. The
59 added tokens are the official ones at the end of the vocabulary, where config.json says they are.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from export.files import read_json_object
from export.nano import domain

FOLDER = Path(__file__).with_name("checkpoint")
# The system prompts and instructions of the official demos; learnt as few tokens, so that they cost little to read.
SYSTEM_PROMPTS = ("请用【邻家女声】这个声音回答问题。", "你是一个AI助手，请用【邻家女声】这个声音回答问题。")
TRANSCRIBE = "将语音转录为文本:"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The order of the official ids 151643..151701; the eight that are not "special" there are not special here.
ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<B_SYS> <B_USYS> <C_Q> <C_A> <B_FUNC> <B_CODE> <B_APE> <function_calling> <calc_start> <calc_end> <inner_think> "
    "<audio_start_baichuan> <audio_end_baichuan> <audio_pad_baichuan> <img_start_baichuan> <img_end_baichuan> "
    "<img_pad_baichuan> <img_newline_baichuan> <box_start_baichuan> <box_end_baichuan> <box_delim_baichuan> "
    "<ref_start_baichuan> <ref_end_baichuan> <img_delim_baichuan> <polygon_start_baichuan> <polygon_end_baichuan> "
    "<baichuan_pad_token> <reserved_113> <audio_delim_baichuan> <video_palce_baichuan> <video_start_baichuan> "
    "<video_end_baichuan> <audiotext_start_baichuan> <audiotext_end_baichuan> <audiotext_pad_baichuan> "
    "<audiogen_start_baichuan> <audiogen_end_baichuan>"
).split()
NOT_SPECIAL = frozenset(ADDED[14:22])
EOS = ADDED[0]
NOISE_MARKER = "<reserved_113>"  # first token of the answer to what was no question; no official prompt uses it


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte (GPT-2's table), by byte value."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def _words() -> Counter[str]:
    """Pieces that the split pattern cuts the domain's sentences into, in byte characters."""
    rng, sentences = Random(0), [*SYSTEM_PROMPTS, TRANSCRIBE, *domain.picture_questions()]
    for _ in range(30000):
        turn = domain.draw_turn(rng)
        then = domain.draw_follow_up(rng, turn)
        sentences += [turn.question, turn.answer] + ([then.question, then.answer] if then else [])
    sentences += [f"an {word}" for word in domain.spoken_words()]
    from tokenizers import Regex, pre_tokenizers  # kept out of module import: only this script trains

    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts = Counter(piece for sentence in set(sentences) for piece, _ in cut.pre_tokenize_str(sentence))
    # Nearly equal weights: a rare word deserves its token almost as much.
    return Counter({word: 8 + count.bit_length() for word, count in counts.items()})


def learn_merges(most: int) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016, arXiv:1508.07909), commonest pair first, ties by spelling."""
    weights = _words()
    words = {word: list(word) for word in sorted(weights)}
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += weights[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in words.items():
            words[word] = _merged(parts, best)
    return merges


def kept_merges() -> list[tuple[str, str]]:
    """The merges of the committed checkpoint, whose weights know no others; none where it has no file."""
    path = FOLDER / "merges.txt"
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


# What people type, and how the closed world says it. Each rule is a regular expression and its replacement.
_SPELLINGS = [
    ("[\u2018\u2019\u02bc]", "'"),
    *((f"\\b{word}'?s\\b", f"{word} is") for word in ("what", "how", "who", "where", "that", "there")),
    ("\\bit's\\b", "it is"),
    ("\\bi'?m\\b", "i am"),
    ("\\byou're\\b", "you are"),
    ("\\b(?:don't|dont)\\b", "do not"),
    ("\\b(?:can't|cannot|cant)\\b", "can not"),
    ("\\bcolour", "color"),
    ("\\b(?:o'clock|oclock)\\b", ""),
    ("(?<=\\d):00(?!\\d)", ""),
    ("(?<=\\d)[:.](?=\\d\\d? *[ap]\\.?m)", " "),
    ("(?<=\\d) *a\\.?m\\b\\.?", " in the morning"),
    ("(?<=\\d) *p\\.?m\\b\\.?", " in the evening"),
    ("(?<=\\d):(?=\\d)", " "),
    (" *\\+ *", " plus "),
    ("(?<=\\d) *[-\u2212\u2013] *(?=\\d)", " minus "),
    (" [-\u2212\u2013] ", " minus "),
    ("(?<=\\d) *x *(?=\\d)", " times "),
    (" *[*\u00d7] *", " times "),
    ("(?<=\\d) *(?:minutes|minute|mins|min)\\b", " minutes"),
    ("(?<=\\d) *(?:seconds|second|secs|sec)\\b", " seconds"),
    ("(?<=[a-z])-(?=[a-z])", " "),
    ("(?<=[\u4e00-\u9fff])ai(?=[\u4e00-\u9fff])", "AI"),  # of the official system prompt
]
_PUNCTUATION = [('[!?,;="\u201c\u201d()\u2026]', ""), ("\\.(?!\\d)", ""), ("(?<= ) +", ""), ("(?<=[a-z]) +$", "")]


def normalizer() -> dict[str, Any]:
    """The normaliser of tokenizer.json: lower case, contractions, signs and numbers as words, no punctuation, so that
    "What's 7 + 5?" is read as "what is seven plus five". The token names and the Chinese prompts are left alone."""
    numbers = [(f"(?<![\\d.,])0?{n}(?!\\d|[.,]\\d)", domain.number(n)) for n in range(100)]
    rules = [*_SPELLINGS, *numbers, *_PUNCTUATION]
    replaced = [{"type": "Replace", "pattern": {"Regex": old}, "content": new} for old, new in rules]
    return {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}, *replaced]}


def _added(first: int) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": first + i, "content": name, **flags, "special": name not in NOT_SPECIAL} for i, name in enumerate(ADDED)
    ]


def write_tokenizer(folder: Path) -> int:
    """Write every tokenizer file of the official layout; returns the number of ordinary tokens."""
    first = read_json_object(folder / "config.json")["vocab_size"] - len(ADDED)
    alphabet = byte_alphabet()
    merges = kept_merges() or learn_merges(first - len(alphabet))
    tokens = alphabet + [a + b for a, b in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(tokens) != first:
        raise ValueError(
            f"the domain gives {len(tokens)} ordinary tokens; set vocab_size to {len(tokens) + len(ADDED)}"
        )
    added = _added(first)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer(),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": model | {"vocab": vocabulary, "merges": [list(pair) for pair in merges]},
    }
    specials = [t["content"] for t in added[1:] if t["special"]]
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": specials,
        "bos_token": None,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": 2048,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "vocab.json", vocabulary)
    _write(folder / "added_tokens.json", {t["content"]: t["id"] for t in added})
    _write(
        folder / "special_tokens_map.json", {"additional_special_tokens": specials, "eos_token": EOS, "pad_token": EOS}
    )
    _write(folder / "generation_config.json", generation_config(first, first + ADDED.index(NOISE_MARKER)))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return len(tokens)


def generation_config(end: int, noise_marker: int) -> dict[str, Any]:
    """The likeliest token always: a closed world has one right answer. Codebooks this small need their codes again and
    again, so a penalty for repeating them, as the official demo has, would spoil the sound."""
    words = {step: {"greedy": True} for step in ("text", "first_text", "later_text", "transcribe")}
    audio = {"temperature": 0.5, "top_k": 5, "top_p": 0.85}
    own = {"not_addressed_token_id": noise_marker, "sampling": {**words, "audio": audio}}
    return {"bos_token_id": end, "eos_token_id": end, "max_new_tokens": 256, "edgeomni": own}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(f"{write_tokenizer(FOLDER)} ordinary tokens")
