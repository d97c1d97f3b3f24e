"""Renders a checkpoint's chat template as transformers does: the same extensions, functions, filters and sandbox."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import CheckpointError

Message = Mapping[str, str]  # role and content
DATE, DATE_END = "\ue005", "\ue006"  # private-use marks that no template contains, around a date's format


class Generation(Extension):
    """{% generation %} marks what the model wrote, for training; what stands in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja template and the names of special tokens that it may use."""

    def __init__(self, source: str, tokens: Mapping[str, str]):
        """`tokens` are bos_token and such, those that the tokenizer has. CheckpointError for what is no template."""
        self.tokens = tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _date}
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise CheckpointError(f"the checkpoint's chat template is no Jinja template: {error}") from None

    def render(self, messages: Sequence[Message], to_answer: bool = True) -> str:
        """The prompt of a conversation; `to_answer`: up to where the answer begins.

        A date stands in it as its strftime format between DATE and DATE_END. CheckpointError where the template
        refuses the conversation or fails.
        """
        given: dict[str, Any] = {**self.tokens, "messages": list(messages), "tools": None, "documents": None}
        try:
            return self._template.render(given, add_generation_prompt=to_answer)
        except Exception as error:  # whatever a template divides by, indexes or calls
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise CheckpointError(f"the checkpoint's chat template cannot be rendered: {kind}{error}") from None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _date(form: str) -> str:
    return f"{DATE}{form}{DATE_END}"


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **choices: Any) -> str:
    """As JSON, and not as Jinja's own filter has it, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **choices)
