"""Files that a bundle does not have to itself: clones, hard links, links into a hub's cache, and what may be opened."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from export.convert import export
from quant.cache import quantize_cache
from quant.quantize import quantize
from quant.scheme import parse_recipe, read_recipe
from runtime import shared_files, vouched
from runtime.bundle import MANIFEST, read_bundle
from runtime.errors import BundleError
from runtime.session import Options
from runtime.verify import refuse_failed, verify
from tests import tiny_llama

IDS = [72, 101, 257, 5]
SHARD = "model.safetensors"
HEAD = parse_recipe("head", '[weights]\n"lm_head.*" = { bits = 8, group_size = 32 }')


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and nothing remembered of earlier ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(vouched, "_known", {})
    return tmp_path / "xdg" / "edgeomni"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_llama.save(tmp_path / "checkpoint")


def saved_again(checkpoint: Path, seed: int = 1) -> None:
    """Other weights into the same file, as a library that opens it for writing does; its inode stays."""
    other = checkpoint / "other"
    save_file(tiny_llama.tensors(seed), other)
    content = other.read_bytes()
    other.unlink()
    with (checkpoint / SHARD).open("r+b") as file:
        file.write(content)


def one_line(folder: Path) -> str:
    with pytest.raises(BundleError) as error:
        read_bundle(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# Hard links


def test_a_bundle_is_what_it_was_when_the_checkpoint_is_saved_again_in_place(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle")
    before = tiny_llama.logits(tmp_path / "bundle", IDS)
    saved_again(checkpoint)
    np.testing.assert_array_equal(tiny_llama.logits(tmp_path / "bundle", IDS), before)
    refuse_failed(tmp_path / "bundle", verify(tmp_path / "bundle", read_bundle(tmp_path / "bundle")))


def test_a_linked_bundle_whose_checkpoint_was_saved_again_in_place_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path
) -> None:
    export(checkpoint, tmp_path / "bundle", link=True)
    read_bundle(tmp_path / "bundle")
    saved_again(checkpoint)
    assert "model.safetensors of the bundle" in one_line(tmp_path / "bundle")
    assert "has been changed since the export; export it again" in one_line(tmp_path / "bundle")


def test_one_changed_value_is_noticed_though_no_sample_holds_it(checkpoint: Path, tmp_path: Path) -> None:
    weights = tiny_llama.tensors()
    weights["model.embed_tokens.weight"] = np.zeros((1 << 15, tiny_llama.HIDDEN), np.float32)  # 4 MB
    shutil.rmtree(checkpoint)
    tiny_llama.save(checkpoint, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, vocab_size=1 << 15)
    export(checkpoint, tmp_path / "bundle", link=True)
    sample = vouched.sample_of(checkpoint / SHARD)
    with (checkpoint / SHARD).open("r+b") as file:
        file.seek(vouched.BLOCK + 100)
        file.write(b"\1")
    assert vouched.sample_of(checkpoint / SHARD) == sample
    assert "has been changed" in one_line(tmp_path / "bundle")


def test_a_change_is_noticed_though_its_time_was_put_back(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle", link=True)
    state = (checkpoint / SHARD).stat()
    saved_again(checkpoint)
    os.utime(checkpoint / SHARD, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert "has been changed" in one_line(tmp_path / "bundle")


def test_a_file_that_was_only_touched_or_copied_is_what_it_was(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle", link=True)
    (checkpoint / SHARD).touch()
    read_bundle(tmp_path / "bundle")
    shutil.copytree(tmp_path / "bundle", tmp_path / "copy")
    saved_again(checkpoint)
    read_bundle(tmp_path / "copy")
    assert "has been changed" in one_line(tmp_path / "bundle")


@pytest.mark.parametrize("content", [b"", b"short"])
def test_a_linked_file_that_was_cut_is_called_changed(checkpoint: Path, tmp_path: Path, content: bytes) -> None:
    export(checkpoint, tmp_path / "bundle", link=True)
    (checkpoint / SHARD).write_bytes(content)
    assert "has been changed" in one_line(tmp_path / "bundle")


def test_what_is_made_from_a_linked_bundle_is_its_own_or_refused_as_well(checkpoint: Path, tmp_path: Path) -> None:
    floats = tmp_path / "floats"
    export(checkpoint, floats, link=True)
    for name, link in (("copied", False), ("linked", True)):
        quantize(floats, tmp_path / name, HEAD, link=link)
        quantize_cache(floats, tmp_path / f"{name}-cache", link=link)
    before = {name: tiny_llama.logits(tmp_path / name, IDS) for name in ("copied", "copied-cache")}
    saved_again(checkpoint)
    for name, logits in before.items():
        np.testing.assert_array_equal(tiny_llama.logits(tmp_path / name, IDS), logits)
    for name in ("linked", "linked-cache"):
        assert "has been changed" in one_line(tmp_path / name)


@pytest.mark.parametrize("name", ["decoder.data", "lm_head.onnx", "tokenizer.json", MANIFEST])
def test_a_shard_that_is_called_as_a_file_of_the_bundle_is_never_written_to(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(checkpoint, folder / "rest")
    for path in (folder / "rest").iterdir():
        path.rename(folder / path.name)
    (folder / "rest").rmdir()
    (folder / "sub").mkdir()
    place = f"sub/{name}" if name == "tokenizer.json" else name
    (folder / SHARD).rename(folder / place)
    keys = '", "'.join(tiny_llama.tensors())
    index = '{"weight_map": {"' + keys.replace('", "', f'": "{place}", "') + f'": "{place}"' + "}}"
    (folder / "model.safetensors.index.json").write_text(index)
    content = (folder / place).read_bytes()
    export(folder, tmp_path / "bundle", link=True)
    export(checkpoint, tmp_path / "plain")
    assert (folder / place).read_bytes() == content
    np.testing.assert_array_equal(
        tiny_llama.logits(tmp_path / "bundle", IDS), tiny_llama.logits(tmp_path / "plain", IDS)
    )


# Clones


@pytest.fixture(scope="module")
def cloning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system that clones, where this machine can make one."""
    folder = tmp_path_factory.mktemp("cloning")
    maker = shutil.which("mkfs.btrfs") or shutil.which("mkfs.xfs")
    if maker is None or os.geteuid() != 0:
        pytest.skip("only root, with mkfs.btrfs or mkfs.xfs, can make a file system that clones")
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([maker, "-q", "-f", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True).returncode:
        pytest.skip("this machine mounts no image")
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def test_where_the_file_system_clones_a_bundle_takes_no_room_and_is_its_own(cloning: Path) -> None:
    checkpoint = tiny_llama.save(cloning / "checkpoint")
    manifest = export(checkpoint, cloning / "bundle")
    assert SHARD in {file.path for file in manifest.files}
    assert all(file.linked is None for file in manifest.files)
    assert (cloning / "bundle" / SHARD).stat().st_nlink == 1
    before = tiny_llama.logits(cloning / "bundle", IDS)
    quantize(cloning / "bundle", cloning / "small", HEAD)
    quantize_cache(cloning / "bundle", cloning / "cache")
    assert (cloning / "small" / SHARD).is_file() and (cloning / "cache" / SHARD).is_file()
    saved_again(checkpoint)
    np.testing.assert_array_equal(tiny_llama.logits(cloning / "bundle", IDS), before)
    for name in ("bundle", "small", "cache"):
        refuse_failed(cloning / name, verify(cloning / name, read_bundle(cloning / name)))


def test_a_clone_that_a_killed_run_left_is_made_anew(cloning: Path) -> None:
    (cloning / "clones").mkdir()
    (cloning / "original").write_bytes(b"weights" * 1000)
    (cloning / "clones" / "original").write_bytes(b"")
    shared = shared_files.share([cloning / "original"], cloning / "clones", False, ())
    assert shared == {cloning / "original": "original"}
    assert (cloning / "clones" / "original").read_bytes() == b"weights" * 1000


def test_what_can_be_neither_cloned_nor_linked_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    (tmp_path / "bundle").mkdir()
    for link in (False, True):
        assert shared_files.share([Path("/proc/version")], tmp_path / "bundle", link, ()) == {}
        assert shared_files.share([file], tmp_path / "bundle", link, {"weights"}) == {}
    assert not list((tmp_path / "bundle").iterdir())
    other = tmp_path / "sub" / "weights"
    other.parent.mkdir()
    other.write_bytes(b"others")
    assert shared_files.share([file, other], tmp_path / "bundle", True, ()) == {file: "weights"}


# A hub's cache


def in_a_hub(bundle: Path, hub: Path) -> Path:
    """The bundle as huggingface_hub keeps what it downloads: contents under blobs, a folder of links to them."""
    snapshot, blobs = hub / "models--me--tiny" / "snapshots" / "5f1d", hub / "models--me--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in bundle.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blobs / name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", name))
    return snapshot


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return in_a_hub(tiny_llama.bundle(), tmp_path / "hub")


def test_a_bundle_in_a_hubs_cache_is_whole_and_answers(snapshot: Path, tmp_path: Path) -> None:
    refuse_failed(snapshot, verify(snapshot, read_bundle(snapshot)))
    plain = tiny_llama.logits(tiny_llama.bundle(), IDS)
    np.testing.assert_array_equal(tiny_llama.logits(snapshot, IDS), plain)
    for _ in range(2):
        packed = tiny_llama.logits(snapshot, IDS, Options(prepack_cache=tmp_path / "packed"))
        np.testing.assert_allclose(packed, plain, rtol=1e-5)


@pytest.mark.parametrize("link", [False, True])
def test_a_bundle_in_a_hubs_cache_can_be_made_smaller(snapshot: Path, tmp_path: Path, link: bool) -> None:
    quantize(snapshot, tmp_path / "small", read_recipe("int8"), link=link)
    quantize(tiny_llama.bundle(), tmp_path / "expected", read_recipe("int8"))
    expected = tiny_llama.logits(tmp_path / "expected", IDS)
    np.testing.assert_array_equal(tiny_llama.logits(tmp_path / "small", IDS), expected)
    quantize_cache(snapshot, tmp_path / "cache", link=link)
    refuse_failed(tmp_path / "cache", verify(tmp_path / "cache", read_bundle(tmp_path / "cache")))


def test_weights_alone_may_lie_elsewhere_if_their_checksum_says_so(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export(tiny_llama.save(tmp_path / "checkpoint"), bundle)
    before = tiny_llama.logits(bundle, IDS)
    (bundle / "decoder.data").rename(tmp_path / "on another disk")
    (bundle / "decoder.data").symlink_to(tmp_path / "on another disk")
    np.testing.assert_array_equal(tiny_llama.logits(bundle, IDS), before)
    refuse_failed(bundle, verify(bundle, read_bundle(bundle)))


def test_a_blob_with_other_content_is_refused_whatever_its_name_says(snapshot: Path) -> None:
    blob = (snapshot / "decoder.onnx").resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.onnx: leads outside the bundle, to \S+, which does not have its"):
        read_bundle(snapshot)


def test_a_blob_is_read_once_and_then_remembered_until_it_is_written_to(
    snapshot: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vouched, "SETTLED_NS", -1)  # as if it lay there for long
    read: list[Path] = []
    inner = vouched.sha256_of
    monkeypatch.setattr(vouched, "sha256_of", lambda path: read.append(path) or inner(path))
    read_bundle(snapshot)
    assert len(read) == len(list(snapshot.iterdir())) - 1  # without the manifest
    vouched._known.clear()  # another process
    read_bundle(snapshot)
    assert len(read) == len(list(snapshot.iterdir())) - 1
    blob = (snapshot / "decoder.data").resolve()
    with blob.open("r+b") as file:
        file.write(b"altered")
    with pytest.raises(BundleError, match=r"decoder\.data: leads outside"):
        read_bundle(snapshot)
    shutil.rmtree(snapshot.parents[1])
    assert {entry.unneeded for entry in vouched.entries(cache)} == {"the file is gone"}


def test_what_was_written_just_now_is_not_remembered(snapshot: Path, cache: Path) -> None:
    read_bundle(snapshot)
    assert not (cache / vouched.NOTES).exists()


def test_links_that_lead_nowhere_or_to_themselves_are_named(snapshot: Path) -> None:
    for name, target in {"decoder.data": "gone", "tokenizer.json": "tokenizer.json", "lm_head.onnx": "."}.items():
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(target)
    with pytest.raises(BundleError) as error:
        read_bundle(snapshot)
    message = str(error.value)
    assert "decoder.data: a link to a file that is not there" in message
    assert "tokenizer.json: a link that leads back to itself" in message or "Too many levels" in message
    assert "lm_head.onnx: no regular file" in message


def test_a_checkpoint_in_a_hubs_cache_is_exported_as_any_other(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = in_a_hub(checkpoint, tmp_path / "hub")
    export(checkpoint, tmp_path / "plain")
    expected = tiny_llama.logits(tmp_path / "plain", IDS)
    for name, link in (("copied", False), ("linked", True)):
        manifest = export(snapshot, tmp_path / name, link=link)
        assert (SHARD in {file.path for file in manifest.files}) == link
        np.testing.assert_array_equal(tiny_llama.logits(tmp_path / name, IDS), expected)
    assert not (tmp_path / "linked" / SHARD).is_symlink()
