"""``diffsynth generate`` on a toy model: files, settings inside them, and clean ends."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth import VideoData, __version__, read_metadata, save_frames, save_video
from diffsynth.cli import generate
from diffsynth.cli.app import main
from diffsynth.cli.flags import FLAGS
from diffsynth.cli.generate_task import opened_video
from diffsynth.errors import DiffSynthError
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.pictures import write_odd
from tests.toys import write_toy_dit
from tests.unit.cli.running import Ran, Shell, latents_of


@pytest.fixture
def make(shell: Shell, toy_folder: Path, tmp_path: Path) -> Any:
    """Run ``generate`` with the toy model into a folder of this test."""

    def run(*arguments: object, out: str = "video.mp4", model: Path = toy_folder) -> Ran:
        where = ("--model", model, "--device", "cpu", "--dtype", "float32")
        return shell("generate", "a red circle", *where, "--out", tmp_path / "made" / out, *arguments)

    return run


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*")) if folder.exists() else []


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm", ".gif"])
def test_a_video_of_each_kind_carries_its_settings(make: Any, tmp_path: Path, suffix: str) -> None:
    ran = make("--seed", 3, "--steps", 1, "--negative-prompt", "blurry", out=f"video{suffix}")
    path = tmp_path / "made" / f"video{suffix}"
    assert ran.status == 0, ran.err
    assert ran.out.startswith(f"{path}: 32x16, 5 frames at 8 fps, ") and "seed 3," in ran.out
    video = VideoData(path)
    assert (len(video), video.fps, video.shape()) == (5, pytest.approx(8, rel=0.05), (16, 32))
    settings = read_metadata(path)
    expected = {
        "diffsynth": __version__, "prompt": "a red circle", "negative_prompt": "blurry", "seed": 3,
        "num_inference_steps": 1, "height": 16, "width": 32, "num_frames": 5, "fps": 8.0, "sampler": "euler",
        "cfg_scale": 3.0, "sigma_shift": 3.0, "precision": "official",
    }  # fmt: skip
    assert expected.items() <= settings.items()
    assert settings["models"]["dit"].endswith("/dit.safetensors")
    assert str(tmp_path.parent) not in json.dumps(settings), "no path of this machine"
    assert files(path.parent) == [path.name]


def test_the_settings_make_the_same_video_again(make: Any, tmp_path: Path, toy_folder: Path) -> None:
    assert make("--seed", 4, "--steps", 2, "--codec", "h264", "--crf", 0, "--pix-fmt", "yuv444p").status == 0
    settings = read_metadata(tmp_path / "made" / "video.mp4")
    pipe = WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")
    for name in ("diffsynth", "fps", "precision", "models"):
        settings.pop(name)
    frames = zip(VideoData(tmp_path / "made" / "video.mp4"), pipe(**settings), strict=True)
    # x264 with crf 0 is lossless, but for the way to YUV and back
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 3 for a, b in frames)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_name_of_a_picture_makes_one(make: Any, tmp_path: Path, suffix: str) -> None:
    ran = make("--seed", 3, out=f"picture{suffix}")
    path = tmp_path / "made" / f"picture{suffix}"
    assert ran.status == 0 and ran.out.startswith(f"{path}: 32x16, ") and "fps" not in ran.out
    assert Image.open(path).size == (32, 16)
    settings = read_metadata(path)
    assert settings["num_frames"] == 1 and settings["seed"] == 3 and "fps" not in settings


def test_several_videos_are_numbered_each_with_its_seed(make: Any, tmp_path: Path) -> None:
    ran = make("--seed", 7, "--num-videos-per-prompt", 2)
    assert ran.status == 0 and len(ran.out.splitlines()) == 2
    assert files(tmp_path / "made") == ["video-1.mp4", "video-2.mp4"]
    assert [read_metadata(tmp_path / "made" / f"video-{i}.mp4")["seed"] for i in (1, 2)] == [7, 8]


def test_a_video_can_be_the_start(make: Any, tmp_path: Path) -> None:
    grey = [Image.new("RGB", (32, 16), (90, 90, 90))] * 5
    save_video(grey, tmp_path / "in.mp4")
    save_frames(grey, tmp_path / "pictures")
    path = tmp_path / "made" / "video.mp4"
    assert make("--seed", 0).status == 0
    alone = path.read_bytes()
    for source in (tmp_path / "in.mp4", tmp_path / "pictures"):
        asked = ("--input-video", source, "--denoising-strength", 0.5, "--seed", 0, "--overwrite")
        assert make(*asked).status == 0
        assert read_metadata(path)["denoising_strength"] == 0.5 and path.read_bytes() != alone
    ran = make("--input-video", tmp_path / "absent.mp4", "--denoising-strength", 0.5)
    assert ran.status == 1 and "absent.mp4 does not exist" in ran.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("sar=4/3", ["pixels are not square"]),
        ("transfer=smpte2084", ["HDR"]),
        ("interlaced=1", ["interlaced"]),
        ("keyint=1", []),
    ],
    ids=["anamorphic", "hdr", "interlaced", "plain"],
)
def test_what_of_a_video_is_not_as_players_show_it_is_said(
    options: str, words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened_video(write_odd(tmp_path / "in.mp4", options))
    assert len(caplog.messages) == len(words)
    assert all(word in message for word, message in zip(words, caplog.messages, strict=True))


def test_every_flag_of_a_call_reaches_the_pipeline(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    video, picture = tmp_path / "in.mp4", tmp_path / "in.png"
    save_video([Image.new("RGB", (48, 32))] * 9, video)
    Image.new("RGB", (48, 32)).save(picture)
    opened = {
        **dict.fromkeys(("input_video", "control_video", "vace_video", "vace_video_mask"), video),
        **dict.fromkeys(("input_image", "end_image", "reference_image"), picture),
        "vace_reference_image": [picture, picture],
    }
    values: dict[str, Any] = {
        "negative_prompt": "blurry", "height": 32, "width": 48, "num_frames": 9, "num_videos_per_prompt": 2,
        "seed": 1, "strict": True, "num_inference_steps": 2, "cfg_scale": 4.0, "cfg_scale_low_noise": 3.0,
        "sampler": "dpm++", "sigma_shift": 7.0, "switch_DiT_boundary": 0.8, "denoising_strength": 0.5,
        "tiled": True, "tile_size": (4, 4), "tile_stride": (2, 3), "cache_text": tmp_path / "texts",
        "preset": "lightx2v-4step", "resize": "contain", "max_area": 1536, "fit": "hold",
        "camera_control_direction": "Left", "camera_control_speed": 0.02, "motion_bucket_id": 30.0,
        "vace_scale": 0.5, "single_expert": True, **opened,
    }  # fmt: skip
    assert set(values) == {flag.name for flag in FLAGS if flag.is_call}
    arguments: list[object] = []
    for flag in FLAGS:
        if flag.name in values:
            spelling = (flag.spellings or ("--" + flag.name.replace("_", "-"),))[0].split("/")[0]
            value = values[flag.name]
            for one in value if isinstance(value, list) else [value]:
                arguments += [
                    spelling, *(() if one is True else one if isinstance(one, tuple) else (one,)),
                ]  # fmt: skip
    seen: dict[str, Any] = {}
    call = WanVideoPipeline.__call__

    def noted(self: WanVideoPipeline, **given: Any) -> Any:
        seen.update(given)
        # No model reads all of them.
        return call(self, prompt="a red circle", output_type="latent", num_videos_per_prompt=2)

    monkeypatch.setattr(WanVideoPipeline, "__call__", noted)
    ran = make(*arguments)
    assert ran.status == 0, ran.err
    for name, file in opened.items():
        if isinstance(file, list):
            assert [isinstance(one, Image.Image) for one in seen[name]] == [True] * len(file), name
        else:
            assert isinstance(seen[name], VideoData if file is video else Image.Image), name
    assert str(seen.pop("save_steps").path).endswith(".steps.safetensors") and seen.pop("save_every") is None
    assert {**seen, **opened} == {"prompt": "a red circle", "output_type": "latent", **values}


def test_quiet_says_only_what_was_made(make: Any) -> None:
    loud, quiet = make("--seed", 0), make("--seed", 0, "--quiet", "--no-tiled", "--overwrite")
    assert "Loaded wan_video_dit" in loud.err and "it/s" in loud.err
    assert quiet.err == "" and quiet.status == 0 and len(quiet.out.splitlines()) == 1
    assert make("--quiet", "--height", 17, "--overwrite").err.startswith(
        "warning: height 17 is not a multiple of 16"
    )
    assert logging.getLogger("diffsynth").level == logging.NOTSET


def never(*_: object, **__: object) -> None:
    raise AssertionError("a model is loaded before the call was found good")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "/proc/none/video.mp4"), "cannot be written"),
        (("--out", "video.xyz"), "extension '.xyz', which tells no known format; use .mp4"),
        (("--out", "video"), "has no extension"),
        (("--out", "video.webp"), "extension '.webp'"),
        (("--out", "a.png", "--num-frames", 5), "leave --num-frames out, or name a video"),
        (("--out", "a.png", "--fps", 5), "are for videos"),
        (("--quality", 11), "quality is 11"),
        (("--quality", 5, "--crf", 20), "two names of one thing"),
        (("--codec", "h999"), "codec 'h999' is not in this build of ffmpeg"),
        (("--fps", 0), "fps is 0"),
        (("--input-video", "absent.mp4"), "absent.mp4 does not exist"),
    ],
    ids=str,
)
def test_what_cannot_work_is_known_before_a_model_is_loaded(
    make: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WanVideoPipeline, "from_pretrained", never)
    ran = make(*arguments)
    assert ran.status == 1 and ran.err.startswith("error: ") and words in ran.err
    assert "Traceback" not in ran.err and ran.out == ""


def test_a_full_disk_is_known_before_a_model_is_loaded(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Usage:
        free = 1 << 20

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    monkeypatch.setattr(WanVideoPipeline, "from_pretrained", never)
    ran = make("--height", 480, "--width", 832, "--num-frames", 81)
    assert ran.status == 1 and "needs about 10.8 MiB, but only 1.0 MiB are free" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", 0), "num_inference_steps is 0; give a whole number from 1"),
        (("--num-frames", 6, "--strict"), "num_frames is 6, which is not 4 k + 1; the nearest is 9"),
        (("--denoising-strength", 0.5), "there is no input_video"),
        (("--num-videos-per-prompt", 0), "num_videos_per_prompt is 0"),
        (("--dit", "other.safetensors"), "dit='other.safetensors' names 0 of the loaded DiTs"),
        (("--tokenizer-path", "nowhere"), "needs its tokenizer"),
    ],
    ids=str,
)
def test_errors_of_the_pipeline_are_one_message(
    make: Any, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    ran = make("--quiet", *arguments)
    assert ran.status == 1 and ran.err.startswith("error: ") and words in ran.err
    assert "Traceback" not in ran.err and ran.out == "" and files(tmp_path / "made") == []


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["diffsynth", "generate", "a", "--debug", "--out", str(tmp_path)])
    with pytest.raises(DiffSynthError, match="is a folder"):
        main()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code of the file was run",))


def damage(kind: str, folder: Path) -> Path:
    """A checkpoint that cannot be used, one of each kind."""
    folder.mkdir()
    whole = write_toy_dit(folder / "dit.safetensors")
    data = whole.read_bytes()
    if kind == "a truncated file":
        whole.write_bytes(data[: len(data) // 2])
    elif kind == "a header that lies about its length":
        whole.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    elif kind == "text":
        whole.write_text("<html>404 not found</html>")
    elif kind == "code in a pickle":
        whole.unlink()
        whole = folder / "dit.pth"
        whole.write_bytes(pickle.dumps({"patch_embedding.weight": Evil()}))
    elif kind == "one shard of six":
        whole = whole.rename(folder / "model-00001-of-00006.safetensors")
    elif kind == "no file":
        whole.unlink()
    return whole


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no file", "does not exist"),
        ("a truncated file", "dit.safetensors"),
        ("a header that lies about its length", "dit.safetensors"),
        ("text", "dit.safetensors"),
        ("code in a pickle", "dit.pth"),
        ("one shard of six", "5 of 6 missing"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_told(make: Any, tmp_path: Path, kind: str, words: str) -> None:
    ran = make("--quiet", model=damage(kind, tmp_path / "model"))
    assert ran.status == 1 and ran.err.startswith("error: ") and words in ran.err
    assert "Traceback" not in ran.err and ran.out == "" and files(tmp_path / "made") == []


def test_ctrl_c_leaves_nothing(make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def press(steps: Iterable[Any]) -> Iterable[Any]:
        yield next(iter(steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_no_progress", press)
    ran = make("--quiet")
    assert ran.status == 130 and "Stopped" in ran.err and "Traceback" not in ran.err
    assert files(tmp_path / "made") == []


def test_ctrl_c_while_the_file_is_written_keeps_the_old_one(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from diffsynth.video import VideoWriter

    assert make("--seed", 1).status == 0
    before = (tmp_path / "made" / "video.mp4").read_bytes()
    write = VideoWriter.write

    def press(self: VideoWriter, frame: Any) -> None:
        write(self, frame)
        if self.num_frames == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "write", press)
    ran = make("--seed", 2, "--quiet", "--overwrite")
    latents = latents_of(tmp_path / "made" / "video.mp4")
    assert ran.status == 130 and f"warning: The latents are kept in {latents}; " in ran.err
    assert f"diffsynth decode {latents}" in ran.err
    assert files(tmp_path / "made") == [latents.name, "video.mp4"]
    assert (tmp_path / "made" / "video.mp4").read_bytes() == before


def test_a_full_gpu_is_told_with_what_to_do(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(WanVideoPipeline, "__call__", full)
    ran = make("--quiet")
    assert ran.status == 1 and "CUDA out of memory. Ask for a smaller --height" in ran.err


def test_the_file_holds_what_the_pipeline_gives(make: Any, tmp_path: Path, toy_folder: Path) -> None:
    assert make("--seed", 5, "--num-frames", 17, "--crf", 0, "--keep-latents").status == 0
    made = tmp_path / "made" / "video.mp4"
    pipe = WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")
    save_video(pipe("a red circle", seed=5, num_frames=17), tmp_path / "other.mp4", fps=8, crf=0)
    frames = zip(VideoData(made), VideoData(tmp_path / "other.mp4"), strict=True)
    assert all(np.array_equal(a, b) for a, b in frames)
    assert files(made.parent) == [latents_of(made).name, "video.mp4"]


def test_latents_are_safe_before_the_first_of_several_is_decoded(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("diffsynth.models.wan.vae.WanVideoVAE.decode_stream", full)
    ran = make("--num-videos-per-prompt", 2, "--no-tiled", "--quiet")
    assert ran.status == 1 and "tiled=False asked for nothing else" in ran.err and "Traceback" not in ran.err
    kept = [latents_of(tmp_path / "made" / f"video-{i}.mp4").name for i in (1, 2)]
    assert files(tmp_path / "made") == kept and f"diffsynth decode {tmp_path}/made/{kept[0]}" in ran.err
    assert make("--num-videos-per-prompt", 2, "--no-tiled", "--quiet").status == 1
    assert len(files(tmp_path / "made")) == 4, "the next run has names of its own"


def test_a_long_name_leaves_room_for_what_lies_beside_it(make: Any, tmp_path: Path) -> None:
    name = "木" * 80 + "-end.mp4"
    assert make("--keep-latents", out=name).status == 0
    kept = next(path.name for path in (tmp_path / "made").iterdir() if path.suffix == ".safetensors")
    assert len(kept.encode()) <= 255 and "木-end." in kept
    ran = make(out="v" * 252 + ".mp4")
    assert ran.status == 1 and "cannot be written: File name too long" in ran.err


def test_a_model_without_vae_is_told_before_the_first_step(make: Any, toy_folder: Path) -> None:
    ran = make("--quiet", "--model", toy_folder / "t5.safetensors", model=toy_folder / "dit.safetensors")
    assert ran.status == 1 and "--model holds no VAE" in ran.err


def test_prompts_are_kept_and_the_text_encoder_left_out(make: Any, tmp_path: Path, toy_folder: Path) -> None:
    texts = tmp_path / "texts"
    made = tmp_path / "made" / "video.mp4"
    assert make("--seed", 1, "--crf", 0, "--cache-text", texts).status == 0
    first = [np.asarray(frame) for frame in VideoData(made)]
    files_only = (
        "--model", toy_folder / "vae.safetensors", "--cache-text", texts, "--seed", 1, "--crf", 0,
        "--overwrite",
    )  # fmt: skip
    ran = make(*files_only, model=toy_folder / "dit.safetensors")
    assert ran.status == 0 and "taken as cached" in ran.err
    assert all(np.array_equal(a, b) for a, b in zip(first, VideoData(made), strict=True))
    assert "cache_text" not in read_metadata(made)


def test_without_a_model_the_tiny_wan_is_used(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_folder: Path
) -> None:
    monkeypatch.setattr("diffsynth.tiny.tiny_folder", lambda: tmp_path)
    ran = shell("generate", "a red circle", "--out", tmp_path / "video.mp4")
    assert ran.status == 1 and "tiny Wan is missing from this installation" in ran.err
    monkeypatch.setattr("diffsynth.tiny.tiny_folder", lambda: toy_folder)
    ran = shell("generate", "a red circle", "--out", tmp_path / "video.mp4", "--seed", 0)
    assert ran.status == 0, ran.err
    assert ran.err.startswith("No --model given: the tiny Wan") and "float32" in ran.err
    assert files(tmp_path) == ["video.mp4"]
