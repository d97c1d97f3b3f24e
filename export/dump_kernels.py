"""Regenerates kernels.json from an unpacked onnxruntime-gpu wheel, on a machine without a GPU.

    pip download --no-deps onnxruntime-gpu==VERSION && unzip onnxruntime_gpu-*.whl -d WHEEL
    python -m export.dump_kernels WHEEL

The wheel's Python module lists every registered kernel with its versions and types, but builds each execution provider
for it, and those link against CUDA and TensorRT. Libraries of the same names whose every function returns 0 (which
means success) are enough: kernels are registered, none is run. Needs a C compiler and binutils.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("kernels.json")
PROVIDERS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
DOMAINS = ("", "com.microsoft")
PROVIDER_LIBRARIES = ("libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so")
VENDOR_LIBRARY = re.compile(r"NEEDED.*\[(lib(?:cu|nv)[^\]]*)\]")
OPEN_ENDED = 2**31 - 1


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def missing_symbols(library: Path) -> Iterator[tuple[str, str]]:
    """(symbol, library that it is bound to, or "") of everything `library` expects from elsewhere."""
    for line in output_of("nm", "-D", "--undefined-only", library).splitlines():
        symbol, _, source = line.split()[-1].partition("@")
        if not symbol.startswith("_") or source:
            yield symbol, source


def build_stubs(capi: Path, folder: Path) -> None:
    """Write into `folder` every CUDA and TensorRT library that the providers in `capi` load."""
    libraries = [capi / name for name in PROVIDER_LIBRARIES]
    linked = "".join(output_of("readelf", "-dW", library) for library in libraries)
    missing = {entry for library in libraries for entry in missing_symbols(library)}
    # A symbol without a version may come from any library; the host's own is not NVIDIA's to give.
    loose = {symbol for symbol, source in missing if not source and symbol != "Provider_GetHost"}
    for vendor in set(VENDOR_LIBRARY.findall(linked)):
        versioned = {symbol for symbol, source in missing if source == vendor}
        build_library(folder / vendor, versioned or loose, versioned=bool(versioned))


def build_library(path: Path, symbols: Iterable[str], versioned: bool) -> None:
    """Compile a library whose functions return 0; with `versioned`, its symbols carry its own name as version."""
    source, script = path.with_suffix(".c"), path.with_suffix(".map")
    source.write_text("int stub;\n" + "".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in sorted(symbols)))
    script.write_text(f"{path.name} {{ global: *; }};\n")
    flags = [f"-Wl,-soname,{path.name}", *([f"-Wl,--version-script={script}"] if versioned else [])]
    output_of("cc", "-shared", "-fPIC", "-w", "-fno-builtin", "-o", path, source, *flags)


def print_registry() -> None:
    """Runs inside the wheel: print its kernels and operator schemas as JSON."""
    registry: Any = importlib.import_module("onnxruntime.capi._pybind_state")
    kernels = [
        (PROVIDERS[k.provider], k.domain, k.op_name, *k.version_range, k.type_constraints)
        for k in registry.get_all_opkernel_def()
        if k.provider in PROVIDERS and k.domain in DOMAINS
    ]
    schemas = [
        (s.domain, s.name, s.since_version, [*map(formal, s.inputs)], [*map(formal, s.outputs)])
        for s in registry.get_all_operator_schema()
        if s.domain in DOMAINS
    ]
    print(json.dumps({"onnxruntime": registry.get_version_string(), "kernels": kernels, "schemas": schemas}))


def formal(parameter: Any) -> str:
    """A formal parameter as "name:type", "name:T=type" where a variable may be one type alone; "*" if variadic."""
    only = f"={min(parameter.types)}" if len(parameter.types) == 1 and "(" not in parameter.typeStr else ""
    star = "*" if str(parameter.option).endswith("Variadic") else ""
    return f"{parameter.name}:{parameter.typeStr}{only}{star}"


def read_registry(wheel: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as stubs:
        build_stubs(wheel / "onnxruntime" / "capi", Path(stubs))
        inside = {"LD_LIBRARY_PATH": stubs, "PYTHONPATH": str(wheel), "ORT_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, __file__, "--inside"]
        result = subprocess.run(command, env={**os.environ, **inside}, capture_output=True, text=True, check=True)
        return json.loads(result.stdout)


def tensor_types(constraints: dict[str, list[str]]) -> dict[str, frozenset[str]] | None:
    """Short names of the tensor types of each constraint; None for a kernel of sequences or optionals alone."""
    types = {
        name: frozenset(found[1] for t in listed if (found := re.fullmatch(r"tensor\((\w+)\)", t)))
        for name, listed in constraints.items()
    }
    return types if all(types.values()) else None


def merged(kernels: list[dict[str, frozenset[str]]]) -> list[dict[str, frozenset[str]]]:
    """Join kernels that differ in a single constraint, until none do: a typed kernel is registered once a type."""
    for i, first in enumerate(kernels):
        for j in range(i + 1, len(kernels)):
            differ = [name for name in first if first[name] != kernels[j].get(name)]
            if first.keys() == kernels[j].keys() and len(differ) <= 1:
                joined = {name: first[name] | kernels[j][name] for name in first}
                return merged([*kernels[:i], joined, *kernels[i + 1 : j], *kernels[j + 1 :]])
    return kernels


def table(registry: dict[str, Any]) -> dict[str, Any]:
    """The registry as kernels.json holds it: operators by "domain::name", versions in order, types sorted."""
    ranges: dict[tuple[str, str, int, int], list[dict[str, frozenset[str]]]] = {}
    for provider, domain, name, since, until, constraints in registry["kernels"]:
        types = tensor_types(constraints)
        if types is not None:
            ranges.setdefault((provider, f"{domain}::{name}", since, until), []).append(types)
    kernels: dict[str, dict[str, list[Any]]] = {provider: {} for provider in PROVIDERS.values()}
    for (provider, operator, since, until), group in sorted(ranges.items()):
        for types in merged(group):
            listed = {name: sorted(types[name]) for name in sorted(types)}
            entry = [since, None if until == OPEN_ENDED else until, listed]
            kernels[provider].setdefault(operator, []).append(entry)
    schemas: dict[str, list[Any]] = {}
    for domain, name, *version in sorted(registry["schemas"]):
        schemas.setdefault(f"{domain}::{name}", []).append(version)
    return {"onnxruntime": registry["onnxruntime"], **kernels, "schemas": schemas}


def write_table(content: dict[str, Any], path: Path) -> None:
    """JSON with one operator a line, so that a new version of ONNX Runtime reads as a diff of operators."""
    sections = [f'"onnxruntime": {json.dumps(content["onnxruntime"])}']
    for section in ("cuda", "cpu", "schemas"):
        lines = [f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in sorted(content[section].items())]
        sections.append(f'"{section}": {{\n' + ",\n".join(lines) + "\n}")
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        print_registry()
    elif len(sys.argv) == 2:
        write_table(table(read_registry(Path(sys.argv[1]).resolve())), TABLE)
    else:
        sys.exit(__doc__)
