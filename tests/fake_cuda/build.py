"""Builds the simulated CUDA runtime and driver, with g++ and the headers of the nvidia wheels beside torch.

Two libraries come out: ``libfake_cudart.so``, for LD_PRELOAD, and ``libcuda.so.1``. What torch asks of the
runtime and what the sources do not have becomes a function that returns 0. They are kept in the user's cache
and built anew when the sources or torch change.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "runtime"
RUNTIME, DRIVER = "libfake_cudart.so", "libcuda.so.1"
TORCH_LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
TOOLS = ("g++", "gcc", "nm")


def why_not() -> str | None:
    """Why nothing can be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the simulated CUDA runtime is written for Linux on x86-64"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} is not installed (Debian, Ubuntu: apt install g++)"
    if headers() is None:
        return "the headers of CUDA are not beside torch (the nvidia-cuda-runtime wheel has them)"
    return None


def headers() -> Path | None:
    """Where cuda.h and cuda_runtime_api.h lie."""
    for folder in ("cu13", "cuda_runtime"):
        place = _site() / "nvidia" / folder / "include"
        if (place / "cuda_runtime_api.h").is_file() and (place / "cuda.h").is_file():
            return place
    return None


def is_loaded() -> bool:
    """Whether this process runs on the simulated runtime."""
    return hasattr(ctypes.CDLL(None), "fake_cuda_counter")


def environment(capability: int = 90, devices: int = 1) -> dict[str, str]:
    """Of a process that sees simulated GPUs: the runtime has to be there before Python starts.

    Args:
        capability: compute capability times ten.
        devices: how many there are.
    """
    folder = built()
    libraries = [str(folder), os.environ.get("LD_LIBRARY_PATH")]
    return {
        **os.environ, "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "FAKE_CUDA_CAPABILITY": str(capability), "FAKE_CUDA_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def built() -> Path:
    """The folder of both libraries, which are built on first use.

    Raises:
        subprocess.CalledProcessError: when the compiler fails; its words are on standard error.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for source in (Path(__file__), *sorted(SOURCES.rglob("*.*"))):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "diffsynth-tests" / f"fake-cuda-{torch.__version__}-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            made = Path(work) / "made"
            made.mkdir()
            _build_runtime(made)
            _build_driver(made)
            try:
                made.rename(folder)
            except OSError:  # another run was faster
                if not folder.is_dir():
                    raise
    return folder


def _build_runtime(folder: Path) -> None:
    wanted: set[str] = set()
    for library in TORCH_LIBRARIES:
        path = _site() / "torch" / "lib" / library
        if path.is_file():
            wanted |= _symbols(path, "--undefined-only")
    pattern = re.compile(r"(cuda[A-Z]|__cuda|cublas)")
    wanted = {name for name in wanted if pattern.match(name)}
    _link(folder, SOURCES / "runtime.cpp", RUNTIME, wanted)


def _build_driver(folder: Path) -> None:
    place = headers()
    assert place is not None
    text = (place / "cuda.h").read_text(errors="replace")
    # Functions, and the names with a version that macros give some of them.
    wanted = set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", text))
    wanted |= set(re.findall(r"^#define\s+cu[A-Z]\w*\s+(cu[A-Z]\w+)$", text, re.MULTILINE))
    _link(folder, SOURCES / "driver.cpp", DRIVER, {name for name in wanted if not name.endswith("_t")})


def _link(folder: Path, source: Path, name: str, wanted: set[str]) -> None:
    """Compile a library in which all that is wanted and not written returns 0."""
    compiled, stubs = folder / f"{name}.o", folder / f"{name}.stubs.c"
    flags = ["-O1", "-fPIC", "-w", f"-I{SOURCES}", f"-I{headers()}"]
    _run("g++", "-std=c++17", *flags, "-c", str(source), "-o", str(compiled))
    absent = sorted(wanted - _symbols(compiled, "--defined-only", is_object=True))
    stubs.write_text("".join(f"int {function}() {{ return 0; }}\n" for function in absent))
    parts = [str(compiled), "-x", "c", str(stubs), "-x", "none"]
    _run("g++", "-shared", "-fPIC", "-w", *parts, f"-Wl,-soname,{name}", "-o", str(folder / name),
         "-lpthread", "-ldl")  # fmt: skip
    compiled.unlink()
    stubs.unlink()


def _symbols(path: Path, kind: str, *, is_object: bool = False) -> set[str]:
    words = ["nm", *([] if is_object else ["-D"]), kind, str(path)]
    lines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.strip()}


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


def _site() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]
