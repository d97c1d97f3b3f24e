"""Chat templates: the ids of whole conversations are those that transformers gives, or the template is refused."""

from datetime import datetime
from pathlib import Path

import pytest

from export.families import rendering
from export.families.chat_template import default_template, template_strings
from export.families.rendering import ChatTemplate
from runtime.bundle import PromptTemplate, SpecialTokens
from runtime.errors import CheckpointError, PromptError
from runtime.prompt import Prompt, PromptFormat, Text
from runtime.tokenizer import Tokenizer
from tests import chat_templates
from tests.chat_templates import CASES, CHATML, LLAMA3, TURNS, Turns

RECORDED = chat_templates.recorded()


def form(name: str, folder: Path, source: str | None = None) -> PromptFormat:
    """How a case's checkpoint spells a conversation; `source`: with another template."""
    case, text = CASES[name], chat_templates.tokenizer_json(name)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    strings = template_strings(source or case.source, case.names, text)
    return PromptFormat(Tokenizer(folder / "tokenizer.json"), strings, SpecialTokens(eos=()), (), 4)


def prompt(spelled: PromptFormat, turns: Turns, now: datetime | None = None) -> Prompt:
    system, users, answers = turns
    piece = spelled.open_conversation(system, waits=True, now=now)
    for user, answer in zip(users, answers, strict=False):
        piece = spelled.user_turn([Text(user)], spoken=False, behind=piece, waits=True)
        piece = spelled.close_assistant([Text(answer)], spoken=False, behind=piece, waits=True)
    return spelled.user_turn([Text(users[-1])], spoken=False, behind=piece)


def strings(source: str, name: str = "chatml") -> PromptTemplate:
    return template_strings(source, CASES[name].names, chat_templates.tokenizer_json(name))


@pytest.mark.parametrize("turns", range(len(TURNS)))
@pytest.mark.parametrize("name", CASES)
def test_a_conversation_has_the_ids_that_transformers_gives(tmp_path: Path, name: str, turns: int) -> None:
    expected, spelled = RECORDED[name][turns], form(name, tmp_path)
    if expected is None:
        with pytest.raises(PromptError, match="takes no system prompt"):
            prompt(spelled, TURNS[turns])
    else:
        assert prompt(spelled, TURNS[turns]).ids.tolist() == expected


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_the_recorded_ids_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    assert chat_templates.transformers_ids(name, tmp_path) == RECORDED[name]


def shown(spelled: PromptFormat, system: str | None) -> str:
    piece = spelled.open_conversation(system, waits=True)
    return spelled.tokenizer.decode(spelled.user_turn([Text("me")], False, behind=piece).ids, skip_special=False)


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "chatml"])
def test_no_system_prompt_is_none_and_not_the_end_of_one(tmp_path: Path, name: str) -> None:
    assert shown(form(name, tmp_path), "") == "<|im_start|>user\nme<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_always_writes_a_system_turn_writes_an_empty_one(tmp_path: Path) -> None:
    spelled = form("llama 3.1", tmp_path)
    assert shown(spelled, "") == shown(spelled, None)
    assert "26 Jul 2024\n\n<|eot_id|>" in shown(spelled, None)


def test_begin_of_text_comes_once_with_any_system_prompt(tmp_path: Path) -> None:
    for name in ("llama 3", "llama 3.1", "mistral", "llama 2", "alpaca"):
        spelled = form(name, tmp_path)
        begin = spelled.tokenizer.id_of(CASES[name].names["bos_token"])
        for system in (None, "", "be brief") if CASES[name].takes_system else (None, ""):
            ids = spelled.user_turn([Text("me")], False, behind=spelled.open_conversation(system, waits=True)).ids
            assert ids.tolist().count(begin) == 1 and ids[0] == begin, (name, system)


def test_the_date_is_that_of_the_conversation(tmp_path: Path) -> None:
    dated = chat_templates.LLAMA31.replace('"26 Jul 2024"', 'strftime_now("%d %b %Y")')
    spelled = form("llama 3.1", tmp_path, dated)
    expected = form("llama 3.1", tmp_path, chat_templates.LLAMA31.replace("26 Jul 2024", "05 Feb 2031"))
    for turns in TURNS:
        assert prompt(spelled, turns, datetime(2031, 2, 5)).ids.tolist() == prompt(expected, turns).ids.tolist()


@pytest.mark.parametrize("stated", [[{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}],
                                    {"rag": "x", "default": CHATML}, CHATML])  # fmt: skip
def test_of_several_templates_the_default_is_taken(stated: object) -> None:
    assert default_template(stated) == CHATML


@pytest.mark.parametrize("stated", [[{"name": "tool_use", "template": "x"}], [], {"rag": "x"}, 5, True, ["x"]])
def test_templates_without_a_default_are_refused_in_one_line(stated: object) -> None:
    with pytest.raises(CheckpointError, match=r"named 'default'|expected a Jinja template") as caught:
        default_template(stated)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_template_has_none() -> None:
    assert default_template(None) is None and default_template("") is None


REFUSED = {
    "drops and trims the reasoning of earlier answers": (
        CHATML.replace("turn.content", "turn.content.split('</think>')[-1].lstrip('\n')"),
        "writes a conversation otherwise where",
    ),
    "writes an earlier answer's turn otherwise": (
        CHATML.replace("assistant", "gpt"),
        "a conversation cannot be continued",
    ),
    "writes its texts in capitals": (CHATML.replace("turn.content", "turn.content | upper"), "changes texts"),
    "trims on the left only": (CHATML.replace("turn.content", "turn.content.lstrip()"), "blanks are around its texts"),
    "keeps the last turn alone": (
        "{{ '<|im_start|>user\n' + messages[-1]['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}",
        "each turn's text into the prompt once",
    ),
    "numbers its turns": (CHATML.replace("<|im_end|>", "{{ loop.index }}<|im_end|>"), "otherwise"),
    "writes the date into every turn": (
        CHATML.replace("<|im_end|>", "{{ strftime_now('%H:%M') }}<|im_end|>"),
        "the date",
    ),
    "reads parts of a content": (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
        "each turn's text",
    ),
    "divides by zero": ("{{ 1/0 }}", "ZeroDivisionError"),
    "calls itself without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "is no template": ("{% for %}", "no Jinja template"),
    "takes what it may not": ("{{ messages.__class__.__mro__ }}", "unsafe"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_template_that_strings_cannot_say_is_refused_by_what_it_does(what: str) -> None:
    source, message = REFUSED[what]
    with pytest.raises(CheckpointError, match=message) as caught:
        strings(source)
    assert "\n" not in str(caught.value)


def test_a_system_prompt_that_moves_with_the_last_turn_is_refused_alone(tmp_path: Path) -> None:
    moving = (
        "{{ bos_token }}{% set rules = namespace(text='') %}{% for turn in messages %}{% if turn.role == 'system' %}"
        "{% set rules.text = turn.content ~ '\n\n' %}{% elif turn.role == 'assistant' %}{{ turn.content ~ eos_token }}"
        "{% else %}[INST] {{ (rules.text if loop.last) ~ turn.content }} [/INST]{% endif %}{% endfor %}"
    )
    spelled = form("mistral", tmp_path, moving)
    assert spelled.template.system is None
    assert len(prompt(spelled, TURNS[2])) > 0
    with pytest.raises(PromptError, match="takes no system prompt"):
        spelled.open_conversation("be brief")


def test_a_token_that_counts_as_a_word_of_its_own_is_noticed() -> None:
    plain, alone = (f'"content":"<|im_end|>","single_word":{word}' for word in ("false", "true"))
    assert plain in chat_templates.tokenizer_json("chatml")
    text = chat_templates.tokenizer_json("chatml").replace(plain, alone)
    with pytest.raises(CheckpointError, match="rules that are not supported"):
        template_strings(CHATML, CASES["chatml"].names, text)


def test_only_a_template_sees_the_tokens_that_the_checkpoint_names() -> None:
    assert ChatTemplate("{{ bos_token }}|{{ eos_token }}", {"eos_token": "</s>"}).render([]) == "|</s>"


def test_the_end_of_a_turn_is_cut_off_whole() -> None:
    found = strings(LLAMA3, "llama 3")
    assert found.begin == "<|begin_of_text|>" and found.assistant[1] == "<|eot_id|>"
    assert found.user == ("<|start_header_id|>user<|end_header_id|>\n\n", "")
    assert set(found.trimmed) == {"system", "user", "assistant"}


LONG = "{% for i in range(3000) %}{% for j in range(30000) %}{% endfor %}{% endfor %}"  # some seconds


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (LONG, r"cannot be rendered: it did not end within 0\.3 s"),
        ("{{ 'a' * 2000000 }}", "cannot be rendered: it writes more than 1048576 characters"),
        ("{% set long = 'a' * 4000000000 %}", "cannot be rendered: it takes more than 1 GB of memory"),
        ("{{ 1 // 0 }}", "cannot be rendered: ZeroDivisionError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "cannot be rendered: RecursionError"),
        ("{% if %}", "is no Jinja template"),
    ],
)
def test_a_template_that_goes_too_far_is_stopped_and_the_next_one_is_rendered(monkeypatch, source: str, said: str):
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": "é"}]) == "é"
    monkeypatch.setattr(rendering, "SECONDS", 0.3 if source == LONG else 10)
    with pytest.raises(CheckpointError, match=said):
        ChatTemplate(source, {}).render([{"role": "user", "content": "hello"}])
    monkeypatch.setattr(rendering, "SECONDS", 10)
    assert ChatTemplate("{{ bos_token }}!", {"bos_token": "<s>"}).render([]) == "<s>!"
