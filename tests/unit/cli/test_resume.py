"""``generate --resume`` finishes what was killed between two steps, and trusts no file of somebody else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from diffsynth import VideoData, save_video
from diffsynth.cli.flags import FLAGS
from diffsynth.cli.generate_task import Picked
from diffsynth.cli.naming import Reserved
from diffsynth.cli.resume import LINE, SIGNATURE, line_note, resumed
from diffsynth.cli.task_flags import BESIDE_FLAGS, TASK_FLAGS
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.stopping import stopping_before
from tests.unit.cli.running import Ran, Shell
from tests.unit.lora.files import comfy_file

SEEDED = ("--seed", 3, "--steps", 4, "--num-frames", 5, "--save-every", 1)


@pytest.fixture
def make(shell: Shell, toy_folder: Path, tmp_path: Path) -> Callable[..., Ran]:
    def run(*arguments: object, out: str = "video.mp4") -> Ran:
        where = ("--model", toy_folder, "--device", "cpu", "--dtype", "float32", "--quiet")
        return shell("generate", "a red circle", *where, "--out", tmp_path / out, *SEEDED, *arguments)

    return run


def dies(make: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, *arguments: object, **given: Any) -> Path:
    """The file of a run that was stopped before its third step."""
    call = WanVideoPipeline.__call__

    def stopped(self: WanVideoPipeline, **given: Any) -> Any:
        return call(self, **{**given, "progress_bar_cmd": stopping_before(2)})

    with monkeypatch.context() as patched:
        patched.setattr(WanVideoPipeline, "__call__", stopped)
        ran = make(*arguments, **given)
    assert ran.status == 130, ran.err
    word = ran.err.split("diffsynth generate --resume ")[1].split()[0]
    assert "2 steps are kept in" in ran.err
    return Path(word)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def rewritten(file: Path, **changes: object) -> Path:
    """The same file with another line, as somebody else would write it."""
    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in list(opened.keys())}, opened.metadata()
    line = json.loads(metadata[LINE])
    line["values"] |= changes.pop("values", {})  # type: ignore[operator]
    metadata[LINE] = json.dumps({**line, **changes})
    save_file(tensors, file, metadata)
    return file


@pytest.mark.parametrize(
    "arguments",
    [("--sampler", "unipc", "--num-videos-per-prompt", 2), ("--preview",)],
    ids=["batch", "preview"],
)  # fmt: skip
def test_a_run_that_died_goes_on_with_nothing_but_its_file(
    arguments: tuple[object, ...],
    make: Callable[..., Ran],
    shell: Shell,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert make(*arguments, out="whole.mp4").status == 0
    file = dies(make, monkeypatch, *arguments)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    ran = shell("generate", "--resume", file)
    assert ran.status == 0, ran.err
    whole = [name for name in names(tmp_path) if name.startswith("whole")]
    assert names(tmp_path) == sorted([*whole, *(name.replace("whole", "video") for name in whole)])
    for path in tmp_path.glob("whole*.mp4"):
        assert path.with_name(path.name.replace("whole", "video")).read_bytes() == path.read_bytes()


def test_a_preview_that_died_before_its_sheet_goes_on_under_its_names(
    make: Callable[..., Ran], shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    preview = ("--preview", "--num-videos-per-prompt", 2)
    assert make(*preview, out="whole.mp4").status == 0
    with monkeypatch.context() as patched:
        patched.setattr("diffsynth.cli.generate.save_sheet", interrupted)
        assert make(*preview).status == 130
        assert make(*preview, out="other.mp4").status == 130
    (file,), (other,) = (tmp_path.glob(f"{name}-1.*.steps.safetensors") for name in ("video", "other"))
    assert shell("generate", "--resume", file).status == 0
    made = ["video-1.mp4", "video-2.mp4", "video-sheet.png"]
    assert [name for name in names(tmp_path) if name.startswith("video")] == made
    assert (tmp_path / "video-2.mp4").read_bytes() == (tmp_path / "whole-2.mp4").read_bytes()
    (tmp_path / "other-1.mp4").write_text("mine")
    assert shell("generate", "--resume", other).status == 0
    assert (tmp_path / "other-1.mp4").read_text() == "mine" and (tmp_path / "other-sheet_2.png").exists()


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_loras_inputs_and_a_drawn_seed_are_found_again(
    make: Callable[..., Ran], shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_video([Image.new("RGB", (32, 16), (40 * i, 0, 0)) for i in range(5)], tmp_path / "in.mp4")
    lora = comfy_file(tmp_path / "style.safetensors", {"blocks.0.self_attn.q": (48, 48)})
    monkeypatch.chdir(tmp_path)
    inputs = ("--input-video", "in.mp4", "--denoising-strength", 0.7, "--lora", "style.safetensors:0.5")
    assert make(*inputs, out="whole.mp4").status == 0
    file = dies(make, monkeypatch, *inputs)
    monkeypatch.chdir("/")
    assert shell("generate", "--resume", file, "--quiet").status == 0
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "video.mp4").read_bytes()
    monkeypatch.chdir(tmp_path)
    file = dies(make, monkeypatch, *inputs, out="again.mp4")
    comfy_file(lora, {"blocks.0.self_attn.q": (48, 48)})
    save_video([Image.new("RGB", (32, 16), (0, 40 * i, 0)) for i in range(5)], tmp_path / "in.mp4")
    ran = shell("generate", "--resume", file)
    assert (
        ran.status == 1
        and f"{file} is of another run: --input-video is not what it was; the LoRA 'sty" in ran.err
    )
    assert file.exists()


def test_what_would_make_another_run_is_named_and_the_rest_is_free(
    make: Callable[..., Ran], shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_folder: Path
) -> None:
    file = dies(make, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(ModelManager, "load_models", never)
        for arguments, words in (
            (("a blue circle",), "the prompt is 'a blue circle' and the run's is 'a red circle'"),
            (("--steps", 5, "--seed", 4), "--seed is 4 and the run's is 3; --num-inference-steps is 5 and"),
            (("--sampler", "dpm++"), "--sampler is dpm++ and the run's is not given"),
            (("--crf", 20), "--crf is 20.0 and the run's is not given"),
            (("--no-tiled",), "--tiled is False and the run's is not given"),
            (("--preview",), "--preview is True and the run's is False"),
            (("--size", "64*64"), "--size is part of a line that begins a run"),
        ):
            ran = shell("generate", "--resume", file, *arguments)
            assert ran.status == 1 and words in ran.err and "leave --resume out to begin anew" in ran.err, (
                ran.err
            )
    ran = shell(
        "generate", "a red circle", "--resume", file, "--seed", 3, "--dtype", "fp32", "--vram", "none",
    )  # fmt: skip
    assert ran.status == 1 and "--vram is 'none'; give GiB" in ran.err, "it is free, and was read"
    other = tmp_path / "other.mp4"
    ran = shell(
        "generate", "a red circle", "--resume", file, "--seed", 3, "--model", toy_folder, "--keep-latents",
        "--num-persistent", 0, "--out", other, "--save-every", 0,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert len(names(tmp_path)) == 2 and other.exists(), "the video, its latents, and no steps"


def test_files_that_moved_can_be_named_and_others_are_refused(
    make: Callable[..., Ran], shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_folder: Path
) -> None:
    model = shutil.copytree(toy_folder, tmp_path / "model")
    file = dies(make, monkeypatch)
    moved = rewritten_own(file, toy_folder, tmp_path / "gone", monkeypatch)
    ran = shell("generate", "--resume", moved)
    line = f"diffsynth generate --resume {file} --model PATH"
    assert ran.status == 1 and f"--model {tmp_path / 'gone'}, which is not there any more" in ran.err
    assert line in ran.err
    ran = shell("generate", "--resume", moved, "--model", *toy_files("t2v")[:1])
    assert ran.status == 1 and "error: " in ran.err and "Traceback" not in ran.err
    other = [word for path in toy_files("t2v", 7) for word in ("--model", path)]
    ran = shell("generate", "--resume", moved, *other)
    assert ran.status == 1 and "dit has other weights, or another dtype, than the run had" in ran.err
    assert "begin anew without --resume" in ran.err and "resume_from" not in ran.err
    assert shell("generate", "--resume", moved, "--model", model).status == 0


def rewritten_own(file: Path, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if the run had been given other paths, by its own user."""
    from diffsynth.cli import resume

    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in list(opened.keys())}, opened.metadata()
    metadata[LINE] = metadata[LINE].replace(str(old), str(new))
    metadata[SIGNATURE] = str(resume._signature(metadata[LINE]))
    save_file(tensors, file, metadata)
    return file


# a file of somebody else


def never(*_: object, **__: object) -> None:
    raise AssertionError("something is loaded")


def test_a_foreign_file_opens_nothing_that_is_not_at_hand_or_named(
    make: Callable[..., Ran], shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_folder: Path,
    own_cache: Path,
) -> None:  # fmt: skip
    assert make(out="whole.mp4").status == 0
    expected = (tmp_path / "whole.mp4").read_bytes()
    file = dies(make, monkeypatch)
    (own_cache / "diffsynth" / "steps.key").unlink()  # as on another machine
    precious = tmp_path / "precious.mp4"
    precious.write_text("mine")
    rewritten(file, paths=[str(precious)], values={"out": str(precious), "overwrite": True})
    with monkeypatch.context() as patched:
        patched.setattr(ModelManager, "load_models", never)
        ran = shell("generate", "--resume", file)
        line = f"diffsynth generate --resume {file} --model {toy_folder}"
        assert ran.status == 1 and "is of no run of yours on this machine" in ran.err and line in ran.err
        assert not (own_cache / "diffsynth" / "steps.key").exists()
    ran = shell("generate", "--resume", file, "--model", toy_folder)
    assert ran.status == 0, ran.err
    assert precious.read_text() == "mine" and (tmp_path / "precious_2.mp4").read_bytes() == expected
    file = rewritten(dies(make, monkeypatch), run_id="01234567")
    at_hand = shutil.copytree(toy_folder, tmp_path / "at hand")
    rewritten(file, values={"model": [str(at_hand)]})
    assert shell("generate", "--resume", file).status == 0
    link = tmp_path / "link"
    link.symlink_to(toy_folder)
    file = rewritten(dies(make, monkeypatch, "--overwrite"), values={"model": [str(link)]})
    ran = shell("generate", "--resume", file)
    assert ran.status == 1 and "is of no run of yours" in ran.err, "a link leads out of the folder"


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2}, {"prompt": 5}, {"run_id": "../../etc"}, {"paths": []}, {"paths": "video.mp4"},
        {"sheet": 3}, {"beside": {}}, {"values": {"height": "64"}}, {"values": {"height": True}},
        {"values": {"height": 10**30}}, {"values": {"cfg_scale": float("nan")}}, {"values": {"sampler": "x"}},
        {"values": {"model": "a"}}, {"values": {"model": [1]}}, {"values": {"tile_size": [1]}},
        {"values": {"vace_video": {"file": "a"}}}, {"values": {"vace_video": {"file": "a", "frames": [-1]}}},
        {"values": {"input_video": "a\0b"}}, {"values": {"unheard_of": 1}}, {"values": {"resume": "x"}},
        {"values": {"download": True}},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_that_was_changed_is_told_before_anything_is_opened(
    changes: dict[str, Any], shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    file = tmp_path / "a.steps.safetensors"
    line = {
        "version": 1, "prompt": "a", "values": {}, "run_id": "01234567", "paths": ["a.mp4"], "sheet": None,
        "beside": {"offload": False, "t5_cpu": False, "has_default_out": False},
    }  # fmt: skip
    save_file({"noisy_latents": torch.zeros(1, 16, 2, 2, 4)}, file, {"steps": "{}", LINE: json.dumps(line)})
    rewritten(file, **changes)
    monkeypatch.setattr(ModelManager, "load_models", never)
    ran = shell("generate", "--resume", file)
    assert ran.status == 1 and "Traceback" not in ran.err
    assert "was changed" in ran.err or "by another version" in ran.err, ran.err


def test_files_that_hold_no_run_are_told(shell: Shell, make: Callable[..., Ran], tmp_path: Path) -> None:
    import torch

    assert make("--keep-latents").status == 0
    (latents,) = tmp_path.glob("*.latents.safetensors")
    steps = tmp_path / "a.safetensors"
    save_file({"noisy_latents": torch.zeros(1, 16, 2, 2, 4)}, steps, {"steps": "{}"})
    for file, words in (
        (latents, "diffsynth decode"),
        (tmp_path / "video.mp4", "error: "),
        (tmp_path / "absent", "does not exist"),
        (steps, "was written by pipe(save_steps=...)"),
    ):
        ran = shell("generate", "--resume", file)
        assert ran.status == 1 and words in ran.err and "Traceback" not in ran.err, ran.err
    assert "diffsynth generate --resume" in shell("decode", steps).err


def test_saving_can_be_turned_off(make: Callable[..., Ran], tmp_path: Path) -> None:
    ran = make("--save-every", -1)
    assert ran.status == 1 and "--save-every is -1; give a number of steps, 0 for never" in ran.err


def test_every_flag_comes_back_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_video([Image.new("RGB", (32, 16))] * 5, "clip.mp4")
    Path("weights").mkdir()
    Path("style.safetensors").touch()
    values: dict[str, Any] = {**{f.name: f.default for f in FLAGS if f.name != "debug"}, **BESIDE_FLAGS}
    values = {name: list(value) if value == () else value for name, value in values.items()}
    clip = Path("clip.mp4")
    told: Mapping[str, Any] = {
        "height": 64, "tile_size": (4, 4), "tiled": False, "cfg_scale": 2.0, "sampler": "dpm++",
        "input_image": clip, "vace_reference_image": [clip, clip], "model": ["weights"],
        "lora": ["style.safetensors", "style.safetensors:0.5"], "strict": True, "t5_cpu": True,
        "vace_video": Picked(VideoData(clip), (0, 2), clip), "negative_prompt": "\udce9t\udce9 ü",
    }  # fmt: skip
    video = tmp_path / "v.mp4"
    reserved = Reserved(paths=(video,), sheet=None, run_id="01234567", overwrites=False, claims=())
    note = line_note("a prompt", {**values, **told}, reserved)
    import torch

    save_file({"noisy_latents": torch.zeros(1, 16, 2, 2, 4)}, "a.safetensors", {"steps": "{}", **note})
    nothing = {**values, **{flag.name: flag.default for flag in TASK_FLAGS}}
    prompt, found = resumed(None, {**nothing, "resume": Path("a.safetensors")})
    assert found.pop("resume") == Path("a.safetensors") and found.pop("read_files") == ()
    assert {"height", "cfg_scale"} <= set(found.pop("from_file"))
    absolute = {
        "input_image": tmp_path / clip, "vace_reference_image": [tmp_path / clip] * 2,
        "model": [str(tmp_path / "weights")],
        "lora": [f"{tmp_path}/style.safetensors", f"{tmp_path}/style.safetensors:0.5"],
    }  # fmt: skip
    picked, run = found.pop("vace_video"), found.pop("resumed")
    assert (picked.source, picked.frames) == (tmp_path / clip, (0, 2)) and len(picked) == 2
    assert run.names.paths == (video,) and run.names.run_id == "01234567"
    expected = {**values, **told, **absolute}
    assert prompt == "a prompt" and found == {name: expected[name] for name in found}
