"""A run that died between two steps goes on to the same numbers; what is another run is named and refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffsynth import VideoData, save_video
from diffsynth.errors import (
    ArgumentError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DiffSynthError,
    OutputPathError,
    ResumeError,
)
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.pipelines import saved_steps
from diffsynth.pipelines.saved_latents import read_latents
from diffsynth.pipelines.saved_steps import StepsPath, read_steps
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.sampling.registry import SAMPLERS
from tests.step_caches import EverySecondStep
from tests.stopping import stopping_before
from tests.toys import TOY_DIT, TOY_FILES
from tests.unit.lora.files import comfy_file
from tests.unit.pipelines.counting import calls_of

D = TOY_DIT.dim
LAYERS = {f"blocks.{i}.{name}": (D, D) for i in (0, 1) for name in ("self_attn.q", "cross_attn.k")}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.steps.safetensors"


def latents(pipe: WanVideoPipeline, **given: Any) -> Tensor:
    usual = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 3, "output_type": "latent"}
    made = pipe(**{name: value for name, value in {**usual, **given}.items() if value is not None})
    assert isinstance(made, Tensor)
    return made


def dies(pipe: WanVideoPipeline, file: Path, before: int, **given: Any) -> None:
    """Leaves the file of a run that ended before this step, every step of which was saved."""
    with pytest.raises(KeyboardInterrupt):
        latents(
            pipe,
            **{"save_steps": file, "save_every": 1, "progress_bar_cmd": stopping_before(before), **given},
        )


def load(*files: str | Path, dtype: torch.dtype = torch.float32, **given: Any) -> WanVideoPipeline:
    manager = ModelManager(dtype, "cpu").load_models([str(file) for file in files])
    return WanVideoPipeline.from_model_manager(manager, **given)


def content_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as opened:
        return {name: opened.get_tensor(name) for name in list(opened.keys())}, opened.metadata()


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_goes_on_with_the_same_bits(
    sampler: str, before: int, toy_pipe: WanVideoPipeline, two_experts: WanVideoPipeline, file: Path
) -> None:
    for pipe, more in (
        (toy_pipe, {"num_videos_per_prompt": 2}),
        (two_experts, {"cfg_scale": 3.0, "cfg_scale_low_noise": 1.0}),
    ):
        dies(pipe, file, before, sampler=sampler, **more)
        assert read_steps(file).next_step == before
        with calls_of(pipe.dit, pipe.dit2) as calls:
            made = latents(pipe, sampler=sampler, resume_from=file, **more)
        assert len(calls) == 4 - before
        assert torch.equal(made, latents(pipe, sampler=sampler, **more))


@pytest.mark.parametrize("of_blocks", [True, False], ids=["blocks", "velocities"])
def test_what_a_step_cache_remembers_is_saved_with_the_steps(
    of_blocks: bool, two_experts: WanVideoPipeline, file: Path
) -> None:
    expected = latents(two_experts, step_cache=EverySecondStep(of_blocks=of_blocks))
    assert not torch.equal(expected, latents(two_experts))
    for limits in ({}, {"num_persistent_param_in_dit": 0}):
        if limits:
            two_experts.enable_vram_management(**limits)
        dies(two_experts, file, 3, step_cache=EverySecondStep(of_blocks=of_blocks))
        again = EverySecondStep(of_blocks=of_blocks)
        assert torch.equal(latents(two_experts, resume_from=file, step_cache=again), expected)
        assert [index for index, _, _ in again.asked] == [3, 3]
    two_experts.disable_vram_management()
    other = EverySecondStep(of_blocks=not of_blocks)
    for cache, words in ((other, r"and is 'EverySecondStep\(of_blocks="), (None, "and is not given")):
        with pytest.raises(ResumeError, match=rf"step cache was 'EverySecondStep\(of_blocks=.*\)' {words}"):
            latents(two_experts, resume_from=file, step_cache=cache)


def test_a_run_may_die_again_and_be_saved_in_the_same_file(toy_pipe: WanVideoPipeline, file: Path) -> None:
    dies(toy_pipe, file, 1, sampler="unipc")
    dies(toy_pipe, file, 1, sampler="unipc", resume_from=file)  # one step further
    assert read_steps(file).next_step == 2
    made = latents(toy_pipe, sampler="unipc", resume_from=file, save_steps=file, save_every=2)
    assert torch.equal(made, latents(toy_pipe, sampler="unipc"))
    with calls_of(toy_pipe.dit) as calls:
        assert torch.equal(latents(toy_pipe, sampler="unipc", resume_from=file), made), "all steps are there"
    assert calls == []


def test_a_drawn_seed_is_that_of_the_run(toy_pipe: WanVideoPipeline, file: Path) -> None:
    dies(toy_pipe, file, 2, seed=None)
    seed = toy_pipe.last_settings["seed"]
    made = latents(toy_pipe, seed=None, resume_from=file)
    assert toy_pipe.last_settings["seed"] == seed and torch.equal(made, latents(toy_pipe, seed=seed))
    assert torch.equal(latents(toy_pipe, seed=-1, resume_from=file), made), "-1 asks for any"
    noise = torch.randn(1, 16, 2, 2, 4)
    dies(toy_pipe, file, 2, seed=None, latents=noise)
    made = latents(toy_pipe, seed=None, latents=noise, resume_from=file)
    assert torch.equal(made, latents(toy_pipe, seed=None, latents=noise))
    with pytest.raises(ResumeError, match="latents is not what it was"):
        latents(toy_pipe, seed=None, latents=noise + 1, resume_from=file)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_arithmetic_of_v1_goes_on(sampler: str, toy_folder: Path, file: Path) -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_folder, torch.bfloat16, "cpu", precision="v1")
    dies(pipe, file, 2, sampler=sampler)
    assert read_steps(file).latents.dtype == torch.bfloat16
    assert torch.equal(latents(pipe, sampler=sampler, resume_from=file), latents(pipe, sampler=sampler))


def test_strengths_by_step_go_on_where_they_were(toy_folder: Path, file: Path, tmp_path: Path) -> None:
    style = comfy_file(tmp_path / "style.safetensors", LAYERS)
    pipe = load(*(toy_folder / name for name in TOY_FILES.values()))
    pipe.load_lora(style, mode="attach")
    pipe.set_lora("style", [1.0, 0.5, 0.0, 2.0])
    expected = latents(pipe)
    dies(pipe, file, 2)
    assert torch.equal(latents(pipe, resume_from=file), expected)
    pipe.set_lora("style", [1.0, 0.5, 0.0, 1.0])
    with pytest.raises(ResumeError, match=r"strength of the LoRA 'style' was \[1.0, 0.5, 0.0, 2.0\] and is"):
        latents(pipe, resume_from=file)
    pipe.unload_lora()
    with pytest.raises(ResumeError, match="the run had the LoRAs style, and none are loaded now"):
        latents(pipe, resume_from=file)
    pipe.load_lora(comfy_file(tmp_path / "style.safetensors", LAYERS), mode="attach")
    with pytest.raises(ResumeError, match="the LoRA 'style' is another than the run's") as raised:
        latents(pipe, resume_from=file)
    assert len(raised.value.differences) == 1, "that weights differ with it is not said again"


def test_a_callback_that_changes_latents_and_strengths_goes_on(
    toy_folder: Path, file: Path, tmp_path: Path
) -> None:
    pipe = load(*(toy_folder / name for name in TOY_FILES.values()))
    pipe.load_lora(comfy_file(tmp_path / "style.safetensors", LAYERS), mode="attach")

    def halve(
        pipe: WanVideoPipeline, step: int, told: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if step == 1:
            pipe.set_lora("style", 0.25)
        return {"latents": tensors["latents"] / (1 + step)}

    expected = latents(pipe, callback_on_step_end=halve)
    pipe.set_lora("style", 1.0)
    dies(pipe, file, 3, callback_on_step_end=halve)
    pipe.set_lora("style", 1.0)
    with pytest.raises(ResumeError, match=r"strength of the LoRA 'style' was 0\.25 and is 1\.0"):
        latents(pipe, callback_on_step_end=halve, resume_from=file)
    pipe.set_lora("style", 0.25)
    assert torch.equal(latents(pipe, callback_on_step_end=halve, resume_from=file), expected)
    with pytest.raises(ResumeError, match="callback_on_step_end was given, and is missing now"):
        latents(pipe, resume_from=file)


def test_streamed_weights_are_the_same_run(toy_folder: Path, file: Path) -> None:
    pipe = load(*(toy_folder / name for name in TOY_FILES.values()))
    expected = latents(pipe)
    dies(pipe, file, 2)
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert torch.equal(latents(pipe, resume_from=file), expected)
    dies(pipe, file, 1)
    pipe.disable_vram_management()
    assert torch.equal(latents(pipe, resume_from=file), expected)


def test_an_interrupted_call_keeps_its_last_step(toy_pipe: WanVideoPipeline, file: Path) -> None:
    def stop(pipe: WanVideoPipeline, step: int, *_: Any) -> None:
        if step == 1:
            pipe.interrupt()

    latents(toy_pipe, save_steps=file, callback_on_step_end=stop)
    assert read_steps(file).next_step == 2
    made = latents(toy_pipe, resume_from=file, callback_on_step_end=lambda *_: None)
    assert torch.equal(made, latents(toy_pipe))


def test_frames_that_come_one_by_one_are_the_same_frames(file: Path) -> None:
    pipe = load(*toy_files("control"))
    frames = [Image.fromarray(np.full((16, 32, 3), 40 * i, np.uint8)) for i in range(5)]
    dies(pipe, file, 2, control_video=(frame for frame in frames))
    made = latents(pipe, control_video=(frame for frame in frames), resume_from=file)
    assert torch.equal(made, latents(pipe, control_video=frames))
    with pytest.raises(ResumeError, match="control_video is not what it was"):
        latents(pipe, control_video=frames[::-1], resume_from=file)


# what is another run


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"sampler": "dpm++"}, "sampler was 'unipc' and is 'dpm++'"),
        ({"num_inference_steps": 5}, "num_inference_steps was 4 and is 5"),
        ({"prompt": "a blue circle"}, "prompt was 'a red circle' and is 'a blue circle'"),
        ({"negative_prompt": "blue"}, "negative_prompt was not given and is 'blue'"),
        ({"cfg_scale": 2.0, "height": 32}, "cfg_scale was 3.0 and is 2.0; height was 16 and is 32"),
        ({"sigma_shift": 4.0}, "sigma_shift was 3.0 and is 4.0"),
        ({"num_videos_per_prompt": 2}, "num_videos_per_prompt was not given and is 2"),
        ({"input_video": torch.zeros(5, 3, 16, 32), "denoising_strength": 0.5}, "input_video is given now"),
        ({"callback_on_step_end": print}, "callback_on_step_end is given now, and the run had none"),
        ({"prompt": None, "prompt_embeds": torch.ones(1, 4, 32)}, "prompt_embeds is given now"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_changed_argument_is_named_before_anything_runs(
    changed: dict[str, Any], words: str, toy_pipe: WanVideoPipeline, file: Path
) -> None:
    dies(toy_pipe, file, 1, sampler="unipc")
    with calls_of(toy_pipe.text_encoder, toy_pipe.dit) as calls, pytest.raises(ResumeError) as raised:
        latents(toy_pipe, **{"sampler": "unipc", "resume_from": file, **changed})
    assert calls == []
    assert str(raised.value).startswith(f"{file} is of another run: ") and words in str(raised.value)


def test_changed_weights_are_named(toy_folder: Path, file: Path, tmp_path: Path) -> None:
    dit, text, vae = (toy_folder / TOY_FILES[part] for part in ("dit", "text_encoder", "vae"))
    dies(load(dit, text, vae), file, 1)
    expected = latents(load(dit, text, vae))
    tensors, metadata = content_of(dit)
    tensors["blocks.1.ffn.2.bias"][-1] += 1e-3
    tuned = tmp_path / "dit.safetensors"
    save_file(tensors, tuned, metadata)
    with pytest.raises(ResumeError, match="dit has other weights, or another dtype, than the run had"):
        latents(load(tuned, text, vae), resume_from=file)
    with pytest.raises(ResumeError, match=r"dtype was 'float32' and is 'bfloat16'; dit has .*; vae has"):
        latents(load(dit, text, vae, dtype=torch.bfloat16), resume_from=file)
    with pytest.raises(ResumeError, match="precision was 'official' and is 'v1'"):
        latents(load(dit, text, vae, precision="v1"), resume_from=file, tiled=False)
    moved = tmp_path / "elsewhere" / "model.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(dit.read_bytes())
    assert torch.equal(latents(load(moved, text, vae), resume_from=file), expected)
    assert torch.equal(latents(load(dit, text), resume_from=file), expected), "nothing asks for the VAE"


def test_an_input_is_known_by_its_content(file: Path, tmp_path: Path) -> None:
    pipe = load(*toy_files("control"))
    frames = [np.full((16, 32, 3), 40 * i, np.uint8) for i in range(5)]
    save_video(frames, tmp_path / "a.mp4", crf=0)
    expected = latents(pipe, control_video=VideoData(tmp_path / "a.mp4"))
    dies(pipe, file, 2, control_video=VideoData(tmp_path / "a.mp4"))
    (tmp_path / "a.mp4").rename(tmp_path / "b.mp4")
    assert torch.equal(latents(pipe, control_video=VideoData(tmp_path / "b.mp4"), resume_from=file), expected)
    save_video(frames[::-1], tmp_path / "a.mp4", crf=0)
    with pytest.raises(ResumeError, match="control_video is not what it was"):
        latents(pipe, control_video=VideoData(tmp_path / "a.mp4"), resume_from=file)


# the file


def test_without_a_number_steps_are_saved_after_each_minute(
    toy_pipe: WanVideoPipeline, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(saved_steps.time, "monotonic", lambda: now[0])
    seen: list[int | None] = []

    def hour_glass(steps: Any) -> Iterator[Any]:
        for told in steps:
            yield told
            seen.append(read_steps(file).next_step if file.exists() else None)
            now[0] += 25.0

    latents(toy_pipe, num_inference_steps=8, save_steps=file, progress_bar_cmd=hour_glass)
    assert seen == [None, None, None, 4, 4, 4, 7, 7]


def test_a_short_run_writes_nothing(toy_pipe: WanVideoPipeline, file: Path) -> None:
    latents(toy_pipe, save_steps=file)
    assert not file.exists()


def test_a_disk_that_fills_up_costs_a_warning_and_no_step(
    toy_pipe: WanVideoPipeline, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    expected = latents(toy_pipe)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    def fills_up(steps: Any) -> Iterator[Any]:
        for index, told in enumerate(steps):
            if index == 1:
                monkeypatch.setattr("os.fsync", full)
            yield told

    made = latents(toy_pipe, save_steps=file, save_every=1, progress_bar_cmd=fills_up)
    assert torch.equal(made, expected) and read_steps(file).next_step == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, "said once"
    assert warnings[0].startswith("Step 2 is not saved, the run goes on. 1 steps are saved. ")
    assert "No space left on device" in warnings[0]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_log_says_how_to_go_on(toy_pipe: WanVideoPipeline, file: Path, caplog: Any) -> None:
    dies(toy_pipe, file, 2)
    assert (
        f"2 steps are kept in {file}; to go on: the same call with resume_from={str(file)!r}" in caplog.text
    )
    path = StepsPath(file, lambda: {"line": "a note"}, "press the button")
    dies(toy_pipe, path, 1)  # type: ignore[arg-type]
    assert "to go on: press the button" in caplog.text and read_steps(file).note["line"] == "a note"


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"save_steps": "/proc/none/a.safetensors"}, OutputPathError, "cannot be written"),
        ({"save_steps": "a.mp4"}, OutputPathError, "extension '.mp4'"),
        ({"save_steps": 5}, ArgumentError, "save_steps is 5; give a path"),
        ({"save_steps": "a.safetensors", "save_every": 0}, ArgumentError, "save_every is 0; give a number"),
        ({"save_steps": "a.safetensors", "save_every": 1.5}, ArgumentError, "save_every is 1.5"),
        ({"save_every": 2}, ArgumentError, "without save_steps="),
        ({"save_steps": "a.safetensors", "save_latents": "./a.safetensors"}, ArgumentError, "are one file"),
        ({"resume_from": 5}, ArgumentError, "resume_from is 5; give the file"),
        ({"resume_from": "absent.safetensors"}, CheckpointNotFoundError, "does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,  # equal in every process
)  # fmt: skip
def test_what_cannot_work_is_known_before_anything_runs(
    arguments: dict[str, Any],
    kind: type[DiffSynthError],
    words: str,
    toy_pipe: WanVideoPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with calls_of(toy_pipe.text_encoder, toy_pipe.dit) as calls, pytest.raises(kind, match=words):
        latents(toy_pipe, **arguments)
    assert calls == [] and list(tmp_path.iterdir()) == []


def test_files_that_hold_no_steps_or_were_changed_are_told(
    toy_pipe: WanVideoPipeline, file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(2)}, other)
    with pytest.raises(ArgumentError, match=r"holds no steps\. Give a file"):
        read_steps(other)
    save_file({"latents": torch.zeros(1, 16, 1, 2, 2)}, other)
    with pytest.raises(ArgumentError, match=r"denoising is done; .*: diffsynth decode"):
        read_steps(other)
    dies(toy_pipe, file, 2, sampler="unipc")
    with pytest.raises(ArgumentError, match="diffsynth generate --resume"):
        read_latents(file)
    tensors, metadata = content_of(file)
    told = json.loads(metadata["steps"])
    for changes in (
        "[" * 9999, "5", {"next_step": -1}, {"next_step": 9}, {"next_step": True}, {"seed": "x"},
        {"facts": 3}, {"facts": {**told["facts"], "loras": [1]}},
        {"facts": {**told["facts"], "settings": []}},
    ):  # fmt: skip
        text = changes if isinstance(changes, str) else json.dumps({**told, **changes})
        save_file(tensors, other, {**metadata, "steps": text})
        with pytest.raises(ArgumentError, match="was changed"):
            latents(toy_pipe, sampler="unipc", resume_from=other)
    save_file(tensors, other, {**metadata, "steps": json.dumps({**told, "next_step": 1})})
    with pytest.raises(ArgumentError, match="step 1 looks back at clean, start"):
        latents(toy_pipe, sampler="unipc", resume_from=other)
    for shape, dtype, words in (
        ((1, 16, 2, 2, 5), torch.float32, r"shape \(1, 16, 2, 2, 5\)"),
        ((1, 16, 2, 2, 4), torch.bfloat16, "torch.bfloat16"),
    ):
        save_file({name: torch.zeros(shape, dtype=dtype) for name in tensors}, other, metadata)
        with pytest.raises(ArgumentError, match=words):
            latents(toy_pipe, sampler="unipc", resume_from=other)
    save_file({**tensors, "sampler.start": torch.zeros(3)}, other, metadata)
    with pytest.raises(ArgumentError, match="not of one shape"):
        latents(toy_pipe, sampler="unipc", resume_from=other)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match="is cut off"):
        read_steps(file)
