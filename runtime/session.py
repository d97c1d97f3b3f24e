"""One ONNX graph open on one execution provider: typed ports, carried state, bound buffers, prepacked weights."""

import ctypes
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.bundle import MANIFEST, Graph, Port, sha256_of
from runtime.errors import BundleError, EdgeOmniError
from runtime.files import exists, is_file
from runtime.packed import note_use

# On CUDA fp32 multiplies in TF32 unless told not to, which moves RVQ codes and adds up over Euler steps; and cuDNN's
# exhaustive search for convolution algorithms would run anew at every change of length.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
}


@dataclass(frozen=True)
class Options:
    """How sessions run. `spin_us`: how long an idle worker thread spins before it sleeps; long spinning burns a core
    in an always-on process (measured: 1.12 cores with the default against 0.30 with 1000 at 33 steps a second), and
    one graph's idle workers are in the way of the next graph's (SmolLM2's step with 2 threads on 2 cores, ms: 13.6 with
    0, 8.6 with 100, 10.3 with 1000)."""

    threads: int = 0  # 0: as many as there are cores
    provider: str = "cpu"
    spin_us: int = 100
    prepack_cache: Path | None = None  # where weights in the kernels' own layout are kept; None: pack at each start

    def session_options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads or os.cpu_count() or 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(self.spin_us))
        return options


class Session:
    """An open graph. `run` checks feeds against the ports, so that a wrong shape is named before a kernel meets it."""

    def __init__(self, folder: Path, graph: Graph, options: Options = Options()):
        self.graph, self.options = graph, options
        self.run_options = ort.RunOptions()
        self._outputs = [port.name for port in graph.outputs]
        self._ort = open_ort(folder, graph, options)

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        """Run once and return every output by name."""
        return self.run_for(self._outputs, feeds)

    def run_for(self, outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once and return these outputs alone; the others are freed on the way."""
        return dict(zip(outputs, self._run(outputs, feeds), strict=True))

    def _run(self, outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        try:
            return [np.asarray(value) for value in self._ort.run(outputs, feeds, self.run_options)]
        except Exception as error:  # ONNX Runtime's errors have no common base narrower than this
            raise EdgeOmniError(f"{self.graph.file}: {explain(self.graph, feeds, error)}") from error

    def bind(self, buffers: Mapping[str, np.ndarray]) -> "Bound":
        """Bind numpy buffers to ports for good (both sides without a copy); later runs read and write them in place."""
        return Bound(self, buffers)

    def cancel(self) -> None:
        """Make the run in progress, in whatever thread, return with an error at its next node."""
        self.run_options.terminate = True

    def rearm(self) -> None:
        """Allow runs again after `cancel`."""
        self.run_options.terminate = False


class InMemory(Session):
    """A graph that lies in no bundle: its ONNX bytes, and arrays for the weights that those leave to other files.

    Floats are multiplied as they lie. Packed for the kernels they would take private memory of their own size, which
    quantized weights, whose kernels read no others, do.
    """

    def __init__(self, model: bytes, weights: Mapping[str, np.ndarray], graph: Graph, options: Options = Options()):
        self.graph, self.options = graph, options
        self.run_options = ort.RunOptions()
        self._outputs = [port.name for port in graph.outputs]
        self._weights = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]  # read as they lie
        session_options = options.session_options()
        session_options.add_external_initializers([*weights], self._weights)
        if all(array.dtype.kind == "f" for array in weights.values()):
            session_options.add_session_config_entry("session.disable_prepacking", "1")
        self._ort = _open(model, options, session_options)


def explain(graph: Graph, feeds: Mapping[str, np.ndarray], error: Exception) -> str:
    wanted = {port.name: port for port in graph.inputs}
    missing = sorted(wanted.keys() - feeds.keys())
    wrong = [
        f"{name} is {array.dtype}{list(array.shape)}, expected {wanted[name].dtype}{list(wanted[name].shape)}"
        for name, array in feeds.items()
        if name in wanted and not fits(array, wanted[name])
    ]
    if missing:
        wrong.insert(0, "missing inputs " + ", ".join(missing))
    return "; ".join(wrong) or str(error)


def fits(array: np.ndarray, port: Port) -> bool:
    """Whether an array has the port's dtype, rank and fixed dimensions."""
    return (
        array.dtype == np.dtype(port.dtype)
        and array.ndim == len(port.shape)
        and all(isinstance(want, str) or want == have for want, have in zip(port.shape, array.shape, strict=True))
    )


class Bound:
    """Inputs and outputs bound once; a run costs no look-ups and no copies."""

    def __init__(self, session: Session, buffers: Mapping[str, np.ndarray]):
        self.session = session
        self._binding = session._ort.io_binding()
        self._values: dict[str, ort.OrtValue] = {}
        self._inputs = {port.name for port in session.graph.inputs}
        self._all_outputs = {port.name for port in session.graph.outputs}
        self.rebind(buffers)

    def rebind(self, buffers: Mapping[str, np.ndarray]) -> None:
        """Point ports at other buffers, for instance after a change of shape. The other ports stay bound."""
        for name, array in buffers.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._values[name] = value
            if name in self._inputs:
                self._binding.bind_ortvalue_input(name, value)
            elif name in self._all_outputs:
                self._binding.bind_ortvalue_output(name, value)
            else:
                raise EdgeOmniError(f"{self.session.graph.file} has no port {name}")

    def run(self) -> None:
        """EdgeOmniError if ONNX Runtime refuses, or when it was cancelled."""
        try:
            self.session._ort.run_with_iobinding(self._binding, self.session.run_options)
        except Exception as error:  # as in Session._run
            raise EdgeOmniError(f"{self.session.graph.file}: {error}") from error


class Carried:
    """A graph with state: what comes out as `present.X` goes in as `past.X` of the next run; `reset` forgets it.

    A named dimension of a past starts at 0, a numbered one is filled with zeros.
    """

    def __init__(self, session: Session):
        self.session = session
        self._ports = [port for port in session.graph.inputs if port.name.startswith("past.")]
        self.reset()

    def reset(self) -> None:
        self.state = {port.name: np.zeros(_first_shape(port), port.dtype) for port in self._ports}

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        results = self.session.run(**self.state, **feeds)
        self.state = {port.name: results.pop("present." + port.name.removeprefix("past.")) for port in self._ports}
        return results


def _first_shape(port: Port) -> tuple[int, ...]:
    return tuple(0 if isinstance(dim, str) else dim for dim in port.shape)


def open_ort(folder: Path, graph: Graph, options: Options) -> ort.InferenceSession:
    """Open the graph's file, from the prepacked copy of this machine where there is one or one may be made."""
    if options.provider == "cpu" and options.prepack_cache is not None and graph.weights:
        return _open_prepacked(folder, graph, options)
    return _open_graph(folder, graph, options, options.session_options())


def _open_graph(
    folder: Path, graph: Graph, options: Options, session_options: ort.SessionOptions
) -> ort.InferenceSession:
    """Open a bundle's graph, its weights mapped into memory; those that a link leads to from elsewhere are read."""
    loose = loose_weights(folder, graph)
    contents = [np.memmap(folder / name, np.uint8, "r") for name in loose]
    if loose:
        sizes = [content.nbytes for content in contents]
        session_options.add_external_initializers_from_files_in_memory(loose, contents, sizes)
    return _open(folder / graph.file, options, session_options)


def loose_weights(folder: Path, graph: Graph) -> list[str]:
    """Weight files that ONNX Runtime would refuse to follow a link to.

    It goes no further than the folder and, if the graph itself is a link, the one that it leads to: in a hub's cache
    both are links to the same. That they are the bundle's files was seen to when the manifest was read.
    """
    rooms = [folder.resolve(), (folder / graph.file).resolve().parent]
    places = {name: (folder / name).resolve() for name in graph.weights}
    return [name for name, place in places.items() if not any(place.is_relative_to(room) for room in rooms)]


def _open(model: Path | bytes, options: Options, session_options: ort.SessionOptions) -> ort.InferenceSession:
    provider, provider_options = PROVIDERS[options.provider]
    if provider not in ort.get_available_providers():
        raise EdgeOmniError(
            f"this bundle needs {provider}, the installed ONNX Runtime has {', '.join(ort.get_available_providers())}; "
            f"install edgeomni[{options.provider}] in an environment of its own"
        )
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, session_options, providers=[(provider, provider_options)])
    except Exception as error:  # as above: no narrower base
        what = "a graph in memory" if isinstance(model, bytes) else model
        raise BundleError(f"{what} cannot be loaded: {error}; run `edgeomni verify` on its bundle") from error
    give_back_freed()
    return session


def cache_key(folder: Path, graph: Graph, threads: int) -> str:
    """Prepacked weights fit one graph with one set of weights, one ONNX Runtime and one kind of CPU.

    Two checkpoints of the same shape have the same .onnx files: what tells them apart is the manifest, which holds
    every file's checksum (without one, the files themselves).
    """
    manifest = folder / MANIFEST
    files = [manifest] if manifest.is_file() else [folder / name for name in (graph.file, *graph.weights)]
    parts = (graph.file, *map(sha256_of, files), ort.__version__, cpu_flags(), str(threads))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _open_prepacked(folder: Path, graph: Graph, options: Options) -> ort.InferenceSession:
    """Load weights already in the kernels' layout, memory-mapped; the first start writes them.

    Otherwise every start keeps a private, repacked copy of all weights (measured: 361 MB instead of 32 for 295 MB).
    """
    assert options.prepack_cache is not None
    home = options.prepack_cache / cache_key(folder, graph, options.threads)
    if not exists(home):
        with suppress(OSError, BundleError):  # a full or read-only disk costs the copy, and no more than that
            _write_prepacked(folder, graph, options, home)
        give_back_freed()
    note_use(home, folder, graph.file, ort.__version__)
    if is_file(home / "graph.onnx"):  # else its copy cannot be used
        try:
            return _open(home / "graph.onnx", options, options.session_options())
        except BundleError:  # it was damaged, and is only a copy
            shutil.rmtree(home, ignore_errors=True)
    return _open_graph(folder, graph, options, options.session_options())


def _write_prepacked(folder: Path, graph: Graph, options: Options, home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=home.name + ".", dir=home.parent))
    try:
        session_options = options.session_options()
        session_options.optimized_model_filepath = str(scratch / "graph.onnx")
        # ONNX Runtime 1.31 reads garbage for a quantized matrix whose scales were too small to leave the .onnx file
        # (seen: NaN with a limit of 1024 bytes), and cannot read small integers (of a Split) that did leave it.
        for key, value in {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": "graph.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "128",
        }.items():
            session_options.add_session_config_entry(key, value)
        _open_graph(folder, graph, options, session_options)
        if not lies_aligned((scratch / "graph.onnx").read_bytes()):
            (scratch / "graph.onnx").unlink()
            (scratch / "graph.data").unlink()
        try:
            scratch.rename(home)
        except OSError:
            if not home.exists():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def lies_aligned(model: bytes) -> bool:
    """Whether all weights and packed weights that a written model points to begin at multiples of 64 bytes.

    ONNX Runtime 1.31 lays those below 1 MB one after the other, and its kernels read packed ones as if they were
    aligned: behind a tensor of odd size the process would die. In an ONNX file such a place is an entry whose key is
    "offset", or one whose value is "NAME|offset;length;checksum".
    """
    places = re.findall(rb"\x0a\x06offset\x12.(\d+)|\|(\d+);\d+;", model, re.DOTALL)
    return all(int(plain or packed) % 64 == 0 for plain, packed in places)


def give_back_freed() -> None:
    """Return to the system what the C library holds of freed memory: loading and packing leave as much as they used.

    glibc alone keeps so much and has a call for it; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
