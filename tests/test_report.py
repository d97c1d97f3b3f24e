"""The report's page stands alone and is well formed, escapes what it quotes, and plots what was measured."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from typer.testing import CliRunner

from apps.cli import app
from apps.report import beside, findings, plots, report
from quant.answer import Answer
from quant.comparison.compare import Comparison
from quant.comparison.pareto import Tried, beaten_by, front
from quant.comparison.verdict import verdict
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
    kinds = [address.split(",")[0] for address in tags.addresses if not address.startswith("#")]
    assert set(kinds) == {"data:audio/wav;base64", "data:image/png;base64"}
    assert not re.search(r"https?://|@import|url\(|<script", page)
    assert kinds.count("data:audio/wav;base64") == kinds.count("data:image/png;base64") == len(sounds) > 0
    assert tags.seen.count("svg") >= 3


def test_every_section_can_be_reached_from_the_first_lines_and_every_figure_says_what_it_stands_on() -> None:
    found = compared()
    page = report.page(found)
    linked = [address.removeprefix("#") for address in parsed(page).addresses if address.startswith("#")]
    sections = re.findall(r'<section id="([^"]+)"', page)
    assert sections[0] == linked[0] == "verdict" and sections[1:] == linked[1:]
    stamp = f"reference {found.reference.manifest_sha256[:12]}, candidate {found.candidate.manifest_sha256[:12]}"
    assert page.count("<figure>") == page.count("<figcaption>") == page.count(stamp) >= 6
    for heading in ("Error by layer", "Which weights lose it", "What to change in the recipe"):
        assert heading in page


def test_the_page_tells_of_layers_groups_and_lines_of_the_recipe_as_markdown_and_json_do() -> None:
    found = compared()
    assert found.within is not None and found.advice
    record, told = json.loads(findings.as_json(found)), findings.markdown(found)
    assert len(record["layers"]) == len(found.layers) and len(record["within"]["losses"]) == len(found.within.losses)
    assert record["advice"][0]["lines"] == list(found.advice[0].lines)
    for text in (told, parsed(report.page(found)).text):
        assert found.governing[0].text in text and found.advice[0].lines[0] in text
    assert "worst layer of decoder" in told


def tried(name: str, nbytes: int, kl: float, folder: str = "x") -> Tried:
    return Tried(name, folder, nbytes, 4.0, kl, 0.9, None, None)


def test_a_recipe_that_another_beats_in_bytes_and_divergence_is_off_the_front() -> None:
    every = [
        tried("a", 10, 1.0),
        tried("b", 20, 0.1),
        tried("c", 30, 0.2),
        tried("d", 40, 0.01),
        tried("broken", 40, math.nan),
    ]
    assert [one.name for one in front(every)] == ["a", "b", "d", "broken"]
    better = beaten_by(every[2], every)
    assert better is not None and better.name == "b"
    assert beaten_by(tried("twin", 10, 1.0), every) is None  # as good as another is not worse


def of_known_turns() -> Comparison:
    return replace(compared(), machine=replace(compared().machine, turns_sha256="a" * 64))


def test_earlier_reports_stand_beside_a_comparison_of_the_same_turns(tmp_path: Path) -> None:
    found = of_known_turns()
    (tmp_path / "report.json").write_text(findings.as_json(found))
    reports = beside.read_reports([tmp_path])
    beside.refuse_unlike(reports, found.reference, found.machine.turns_sha256, found.limits, False)
    ours, earlier = beside.beside(found, reports)
    assert replace(earlier, folder="") == ours
    text = parsed(report.page(replace(found, tried=(ours, earlier)))).text
    assert "Recipes that were tried" in text and "int4-rtn (this)" in text


def test_reports_of_other_turns_references_and_limits_are_refused_all_at_once(tmp_path: Path) -> None:
    found = of_known_turns()
    (tmp_path / "report.json").write_text(findings.as_json(found))
    reports = beside.read_reports([tmp_path])
    other, limits = replace(found.reference, manifest_sha256="0" * 64), replace(found.limits, max_new=7)
    with pytest.raises(EdgeOmniError, match=r"its reference was another, .* its turns were others, .*'max_new': 7"):
        beside.refuse_unlike(reports, other, "1" * 64, limits, False)
    with pytest.raises(EdgeOmniError, match="held against a stored reference"):
        beside.refuse_unlike(reports, found.reference, found.machine.turns_sha256, found.limits, True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text('{"figures": []}')
    with pytest.raises(EdgeOmniError, match=r"(?s)broken: no report of this version.*none: no report"):
        beside.read_reports([tmp_path / "broken", tmp_path / "none", tmp_path])


def test_a_plot_of_points_has_a_logarithmic_axis_joins_the_front_and_leaves_out_what_is_not_finite() -> None:
    points = [plots.Point("a", 1.0, 0.001, joined=True), plots.Point("b", 2.0, 1.0, joined=True)]
    points += [plots.Point("c", 3.0, math.inf), plots.Point("<d", 2.0, 0.5, hollow=True, start=(1.0, 1.0))]
    drawn = plots.scatter_plot(points, "MB", "KL", str)
    parsed(drawn)
    assert drawn.count("<circle") == 3 and 'class="front"' in drawn and 'class="way"' in drawn and "&lt;d" in drawn
    assert all(f">{tick}<" in drawn for tick in ("0.001", "0.01", "0.1", "1"))
    assert "inf" not in drawn and "nan" not in drawn


def test_names_of_points_that_lie_close_do_not_cover_each_other_and_an_axis_may_begin_above_zero() -> None:
    drawn = plots.scatter_plot([plots.Point(name, 100.0, 1.0) for name in "abc"], "MB", "KL", str)
    heights = sorted(float(y) for y in re.findall(r'<text class="name" x="[^"]+" y="([^"]+)"', drawn))
    assert len(heights) == 3 and min(b - a for a, b in pairwise(heights)) >= plots.NAME_HEIGHT
    assert plots.around([91.0, 153.0]) == (75.0, 175.0)
    assert plots.around([10.0, 153.0]) == (0.0, 200.0)
    assert plots.around([]) == (0.0, 1.0)


def test_the_text_behind_the_longest_bar_stays_inside_the_picture() -> None:
    text = "0.000237 / 0.00024 ± 5e-05"
    drawn = plots.bar_plot([plots.Bar("a", 1.0, text), plots.Bar("b", 0.5, "short")], "KL")
    start = float(drawn.split('class="value" x="')[1].split('"')[0])
    assert start + 6.7 * len(text) < plots.WIDTH


def test_a_curve_below_zero_is_drawn_from_its_lowest_value() -> None:
    y = plots.Scale(-10, 10, 100, 0)
    assert (y.at(-10), y.at(0), y.at(10)) == (100, 50, 0)
    assert ">-5<" in plots.line_plot([plots.Line("a", [-4.0, 4.0])], "x", "y")


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
    assert report.differing("it is a type", "it refers") == ("it <del>is a type</del>", "it <ins>refers</ins>")
    assert report.differing("你好世界", "你好地球") == ("你好<del>世界</del>", "你好<ins>地球</ins>")


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


def test_a_second_recipe_is_set_beside_the_first_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "turns.jsonl").write_text('{"text": "Hello"}\n')
    common = ["--turns", str(tmp_path / "turns.jsonl"), "--max-new", "3", "--no-cache", "--threads", "1"]
    for candidate, out, more in (
        (small_bundle().folder, "first", []),
        (omni_bundle(), "second", ["--beside", str(tmp_path / "first")]),
    ):
        compare = ["compare", str(omni_bundle()), str(candidate), "--report", str(tmp_path / out), "--swap-turns", "0"]
        done = CliRunner().invoke(app, [*compare, *common, *more])
        assert done.exit_code == 0, done.output
    tried = json.loads((tmp_path / "second" / "report.json").read_text())["tried"]
    assert [(one["name"], one["beaten_by"]) for one in tried] == [("float", ""), ("int4-rtn", "")]
    refused = CliRunner().invoke(app, [*compare, *common[2:], "--beside", str(tmp_path / "first")]).exception
    assert isinstance(refused, EdgeOmniError) and "its turns were others" in str(refused)


def test_a_recipe_that_another_beats_is_told_so_in_the_verdict() -> None:
    found = compared()
    ours = beside.tried(found)
    better = replace(ours, name="better", folder="elsewhere", weight_bytes=ours.weight_bytes - 1)
    assert any("better (elsewhere) weighs no more" in said for said in verdict(replace(found, tried=(ours, better))))
    assert not any("weighs no more" in said for said in verdict(replace(found, tried=(better, ours))))


def test_a_record_takes_the_place_of_the_reference(tmp_path: Path) -> None:
    (tmp_path / "turns.jsonl").write_text('{"text": "Hello"}\n')
    common = ["--max-new", "3", "--no-cache", "--threads", "1"]
    record = ["record", str(omni_bundle()), "-o", str(tmp_path / "ref"), "--turns", str(tmp_path / "turns.jsonl")]
    assert CliRunner().invoke(app, [*record, *common]).exit_code == 0
    compare = ["compare", str(tmp_path / "ref"), str(small_bundle().folder), "--report", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*compare, "--json", "--no-cache", "--threads", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["reference"]["stored"] is True
    assert found["recogniser"] is None  # nobody need listen to random weights
    refused = CliRunner().invoke(app, [*compare, "--turns", str(tmp_path / "turns.jsonl")])
    assert "brings its own turns" in str(refused.exception)


def test_records_of_other_turns_cannot_stand_beside_each_other(tmp_path: Path) -> None:
    common = ["--max-new", "3", "--no-cache", "--threads", "1"]
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
        turns = ["--turns", str(tmp_path / f"{name}.jsonl")]
        done = CliRunner().invoke(app, ["record", str(omni_bundle()), "-o", str(tmp_path / name), *turns, *common])
        assert done.exit_code == 0, done.output
    sides = [str(small_bundle().folder), "--swap-turns", "0", "--threads", "1", "--no-cache"]
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "first"), *sides, "--report", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    again = ["compare", str(tmp_path / "second"), *sides, "--report", str(tmp_path / "again")]
    assert "its turns were others" in str(
        CliRunner().invoke(app, [*again, "--beside", str(tmp_path / "out")]).exception
    )


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


def test_no_report_is_written_into_a_bundle() -> None:
    with pytest.raises(EdgeOmniError, match="is a bundle; name another folder for the report"):
        report.prepare(omni_bundle())


def test_a_folder_that_takes_no_files_is_found_before_anything_is_measured() -> None:
    with pytest.raises(EdgeOmniError, match="the report cannot be written to /proc"):
        report.prepare(Path("/proc/self"))
