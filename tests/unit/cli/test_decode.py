"""``diffsynth decode`` finishes what ``generate`` began, and says what it cannot use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth import VideoData, VideoWriter, read_metadata
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.saved_latents import read_latents
from tests.toys import TOY_FILES
from tests.unit.cli.running import Ran, Shell, latents_of

# crf 0 loses nothing: files are compared by what was decoded, whatever the encoder decided under load
SEEDED = ("--seed", 3, "--num-frames", 17, "--crf", 0)


@pytest.fixture
def make(shell: Shell, toy_folder: Path, tmp_path: Path) -> Any:
    def run(*arguments: object, out: str = "video.mp4") -> Ran:
        where = ("--model", toy_folder, "--device", "cpu", "--dtype", "float32", "--quiet")
        return shell("generate", "a red circle", *where, "--out", tmp_path / out, *arguments)

    return run


def interrupted(make: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Ran:
    """A run that is stopped while its file is written."""
    write = VideoWriter.write

    def press(self: VideoWriter, frame: Any) -> None:
        write(self, frame)
        if self.num_frames == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(VideoWriter, "write", press)
        return make(*arguments)


def frames_of(path: Path) -> Sequence[np.ndarray]:
    return [np.asarray(frame) for frame in VideoData(path)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_interrupted_run_is_finished_as_it_would_have_been(
    make: Any, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    video = tmp_path / "video.mp4"
    assert make(*SEEDED).status == 0
    expected, settings = frames_of(video), read_metadata(video)
    video.unlink()
    assert interrupted(make, monkeypatch, *SEEDED).status == 130
    latents = latents_of(video)
    assert names(tmp_path) == [latents.name]
    ran = shell("decode", latents, "--device", "cpu")
    assert ran.status == 0, ran.err
    assert ran.out.startswith(f"{video}: 32x16, 17 frames at 8 fps, ") and ", seed 3, " in ran.out
    assert np.array_equal(frames_of(video), expected), "also the encoder's options are those of the run"
    assert read_metadata(video) == settings
    assert names(tmp_path) == [latents.name, video.name], "given latents are not removed"


def test_a_decode_that_dies_leaves_the_latents_and_no_half_video(
    make: Any, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupted(make, monkeypatch, *SEEDED)
    latents = latents_of(tmp_path / "video.mp4")
    ran = interrupted(lambda *words: shell("decode", *words), monkeypatch, latents, "--device", "cpu")
    assert ran.status == 130 and f"diffsynth decode {latents}" in ran.err
    assert names(tmp_path) == [latents.name] and read_latents(latents).latents.shape == (1, 16, 5, 2, 4)


def test_everything_can_be_asked_anew(
    make: Any, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_folder: Path
) -> None:
    assert make("--seed", 3, "--keep-latents", "--height", 48, "--width", 64).status == 0
    latents = latents_of(tmp_path / "video.mp4")
    assert names(tmp_path) == [latents.name, "video.mp4"]
    other = tmp_path / "other.mkv"
    seen: list[Any] = []
    load = ModelManager.load_models

    def noted(self: ModelManager, *words: Any, **given: Any) -> ModelManager:
        loaded = load(self, *words, **given)
        seen.append(self)
        return loaded

    monkeypatch.setattr(ModelManager, "load_models", noted)
    ran = shell(
        "decode", latents, "--vae", toy_folder, "--out", other, "--fps", 4,
        "--dtype", "bfloat16", "--device", "cpu", "--tiled", "--tile-size", 4, 4, "--tile-stride", 2, 2,
        "--crf", 0,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert (len(VideoData(other)), VideoData(other).fps) == (5, 4) and read_metadata(other)["fps"] == 4
    assert seen[0].model_name == ["wan_video_vae"], "nothing else of the folder is loaded"
    assert {p.dtype for p in seen[0].model[0].parameters()} == {torch.bfloat16}


def test_a_picture_is_made_of_one_frame(make: Any, shell: Shell, tmp_path: Path) -> None:
    assert make("--seed", 3, "--keep-latents", out="cat.png").status == 0
    before = np.asarray(Image.open(tmp_path / "cat.png"))
    settings = read_metadata(tmp_path / "cat.png")
    (tmp_path / "cat.png").unlink()
    ran = shell("decode", latents_of(tmp_path / "cat.png"), "--device", "cpu")
    assert ran.status == 0 and "fps" not in ran.out, ran.err
    assert np.array_equal(np.asarray(Image.open(tmp_path / "cat.png")), before)
    assert read_metadata(tmp_path / "cat.png") == settings


def test_bare_latents_of_several_videos_are_numbered(shell: Shell, tmp_path: Path, toy_folder: Path) -> None:
    save_file({"latents": torch.zeros(2, 16, 2, 2, 4)}, tmp_path / "bare.safetensors")
    vae = toy_folder / TOY_FILES["vae"]
    ran = shell("decode", tmp_path / "bare.safetensors", "--vae", vae, "--device", "cpu", "--quiet")
    assert ran.status == 0 and ran.err == "" and len(ran.out.splitlines()) == 2 and "seed" not in ran.out
    assert names(tmp_path) == ["bare-1.mp4", "bare-2.mp4", "bare.safetensors"]
    assert VideoData(tmp_path / "bare-2.mp4").fps == 16


def never(*_: object, **__: object) -> None:
    raise AssertionError("the VAE is loaded before the call was found good")


def test_what_cannot_work_is_known_before_the_vae_is_loaded(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_folder: Path
) -> None:
    latents = tmp_path / "a.latents.safetensors"
    save_file({"latents": torch.zeros(1, 16, 2, 2, 4)}, latents)
    cut = tmp_path / "cut.latents.safetensors"
    cut.write_bytes(latents.read_bytes()[:-50])
    monkeypatch.setattr(ModelManager, "load_models", never)
    for arguments, words in (
        ((tmp_path / "absent.safetensors",), "does not exist"),
        ((cut,), "is cut off"),
        ((toy_folder / TOY_FILES["vae"],), "not latents (B, C, T, h, w)"),
        ((latents,), "does not tell where the VAE is, or it is not there any more; give --vae FILE"),
        ((latents, "--out", "/proc/none/a.mp4"), "cannot be written"),
        ((latents, "--out", tmp_path / "a.png"), "is a picture and"),
        ((latents, "--crf", 5, "--quality", 5), "two names of one thing"),
        ((latents, "--fps", 0), "fps is 0"),
    ):
        ran = shell("decode", *arguments)
        assert ran.status == 1 and ran.err.startswith("error: ") and words in ran.err, ran.err
        assert "Traceback" not in ran.err and ran.out == ""


def test_latents_that_do_not_fit_the_vae_are_told(shell: Shell, tmp_path: Path, toy_folder: Path) -> None:
    save_file({"latents": torch.zeros(1, 48, 2, 2, 4)}, tmp_path / "a.latents.safetensors")
    for vae, words in (
        (TOY_FILES["vae"], "this VAE decodes real numbers of shape (B, 16, T, h, w)"),
        (TOY_FILES["dit"], "asks for wan_video_vae"),
        ("absent.pth", "does not exist"),
    ):
        ran = shell(
            "decode", tmp_path / "a.latents.safetensors", "--vae", toy_folder / vae, "--device", "cpu"
        )
        assert ran.status == 1 and words in ran.err and "Traceback" not in ran.err
    assert names(tmp_path) == ["a.latents.safetensors"]


def test_tiles_are_those_of_the_run_unless_asked_anew(make: Any, shell: Shell, tmp_path: Path) -> None:
    size = ("--seed", 3, "--height", 48, "--width", 64, "--keep-latents", "--crf", 0)
    asked = ("--tiled", "--tile-size", 4, 4, "--tile-stride", 2, 2)
    assert make(*size, *asked).status == 0
    expected = frames_of(tmp_path / "video.mp4")
    latents = latents_of(tmp_path / "video.mp4")
    assert shell("decode", latents, "--device", "cpu").status == 0
    assert np.array_equal(frames_of(tmp_path / "video_2.mp4"), expected)
    assert shell("decode", latents, "--device", "cpu", "--no-tiled").status == 0
    assert not np.array_equal(frames_of(tmp_path / "video_3.mp4"), expected)
