"""A checkpoint's tokenizer as one tokenizer.json, from the files of a Hugging Face folder or from GGUF metadata.

Only byte-level BPE (GPT-2, Radford et al. 2019) is written; families differ in how a text is cut before merging.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from tokenizers import AddedToken as Added
from tokenizers import Tokenizer

from export.files import read_json_object, read_text
from export.problems import listed, refuse
from runtime.bundle import pieces_of
from runtime.errors import BundleError, CheckpointError


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is normalised and cut into the pieces inside which merges happen."""

    steps: tuple[dict[str, Any], ...]  # as tokenizer.json spells them
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is in the vocabulary as a whole is taken whole


@dataclass(frozen=True)
class AddedToken:
    id: int
    content: str
    special: bool  # hidden when a text is decoded for people


Name = Annotated[str, BeforeValidator(lambda value: value.get("content") if isinstance(value, dict) else value)]


@dataclass(frozen=True)
class StatedToken:
    content: str
    special: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """What tokenizer_config.json and special_tokens_map.json say of added tokens, spelled as there."""

    tokenizer_class: str = "Qwen2Tokenizer"
    added_tokens_decoder: dict[int, StatedToken] = field(default_factory=dict)
    additional_special_tokens: tuple[Name, ...] = ()
    bos_token: Name | None = None
    eos_token: Name | None = None
    pad_token: Name | None = None
    unk_token: Name | None = None

    @property
    def special(self) -> set[str]:
        named = {self.bos_token, self.eos_token, self.pad_token, self.unk_token, *self.additional_special_tokens}
        return {name for name in named if name is not None}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _qwen_like(digits: str) -> str:
    """Contractions; a word with at most one sign before it; digits; signs; line ends; blanks (GPT-4's pattern)."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    return words + f"|{digits}" + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


GPT2 = PreTokenizer((_byte_level(use_regex=True),))
QWEN2 = PreTokenizer((_split(_qwen_like(r"\p{N}")), _byte_level(use_regex=False)), nfc=True)
LLAMA3 = PreTokenizer((_split(_qwen_like(r"\p{N}{1,3}")), _byte_level(use_regex=False)), ignore_merges=True)
SMOLLM = PreTokenizer(({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)))

MODEL, PRE, TOKENS, MERGES, TYPES = (f"tokenizer.ggml.{k}" for k in ("model", "pre", "tokens", "merges", "token_type"))

# Values of tokenizer.ggml.pre, named by llama.cpp (convert_hf_to_gguf.py). Files that say "default" were converted
# by a version that did not look; GPT-2's cut is then what the checkpoint is taken to have.
GGUF_PRE = {"gpt-2": GPT2, "default": GPT2, "qwen2": QWEN2, "llama-bpe": LLAMA3, "smollm": SMOLLM}

# Values of tokenizer.ggml.token_type (llama.cpp, enum llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def tokenizer_json(folder: Path) -> str:
    """The folder's tokenizer.json; where it has none, one of the Qwen2 kind made from its older files.

    Those are vocab.json and merges.txt, and for the added tokens added_tokens.json, tokenizer_config.json and
    special_tokens_map.json, as far as they exist. Raises CheckpointError for files that are missing, broken,
    contradictory or of another kind of tokenizer.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        return _with_named(_checked(read_text(path), str(path)), folder)
    config = _read(folder / "tokenizer_config.json", TypeAdapter(TokenizerConfig), TokenizerConfig())
    if config.tokenizer_class not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and from the older files only a Qwen2Tokenizer can be built, "
            f"not a {config.tokenizer_class}; save the tokenizer with transformers, which writes tokenizer.json"
        )
    vocab = _read(folder / "vocab.json", TypeAdapter(dict[str, int]))
    lines = read_text(folder / "merges.txt").split("\n")
    merges = _merges_of(lines[1:] if lines[0].startswith("#version") else lines, str(folder))
    return _document(vocab, merges, _added_tokens_of(folder, config), QWEN2, str(folder))


def tokenizer_json_from_gguf(metadata: Mapping[str, Any]) -> str:
    """tokenizer.json of a GGUF file with tokenizer.ggml.model "gpt2".

    `metadata` maps keys to values as the file holds them: tokenizer.ggml.pre, .tokens, .merges (strings) and
    .token_type (integers). Tokens of type unused stay unknown. Raises CheckpointError with everything that is
    missing, inconsistent or of an unknown kind.
    """
    subject = "the tokenizer in the GGUF metadata"
    refuse(subject, list(_gguf_problems(metadata)))
    typed = list(enumerate(zip(metadata[TOKENS], np.asarray(metadata[TYPES]).tolist(), strict=True)))
    vocab = {token: i for i, (token, kind) in typed if kind in (NORMAL, BYTE)}
    added = [
        AddedToken(i, token, special=kind != USER_DEFINED)
        for i, (token, kind) in typed
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return _document(vocab, _merges_of(metadata[MERGES], subject), added, GGUF_PRE[metadata[PRE]], subject)


@lru_cache(maxsize=2)  # a large one takes most of a second
def opened(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, for all who read it and change nothing."""
    return Tokenizer.from_str(text)


def known_tokens(text: str) -> int:
    """One more than the highest id in a tokenizer.json: ids from there on have no text."""
    return 1 + max(opened(text).get_vocab().values())


def _gguf_problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    for key, known in ((MODEL, ["gpt2"]), (PRE, list(GGUF_PRE))):
        found = metadata.get(key)
        if not isinstance(found, str) or found not in known:
            yield f"{key} is {found!r}, expected {' or '.join(map(repr, known))}"
    strings = [key for key in (TOKENS, MERGES) if not _is_strings(metadata.get(key))]
    if strings:
        yield f"{' and '.join(strings)} missing or no array of strings"
    types = np.asarray(metadata.get(TYPES))
    if types.ndim != 1 or types.dtype.kind not in "iu":
        yield f"{TYPES} missing or no array of integers"
    elif TOKENS not in strings:
        yield from _token_problems(metadata[TOKENS], types)


def _token_problems(tokens: Sequence[str], types: np.ndarray) -> Iterator[str]:
    if len(tokens) != len(types):
        yield f"{len(tokens)} tokens but {len(types)} token types"
    if len(set(tokens)) != len(tokens):
        yield f"{len(tokens) - len(set(tokens))} of the {len(tokens)} tokens occur more than once"
    strange = sorted(set(types.tolist()) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE})
    if strange:
        yield f"unknown token types {strange}"


def _is_strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _merges_of(lines: Iterable[str], subject: str) -> list[list[str]]:
    """Pairs to merge, the most important first; blank lines, as at the end of merges.txt, count for nothing."""
    pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip()]
    refuse(subject, [f"the merge {' '.join(pair)!r} is not a pair of tokens" for pair in pairs if len(pair) != 2])
    return pairs


def _added_tokens_of(folder: Path, config: TokenizerConfig) -> list[AddedToken]:
    """Added tokens of the older files, by id; two files that give one token different ids are a CheckpointError."""
    special = config.special
    special |= _read(folder / "special_tokens_map.json", TypeAdapter(TokenizerConfig), TokenizerConfig()).special
    older = _read(folder / "added_tokens.json", TypeAdapter(dict[str, int]), {})
    added = {content: AddedToken(i, content, content in special) for content, i in older.items()}
    problems = []
    for i, token in config.added_tokens_decoder.items():
        if older.get(token.content, i) != i:
            problems.append(
                f"{token.content!r} is {i} in tokenizer_config.json, {older[token.content]} in added_tokens.json"
            )
        added[token.content] = AddedToken(i, token.content, token.special)
    refuse(folder, problems)
    return sorted(added.values(), key=lambda token: token.id)


def _document(
    vocab: Mapping[str, int],
    merges: list[list[str]],
    added: Sequence[AddedToken],
    pre_tokenizer: PreTokenizer,
    subject: str,
) -> str:
    # Added tokens stand in the vocabulary too: that is what fixes their ids, also when these leave gaps.
    ids = dict(vocab) | {token.content: token.id for token in added}
    refuse(subject, [f"two tokens have the id {i}" for i, times in Counter(ids.values()).items() if times > 1])
    exact = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": t.id, "content": t.content, "special": t.special} | exact for t in added],
        "normalizer": {"type": "NFC"} if pre_tokenizer.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre_tokenizer.steps)},
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": pre_tokenizer.ignore_merges},
    }
    return _checked(json.dumps(document, ensure_ascii=False), subject)


def _checked(text: str, subject: str) -> str:
    """The text of a tokenizer.json, once it has been seen to load with every token at the id it gives."""
    try:
        tokenizer = opened(text)
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{subject}: the tokenizer cannot be built: {error}") from None
    document = json.loads(text)
    try:
        pieces_of(document, subject)
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    stated = {token["content"]: token["id"] for token in document.get("added_tokens", [])}
    moved = [content for content, i in stated.items() if tokenizer.token_to_id(content) != i]
    refuse(subject, [f"added tokens would not get their ids: {listed(moved)}"] if moved else [])
    return text


def _with_named(text: str, folder: Path) -> str:
    """A tokenizer.json whose special tokens are also those that the older files name, as transformers has it.

    A token of the vocabulary that only they call special would be torn into pieces where a template spells it.
    """
    named: dict[str, None] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        stated = read_json_object(folder / name) if (folder / name).exists() else {}
        more = stated.get("additional_special_tokens") or stated.get("extra_special_tokens")
        tokens = [stated.get(f"{role}_token") for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
        tokens += more if isinstance(more, list) else list(more.values()) if isinstance(more, dict) else []
        found = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        named |= dict.fromkeys(token for token in found if isinstance(token, str) and token)
    tokenizer = opened(text)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [token for token in named if token not in added and tokenizer.token_to_id(token) is not None]
    if not missing:
        return text
    tokenizer = Tokenizer.from_str(text)
    tokenizer.add_special_tokens([Added(token, special=True, normalized=False) for token in missing])
    return tokenizer.to_str()


T = TypeVar("T")


def _read(path: Path, adapter: TypeAdapter[T], absent: T | None = None) -> T:
    """A JSON object as a type; `absent` where there is no such file, if that is allowed."""
    if absent is not None and not path.exists():
        return absent
    try:
        return adapter.validate_python(read_json_object(path))
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise CheckpointError(f"{path} is not what a tokenizer expects: {'; '.join(found[:6])}") from None
