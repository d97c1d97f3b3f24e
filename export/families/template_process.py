"""Renders chat templates in a process of its own: one JSON request a line on its input, one JSON answer on its output.

A template is a program that somebody else wrote, and a loop in it may have no end. The sandbox keeps it from files and
attributes; what time and memory it may take, only another process can be held to. `rendering` starts it, and it ends
with its input. It is run as a file and imports nothing of ours.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 20  # characters; the conversations that are tried have a few dozen
DATE, DATE_END = "\ue005", "\ue006"  # private-use marks that no template contains, around a date's format


class Generation(Extension):
    """{% generation %} marks what the model wrote, for training; what stands in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=4)
def compiled(source: str) -> Template:
    """As transformers has it: the same extensions, functions, filters and sandbox."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _refuse, "strftime_now": _date}
    return made.from_string(source)


def answer(source: str, given: dict[str, Any] | None) -> dict[str, str]:
    """{"text": …} of the template rendered with the variables `given` (None: only compiled), or {"error": …}."""
    try:
        template = compiled(source)
        return {"text": "" if given is None else _joined(template.generate(given))}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 30} GB of memory"}
    except TemplateError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever a template divides by, indexes or calls
        return {"error": f"{type(error).__name__}: {error}"}


def _joined(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > OUTPUT:
            raise TemplateError(f"it writes more than {OUTPUT} characters for a short conversation")
    return text


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _date(form: str) -> str:
    return f"{DATE}{form}{DATE_END}"


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **choices: Any) -> str:
    """As JSON, and not as Jinja's own filter has it, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **choices)


def main() -> None:
    """Answer until the input ends."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
