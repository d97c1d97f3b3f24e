"""The command line run in this process, as a person would: what it printed, and how it ended."""

import sys
from dataclasses import dataclass

import pytest

from apps import cli


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def one_message(self) -> str:
        """The single message of a mistake: exit code 2, nothing on stdout, no traceback."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("edgeomni: ") and self.err.count("edgeomni: ") == 1, self.err
        assert "Traceback" not in self.err
        return self.err


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Done:
    monkeypatch.setattr(sys, "argv", ["edgeomni", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return Done(int(left.value.code or 0), captured.out, captured.err)
