"""``diffsynth refine``: a preview made large, by the settings inside its file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffsynth import VideoData, read_metadata, save_image, save_video
from diffsynth.cli import generate
from diffsynth.cli.flags import FLAGS
from diffsynth.cli.refine import refined
from diffsynth.errors import AmbiguousModelError, ArgumentError, CheckpointNotFoundError
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.cli.running import Shell

SETTINGS: dict[str, object] = {
    "prompt": "a cat", "negative_prompt": "grey", "seed": 12, "height": 240, "width": 416, "num_frames": 81,
    "num_inference_steps": 13, "cfg_scale": 6.0, "sigma_shift": 8.0, "sampler": "unipc", "fps": 16.0,
    "precision": "official", "models": {"dit": "tiny:diffusion_pytorch_model.safetensors"},
    "preview_of": {"height": 480, "width": 832, "num_inference_steps": 50},
}  # fmt: skip


def preview(path: Path, **changes: object) -> Path:
    """A file that holds the settings of a preview."""
    metadata = {name: value for name, value in {**SETTINGS, **changes}.items() if value is not None}
    save_video([Image.new("RGB", (416, 240))] * 5, path, metadata=metadata)
    return path


def asked(path: Path, **values: Any) -> dict[str, Any]:
    return refined(path, None, values)[1]


def file(path: Path) -> Path:
    """A file where weights are looked for; nothing reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_the_file_tells_everything_but_size_steps_and_strength(tmp_path: Path) -> None:
    path = preview(tmp_path / "v-2.mp4")
    prompt, values = refined(path, None, {})
    same = (
        "negative_prompt",
        "seed",
        "num_frames",
        "cfg_scale",
        "sigma_shift",
        "sampler",
        "fps",
        "precision",
    )
    assert prompt == "a cat" and {name: values[name] for name in same} == {
        name: SETTINGS[name] for name in same
    }
    assert (values["height"], values["width"]) == (480, 832), "those of the full run"
    assert (values["input_video"], values["denoising_strength"]) == (path, 0.5)
    assert values["num_inference_steps"] == 25, "of 50 steps those below the strength"
    assert values["out"] == tmp_path / "v-2-refined.mp4"


def test_flags_win(tmp_path: Path) -> None:
    path = preview(tmp_path / "v.mp4")
    prompt, values = refined(path, "a dog", {"size": "1280*720", "denoising_strength": 0.3, "seed": 1})
    assert (prompt, values["height"], values["width"], values["seed"]) == ("a dog", 720, 1280, 1)
    assert values["num_inference_steps"] == 15
    assert asked(path, num_inference_steps=7)["num_inference_steps"] == 7
    distilled = asked(path, preset="lightx2v-4step")
    assert [distilled[name] for name in ("num_inference_steps", "cfg_scale", "sampler")] == [None] * 3
    assert asked(path, height=960)["height"] == 960
    with pytest.raises(ArgumentError, match="--size replaces --height"):
        asked(path, size="64*64", height=64)


def test_an_ordinary_video_is_made_twice_as_large(tmp_path: Path) -> None:
    values = asked(preview(tmp_path / "v.mp4", preview_of=None, num_inference_steps=40))
    assert (values["height"], values["width"], values["num_inference_steps"]) == (480, 832, 20)


def test_an_area_keeps_the_proportions_of_the_file(tmp_path: Path) -> None:
    full = {"max_area": 4 * 240 * 416, "num_inference_steps": 40}
    values = asked(preview(tmp_path / "v.mp4", preview_of=full, max_area=240 * 416))
    assert (values["height"], values["width"], values["max_area"]) == (480, 832, None)


def test_a_file_that_does_not_tell_how_it_was_made_is_refused(tmp_path: Path) -> None:
    save_video([Image.new("RGB", (32, 16))] * 5, tmp_path / "other.mp4")
    with pytest.raises(ArgumentError, match=r"other\.mp4 does not tell how it was made.*--input-video"):
        asked(tmp_path / "other.mp4")
    with pytest.raises(ArgumentError, match="--from is missing"):
        refined(None, None, {})


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models and LoRAs in it; the previews are elsewhere."""
    monkeypatch.chdir(file(tmp_path / "work" / "models" / "Wan2.1-T2V-1.3B" / "dit.safetensors").parents[2])
    file(Path("models/Wan2.1-T2V-1.3B/vae.pth"))
    file(Path("style.safetensors"))
    return tmp_path / "work"


OF_13B = {"dit": "Wan2.1-T2V-1.3B/dit.safetensors", "vae": "Wan2.1-T2V-1.3B/vae.pth"}


def test_the_model_that_made_a_file_is_used_where_it_is_found(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "diffsynth")
    path = preview(work.parent / "v.mp4", models=OF_13B, loras={"style.safetensors": 0.8})
    values = asked(path)
    assert values["model"] == ["models/Wan2.1-T2V-1.3B/dit.safetensors", "models/Wan2.1-T2V-1.3B/vae.pth"]
    assert values["lora"] == ["style.safetensors:0.8"] and values["dit"] == []
    assert "was made with Wan2.1-T2V-1.3B/dit.safetensors" in caplog.text
    assert "the LoRA style.safetensors; using style.safetensors:0.8" in caplog.text
    named = asked(path, model=["other"], lora=["mine.safetensors:0.5"])
    assert (named["model"], named["lora"]) == (["other"], ["mine.safetensors:0.5"]), "flags win"
    assert asked(path, lora=["none"])["lora"] == []


def test_two_experts_keep_their_roles(work: Path) -> None:
    names = {
        "dit": "A14B/high_noise_model/a.pth",
        "dit_low_noise": "A14B/low_noise_model/a.pth",
    }
    files = [str(file(Path("models") / "Wan-AI" / name)) for name in names.values()]
    values = asked(preview(work.parent / "v.mp4", models=names))
    assert values["model"] == values["dit"] == files


def test_a_model_that_is_not_found_is_refused_with_the_line_to_type(work: Path) -> None:
    path = preview(work.parent / "my v.mp4", models={"dit": "Wan2.1-T2V-14B/dit.safetensors"})
    line = f"diffsynth refine --from '{path}' --size '1280*720' --vram 12 --model PATH/Wan2.1-T2V-14B"
    with pytest.raises(CheckpointNotFoundError, match=r"made with Wan2\.1-T2V-14B/dit\.safetensors") as error:
        asked(path, size="1280*720", vram="12")
    assert str(error.value).splitlines()[1].strip() == line
    for told in (None, {}, [], "dit", 5):
        with pytest.raises(ArgumentError, match=r"does not tell which model made it.*\n.* --model FOLDER"):
            asked(preview(work.parent / "v.mp4", models=told))
    file(Path("Wan2.1-T2V-1.3B/dit.safetensors"))
    with pytest.raises(AmbiguousModelError, match="several files have that name"):
        asked(preview(work.parent / "v.mp4", models=OF_13B))


def test_a_lora_that_is_not_found_is_refused_with_the_line_to_type(work: Path) -> None:
    path = preview(work.parent / "v.mp4", loras={"lost.safetensors": 0.8})
    with pytest.raises(CheckpointNotFoundError) as error:
        asked(path)
    assert "--lora PATH/lost.safetensors:0.8" in str(error.value) and "--lora none" in str(error.value)
    assert asked(path, lora=["style.safetensors"])["lora"] == ["style.safetensors"]
    for strength in ("1", True, float("nan"), float("inf"), 10**400, None, [0.8]):
        path = preview(work.parent / "v.mp4", loras={"style.safetensors": strength})
        with pytest.raises(ArgumentError, match="it was changed"):
            asked(path)


def test_inputs_that_are_not_in_the_file_are_asked_for_again(work: Path) -> None:
    inputs = {"input_image": "cat $(x).png", "vace_reference_image": ["a.png", "b.png"], "unknown": "c"}
    path = preview(work.parent / "v.mp4", inputs=inputs)
    with pytest.raises(ArgumentError, match="from files that are not inside it") as error:
        asked(path)
    words = "--input-image 'PATH/cat $(x).png'"
    words += "".join(f" --vace-reference-image PATH/{name}.png" for name in "ab")
    assert str(error.value).splitlines()[1].endswith(words)
    given = {"input_image": Path("cat.png"), "vace_reference_image": [Path("a.png"), Path("b.png")]}
    assert asked(path, **given)["input_image"] == Path("cat.png")


HOSTILE: dict[str, dict[str, object]] = {
    "path-of-a-cache": {"cache_text": "/tmp/written"},
    "path-of-a-picture": {"input_image": "/etc/hostname", "control_video": "/etc/hostname"},
    "tokenizer": {"tokenizer_path": "/etc"},
    "model-flags": {"model": ["/etc/a.safetensors"], "lora": ["/etc/b.safetensors"], "download": True},
    "unknown-keys": {"__class__": "x", "out": "/tmp/x.mp4", "device": "cuda:9", "resume": "/x", "vram": "9"},
}  # fmt: skip


@pytest.mark.parametrize("settings", HOSTILE.values(), ids=HOSTILE)
def test_a_file_chooses_no_path_and_no_flag(settings: dict[str, object], tmp_path: Path) -> None:
    path = preview(tmp_path / "v.mp4", **settings)
    assert asked(path) == asked(preview(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "12"), ("seed", 10**30), ("seed", True), ("seed", [1]), ("num_frames", 5.5),
        ("cfg_scale", "six"), ("cfg_scale", float("nan")), ("cfg_scale", 10**400), ("sigma_shift", [1.0]),
        ("sampler", "os.system"), ("precision", "v9"), ("fps", float("inf")), ("negative_prompt", 5),
        ("tile_size", [1]), ("tile_size", ["a", "b"]), ("tiled", "yes"), ("num_frames", {}),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_told_with_the_flag_to_give(
    name: str, value: object, tmp_path: Path
) -> None:
    flag = next(flag for flag in FLAGS if flag.name == name)
    spelling = (flag.spellings or ("--" + name.replace("_", "-"),))[0].split("/")[0]
    with pytest.raises(
        ArgumentError, match=f"tells {name} is .*it was changed. Give it yourself: {spelling}"
    ):
        asked(preview(tmp_path / "v.mp4", **{name: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"height": "240"}, {"height": None}, {"width": -5}, {"height": 10**30}, {"width": float("nan")},
    ],
)  # fmt: skip
def test_a_size_that_is_none_is_asked_for(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"does not tell its own size; give --size"):
        asked(preview(tmp_path / "v.mp4", **changes))


@pytest.mark.parametrize(
    "full", [5, "x", [], {"height": "x", "width": None}, {"max_area": -1}, {"height": 1e9}]
)
def test_a_full_run_that_is_none_is_left_aside(full: object, tmp_path: Path) -> None:
    values = asked(preview(tmp_path / "v.mp4", preview_of=full))
    assert values["num_inference_steps"] >= 1 and 0 < values["height"] <= 480 and 0 < values["width"] <= 832


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "{" + '"a":{' * 10**5, "1" * 10**5, '{"a": "' + "x" * (5 << 20) + '"}', "\0", "[]"],
    ids=["nested", "nested-objects", "digits", "huge", "null", "list"],
)  # fmt: skip
def test_a_comment_that_is_no_settings_is_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffsynth.video.settings._picture_comment", lambda path: text)
    assert read_metadata(file(tmp_path / "p.png")) == {}


def test_names_of_a_foreign_file_are_safe_on_a_terminal(work: Path) -> None:
    names = {"dit": "\x1b[2Jx/$(touch owned)\n.safetensors", "vae": "../../vae.pth"}
    with pytest.raises(CheckpointNotFoundError) as error:
        asked(preview(work.parent / "v.mp4", models=names))
    told = str(error.value)
    assert "\x1b" not in told and "--model 'PATH/?[2Jx'" in told and told.count("\n") == 1


def test_a_picture_is_refined_to_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    save_image(Image.new("RGB", (416, 240)), path, metadata={**SETTINGS, "num_frames": 1})
    values = asked(path)
    assert values["input_video"] == path and values["out"].name == "p-refined.png"
    assert values["fps"] is None


def test_both_spellings_ask_for_the_same(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(generate, "make", lambda prompt, values: seen.append((prompt, dict(values))))
    path = preview(tmp_path / "v.mp4")
    more = ("--size", "1280*720", "--denoising-strength", "0.4")
    assert shell("refine", "--from", path, *more, "--model", "wan", "--steps", 6).status == 0
    task = ("--task", "video_super_resolution", "--input_video_path", path, "--ckpt_dir", "wan")
    assert shell("generate", *task, *more, "--sample_steps", 6).status == 0
    for _, values in seen:
        for name in ("task", "prompt_text", "offload"):  # networks rest on the host, as officially
            values.pop(name, None)
    assert seen[0] == seen[1] and seen[0][1]["denoising_strength"] == 0.4 and seen[0][1]["model"] == ["wan"]
    for words, told in (
        (("--image", "a.png"), "--image is not read by --task video_super_resolution"),
        (("--preview",), "--preview is not read"),
        (("--steps", 3, "--sample_steps", 6), "two names of one thing"),
        (("--dit_fsdp",), "--dit_fsdp is not read"),
    ):
        ran = shell("generate", *task, *words)
        assert ran.status == 1 and told in ran.err, ran.err
    ran = shell("generate", "--task", "video_super_resolution", "--ckpt_dir", "wan")
    assert ran.status == 1 and "needs --input_video_path FILE" in ran.err


def test_a_preview_is_refined_on_a_model(
    shell: Shell, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--model", toy_folder, "--dtype", "float32", "--device", "cpu", "--quiet")
    out = tmp_path / "v.mp4"
    line = ("a red circle", *where, "--preview", "--num-videos-per-prompt", 2, "--seed", 5, "--steps", 4)
    ran = shell("generate", *line, "--out", out)
    assert ran.status == 0, ran.err
    words = ("refine", "--from", f"{tmp_path}/v-1.mp4", *map(str, where))
    assert ran.out.splitlines()[-1].endswith(f"go on with: {shlex.join(('diffsynth', *words))}")
    chosen = tmp_path / "v-2.mp4"
    # Its model is named inside, and lies in the working folder: no flag has to.
    monkeypatch.chdir(toy_folder.parent)
    ran = shell("refine", "--from", chosen, "--size", "64*32", *where[2:])
    assert ran.status == 0, ran.err
    settings = read_metadata(tmp_path / "v-2-refined.mp4")
    expected = {"seed": 6, "prompt": "a red circle", "denoising_strength": 0.5, "num_inference_steps": 2}
    assert expected.items() <= settings.items() and VideoData(tmp_path / "v-2-refined.mp4").shape() == (
        32,
        64,
    )
    pipe = WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")
    frames = pipe(
        "a red circle", seed=6, height=32, width=64, num_inference_steps=2, denoising_strength=0.5,
        input_video=VideoData(chosen),
    )  # fmt: skip
    save_video(frames, tmp_path / "same.mp4", fps=8)
    made = zip(VideoData(tmp_path / "same.mp4"), VideoData(tmp_path / "v-2-refined.mp4"), strict=True)
    assert all(one.tobytes() == other.tobytes() for one, other in made)
