"""The report's page stands alone and is well formed, escapes what it quotes, and plots what was measured."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from typer.testing import CliRunner

from apps import findings, plots, report
from apps.cli import app
from quant.observe import Answer
from quant.turn import Turn
from runtime.errors import EdgeOmniError
from tests.test_compare import compared, small_bundle
from tests.tiny import omni_bundle

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Tags(HTMLParser):
    """Checks that every tag is closed in its turn, and collects addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    found = compared()
    page = report.page(found)
    tags = parsed(page)
    sounds = [answer for result in found.results for answer in (result.reference, result.candidate) if len(answer.wave)]
    kinds = [address.split(",")[0] for address in tags.addresses]
    assert set(kinds) == {"data:audio/wav;base64", "data:image/png;base64"}
    assert not re.search(r"https?://|@import|url\(|<script", page)
    assert kinds.count("data:audio/wav;base64") == kinds.count("data:image/png;base64") == len(sounds) > 0
    assert tags.seen.count("svg") >= 3


def test_the_page_says_what_was_measured_and_with_what() -> None:
    found = compared()
    text = parsed(report.page(found)).text
    for figure in found.figures:
        assert figure.name in text
    for wanted in (found.reference.manifest_sha256, found.candidate.manifest_sha256, "a CPU", "random", "seed"):
        assert wanted in text


def test_a_text_cannot_break_out_of_the_page() -> None:
    found, nothing = compared(), np.empty(0, np.float32)
    evil = '</div><script>alert("1")</script>'
    said = [replace(found.results[0], turn=Turn(evil), reference=Answer(evil, (), nothing))]
    tags = parsed(report.page(replace(found, results=tuple(said))))
    assert "script" not in tags.seen
    assert evil in tags.text


def test_what_differs_between_two_answers_is_marked() -> None:
    assert report.differing("a <b", "a c") == ("a <del>&lt;b</del>", "a <ins>c</ins>")


def test_json_has_every_figure_and_no_number_that_is_none() -> None:
    found = compared()
    assert math.inf not in [f.value for f in found.figures]
    broken = replace(found, figures=(replace(found.figures[0], value=math.nan), *found.figures[1:]))
    record = json.loads(findings.as_json(broken))
    assert record["figures"][0]["value"] is None
    assert [figure["name"] for figure in record["figures"]] == [figure.name for figure in found.figures]
    assert len(record["turns"]) == 3


def test_markdown_has_a_row_for_each_figure() -> None:
    found = compared()
    rows = findings.markdown(found).splitlines()
    for figure in found.figures:
        assert any(row.startswith(f"| {figure.name} | ") for row in rows)


def test_plots_leave_out_what_is_not_finite_and_reach_the_highest_value() -> None:
    drawn = plots.line_plot([plots.Line("a", [0.0, math.nan, 3.0])], "x", "y")
    parsed(drawn)
    assert "nan" not in drawn and ">5<" in drawn
    assert "nan" not in plots.bar_plot([plots.Bar("a", math.nan, "none"), plots.Bar("b", 2.0, "2")], "bars")
    assert [plots.nice(value) for value in (0.0, 0.03, 1.0, 2.2, 7.0)] == [1.0, 0.05, 1.0, 2.5, 10.0]


@pytest.mark.parametrize(("limit", "code"), [(1000.0, 0), (0.0, 1)])
def test_gates_decide_the_exit_code_and_three_files_are_written(tmp_path: Path, limit: float, code: int) -> None:
    (tmp_path / "turns.jsonl").write_text('{"text": "Hello"}\n')
    (tmp_path / "gates.toml").write_text(f'[max]\n"text.kl" = {limit}\n')
    arguments = ["compare", omni_bundle(), small_bundle().folder, "--report", tmp_path / "out", "--max-new", 3]
    arguments += ["--turns", tmp_path / "turns.jsonl", "--gates", tmp_path / "gates.toml", "--no-cache", "--threads", 1]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    assert ("Gate failed" in done.output) == bool(code)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "report.json"}


def test_a_record_takes_the_place_of_the_reference(tmp_path: Path) -> None:
    (tmp_path / "turns.jsonl").write_text('{"text": "Hello"}\n')
    common = ["--max-new", "3", "--no-cache", "--threads", "1"]
    record = ["record", str(omni_bundle()), "-o", str(tmp_path / "ref"), "--turns", str(tmp_path / "turns.jsonl")]
    assert CliRunner().invoke(app, [*record, *common]).exit_code == 0
    compare = ["compare", str(tmp_path / "ref"), str(small_bundle().folder), "--report", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*compare, "--json", "--no-cache", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["reference"]["stored"] is True
    refused = CliRunner().invoke(app, [*compare, "--turns", str(tmp_path / "turns.jsonl")])
    assert "brings its own turns" in str(refused.exception)


def test_what_is_wrong_with_what_was_given_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "gates.toml").write_text("[max]\nnothing = 1\n")
    (tmp_path / "file").write_text("")
    sides = ["compare", str(omni_bundle()), str(small_bundle().folder)]
    for more, wanted in (
        (["--report", str(tmp_path / "out"), "--gates", str(tmp_path / "gates.toml")], "no such figure"),
        (["--report", str(tmp_path / "file")], "the report cannot be written"),
        (["--report", str(tmp_path / "out"), "--turns", str(tmp_path / "none.jsonl")], "cannot be read"),
    ):
        error = CliRunner().invoke(app, [*sides, *more]).exception
        assert isinstance(error, EdgeOmniError)
        assert wanted in str(error)
    assert not (tmp_path / "out").exists()
