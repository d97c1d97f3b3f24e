"""Opens one graph of a bundle with inner values that its author named as further outputs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile

import onnx_ir as ir

from runtime.bundle import Graph, Port
from runtime.errors import EdgeOmniError


def exposed(folder: Path, graph: Graph, taps: Sequence[str]) -> tuple[Path, Graph]:
    """A copy of the graph, written beside it, whose outputs hold the values called `taps` too; to be deleted.

    It must lie in the bundle because ONNX Runtime reads no weights from elsewhere. EdgeOmniError where the folder
    cannot be written or the graph has no such values.
    """
    model = ir.load(folder / graph.file)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    missing = [name for name in taps if name not in values]
    if missing:
        raise EdgeOmniError(
            f"{folder / graph.file} has no inner value {', '.join(missing)}; export it with this version"
        )
    model.graph.outputs.extend(values[name] for name in taps)
    path = _beside(folder)
    try:
        ir.save(model, path)
    except BaseException:
        path.unlink()
        raise
    ports = (Port(name, "float32", ()) for name in taps)
    return path, replace(graph, file=path.name, outputs=(*graph.outputs, *ports))


def _beside(folder: Path) -> Path:
    try:
        with NamedTemporaryFile(prefix=".tapped-", suffix=".onnx", dir=folder, delete=False) as file:
            return Path(file.name)
    except OSError as error:
        raise EdgeOmniError(
            f"{folder} cannot be written ({error.strerror}); its audio head is looked into by a copy that must lie in "
            "it for a moment: copy the bundle to a folder of your own"
        ) from None
