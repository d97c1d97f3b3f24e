"""A tokenizer of SentencePiece's kind as Llama 2, TinyLlama and Mistral ship one, with a vocabulary of a few pieces."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

BLANK = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = BLANK + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]/<>|:.,?!é"
MERGES = [
    (BLANK, "t"),
    ("h", "e"),
    (BLANK + "t", "he"),
    (BLANK, BLANK),
    ("I", "N"),
    ("S", "T"),
    ("IN", "ST"),
    ("e", "r"),
]


def tokenizer_json(metaspace: str | None = None) -> str:
    """tokenizer.json as transformers writes it; `metaspace`: with the prepend scheme of newer files."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *("".join(pair) for pair in MERGES)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, replace]}
    cut = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": metaspace, "split": False}
    back = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    ids = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    exact = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": content} | exact for i, content in enumerate(SPECIAL)],
        "normalizer": None if metaspace else prepend,
        "pre_tokenizer": cut if metaspace else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": ids,
        },
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in MERGES],
        },
    }
    return Tokenizer.from_str(json.dumps(document)).to_str()


def save(folder: Path, metaspace: str | None = None) -> Path:
    """Write tokenizer.json into the folder; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(metaspace), encoding="utf-8")
    return folder / "tokenizer.json"
