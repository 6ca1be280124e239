"""Package metadata; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Return ``__version__`` of the package without importing it: its requirements may not be there yet."""
    text = (ROOT / "diffsynth" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__\s*(?::\s*\w+\s*)?=\s*"([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('diffsynth/__init__.py has no line __version__ = "..."')
    return found.group(1)


TRAIN = ["lightning>=2.4", "pyyaml>=6"]
DEEPSPEED = [*TRAIN, "deepspeed>=0.15"]
CONTROL = ["opencv-python>=4.8", "transformers>=4.46", "rtmlib>=0.0.13", "onnxruntime>=1.17"]
PEERS = ["peft>=0.14", "diffusers>=0.35", "transformers>=4.46"]  # what our numbers are compared with
TEST = [*TRAIN, *PEERS, "pytest>=8", "pytest-xdist>=3.6", "opencv-python-headless>=4.8"]
DEV = [*TEST, "ruff>=0.9", "mypy>=1.14", "codespell>=2.3", "pre-commit>=4", "types-tqdm"]

setup(
    name="diffsynth-wan",  # diffsynth is another project on the public index; imports still say diffsynth
    version=read_version(),
    description="Wan video diffusion models: generate and train, on one GPU or many",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8")
    if (ROOT / "README.md").is_file()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["diffsynth", "diffsynth.*"]),
    package_data={"diffsynth": ["py.typed", "tiny/weights/**"]},
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "safetensors>=0.4.5",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "ftfy>=6.1",
        "pillow>=10",
        "av>=16",
        "tqdm>=4.66",
        "typer>=0.12",
        "huggingface_hub>=0.26",
        "modelscope>=1.20",
    ],
    extras_require={
        "train": TRAIN,
        "deepspeed": DEEPSPEED,
        "control": CONTROL,
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["diffsynth=diffsynth.cli.app:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Video",
        "Typing :: Typed",
    ],
)
