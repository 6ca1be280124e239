"""The command as a whole: light where it can be, its flags those of pipe()."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from diffsynth import __version__
from diffsynth.cli.flags import FLAGS, TORCH_NAMES, DtypeName, PrecisionName, short_dtype
from diffsynth.conditioning.clips import FITS
from diffsynth.pipelines.foreign_arguments import ADVERTISED
from diffsynth.pipelines.options import call_arguments
from diffsynth.pipelines.request import known_arguments
from diffsynth.sampling.registry import SAMPLERS
from diffsynth.video import Resize
from tests.unit.checkpoints.weights import manifests, write_sparse
from tests.unit.cli.running import Shell

REPOSITORY = Path(__file__).parents[3]
# of pipe(), but not for a command line: objects of Python, and v1's arguments that nothing reads yet
PYTHON_ONLY = {
    "prompt",  # the one positional argument
    "prompt_embeds", "negative_prompt_embeds", "latents", "sigmas", "timesteps", "step_cache",
    "callback_on_step_end", "progress_bar_cmd", "progress_bar_st", "output_type", "rand_device",
    "camera_control_origin", "camera_control_poses",  # rows of 19 numbers
    "save_latents", "save_steps", "save_every", "resume_from",  # generate names the file itself
}  # fmt: skip

# what a run imports and how much memory it takes, told at its end
SPY = """
import atexit, json, sys
from pathlib import Path
from typing import get_args
def tell():
    heavy = {"torch", "numpy", "PIL", "av", "safetensors", "transformers"} & set(sys.modules)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    sys.stderr.write(json.dumps([sorted(heavy), *peaks]))
atexit.register(tell)
from diffsynth.cli.app import main
main()
"""


LIGHT = [
    "--version", "--help", "generate --help", "refine --help", "decode --help", "inspect --help", "inspect",
    "schema --json",
]  # fmt: skip


@pytest.mark.parametrize("command", LIGHT)
def test_light_commands_import_nothing_heavy(command: str, tmp_path: Path) -> None:
    arguments = command.split()
    if command == "inspect":
        file = write_sparse(tmp_path / "dit.safetensors", manifests()["wan2.1_t2v_14b"])
        assert file.stat().st_size > 28e9
        arguments += [str(file), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", SPY, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    heavy, *peaks_kib = json.loads(done.stderr)
    assert heavy == [] and all(peak < 100 << 10 for peak in peaks_kib)
    if command == "inspect":
        assert json.loads(done.stdout)[0]["parameters"] == 14_288_491_584


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffsynth", "--version"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"diffsynth {__version__}")


def test_flags_are_the_arguments_of_pipe() -> None:
    flags = {flag.name for flag in FLAGS if flag.is_call}
    assert flags == set(known_arguments()) - PYTHON_ONLY - set(ADVERTISED)
    assert set(known_arguments()) >= PYTHON_ONLY


def test_choices_are_what_the_pipeline_knows() -> None:
    import torch

    assert call_arguments()["sampler"].choices == tuple(SAMPLERS)
    assert call_arguments()["fit"].choices == FITS and call_arguments()["resize"].choices == get_args(Resize)
    names = [TORCH_NAMES.get(name.value, name.value) for name in DtypeName]
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in names)
    assert [name.value for name in PrecisionName] == ["official", "v1"]


def test_a_dtype_has_two_spellings_everywhere(shell: Shell, toy_folder: Path) -> None:
    pairs = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "fp8": "fp8"}
    for long, short in pairs.items():
        assert short_dtype(long) == short_dtype(short) == short
        plans = [
            json.loads(shell("plan", toy_folder, "--json", "--dtype", name).out) for name in (long, short)
        ]
        assert plans[0] == plans[1] and plans[0]["request"]["dtype"] == short
    assert set(pairs) | set(pairs.values()) == {name.value for name in DtypeName}


def test_help_names_every_flag(shell: Shell) -> None:
    text = shell("generate", "--help").out
    for flag in FLAGS:
        for spelling in flag.spellings or ("--" + flag.name.replace("_", "-"),):
            assert all(part in text for part in spelling.split("/")), spelling
    assert all(command in shell("--help").out for command in ("generate", "inspect", "doctor"))


def test_usage_errors_end_with_2(shell: Shell) -> None:
    for arguments in (
        ["generate"],
        ["generate", "a", "b"],
        ["generate", "a", "--hieght", "64"],
        ["generate", "a", "--height", "tall"],
        ["generate", "a", "--sampler", "heun"],
        ["paint"],
        ["inspect"],
    ):
        ran = shell(*arguments)
        assert ran.status == 2 and "Traceback" not in ran.err, arguments
    assert "--height" in shell("generate", "a", "--hieght", "64").err, "the nearest flag is named"
    assert "dpm++" in shell("generate", "a", "--sampler", "heun").err


def test_inspect_tells_errors_in_one_message(shell: Shell, tmp_path: Path) -> None:
    ran = shell("inspect", tmp_path / "no.safetensors")
    assert ran.status == 1 and ran.err.startswith("error: ") and "no.safetensors does not exist" in ran.err
    assert "Traceback" not in ran.err and ran.out == ""


def test_inspect_and_doctor_print_json(shell: Shell, toy_folder: Path) -> None:
    networks = json.loads(shell("inspect", toy_folder, "--json").out)
    assert {network["name"] for network in networks} >= {"wan_video_dit", "wan_video_vae"}
    assert "wan_video_text_encoder" in shell("inspect", toy_folder).out
    assert "findings" in json.loads(shell("doctor", "--json").out)
