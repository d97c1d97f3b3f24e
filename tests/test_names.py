"""How bundles are named: by a path, by `nano`, or not at all where a command can do without."""

import shutil
from pathlib import Path

import pytest

from apps.names import bundle_named, with_bundle
from runtime.errors import EdgeOmniError
from tests import tiny_llama
from tests.command_line import run


def test_a_name_is_a_path_and_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert bundle_named("some/where") == Path("some/where") == bundle_named(Path("some/where"))
    assert bundle_named("~/bundle") == tmp_path / "bundle"
    assert bundle_named("~nobody-of-this-name/bundle") == Path("~nobody-of-this-name/bundle")
    (tmp_path / "~").mkdir()
    assert bundle_named("~") == Path("~")


def test_a_bundle_here_that_is_called_nano_is_meant_rather_than_the_one_that_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama.bundle(), "nano")
    assert bundle_named("nano") == Path("nano")
    assert bundle_named(Path("nano")) == Path("nano")


def test_where_the_bundle_is_left_out_nano_is_meant(tmp_path: Path) -> None:
    bundle = str(tiny_llama.bundle())
    assert with_bundle("hello.wav", None, wanted="a file") == ["nano", "hello.wav"]
    assert with_bundle(bundle, "hello.wav", wanted="a file") == [bundle, "hello.wav"]
    assert with_bundle("hello", "out.wav", None, wanted="both") == ["nano", "hello", "out.wav"]
    for given in ((None, None), (bundle, None), ("nano", None), ("hello", None, None), (bundle, "hello", None)):
        with pytest.raises(EdgeOmniError, match="an argument is missing; give the rest"):
            with_bundle(*given, wanted="the rest")


def test_a_missing_argument_is_one_message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give the name of an audio file" in run(capsys, monkeypatch, "transcribe").one_message()
    assert "a text and the name of a sound file" in run(capsys, monkeypatch, "say", "hello").one_message()
    assert "nowhere is not a bundle" in run(capsys, monkeypatch, "transcribe", "nowhere", "a.wav").one_message()


def test_without_weights_nano_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apps.embedded.CHECKPOINT", tmp_path)
    for arguments in (("inspect", "nano"), ("transcribe", "a.wav"), ("verify", "nano"), ("chat", "nano", "hello")):
        assert "no weights lie in" in run(capsys, monkeypatch, *arguments).one_message()
