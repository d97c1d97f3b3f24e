"""Chat templates as checkpoints ship them, with tokenizers of a few tokens, and the ids that transformers gives."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests import tiny_pieces

RECORDED = Path(__file__).parent / "chat_templates.json"  # written by `python -m tests.chat_templates`
# Each template writes the conversation's format that it is named after, in Jinja of our own.
CHATML = """\
{% for turn in messages %}
<|im_start|>{{ turn.role }}
{{ turn.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
LLAMA3 = r"""
{%- macro header(role) %}<|start_header_id|>{{ role }}<|end_header_id|>{{ '\n\n' }}{% endmacro %}
{% for turn in messages %}
    {{- bos_token if loop.first }}{{ header(turn.role) ~ turn.content.strip() }}<|eot_id|>
{%- endfor %}
{{ header('assistant') if add_generation_prompt }}"""
LLAMA31 = r"""
{%- macro header(role) %}<|start_header_id|>{{ role }}<|end_header_id|>{{ '\n\n' }}{% endmacro %}
{%- set led = messages[0].role == 'system' %}
{{- bos_token ~ header('system') }}Cutting Knowledge Date: December 2023
Today Date: {{ date_string | default("26 Jul 2024") ~ '\n\n' }}
{{- messages[0].content | trim if led }}<|eot_id|>
{#- What calls a tool or is its result stays out. -#}
{% for turn in messages[led | int:] if turn.role not in ('tool', 'ipython') and turn.tool_calls is not defined %}
    {{- header(turn.role) ~ turn.content | trim }}<|eot_id|>
{%- endfor %}
{{ header('assistant') if add_generation_prompt }}"""
SMOLLM2 = (
    """\
{% if messages and messages[0].role != 'system' %}
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif %}
"""
    + CHATML
)
QWEN25 = r"""
{%- macro entry(role, text) %}{{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}{% endmacro %}
{%- set led = messages[0].role == 'system' %}
{%- if tools %}
    {{- '<|im_start|>system\n' ~ tools | map('tojson') | join }}
{%- elif not led %}
    {{- entry('system', 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.') }}
{%- endif %}
{%- for turn in messages %}
    {%- if turn.role not in ('system', 'user', 'assistant') or (tools and led and loop.first) %}
        {%- continue %}
    {%- endif %}
    {{- entry(turn.role, turn.content) }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""
LLAMA2 = r"""
{%- set led = messages[0].role == 'system' %}
{%- for asked, answered in messages[led | int:] | batch(2, {}) %}
    {%- if asked.role != 'user' or answered.role == 'user' %}{{ raise_exception('no answer between') }}{% endif %}
    {%- set rules = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' if led and loop.first %}
    {{- bos_token }}[INST] {{ (rules ~ asked.content).strip() }} [/INST]
    {%- if answered.role == 'assistant' %}{{ ' ' ~ answered.content.strip() ~ ' ' ~ eos_token }}{% endif %}
{%- endfor %}"""
MISTRAL = """
{{- bos_token }}
{%- for turn in messages %}
    {%- if turn.role != loop.cycle('user', 'assistant') %}{{ raise_exception('not your turn') }}{% endif %}
    {{- '[INST] ' ~ turn.content ~ ' [/INST]' if turn.role == 'user' else turn.content ~ eos_token ~ ' ' }}
{%- endfor %}"""
ZEPHYR = """\
{% for turn in messages if turn.role in ('system', 'user', 'assistant') %}
<|{{ turn.role }}|>
{{ turn.content ~ eos_token }}
{% endfor %}
{% if messages and add_generation_prompt %}
<|assistant|>
{% endif %}
"""
PHI3 = """\
{% macro entry(turn) %}
<|{{ turn.role }}|>
{{ turn.content }}<|end|>
{% endmacro %}
{% for turn in messages %}
    {%- if turn.role == 'assistant' %}{% generation %}{{ entry(turn) }}{% endgeneration %}
    {%- elif turn.role in ('user', 'system') %}{{ entry(turn) }}{% endif %}
{% endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""
VICUNA = """
{%- set chat = namespace(opening='A chat between a user and an assistant.', turns=messages) %}
{%- if messages[0].role == 'system' %}
    {%- set chat.opening = messages[0].content %}
    {%- set chat.turns = messages[1:] %}
{%- endif %}
{{- chat.opening }}
{%- for turn in chat.turns %}
    {{- ' USER: ' ~ turn.content if turn.role == 'user' else ' ASSISTANT: ' ~ turn.content ~ '</s>' }}
{%- endfor %}
{{- ' ASSISTANT:' if add_generation_prompt }}"""
ALPACA = r"""
{%- set heading = {'user': '### Instruction:\n', 'assistant': '### Response:\n'} %}
{{- bos_token }}{{ messages[0].content ~ '\n\n' if messages[0].role == 'system' }}
{%- for turn in messages if turn.role in heading %}
    {{- heading[turn.role] ~ (turn.content | trim if turn.role == 'user' else turn.content) ~ '\n\n' }}
{%- endfor %}
{{- heading.assistant if add_generation_prompt }}"""
DEEPSEEK = r"""
{%- set rules = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}
{{- bos_token ~ rules | last }}
{%- for turn in messages if turn.content is not none %}
    {%- if turn.role == 'user' %}<｜User｜>{{ turn.content }}
    {%- elif turn.role == 'assistant' %}<｜Assistant｜>{{ turn.content.split('</think>') | last }}<｜end▁of▁sentence｜>
    {%- endif %}
{%- endfor %}
{{- '<｜Assistant｜><think>\n' if add_generation_prompt }}"""


@dataclass(frozen=True)
class Case:
    source: str
    special: tuple[str, ...]  # beside the pieces' own <unk>, <s>, </s>
    names: dict[str, str]
    pieces: bool = False
    metaspace: str | None = None
    takes_system: bool = True


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SENTENCE = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BEGIN = {"bos_token": HEADERS[0], "eos_token": HEADERS[4]}
CASES = {
    "chatml": Case(CHATML, IM, {"eos_token": IM[2]}),
    "llama 3": Case(LLAMA3, HEADERS, BEGIN),
    "llama 3.1": Case(LLAMA31, HEADERS, BEGIN),
    "smollm2": Case(SMOLLM2, IM, {"bos_token": IM[1], "eos_token": IM[2]}),
    "qwen2.5": Case(QWEN25, IM, {"eos_token": IM[2]}),
    "deepseek r1": Case(DEEPSEEK, SENTENCE, {"bos_token": SENTENCE[0], "eos_token": SENTENCE[1]}),
    "llama 2": Case(LLAMA2, (), S, pieces=True),
    "llama 2, newer file": Case(LLAMA2, (), S, pieces=True, metaspace="first"),
    "mistral": Case(MISTRAL, (), S, pieces=True, takes_system=False),
    "zephyr": Case(ZEPHYR, (), S, pieces=True),
    "zephyr, newer file": Case(ZEPHYR, (), S, pieces=True, metaspace="first"),
    "phi 3": Case(PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), S, pieces=True),
    "vicuna": Case(VICUNA, (), S, pieces=True),
    "alpaca": Case(ALPACA, (), S, pieces=True),
}
EATS_BLANKS = {"phi 3"}  # whose special tokens take the blanks behind them

Turns = tuple[str | None, tuple[str, ...], tuple[str, ...]]  # system, users, answers
TURNS: tuple[Turns, ...] = (
    (None, ("the tree",), ()),
    ("be brief\n", ("  the tree ",), ()),
    (None, ("the tree", " and\nthen ", "me?"), ("a tree", "the end.")),
    ("be brief", ("the tree", "Who", "\tme? \n"), ("a  tree \n", "yes")),
    (None, ("the tree", "Who", "me?"), ("<think>\nhm\n</think>\n\na tree", "it</think>is</think> yes\n")),
)


@cache
def tokenizer_json(name: str) -> str:
    case = CASES[name]
    if case.pieces:
        read = Tokenizer.from_str(tiny_pieces.tokenizer_json(case.metaspace))
    else:
        vocab = {letter: i for i, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ĊĊ"])}
        read = Tokenizer(models.BPE(vocab, [("h", "e"), ("Ċ", "Ċ")]))
        read.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        read.decoder = decoders.ByteLevel()
    eats = name in EATS_BLANKS
    read.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=eats) for token in case.special])
    return read.to_str()


def save(name: str, folder: Path) -> Path:
    """tokenizer.json and tokenizer_config.json, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(name), encoding="utf-8")
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CASES[name].source, **CASES[name].names}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return folder


def messages(turns: Turns) -> list[dict[str, str]]:
    system, users, answers = turns
    said = [{"role": "system", "content": system}] if system is not None else []
    for user, answer in zip(users, (*answers, None), strict=True):
        said.append({"role": "user", "content": user})
        if answer is not None:
            said.append({"role": "assistant", "content": answer})
    return said


def transformers_ids(name: str, folder: Path) -> list[list[int] | None]:
    """Ids of each conversation of TURNS; None where the template refuses a system turn."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(save(name, folder))
    asked = [turns if CASES[name].takes_system or turns[0] is None else None for turns in TURNS]
    return [
        turns and theirs.apply_chat_template(messages(turns), add_generation_prompt=True, return_dict=False)
        for turns in asked
    ]


def recorded() -> dict[str, list[Any]]:
    return json.loads(RECORDED.read_text("utf-8"))


if __name__ == "__main__":
    from tempfile import mkdtemp

    found = {name: transformers_ids(name, Path(mkdtemp())) for name in CASES}
    lines = [f"{json.dumps(name)}: {json.dumps(ids)}" for name, ids in found.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
