"""`edgeomni list`: which bundles it finds, what it says of them, and what it does about those that are not whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.quantize import quantize
from quant.scheme import read_recipe
from runtime import packed
from runtime.bundle import MANIFEST
from runtime.session import Options
from tests import tiny_llama
from tests.command_line import Done, run

Run = Callable[..., Done]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def edgeomni(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def bundles(edgeomni: Run, *folders: object) -> dict[str, dict[str, object]]:
    done = edgeomni("list", "--json", *folders)
    assert done.code == 0, done
    found = {bundle["path"]: bundle for bundle in json.loads(done.out)["bundles"]}
    assert ("nano" in found) == (not folders)
    return {path: bundle for path, bundle in found.items() if path != "nano"}


def a_bundle(at: Path) -> Path:
    return shutil.copytree(tiny_llama.bundle(), at)


def test_bundles_here_and_two_folders_down_are_listed_with_what_they_hold(edgeomni: Run, here: Path) -> None:
    a_bundle(here / "plain")
    quantize(here / "plain", here / "models" / "small", read_recipe("int8"))
    for unseen in (".hidden/bundle", "a/b/too/deep", "plain/within"):
        a_bundle(here / unseen)
    (here / "link").symlink_to(here / "plain", target_is_directory=True)
    (here / "other").mkdir()
    (here / "other" / MANIFEST).write_text('{"name": "a web app"}')
    os.mkfifo(here / "a" / MANIFEST)
    found = bundles(edgeomni)
    assert set(found) == {"plain", "models/small"}
    plain, small = found["plain"], found["models/small"]
    assert (plain["family"], plain["precision"], plain["profile"], plain["problem"]) == ("llama", "fp32", "cpu", None)
    assert str(small["precision"]).startswith("int8, ") and str(small["precision"]).endswith(" bits a weight")
    files = [path for path in (here / "plain").iterdir() if path.is_file() and path.name != MANIFEST]
    assert plain["nbytes"] == sum(path.stat().st_size for path in files)
    shown = edgeomni("list").out
    assert "models/small" in shown and "fp32" in shown and "Next: edgeomni chat" in shown


def test_named_folders_are_looked_into_and_no_others(edgeomni: Run, here: Path, tmp_path: Path) -> None:
    a_bundle(here / "here")
    one, other = a_bundle(tmp_path / "one"), a_bundle(tmp_path / "several" / "other")
    assert set(bundles(edgeomni, one, tmp_path / "several")) == {str(one), str(other)}
    assert set(bundles(edgeomni, one, one)) == {str(one)}


def test_a_bundle_that_was_opened_before_is_found_wherever_it_lies(edgeomni: Run, here: Path, tmp_path: Path) -> None:
    bundle = a_bundle(tmp_path / "far" / "away" / "from" / "here")
    tiny_llama.logits(bundle, [72], Options(prepack_cache=tmp_path / "xdg" / "edgeomni"))
    assert set(bundles(edgeomni)) == {str(bundle)}
    for note in (tmp_path / "xdg").rglob(packed.NOTE):
        note.write_text("damaged")
    assert bundles(edgeomni) == {}
    shutil.rmtree(bundle)
    assert bundles(edgeomni) == {}


def test_a_bundle_that_cannot_be_used_is_listed_with_the_reason(edgeomni: Run, here: Path) -> None:
    a_bundle(here / "newer")
    manifest = json.loads((here / "newer" / MANIFEST).read_text())
    (here / "newer" / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 99}))
    (a_bundle(here / "cut") / "decoder.data").unlink()
    found = bundles(edgeomni)
    assert "schema version 99" in str(found["newer"]["problem"])
    assert found["cut"]["problem"] == "not whole: decoder.data missing"
    assert "not whole" in edgeomni("list").out


def test_where_there_is_none_the_next_step_is_named(edgeomni: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = edgeomni("list", here)
    assert done.code == 0 and "There is no bundle in" in done.out and "edgeomni export CHECKPOINT -o BUNDLE" in done.out
    assert "Next: edgeomni chat nano" in edgeomni("list").out
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "relative")
    assert edgeomni("list").code == 0


def test_a_folder_that_is_not_there_is_one_message(edgeomni: Run, here: Path) -> None:
    assert "nowhere is no folder" in edgeomni("list", "nowhere").one_message()
