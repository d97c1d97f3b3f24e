"""A Jinja chat template as the strings that it puts around each turn, found by rendering it with marked contents."""

from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.bundle import PromptTemplate
from runtime.errors import CheckpointError

SYSTEM, USER, ANSWER, NEXT = "\ue001", "\ue002", "\ue003", "\ue004"  # private-use marks that no template contains


def template_strings(source: str, tokens: Mapping[str, str]) -> PromptTemplate:
    """The PromptTemplate that concatenates to the same prompts as the Jinja template `source`.

    `tokens` gives `bos_token` and `eos_token` as the template may spell them. CheckpointError if the template is no
    concatenation of turns: rendered in pieces it must give what it gives rendered whole.
    """
    opening, to_answer = _cut(_render(source, tokens, [_user(USER)]), USER)
    before_system, rest = _cut(_render(source, tokens, [_system(), _user(USER)]), SYSTEM)
    system_to_user, _ = _cut(rest, USER)
    history = _render(source, tokens, [_user(USER), {"role": "assistant", "content": ANSWER}, _user(NEXT)])
    _, after_user = _cut(history, USER)
    _, after_answer = _cut(after_user, ANSWER)
    answer_to_user, to_answer_again = _cut(after_answer, NEXT)
    if to_answer != to_answer_again:
        raise CheckpointError(
            "the chat template treats its first turn otherwise than the later ones; it is not supported"
        )
    before_user = _common_end(_common_end(system_to_user, answer_to_user), opening)
    after_system = system_to_user.removesuffix(before_user)
    start = opening.removesuffix(before_user)
    has_default = bool(start) and start.startswith(before_system) and start.endswith(after_system)
    return PromptTemplate(
        system=(before_system, after_system),
        user=(before_user, ""),
        assistant=(to_answer, answer_to_user.removesuffix(before_user)),
        default_system=start.removeprefix(before_system).removesuffix(after_system) if has_default else None,
        begin="" if has_default else start,
    )


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _system() -> dict[str, str]:
    return {"role": "system", "content": SYSTEM}


def _render(source: str, tokens: Mapping[str, str], messages: list[dict[str, str]]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    context: dict[str, Any] = {**tokens, "messages": messages, "add_generation_prompt": True}
    try:
        return environment.from_string(source).render(context)
    except TemplateError as error:
        raise CheckpointError(f"the checkpoint's chat template cannot be rendered: {error}") from None


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise CheckpointError(
            "the chat template does not put each turn's text into the prompt once; it is not supported"
        )
    return before, after


def _common_end(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return a[len(a) - length :]
