"""The cache: whom each entry belongs to, what is removed and what never is, and a cache that is damaged or not ours."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from apps import cache_command, embedded
from export.convert import export
from runtime import packed, vouched
from runtime.bundle import MANIFEST
from runtime.cached import GIVEN_UP, Entry, remove
from runtime.errors import EdgeOmniError
from runtime.session import Options
from tests import tiny_llama
from tests.command_line import Done, run

Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(vouched, "_known", {})
    return tmp_path / "xdg" / "edgeomni"


@pytest.fixture
def edgeomni(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_llama.bundle(), folder)
    return folder


def use(bundle: Path, cache: Path) -> None:
    """Open every graph from packed weights."""
    tiny_llama.logits(bundle, [72, 101, 5], Options(prepack_cache=cache))


def listed(edgeomni: Run) -> list[dict[str, object]]:
    done = edgeomni("cache", "list", "--json")
    assert done.code == 0, done
    return json.loads(done.out)["entries"]


def graphs_of(entries: list[dict[str, object]], bundle: Path) -> set[object]:
    return {entry["part"] for entry in entries if entry["owner"] == str(bundle)}


def homes(cache: Path) -> set[Path]:
    return {path for path in cache.iterdir() if packed.NAME.fullmatch(path.name)}


# Whom entries belong to


def test_each_graph_of_a_bundle_that_was_opened_is_listed_with_its_size_and_when_it_was_used(
    edgeomni: Run, bundle: Path, cache: Path
) -> None:
    use(bundle, cache)
    found = listed(edgeomni)
    assert graphs_of(found, bundle) == {"embed_tokens.onnx", "decoder.onnx", "lm_head.onnx"} and len(found) == 3
    for entry in found:
        home = Path(str(entry["path"]))
        assert entry["bytes"] == sum(path.stat().st_size for path in home.iterdir()) > 0
        assert entry["unneeded"] is None and time.time() - float(str(entry["used"])) < 600
    shown = edgeomni("cache", "list").out
    assert str(bundle) in shown and "packed weights × 3" in shown and "today" in shown


def test_an_opening_is_the_last_use(bundle: Path, cache: Path) -> None:
    use(bundle, cache)
    for path in cache.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert {entry.used for entry in packed.entries(cache, ())} == {1e9}
    use(bundle, cache)
    assert all(time.time() - entry.used < 600 for entry in packed.entries(cache, ()))


def test_a_copy_of_a_bundle_shares_its_entries_and_keeps_them_when_the_first_is_gone(
    edgeomni: Run, bundle: Path, cache: Path, tmp_path: Path
) -> None:
    use(bundle, cache)
    copy = shutil.copytree(bundle, tmp_path / "copy")
    use(copy, cache)
    assert len(homes(cache)) == 3
    shutil.rmtree(bundle)
    assert edgeomni("cache", "prune").code == 0
    assert len(graphs_of(listed(edgeomni), copy)) == 3
    shutil.rmtree(copy)
    assert {entry["unneeded"] for entry in listed(edgeomni)} == {"its bundle is gone"}


def test_entries_of_an_earlier_version_get_their_note_when_they_are_used(bundle: Path, cache: Path) -> None:
    use(bundle, cache)
    for home in homes(cache):
        (home / packed.NOTE).unlink()
    assert {entry.owner for entry in packed.entries(cache, ())} == {""}
    use(bundle, cache)
    assert {entry.owner for entry in packed.entries(cache, ())} == {str(bundle)}


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"graph": 1}', b"[" * 100_000, b'{"graph":"g","manifest":"m",'
     b'"onnxruntime":"1","bundles":{"a":1}}', b'{"graph":"g","manifest":"m","onnxruntime":"1","bundles":[3]}']
)  # fmt: skip
def test_a_damaged_note_belongs_to_nobody_and_is_mended_by_the_next_use(
    damage: bytes, edgeomni: Run, bundle: Path, cache: Path
) -> None:
    use(bundle, cache)
    for home in homes(cache):
        (home / packed.NOTE).write_bytes(damage)
    assert {entry["unneeded"] for entry in listed(edgeomni)} == {"nothing says what it belongs to"}
    use(bundle, cache)
    assert {entry["unneeded"] for entry in listed(edgeomni)} == {None}


# What is removed


def test_entries_of_a_bundle_that_was_replaced_or_is_gone_are_removed_and_no_others(
    edgeomni: Run, bundle: Path, cache: Path, tmp_path: Path
) -> None:
    gone = shutil.copytree(bundle, tmp_path / "gone")
    manifest = gone / MANIFEST
    manifest.write_text(manifest.read_text() + " ")  # another one, for entries of its own
    replaced = tmp_path / "replaced"
    export(tiny_llama.save(tmp_path / "checkpoint", tiny_llama.tensors(3)), replaced)
    for folder in (bundle, gone, replaced):
        use(folder, cache)
    assert len(homes(cache)) == 9
    shutil.rmtree(gone)
    export(tiny_llama.save(tmp_path / "other", tiny_llama.tensors(4)), replaced, force=True)
    why = {(entry["owner"], entry["unneeded"]) for entry in listed(edgeomni)}
    assert why == {(str(bundle), None), (str(gone), "its bundle is gone"), (str(replaced), "its bundle was changed")}
    before = homes(cache)
    dry = edgeomni("cache", "prune", "--dry-run")
    assert "Would remove 6 entries" in dry.out and homes(cache) == before
    done = json.loads(edgeomni("cache", "prune", "--json").out)
    assert len(done["removed"]) == 6 and done["failed"] == {} and done["bytes"] > 0
    assert graphs_of(listed(edgeomni), bundle) == {"embed_tokens.onnx", "decoder.onnx", "lm_head.onnx"}
    assert len(homes(cache)) == 3
    assert "Removed 0 entries" in edgeomni("cache", "prune").out


def test_all_is_all_and_what_was_removed_is_made_again(edgeomni: Run, bundle: Path, cache: Path) -> None:
    use(bundle, cache)
    assert "Removed 3 entries" in edgeomni("cache", "prune", "--all").out
    assert not list(cache.iterdir())
    use(bundle, cache)
    assert len(homes(cache)) == 3


def test_what_was_not_used_for_long_is_removed_where_that_is_asked_for(
    edgeomni: Run, bundle: Path, cache: Path
) -> None:
    use(bundle, cache)
    old = sorted(homes(cache))[0]
    for path in (old, *old.iterdir()):
        os.utime(path, (1e9, 1e9))
    assert "Removed 0 entries" in edgeomni("cache", "prune").out
    assert "Removed 1 entry" in edgeomni("cache", "prune", "--unused", "30").out
    assert not old.exists() and len(homes(cache)) == 2


def test_weights_packed_for_an_onnx_runtime_that_is_not_installed_are_not_needed(bundle: Path, cache: Path) -> None:
    use(bundle, cache)
    assert {entry.unneeded for entry in packed.entries(cache, ["0.1"])} != {None}
    assert {entry.unneeded for entry in packed.entries(cache, ())} == {None}


def test_what_a_killed_run_left_goes_after_an_hour_and_what_is_being_written_stays(edgeomni: Run, cache: Path) -> None:
    key = "0" * 32
    names = [f"{key}.abc", ".nano-int8-0123456789abcdef.partial", "nano-int8-0123456789abcdef.gone-7", f"{key}.gone-9"]
    for name in names:
        (cache / name).mkdir(parents=True)
        (cache / name / "graph.data").write_bytes(b"half")
    (cache / vouched.NOTES).mkdir()
    (cache / vouched.NOTES / f"{key}.77").write_text("half")
    assert "Removed 0 entries" in edgeomni("cache", "prune").out
    before = time.time() - GIVEN_UP - 60
    for path in cache.rglob("*"):
        os.utime(path, (before, before))
    assert "Removed 5 entries" in edgeomni("cache", "prune").out
    assert [path.name for path in cache.rglob("*")] == [vouched.NOTES]


def test_a_bundle_of_another_version_of_the_embedded_model_goes_with_the_weights_that_were_packed_for_it(
    edgeomni: Run, bundle: Path, cache: Path
) -> None:
    cache.mkdir(parents=True)
    other = cache / f"nano-{embedded.RECIPE}-{'0' * 16}"
    bundle.rename(other)
    use(other, cache)
    why = [entry["unneeded"] for entry in listed(edgeomni) if entry["kind"] != "checksum"]
    assert sorted(map(str, why)) == [*3 * ["its bundle is gone"], "made by another version"]
    assert "Removed 4 entries" in edgeomni("cache", "prune").out
    assert [path.name for path in cache.iterdir()] == [vouched.NOTES]  # of the checkpoint that comes along


def test_what_is_remembered_of_files_that_are_gone_or_changed_goes(edgeomni: Run, cache: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("stays", "gone", "changed")]
    for file in files:
        file.write_bytes(b"content")
        os.utime(file, (1e9, 1e9))
        note = vouched._note(file)
        assert note is not None
        vouched._write(note, vouched._content(file, vouched.identity(file), vouched.sha256_of(file)))
    files[1].unlink()
    files[2].write_bytes(b"another")
    why = {entry["owner"]: entry["unneeded"] for entry in listed(edgeomni)}
    assert why == {str(files[0]): None, str(files[1]): "the file is gone", str(files[2]): "the file was changed"}
    assert edgeomni("cache", "list").out.count(str(tmp_path) + " ") == 3  # one row for each fate
    assert "Removed 2 entries" in edgeomni("cache", "prune").out
    assert [entry["owner"] for entry in listed(edgeomni)] == [str(files[0])]


# What is never removed


def test_nothing_that_is_not_ours_is_listed_or_removed(edgeomni: Run, cache: Path) -> None:
    names = ["my-bundle", "notes.txt", "a" * 31, "G" * 32, "nano", ".git", f"{vouched.NOTES}/README"]
    for name in names:
        (cache / name).mkdir(parents=True)
    assert listed(edgeomni) == []
    assert edgeomni("cache", "prune", "--all").code == 0
    assert all((cache / name).is_dir() for name in names)


def test_a_link_is_removed_as_a_link_and_what_it_leads_to_stays(
    edgeomni: Run, bundle: Path, cache: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "within").mkdir(parents=True)
    (outside / "precious").write_text("precious")
    use(bundle, cache)
    (cache / ("0" * 32)).symlink_to(outside)
    (cache / f"nano-{embedded.RECIPE}-{'0' * 16}").symlink_to(outside)
    (cache / vouched.NOTES).symlink_to(outside)
    (outside / ("0" * 32)).write_text("looks like one of ours")
    home = sorted(homes(cache) - {cache / ("0" * 32)})[0]
    (home / "within").symlink_to(outside, target_is_directory=True)
    done = edgeomni("cache", "prune", "--all")
    assert done.code == 0 and "Removed 5 entries" in done.out, done
    assert sorted(path.name for path in outside.iterdir()) == ["0" * 32, "precious", "within"]
    assert [path.name for path in cache.iterdir()] == [vouched.NOTES]


def test_a_note_is_not_written_where_a_link_leads(bundle: Path, cache: Path, tmp_path: Path) -> None:
    use(bundle, cache)
    home = sorted(homes(cache))[0]
    outside = home.rename(tmp_path / "outside")
    (outside / packed.NOTE).unlink()
    home.symlink_to(outside)
    use(bundle, cache)
    assert not (outside / packed.NOTE).exists()


@pytest.mark.parametrize("place", ["elsewhere", "xdg", "xdg/edgeomni", "xdg/edgeomni/../../elsewhere"])
def test_an_entry_that_does_not_lie_in_the_cache_is_refused(place: str, cache: Path, tmp_path: Path) -> None:
    cache.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(EdgeOmniError, match="does not lie in the cache"):
        remove(Entry(tmp_path / place, "packed weights", "", "", 0, 0.0, None), cache)
    assert (tmp_path / place).is_dir()


# A cache that is missing, elsewhere, or cannot be used


def test_a_cache_that_is_not_there_is_empty(edgeomni: Run, cache: Path) -> None:
    assert "is empty" in edgeomni("cache", "list").out
    assert "Removed 0 entries" in edgeomni("cache", "prune").out
    assert not cache.exists()


def test_a_cache_that_a_link_leads_to_is_the_cache(edgeomni: Run, bundle: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "large disk")
    use(bundle, cache)
    assert "Removed 3 entries" in edgeomni("cache", "prune", "--all").out
    assert cache.is_symlink() and not list((tmp_path / "large disk").iterdir())


def test_a_file_in_the_place_of_the_cache_is_one_message(edgeomni: Run, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("")
    for command in ("list", "prune"):
        assert "is no folder" in edgeomni("cache", command).one_message()


def test_what_cannot_be_removed_is_named_and_the_rest_is_removed(
    edgeomni: Run, bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(bundle, cache)
    kept = sorted(homes(cache))[1]
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path == kept:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    done = edgeomni("cache", "prune", "--all")
    assert done.code == 2 and "Removed 2 entries" in done.out
    assert f"1 could not be removed, {kept} for one: Permission denied" in done.err
    assert homes(cache) == {kept}


def test_each_command_of_the_cache_explains_itself(edgeomni: Run) -> None:
    assert "cache" in edgeomni("--help").out
    for command in cache_command.app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert name in edgeomni("cache", "--help").out and edgeomni("cache", name, "--help").code == 0
