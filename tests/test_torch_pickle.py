"""The vocoder's torch file: tensors come out, and no pickle can make anything else happen."""

import builtins
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoint import open_checkpoint
from export.torch_archive import read_torch
from export.torch_pickle import read_state_dict
from runtime.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden" / "a" / "checkpoint"
DATA = np.arange(24, dtype=np.float32)


def literal(value: object) -> bytes:
    """A value's instructions without the frame around them."""
    return pickle.dumps(value, 2)[2:-1]


def storage(key: str = "0", kind: str = "torch\nFloatStorage", numel: int = 24) -> bytes:
    parts = [b"(", literal("storage"), b"c", kind.encode(), b"\n", literal(key), literal("cpu"), literal(numel), b"tQ"]
    return b"".join(parts)


def tensor(
    shape: tuple[Any, ...], strides: tuple[Any, ...], offset: Any = 0, stored: bytes | None = None, flags: bytes = b""
) -> bytes:
    """The instructions with which torch saves a tensor."""
    stored = storage() if stored is None else stored
    view = literal(offset) + literal(shape) + literal(strides)
    hooks = b"\x89ccollections\nOrderedDict\n)R"  # requires_grad=False, no hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + view + hooks + flags + b"tR"


def program(**entries: bytes) -> bytes:
    """A pickle of a dict with these values."""
    return b"\x80\x02}(" + b"".join(literal(key) + value for key, value in entries.items()) + b"u."


def save(path: Path, pickled: bytes, byteorder: bytes = b"little", data: bytes = DATA.tobytes()) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "byteorder": byteorder, "data/0": data}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_torch(path)
    return str(caught.value)


def entry_refusal(folder: Path, value: bytes) -> str:
    return refusal(save(folder / "hift.pt", program(entry=value)))


# --- what opens ---


def test_views_with_offsets_and_strides_read_as_numpy_views(tmp_path: Path) -> None:
    path = save(
        tmp_path / "hift.pt",
        program(
            whole=tensor((4, 6), (6, 1)),
            part=tensor((2, 6), (6, 1), 6),
            turned=tensor((6, 4), (1, 6)),
            column=tensor((4,), (6,), 2),
            tower=tensor((1, 2, 3), (2**62, 12, 2), 1),  # torch leaves any stride where the size is 1
            line=tensor((1, 24), (99, 1)),
            scalar=tensor((), (), 23),
            empty=tensor((0, 3), (3, 1), 24),
        ),
    )
    tensors, whole = read_torch(path), DATA.reshape(4, 6)
    tower = np.lib.stride_tricks.as_strided(DATA[1:], (1, 2, 3), (0, 48, 8))
    expected = {
        "line": DATA.reshape(1, 24),
        "whole": whole,
        "part": whole[1:3],
        "turned": whole.T,
        "column": whole[:, 2],
        "tower": tower,
    }
    for key, values in (expected | {"scalar": DATA[23], "empty": DATA[:0].reshape(0, 3)}).items():
        np.testing.assert_array_equal(tensors[key].read(), values)
    for key, values in expected.items():
        for start in range(values.shape[0] + 1):
            np.testing.assert_array_equal(tensors[key].rows(start, values.shape[0]), values[start:])
    assert [key for key, value in tensors.items() if value.strides is None] == [
        "whole",
        "part",
        "line",
        "scalar",
        "empty",
    ]


def test_a_contiguous_tensor_says_where_its_bytes_lie(tmp_path: Path) -> None:
    path = save(tmp_path / "hift.pt", program(part=tensor((2, 6), (6, 1), 6)))
    part = read_torch(path)["part"]
    assert path.read_bytes()[part.offset : part.offset + part.nbytes] == DATA[6:18].tobytes()


def test_every_storage_type_keeps_its_bytes(tmp_path: Path) -> None:
    names = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32"}
    names |= {"Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"}
    for kind, dtype in names.items():
        itemsize = {"64": 8, "32": 4, "16": 2}.get(dtype[-2:], 1)
        stored = storage(kind=f"torch\n{kind}Storage", numel=4)
        content = bytes(i % 2 for i in range(4 * itemsize))
        path = save(tmp_path / "hift.pt", program(t=tensor((4,), (1,), stored=stored)), data=content)
        found = read_torch(path)["t"]
        assert found.dtype == dtype and found.read().tobytes() == content


def test_a_state_dict_in_an_ordered_dict_with_attributes_reads(tmp_path: Path) -> None:
    ordered = b"\x80\x02ccollections\nOrderedDict\n)R" + literal("a") + tensor((24,), (1,)) + b"s"
    attributes = literal({"_metadata": {"": {"version": 1}}}) + b"b."
    assert list(read_torch(save(tmp_path / "hift.pt", ordered + attributes))) == ["a"]


def test_hift_pt_serves_a_checkpoint_without_hift_safetensors(tmp_path: Path) -> None:
    for file in GOLDEN.iterdir():
        if file.name != "hift.safetensors":
            (tmp_path / file.name).symlink_to(file)
    with_pt, with_safetensors = open_checkpoint(tmp_path).hift, open_checkpoint(GOLDEN).hift
    assert with_pt is not None and with_safetensors is not None and with_pt.keys() == with_safetensors.keys()
    assert {value.file.name for value in with_pt.values()} == {"hift.pt"}
    assert {value.file.name for value in with_safetensors.values()} == {"hift.safetensors"}


# --- pickles that would do something ---


class Call:
    """Pickles as a call of `function`, as an attacker would write it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_calls_something_is_refused_by_name_and_not_run(tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "proof"
    for name, call in {
        f"{os.system.__module__}.system": Call(os.system, f"touch {proof}"),
        "builtins.eval": Call(builtins.eval, f"open({str(proof)!r}, 'w')"),
    }.items():
        attack = pickle.dumps(call, protocol)
        pickle.loads(attack)  # a real attack: it works where a pickle is trusted
        assert proof.exists()
        proof.unlink()
        message = refusal(save(tmp_path / "hift.pt", attack))
        assert name in message.replace("__builtin__", "builtins")  # as protocols 0 to 2 call it
        assert not proof.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_hidden_in_a_dict_is_not_run_either(tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "proof"
    attack = {"a": Call(os.system, f"touch {proof}"), "b": Call(Path, str(proof))}
    assert "refused" in (message := refusal(save(tmp_path / "hift.pt", pickle.dumps(attack, protocol)))) or (
        protocol < 2 and "instruction" in message
    )
    assert not proof.exists()


def test_an_attack_among_good_tensors_is_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    attack = b"cos\nsystem\n" + literal((f"touch {proof}",)) + b"R"
    path = save(tmp_path / "hift.pt", program(a=tensor((24,), (1,)), b=attack, c=tensor((24,), (1,))))
    assert "'os.system'" in refusal(path) and not proof.exists()


@pytest.mark.parametrize(
    ("pickled", "expected"),
    [
        (pickle.dumps(np.ones(3), 2), "numpy"),
        (b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b.", "torch.nn.modules.linear.Linear"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.", "torch._utils._rebuild_parameter"),
        (b"\x80\x02ctorch\nload\n)R.", "torch.load"),
        (b"\x80\x04\x8c\x05torch\x8c\x0eFloatStorage.x\x93.", "torch.FloatStorage.x"),
        (b"(cos\nsystem\nX\x04\x00\x00\x00trueo.", "os.system"),
        (b"(X\x04\x00\x00\x00trueios\nsystem\n.", "instruction INST"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls 'torch.FloatStorage'"),
        (b"\x80\x02ccollections\nOrderedDict\n" + literal((((1, 2),),)) + b"R.", "calls 'collections.OrderedDict'"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "sets attributes"),
        (b"\x80\x02" + tensor((24,), (1,)) + literal({"offset": 10**9}) + b"b.", "sets attributes"),
        (b"\x80\x02" + literal("os.system") + b")R.", "calls 'str'"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"Pos.system\n.", "instruction PERSID"),
        (b"\x80\x02" + literal(("module", 1, 2, 3, 4)) + b"Q.", "no storage"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        (b"\x80\x02" + literal(3) + b".", "no dict of tensor names"),
        (b"\x80\x02}" + literal(1) + literal(2) + b"s.", "no dict of names"),
        (b"\x80\x02}(" + literal("a") + b"u.", "malformed"),
        (b"\x80\x02h\x05.", "malformed"),
        (b"\x80\x02t.", "malformed"),
        (b"\x80\x02.", "malformed"),
        (b"\x80\x02}", "malformed"),
        (b"\x80\x02(" + storage() + b"Q.", "malformed"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "malformed"),
        (b"", "malformed"),
    ],
)
def test_other_programs_are_refused(tmp_path: Path, pickled: bytes, expected: str) -> None:
    assert expected in refusal(save(tmp_path / "hift.pt", pickled))


def test_a_memo_index_or_a_nest_of_tuples_costs_no_memory() -> None:
    with pytest.raises(CheckpointError, match="no dict"):
        read_state_dict(b"\x80\x02Nr\xff\xff\xff\xff.")  # LONG_BINPUT 2**32-1
    doubled = b"".join(b"q\x00h\x00\x86" for _ in range(200))  # each a pair of the one before
    with pytest.raises(CheckpointError, match="no whole numbers"):
        read_state_dict(program(t=tensor((), (), stored=storage()).replace(literal(()) * 2, b")" + doubled + b")")))


# --- tensors that do not fit ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (tensor((25,), (1,)), "ends at value 25 of a storage of 24"),
        (tensor((4, 6), (6, 1), 1), "ends at value 25"),
        (tensor((4,), (2**62,)), "of a storage of 24"),
        (tensor((2**62, 2**62), (1, 1)), "larger than any memory"),
        (tensor((-1,), (1,)), "none negative"),
        (tensor((4,), (-1,)), "none negative"),
        (tensor((4,), (1,), -1), "offset -1"),
        (tensor((4,), (1, 1)), "do not fit shape [4]"),
        (tensor((10**12,), (0,)), "more than once"),
        (tensor((4,), (1,), stored=storage("7")), "storage '7' is missing"),
        (tensor((4,), (1,), stored=storage("../data.pkl")), "is missing"),
        (tensor((4,), (1,), stored=storage(numel=25)), "has 96 bytes, expected 100"),
        (tensor((4,), (1,), stored=storage(numel=-1)), "expected -4"),
        (tensor(("4",), (1,)), "no whole numbers"),
        (tensor((4.0,), (1,)), "no whole numbers"),
        (tensor((4,), (1,), True), "no whole numbers"),
        (tensor((4,), (1,), stored=literal("s")), "no storage"),
        (tensor((4,), (1,), flags=literal({"neg": True})), "negated"),
        (tensor((4,), (1,), stored=storage(kind="torch\nComplexFloatStorage")), "torch.ComplexFloatStorage"),
        (literal(3), "tensor 'entry': is a int, expected a tensor"),
        (b"}" + literal("a") + tensor((4,), (1,)) + b"s", "is a dict, expected a tensor"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path: Path, value: bytes, expected: str) -> None:
    assert expected in entry_refusal(tmp_path, value)


def test_all_tensors_that_do_not_fit_are_named_at_once(tmp_path: Path) -> None:
    path = save(tmp_path / "hift.pt", program(a=tensor((25,), (1,)), b=tensor((4,), (1,)), c=literal(None)))
    message = refusal(path)
    assert "'a'" in message and "'b'" not in message and "'c'" in message


# --- archives that are none ---


def test_compressed_members_are_refused_before_they_are_inflated(tmp_path: Path) -> None:
    path = tmp_path / "hift.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    assert "'archive/data.pkl' is compressed" in refusal(path)


def test_a_member_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "hift.pt", program())
    content = path.read_bytes()
    at = content.rindex(b"PK\x01\x02")  # the directory's record of the last member: sizes at 20 and 24
    path.write_bytes(content[: at + 20] + struct.pack("<II", 2**30, 2**30) + content[at + 28 :])
    assert "reaches past the end" in refusal(path)


def test_missing_doubled_and_rootless_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hift.pt"
    for names in (["a/version"], ["data.pkl"], ["a/b/data.pkl"], ["a/data.pkl", "b/data.pkl"]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, program())
        assert "data.pkl, expected one" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data.pkl", program())
        archive.writestr("a/data.pkl", program())
    assert "is there twice" in refusal(path)


def test_big_endian_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "hift.pt", program(), byteorder=b"big")
    assert "byte order b'big'" in refusal(path)
    path.write_bytes((GOLDEN / "hift.pt").read_bytes()[:-100])
    assert f"({path.stat().st_size} bytes) is truncated or no torch file" in refusal(path)
    path.write_bytes(b"hello")
    assert "no torch file" in refusal(path)


def test_the_legacy_format_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "hift.pt"
    magic = 0x1950A86A20F9469CFC6C
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in (magic, 1001, OrderedDict())))
    message = refusal(path)
    assert "before 1.6" in message and "torch.load('hift.pt', weights_only=True), 'hift.safetensors'" in message


def whole_file() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", program(x=tensor((4, 6), (6, 1)), y=tensor((6, 4), (1, 6))))
        archive.writestr("a/data/0", DATA.tobytes())
    return file.getvalue()


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_any_damage_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(whole_file())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(st.binary(max_size=4) | st.sampled_from([b"\xff" * 4, b"\xff" * 8]))
        content[at : at + data.draw(st.sampled_from([0, len(patch)]))] = patch
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    with suppress(CheckpointError):
        for value in read_torch(path).values():
            assert value.read().shape == value.shape


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # pickletools on a noisy string
@given(st.binary(max_size=60), st.integers(0, 200))
@settings(max_examples=400, deadline=None)
def test_any_program_builds_a_dict_or_is_refused(noise: bytes, at: int) -> None:
    good = program(x=tensor((4, 6), (6, 1)))
    for pickled in (noise + b".", good[:at] + noise + good[at:]):
        with suppress(CheckpointError):
            assert isinstance(read_state_dict(pickled), dict)


@pytest.mark.oracle
def test_torch_saves_what_we_read(tmp_path: Path) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 5), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2).bfloat16())
    state = module.state_dict() | {"turned": torch.arange(6).reshape(2, 3).T, "half": torch.ones(2, 2).half()[1]}
    for protocol in (2, 4, 5):
        torch.save(OrderedDict(state), tmp_path / "hift.pt", pickle_protocol=protocol)
        tensors = read_torch(tmp_path / "hift.pt")
        assert tensors.keys() == state.keys()
        for key, value in tensors.items():
            np.testing.assert_array_equal(value.read().astype(np.float64), state[key].double().numpy())
    torch.save(module.state_dict(), tmp_path / "hift.pt")
    assert read_torch(tmp_path / "hift.pt").keys() == module.state_dict().keys()
    torch.save(state, tmp_path / "hift.pt", _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(tmp_path / "hift.pt")
    torch.save(module, tmp_path / "hift.pt")
    assert "torch.nn.modules.container.Sequential" in refusal(tmp_path / "hift.pt")
