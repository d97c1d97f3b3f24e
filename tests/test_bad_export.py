"""Checkpoints that lie, disks that fill, processes that die, bundles that were tampered with: one message, no harm."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.convert import export, plan
from runtime.bundle import MANIFEST, Gate, Manifest, parse_manifest, read_bundle
from runtime.errors import BundleError, CheckpointError, EdgeOmniError
from runtime.verify import refuse_failed, verify
from tests import tiny_llama
from tests.tiny import CHECKPOINT

ROOT = Path(__file__).parents[1]

# An export that says when it has read everything and after each graph, and lingers there to be met.
SLOW = """
import sys, time
from pathlib import Path
from export.convert import plan, write
planned = plan(Path(sys.argv[1]), "cpu")
def linger(name, nbytes):
    print(name, flush=True)
    time.sleep(float(sys.argv[3]))
print("planned", flush=True)
write(planned, Path(sys.argv[2]), standalone=True, force=True, progress=linger)
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_llama.save(tmp_path / "checkpoint")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama.bundle(), tmp_path / "bundle"))


def slow_export(checkpoint: Path, out: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", SLOW, str(checkpoint), str(out), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def refused(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        refuse_failed(folder, verify(folder, read_bundle(folder)))
    return str(caught.value)


# Checkpoints


def test_every_missing_unknown_and_misshapen_tensor_is_named_at_once(tmp_path: Path) -> None:
    weights = tiny_llama.tensors()
    del weights["model.norm.weight"], weights["model.layers.1.self_attn.k_proj.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
    weights["model.layers.7.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)
    with pytest.raises(CheckpointError) as caught:
        export(tiny_llama.save(tmp_path / "checkpoint", weights), tmp_path / "bundle")
    assert sorted(re.findall(r"(missing|misshapen|left over): (\S+)", str(caught.value))) == [
        ("left over", "model.layers.7.mlp.up_proj.weight"),
        ("misshapen", "model.layers.0.mlp.up_proj.weight"),
        ("missing", "model.layers.1.self_attn.k_proj.weight"),
        ("missing", "model.norm.weight"),
    ]
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 48}, r"config\.json: hidden_size is 48, but model\.embed_tokens\.weight is .*: expected 32"),
        ({"num_hidden_layers": 1}, r"left over: model\.layers\.1\."),
        ({"num_hidden_layers": 3}, r"num_hidden_layers is 3, .* 2 layers \(missing: model\.layers\.2\."),
        ({"num_key_value_heads": 4}, r"num_key_value_heads \* head_dim is 64, but .*k_proj\.weight is \[32, 32\]"),
        ({"vocab_size": 300}, r"vocab_size is 300, but model\.embed_tokens\.weight is \[\d+, 32\]"),
        ({"rms_norm_eps": "small", "hidden_size": -1}, r"(?s)hidden_size.*rms_norm_eps|rms_norm_eps.*hidden_size"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' needs factor"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    checkpoint = tiny_llama.save(tmp_path / "checkpoint", **changes)
    with pytest.raises(CheckpointError, match=found):
        export(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_truncated_shard_is_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path, share: float):
    shard = checkpoint / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[: int(share * shard.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export(checkpoint, tmp_path / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


class Attack:
    """Unpickled by Python's own loader, it would create the folder `where`."""

    def __init__(self, where: Path):
        self.where = where

    def __reduce__(self):
        return os.mkdir, (str(self.where),)


def test_a_vocoder_file_that_would_run_code_is_refused_through_the_whole_export(tmp_path: Path) -> None:
    folder, trap = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")), tmp_path / "executed"
    (folder / "hift.safetensors").unlink()
    with zipfile.ZipFile(folder / "hift.pt", "w") as archive:
        archive.writestr("hift/data.pkl", pickle.dumps({"weight": Attack(trap)}, protocol=2))
        archive.writestr("hift/version", "3\n")
    with pytest.raises(CheckpointError, match=r"hift\.pt"):
        export(folder, tmp_path / "bundle")
    assert not trap.exists()
    assert not (tmp_path / "bundle").exists()
    with zipfile.ZipFile(folder / "hift.pt") as archive:
        pickle.loads(archive.read("hift/data.pkl"))  # the attack works where nothing stops it
    assert trap.exists()


# Disks and processes


def test_a_disk_that_is_too_small_is_noticed_before_writing(checkpoint: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        with pytest.raises(EdgeOmniError, match=r"has 0\.00 GB free, the bundle needs"):
            export(checkpoint, small / "bundle", standalone=True)
        assert not [path.name for path in small.iterdir()]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_write_that_fails_half_way_leaves_what_was_there(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export(checkpoint, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        "from apps.cli import main; main()"
    )
    arguments = ["export", str(checkpoint), "-o", str(out), "--standalone", "--force"]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert re.fullmatch(r"edgeomni: \S+ could not be written: File too large; nothing was changed\n", done.stderr)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "bundle"}


@pytest.mark.parametrize("there_before", [False, True])
def test_a_killed_export_leaves_no_half_bundle_and_can_be_run_again(
    checkpoint: Path, tmp_path: Path, there_before: bool
) -> None:
    out, dice = tmp_path / "bundle", random.Random(7)
    if there_before:
        export(checkpoint, out)
    for lines in (1, 2, 3, 4):  # planned, embed_tokens, decoder, lm_head: then the checksums and the renames
        process = slow_export(checkpoint, out, 0.02)
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        time.sleep(dice.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if out.exists() or there_before:
            refuse_failed(out, verify(out, read_bundle(out)))
    export(checkpoint, out, standalone=True, force=True)
    refuse_failed(out, verify(out, read_bundle(out)))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "bundle"}


def test_what_was_replaced_returns_if_the_export_died_between_its_two_renames(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "bundle"
    export(checkpoint, out)
    out.rename(tmp_path / ".bundle.old")
    (tmp_path / ".bundle.partial").mkdir()
    export(checkpoint, out, force=True, random=True)
    assert read_bundle(out).source.random
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "bundle"}


def test_of_two_exports_to_one_place_the_second_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    process = slow_export(checkpoint, tmp_path / "bundle", 1.0)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["planned\n", "embed_tokens\n"]
    with pytest.raises(EdgeOmniError, match="another process is writing"):
        export(checkpoint, tmp_path / "bundle")
    process.communicate()
    assert process.returncode == 0
    refuse_failed(tmp_path / "bundle", verify(tmp_path / "bundle", read_bundle(tmp_path / "bundle")))


# Bundles


@pytest.mark.parametrize("path", ["../weights", "/etc/passwd", "a/../../b", "..\\b", "c:\\b", "", "a\0b"])
def test_a_manifest_may_not_name_a_file_outside_its_bundle(bundle: Path, path: str) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][0]["path"] = path
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="may only name files inside its own folder"):
        read_bundle(bundle)


def test_a_link_that_leads_out_of_the_bundle_to_something_else_is_refused(bundle: Path, tmp_path: Path) -> None:
    content = (bundle / "tokenizer.json").read_text()
    (tmp_path / "outside.json").write_text(content.replace("t", "T"))  # of the same size
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json: leads outside the bundle, to .*checksum"):
        read_bundle(bundle)


def test_a_swapped_graph_is_named_and_never_opened(bundle: Path) -> None:
    graph = bundle / "lm_head.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.unlink()
    graph.write_bytes(content)
    assert re.search(r"lm_head\.onnx: altered: sha256 is", refused(bundle))
    states = {check.subject: check for check in verify(bundle, read_bundle(bundle))}
    assert states["graph lm_head"].skipped == "not opened: its files were altered"
    assert not states["graph decoder"].skipped


def test_a_graph_swapped_for_one_of_another_size_is_named_when_the_bundle_is_read(bundle: Path) -> None:
    shutil.copy(bundle / "decoder.onnx", bundle / "lm_head.onnx")
    with pytest.raises(BundleError, match=r"lm_head\.onnx: \d+ bytes, expected \d+"):
        read_bundle(bundle)


def test_ports_that_the_manifest_describes_wrongly_are_all_named(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    ports = manifest["graphs"]["decoder"]
    (lengths,) = (port for port in ports["inputs"] if port["name"] == "seqlens_k")
    lengths["shape"] = [2]
    (key,) = (port for port in ports["outputs"] if port["name"] == "present.0.key")
    key["name"] = "scores"
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    message = refused(bundle)
    assert "input seqlens_k is int32[1], the manifest says int32[2]" in message
    assert "output scores is in the manifest, not in the graph" in message
    assert "output present.0.key is in the graph, not in the manifest" in message


def test_sizes_that_the_manifests_own_graphs_do_not_have_are_all_named(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    ports = manifest["graphs"]["lm_head"]
    ports["inputs"][0]["shape"][1] += 1
    ports["outputs"][0]["name"] = "scores"
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    message = refused(bundle)
    assert "its sizes ask [any, 32] of lm_head's hidden, and the graph has [any, 33]" in message
    assert "its sizes ask [any, 260] of lm_head's logits, and the graph has no such port" in message


@cache
def intact() -> tuple[Path, str]:
    """A copy of a bundle whose manifest may be overwritten, and the manifest."""
    folder = Path(mkdtemp(prefix="edgeomni-test-"))
    shutil.copytree(tiny_llama.bundle(), folder, dirs_exist_ok=True)
    return folder, (folder / MANIFEST).read_text()


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def altered(document: Any, path: tuple[Any, ...], value: Any, delete: bool) -> Any:
    if not path:
        return value
    *way, last = path
    node = document
    for key in way:
        node = node[key]
    if delete:
        del node[last]
    else:
        node[last] = value
    return document


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_manifest_gives_a_manifest_or_one_clear_error(data: st.DataObject) -> None:
    folder, text = intact()
    document = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(document)))
        document = altered(document, path, data.draw(JSON), data.draw(st.booleans()))
    (folder / MANIFEST).write_text(json.dumps(document))
    try:
        assert isinstance(read_bundle(folder), Manifest)
    except BundleError as error:
        assert str(error).strip()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_bytes_for_a_manifest_give_a_manifest_or_one_clear_error(data: st.DataObject) -> None:
    content = bytearray(intact()[1].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    try:
        assert isinstance(parse_manifest(bytes(content)), Manifest)
    except BundleError as error:
        assert str(error).strip()


@pytest.mark.parametrize("out", ["/proc/nowhere/bundle", "/proc/bundle"])
def test_a_folder_where_nothing_can_be_written_is_said(checkpoint: Path, out: str) -> None:
    with pytest.raises(EdgeOmniError, match=f"nothing can be written beside {out}: .*; name another folder"):
        export(checkpoint, Path(out))


def test_a_checkpoint_that_states_no_end_of_answers_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, checkpoint)
    (checkpoint / "generation_config.json").write_text('{"bos_token_id": 320}')
    with pytest.raises(CheckpointError, match=r"generation_config.json has eos_token_id None, expected the id"):
        plan(checkpoint, "cpu")


def test_what_a_checkpoint_declares_of_itself_takes_the_place_of_the_familys_defaults(tmp_path: Path) -> None:
    declared = {"not_addressed_token_id": 7, "sampling": {"text": {"greedy": True}}, "gate": {"over_answer": 0.75}}
    blueprint = plan(_declaring(tmp_path, declared), "cpu")
    assert blueprint.blueprint.tokens.not_addressed == 7
    assert blueprint.blueprint.generation.text.sampling.greedy
    assert blueprint.blueprint.gate == Gate(in_silence=0.5, over_answer=0.75)
    assert blueprint.blueprint.generation.text.max_new == plan(CHECKPOINT, "cpu").blueprint.generation.text.max_new


def test_a_declaration_that_means_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config.json, edgeomni, .*sampling\.txt"):
        plan(_declaring(tmp_path, {"sampling": {"txt": {"greedy": True}}}), "cpu")


def _declaring(tmp_path: Path, declared: dict[str, object]) -> Path:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, checkpoint)
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "edgeomni": declared}))
    return checkpoint
