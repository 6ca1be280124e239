"""``diffsynth doctor``: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from diffsynth import __version__
from diffsynth.errors import install_extra

_GIB = 2**30
_LOW_RAM_GIB = 16.0  # below it a 14B model in fp8 has no room to rest
_LOW_DISK_GIB = 30.0  # one 14B model in bf16 is 28 GiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked for."""

    topic: str
    name: str
    found: str | None  # what is there, in words; None when it is missing or does not work
    remedy: str = ""  # what to do about it; empty when all is well
    is_optional: bool = False  # videos can be made without it


# label, encoders that write it
_CODECS = (
    ("H.264 (.mp4, .mkv)", ("libx264", "h264_nvenc")),
    ("H.265 (.mp4, .mkv)", ("libx265", "hevc_nvenc")),
    ("VP9 (.webm)", ("libvpx-vp9",)),
    ("AV1 (.mp4, .webm)", ("libsvtav1", "av1_nvenc")),
)

# module, its package, what it is for, how to get it
_LIBRARIES = (
    ("safetensors", "safetensors", "reads checkpoints", "pip install safetensors"),
    ("tokenizers", "tokenizers", "reads tokenizer.json", "pip install tokenizers"),
    ("sentencepiece", "sentencepiece", "reads spiece.model", "pip install sentencepiece"),
    ("ftfy", "ftfy", "cleans prompts as official Wan does", "pip install ftfy"),
    ("huggingface_hub", "huggingface_hub", "downloads models", "pip install huggingface_hub"),
    ("modelscope", "modelscope", "downloads models", "pip install modelscope"),
    ("lightning", "lightning", "trains", install_extra("train")),
    ("yaml", "pyyaml", "reads the settings of a training", install_extra("train")),
    ("cv2", "opencv-python", "draws lines and motion for `diffsynth preprocess`", install_extra("control")),
)
DISTRIBUTION, OTHER_PROJECT = "diffsynth-wan", "diffsynth"


def run_doctor(as_json: bool) -> None:
    """Print what this machine has.

    Args:
        as_json: one JSON object, {"ok": bool, "findings": [...]}, instead of text for people; ``ok`` says
            that nothing is missing but optional things.
    """
    findings = [finding for examine in _EXAMINATIONS for finding in examine()]
    if as_json:
        report = {
            "ok": not any(f.remedy and not f.is_optional for f in findings),
            "findings": [asdict(f) for f in findings],
        }
        typer.echo(json.dumps(report, indent=2))
        return
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            typer.echo(f"\n{topic}")
        typer.echo(f"  {finding.name:22} {finding.found or '--'}")
        if finding.remedy:
            typer.echo(f"  {'':22} -> {finding.remedy}")
    num_remedies = sum(bool(finding.remedy) for finding in findings)
    typer.echo(f"\nThings to mend (marked ->): {num_remedies}" if num_remedies else "\nAll is well.")


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    is_new = sys.version_info >= (3, 10)
    yield Finding(
        topic="Machine",
        name="Python",
        found=f"{version} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        remedy="" if is_new else "install Python 3.10 or newer",
    )
    total, available = _memory_gib()
    if total is not None:
        yield Finding(
            topic="Machine",
            name="RAM",
            found=f"{total:.1f} GiB, {available or 0.0:.1f} GiB free",
            remedy="" if total >= _LOW_RAM_GIB else "14B models want 16 GiB or more; use a 1.3B or 5B model",
            is_optional=True,
        )
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    yield Finding(
        topic="Machine",
        name="disk (this folder)",
        found=f"{free:.1f} GiB free",
        remedy=""
        if free >= _LOW_DISK_GIB
        else "a 14B model takes 28 GiB or more; free some space or change folder",
        is_optional=True,
    )


def _memory_gib() -> tuple[float | None, float | None]:
    """Total and free RAM in GiB, within the limit of a container if there is one; None where unknown."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB, None
        return None, None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 / _GIB for name in ("MemTotal", "MemAvailable"))
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        limit_gib = int(limit.read_text()) / _GIB
        total, free = min(total, limit_gib), min(free, limit_gib - int(used.read_text()) / _GIB)
    return total, free


def _installation() -> Iterator[Finding]:
    """This package, and others that write into the same folder ``diffsynth``."""
    package = Path(__file__).resolve().parents[1]
    yield Finding(topic="This package", name=DISTRIBUTION, found=f"{__version__} in {package}")
    for distribution in importlib.metadata.distributions(name=OTHER_PROJECT):
        place = Path(str(distribution.locate_file(""))).resolve()
        if place == package.parent and (place / "setup.py").is_file():
            continue  # diffsynth.egg-info of a checkout, from before this distribution had its name
        told = distribution.metadata.get_all("Summary") or ["it does not say what it is"]
        yield Finding(
            topic="This package",
            name=f"another {OTHER_PROJECT}",
            found=f"{distribution.version} in {place}: {told[0][:80]}",
            remedy=f"it is another project, or an older install of this one, and both use the folder "
            f"{OTHER_PROJECT}: pip uninstall {OTHER_PROJECT}, then install this one again, or use a virtual "
            "environment for each",
            is_optional=True,
        )


def _torch() -> Iterator[Finding]:
    topic = "PyTorch"
    try:
        import torch
    except Exception as error:
        yield Finding(topic=topic, name="torch", found=None, remedy=f"pip install torch ({_short(error)})")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    is_cpu_build = not (torch.version.cuda or torch.version.hip)
    has_driver = shutil.which("nvidia-smi") is not None
    yield Finding(
        topic=topic,
        name="torch",
        found=f"{torch.__version__}, {'CPU build' if is_cpu_build else build}",
        remedy="there is an NVIDIA driver, but this torch is for CPUs: install the CUDA build as "
        "pytorch.org/get-started says"
        if is_cpu_build and has_driver
        else "",
    )
    if torch.cuda.is_available():
        yield from _gpus(topic)
    elif is_cpu_build or not has_driver:
        yield Finding(topic=topic, name="GPU", found="none; all runs on the CPU (fine for the tiny Wan)")
    else:
        advice = "torch cannot use the GPU: check `nvidia-smi`, and update the driver to one for this CUDA"
        yield Finding(topic=topic, name="GPU", found=None, remedy=advice)
    yield _library(
        topic,
        "triton",
        "triton",
        "compiles fused kernels",
        "pip install triton",
        is_optional=True,
        is_needed=_has_gpu(),
    )


def _gpus(topic: str) -> Iterator[Finding]:
    import torch

    from diffsynth.ops.convolution import cudnn_text, cudnn_version, slow_convolutions

    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        fp8 = ", multiplies fp8" if (card.major, card.minor) >= (8, 9) else ""
        yield Finding(
            topic=topic,
            name=f"GPU cuda:{index}",
            found=f"{card.name}, {total / _GIB:.1f} GiB ({free / _GIB:.1f} free), "
            f"compute capability {card.major}.{card.minor}{fp8}",
        )
    version = cudnn_version()
    if version is not None:
        found = f"{cudnn_text(version)}, computes the convolutions of the VAE"
        yield Finding(
            topic=topic, name="cuDNN", found=found, remedy=slow_convolutions() or "", is_optional=True
        )


def _attention() -> Iterator[Finding]:
    topic = "Attention"
    try:
        import torch

        from diffsynth.ops.attention import describe_attention
        from diffsynth.ops.attention_kernels import KERNELS

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:
        yield Finding(topic=topic, name="sdpa", found=f"part of torch, which does not load: {_short(error)}")
        return
    try:
        yield Finding(topic=topic, name="in use", found=describe_attention(device))
    except ValueError as error:
        yield Finding(topic=topic, name="in use", found=None, remedy=str(error).partition(":\n")[0])
    for kernel in KERNELS:
        misfit = kernel.misfit(device)
        if misfit is not None:
            found = f"{kernel.title}: not for this machine, {misfit}"
        elif kernel.module and kernel.missing() is not None:
            remedy = f"{kernel.missing()}; an alternative to sdpa: {kernel.install}"
            yield Finding(topic=topic, name=kernel.name, found=None, remedy=remedy, is_optional=True)
            continue
        else:
            found = f"{kernel.title}, available"
        yield Finding(topic=topic, name=kernel.name, found=found)


def _codecs() -> Iterator[Finding]:
    topic = "Video"
    av = _library(topic, "av", "PyAV", "reads and writes videos", "pip install av")
    yield av
    if av.found is None:
        return
    from diffsynth.errors import ArgumentError
    from diffsynth.video.encoding import choose_encoding

    for label, encoders in _CODECS:
        working = []
        for encoder in encoders:
            try:
                choose_encoding(".mkv", codec=encoder)
            except ArgumentError:
                continue
            working.append(encoder)
        yield Finding(
            topic=topic,
            name=label,
            found=", ".join(working) or None,
            remedy="" if working else "pip install --upgrade av (its wheels bring this encoder)",
            is_optional="libx264" not in encoders,
        )


def _libraries() -> Iterator[Finding]:
    for module, name, purpose, command in _LIBRARIES:
        is_optional = "[" in command or "downloads" in purpose
        yield _library("Libraries", module, name, purpose, command, is_optional=is_optional)


_EXAMINATIONS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _machine,
    _installation,
    _torch,
    _attention,
    _codecs,
    _libraries,
)


def _library(
    topic: str,
    module: str,
    name: str,
    purpose: str,
    command: str,
    *,
    is_optional: bool = False,
    is_needed: bool = True,
) -> Finding:
    """Import a library: only that shows whether its compiled part fits the torch beside it."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        is_absent = (error.name or "").partition(".")[0] == module.partition(".")[0]
        reason = "not installed" if is_absent else f"does not load: {_short(error)}"
    except Exception as error:
        reason = f"installed, but does not load: {_short(error)}"
    else:
        return Finding(topic=topic, name=name, found=_version(module, found))
    if not is_needed:
        return Finding(topic=topic, name=name, found=f"{reason}; not needed here")
    return Finding(
        topic=topic,
        name=name,
        found=None,
        remedy=f"{reason}; it {purpose}: {command}",
        is_optional=is_optional,
    )


def _version(module: str, loaded: object) -> str:
    try:
        return importlib.metadata.version(module.partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(loaded, "__version__", "present"))


def _has_gpu() -> bool:
    return _capability() is not None


def _capability() -> float | None:
    """Compute capability of the first GPU, such as 8.9; None without a usable one."""
    try:
        import torch

        major, minor = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else (0, 0)
    except Exception:
        return None
    return float(f"{major}.{minor}") if major else None


def _short(error: BaseException) -> str:
    """The first line of an error, at most 120 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]
