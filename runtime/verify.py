"""Is a bundle what its manifest says: every file's checksum, every graph loadable, every port as described."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from runtime.bundle import File, Graph, Manifest, Port, sha256_of
from runtime.errors import BundleError, EdgeOmniError
from runtime.session import PROVIDERS, Options, open_ort
from runtime.tokenizer import Tokenizer

# ONNX Runtime's spelling of element types -> ours.
ELEMENTS = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `problems` is empty where it is as it should be; `skipped` says why it was not."""

    subject: str
    problems: tuple[str, ...] = ()
    skipped: str = ""


def verify(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """Check every file, the tokenizer and every graph of a bundle whose manifest has been read.

    A graph is opened only if its own files are unaltered: what was swapped is not executed.
    """
    altered: set[str] = set()
    for file in manifest.files:
        check = check_file(folder, file)
        altered.update([file.path] if check.problems else [])
        yield check
    yield check_tokenizer(folder, manifest) if manifest.tokenizer not in altered else _not_opened("tokenizer")
    for name, graph in manifest.graphs.items():
        touched = altered & {graph.file, *graph.weights}
        yield _not_opened(f"graph {name}") if touched else check_graph(folder, name, graph, manifest.profile)


def refuse_failed(folder: Path, checks: Iterable[Check]) -> None:
    """BundleError that names everything that failed, if anything did."""
    failed = [f"  {check.subject}: {problem}" for check in checks for problem in check.problems]
    if failed:
        raise BundleError(f"{folder} is not what its manifest says; export it again:\n" + "\n".join(failed))


def check_file(folder: Path, file: File) -> Check:
    """Recompute one checksum."""
    try:
        found = sha256_of(folder / file.path)
    except OSError as error:
        return Check(file.path, (f"cannot be read: {error.strerror or error}",))
    if found == file.sha256:
        return Check(file.path)
    return Check(file.path, (f"altered: sha256 is {found[:16]}…, the manifest says {file.sha256[:16]}…",))


def check_tokenizer(folder: Path, manifest: Manifest) -> Check:
    try:
        Tokenizer(folder / manifest.tokenizer)
    except Exception as error:  # the tokenizers package raises bare exceptions
        return Check("tokenizer", (f"cannot be loaded: {error}",))
    return Check("tokenizer")


def check_graph(folder: Path, name: str, graph: Graph, provider: str) -> Check:
    """Open a graph on its execution provider and compare the ports that ONNX Runtime sees with the manifest's."""
    subject = f"graph {name}"
    needed, _ = PROVIDERS[provider]
    if needed not in ort.get_available_providers():
        return Check(subject, skipped=f"not opened: it needs {needed}, which this ONNX Runtime lacks")
    try:
        session = open_ort(folder, graph, Options(provider=provider))
    except EdgeOmniError as error:
        return Check(subject, (str(error),))
    return Check(
        subject,
        (
            *port_problems("input", graph.inputs, session.get_inputs()),
            *port_problems("output", graph.outputs, session.get_outputs()),
        ),
    )


def port_problems(side: str, described: Sequence[Port], found: Sequence[Any]) -> Iterator[str]:
    """How the ports of an open graph (onnxruntime.NodeArg: name, type, shape) differ from those of the manifest."""
    real = {arg.name: arg for arg in found}
    for port in described:
        arg = real.pop(port.name, None)
        if arg is None:
            yield f"{side} {port.name} is in the manifest, not in the graph"
        elif not _agrees(port, arg):
            yield (
                f"{side} {port.name} is {ELEMENTS.get(arg.type, arg.type)}{arg.shape}, "
                f"the manifest says {port.dtype}{list(port.shape)}"
            )
    for name in real:
        yield f"{side} {name} is in the graph, not in the manifest"


def _agrees(port: Port, arg: Any) -> bool:
    """Same type, same rank, and the same numbers wherever both sides state one."""
    fixed = [
        not isinstance(want, int) or not isinstance(have, int) or want == have
        for want, have in zip(port.shape, arg.shape, strict=False)
    ]
    return ELEMENTS.get(arg.type) == port.dtype and len(arg.shape) == len(port.shape) and all(fixed)


def _not_opened(subject: str) -> Check:
    return Check(subject, skipped="not opened: its files were altered")
