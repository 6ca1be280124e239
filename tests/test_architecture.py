"""The house guards itself: floors, short files, late imports, one home for each library."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOT = REPOSITORY / "diffsynth"
FILES = sorted(ROOT.rglob("*.py"))

# lowest first; a file may import from its own floor and those below it
FLOORS = (
    "announce errors portable lazy video data ops tiny",
    "checkpoints sampling vram_management conditioning",
    "lora",
    "models",
    "denoising distributed",
    "pipelines",
    "training cli webui server utils core",
)
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names.split()}

# importing these costs no torch, nor does anything that they import
LIGHT = (
    "__init__.py",
    "announce.py",
    "errors.py",
    "portable.py",
    "checkpoints",
    "models/registry.py",
    *(f"vram_management/{name}.py" for name in ("plan", "memory_plan", "arrange", "choices", "activations")),
    *(f"vram_management/{name}.py" for name in ("layers", "rates")),
    "cli",
    "conditioning",
    "pipelines/options.py",
    "video",
    "data",
    "lazy.py",
    "utils",
    "core",
    "models/__init__.py",
    "pipelines/__init__.py",
    "pipelines/model_config.py",
)
# what Windows lacks, or takes for something else; `portable` alone knows
POSIX_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "readline"}
POSIX_NAMES = re.compile(
    r"os\.(?:kill|killpg|fork\w*|get(?:e?[ug]id|pgid|sid|loadavg)|set\w*id|uname|nice|mkfifo|chown|statvfs|wait\w*"
    r"|sched_\w+|posix_\w+|O_NOFOLLOW|O_DIRECTORY|O_DIRECT)"
    r"|signal\.(?:SIG(?:USR[12]|KILL|HUP|STOP|CONT|ALRM|CHLD|QUIT|PIPE)|alarm|pause|setitimer|pthread_\w+)"
)
LATE = {"pydantic", "av", "ftfy"}  # imported only where they are used
HOME = {"PIL": "video", "av": "video", "imageio": "video", "cv2": "video"}

PACKAGE_OF = {"PIL": "pillow", "yaml": "pyyaml"}  # where the name to install is not the name to import
OPTIONAL = {"triton", "flash_attn", "flash_attn_interface", "sageattention", "xformers", "psutil", "pynvml"}


@dataclass(frozen=True)
class Import:
    module: str  # "torch.nn", "diffsynth.ops.rope"
    names: tuple[str, ...]  # of `from module import names`
    is_relative: bool
    is_late: bool  # inside a function
    is_typing: bool  # under `if TYPE_CHECKING`


def imports_of(file: Path) -> list[Import]:
    return list(_walk(ast.parse(file.read_text(encoding="utf-8")), is_late=False, is_typing=False))


def _walk(node: ast.AST, *, is_late: bool, is_typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), False, is_late, is_typing)
        elif isinstance(child, ast.ImportFrom):
            names = tuple(alias.name for alias in child.names)
            yield Import(child.module or "", names, child.level > 0, is_late, is_typing)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from _walk(ast.Module([part], []), is_late=is_late, is_typing=True)
            for part in child.orelse:
                yield from _walk(ast.Module([part], []), is_late=is_late, is_typing=is_typing)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, is_late=is_late or inside, is_typing=is_typing)


def files_of(found: Import) -> list[Path]:
    """The files of this package that an import runs, with the ``__init__`` of each folder on its way."""
    modules = [found.module, *(f"{found.module}.{name}" for name in found.names)]
    files = []
    for module in modules:
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            place = REPOSITORY.joinpath(*parts[:depth])
            files += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    return files


def package_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_file_imports_only_downwards(file: Path) -> None:
    package = package_of(file)
    assert package in {*FLOOR, "__init__", "__main__"}, f"{package} has no floor; give it one in FLOORS"
    level = FLOOR.get(package, len(FLOORS))
    for found in imports_of(file):
        assert not found.is_relative, f"{file} imports relatively; write the whole name"
        if found.module.split(".")[0] != "diffsynth" or found.is_typing:
            continue
        inner = found.module.split(".")[1:2] or list(found.names)
        above = {name for name in inner if FLOOR.get(name, -1) > level}
        assert not above, f"{file} imports {above} from a higher floor; pass the object in as an argument"


@pytest.mark.parametrize("file", [*FILES, *sorted((REPOSITORY / "train").rglob("*.py"))], ids=name_of)
def test_file_and_its_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    # One subject a file is the rule; a length is only where to ask whether there are two.
    assert text.count("\n") < 500, f"{file} has grown past 500 lines; split it by what it does"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            length = (node.end_lineno or 0) - first[0].lineno + 1 if first else 0
            assert length < 60, f"{node.name} in {file} has {length} lines; split it by what it does"


def light_files() -> list[Path]:
    return [file for file in FILES if str(file.relative_to(ROOT)).startswith(LIGHT)]


@pytest.mark.parametrize("file", light_files(), ids=name_of)
def test_light_file_reaches_no_torch(file: Path) -> None:
    came_from: dict[Path, Path | None] = {file: None}
    waiting = [file, ROOT / "__init__.py"]
    while waiting:
        current = waiting.pop()
        for found in imports_of(current) if current.is_file() else []:
            if found.is_late or found.is_typing:
                continue
            assert found.module.split(".")[0] != "torch", f"{file} imports torch by way of {current}"
            for reached in files_of(found):
                if reached not in came_from:
                    came_from[reached] = current
                    waiting.append(reached)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_libraries_are_imported_late_and_in_their_home(file: Path) -> None:
    for found in imports_of(file):
        top = found.module.split(".")[0]
        if found.is_typing:
            continue
        assert found.is_late or top not in LATE, (
            f"{file} imports {top} at its top; import it where it is used"
        )
        home = HOME.get(top, package_of(file))
        assert home == package_of(file), f"{file} imports {top}, which only diffsynth/{home} knows"


@pytest.mark.parametrize("file", [*FILES, *sorted((REPOSITORY / "train").rglob("*.py"))], ids=name_of)
def test_file_asks_for_nothing_that_windows_lacks(file: Path) -> None:
    if file.name == "portable.py":
        return
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    found = [name for name in names if POSIX_NAMES.fullmatch(name)]
    found += [one.module for one in imports_of(file) if one.module in POSIX_MODULES]
    assert not found, f"{file} uses {', '.join(found)}; let diffsynth/portable.py do it"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_library_is_declared_in_setup(file: Path) -> None:
    declared = {
        name.lower().replace("-", "_") for name in re.findall(r'"([A-Za-z][\w-]*)', setup_requirements())
    }
    for found in imports_of(file):
        top = found.module.split(".")[0]
        is_ours = top in sys.stdlib_module_names or top in {"diffsynth", "train"} or top in OPTIONAL
        assert is_ours or PACKAGE_OF.get(top, top).lower() in declared, (
            f"{file} imports {top}; add it to setup.py"
        )


def setup_requirements() -> str:
    text = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:[A-Z]+ =|    install_requires=)\s*\[.*?\]", text, re.DOTALL | re.MULTILINE)
    return "\n".join(lists)


PLANTED = """
from typing import TYPE_CHECKING
import av
if TYPE_CHECKING:
    from torch import Tensor
from diffsynth.pipelines import wan_video
class A:
    def f(self):
        import torch.nn
from . import b
"""


def test_the_guard_sees_each_kind_of_import(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(PLANTED)
    seen = {
        found.module: (found.is_relative, found.is_late, found.is_typing)
        for found in imports_of(tmp_path / "a.py")
    }
    assert seen == {
        "typing": (False, False, False),
        "av": (False, False, False),
        "torch": (False, False, True),
        "diffsynth.pipelines": (False, False, False),
        "torch.nn": (False, True, False),
        "": (True, False, False),
    }
