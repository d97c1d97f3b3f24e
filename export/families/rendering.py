"""Renders a checkpoint's chat template as transformers does, in a process whose time and memory are bounded."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from export.families.template_process import DATE, DATE_END
from runtime.errors import CheckpointError

__all__ = ["DATE", "DATE_END", "ChatTemplate", "Message"]

Message = Mapping[str, str]  # role and content
SECONDS = 10.0  # for one conversation of a few words, on however slow a machine
WORKER = Path(__file__).with_name("template_process.py")


class ChatTemplate:
    """A Jinja template and the names of special tokens that it may use."""

    def __init__(self, source: str, tokens: Mapping[str, str]):
        """`tokens` are bos_token and such, those that the tokenizer has. CheckpointError for what is no template."""
        self.source, self.tokens = source, tokens
        _ask(source, None, "is no Jinja template")

    def render(self, messages: Sequence[Message], to_answer: bool = True) -> str:
        """The prompt of a conversation; `to_answer`: up to where the answer begins.

        A date stands in it as its strftime format between DATE and DATE_END. CheckpointError where the template
        refuses the conversation, fails, or does not come to an end.
        """
        given = {**self.tokens, "messages": list(map(dict, messages)), "tools": None, "documents": None}
        return _ask(self.source, given | {"add_generation_prompt": to_answer}, "cannot be rendered")


class _Worker:
    """The process that renders: started at the first template, and again after one that had to be stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, str]:
        """What the process answers, or an error of its own where it did not come to that."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            watch, begun = threading.Timer(SECONDS, process.kill), time.monotonic()
            watch.start()
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
            watch.cancel()
            if line:
                return json.loads(line)
            with suppress(BrokenPipeError):  # of what it had not read yet
                process.communicate()
            late = time.monotonic() - begun >= SECONDS
            return {"error": f"it did not end within {SECONDS:g} s" if late else "it ended its process"}

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            command, pipe = [sys.executable, "-P", str(WORKER)], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        return self._process


_WORKER = _Worker()


def _ask(source: str, given: Mapping[str, Any] | None, problem: str) -> str:
    found = _WORKER.answer({"source": source, "given": given})
    if "error" in found:
        raise CheckpointError(f"the checkpoint's chat template {problem}: {found['error']}")
    return found["text"]
