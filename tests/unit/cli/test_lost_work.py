"""No finished work is lost, and nothing is overwritten that nobody asked to overwrite."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffsynth import VideoData, VideoWriter, read_metadata, save_image, save_video
from diffsynth.checkpoints.saving import save_tensors
from diffsynth.cli import generate
from diffsynth.cli.flags import FLAGS
from diffsynth.cli.generate_task import with_task
from diffsynth.cli.naming import Names, Naming, Resumed, reserve
from diffsynth.cli.task_flags import TASK_FLAGS
from diffsynth.errors import ArgumentError, OutputPathError
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.saved_latents import read_latents, shell_word
from diffsynth.video.claims import Claim, claim
from tests.pictures import noise
from tests.toys import write_toy_dit
from tests.unit.cli.running import Ran, Shell, latents_of

VIDEOS = (".mp4", ".png")


@pytest.fixture
def make(shell: Shell, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``generate`` with the toy model in the folder ``made``, where names without a folder go."""
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    where = ("--model", toy_folder, "--device", "cpu", "--dtype", "float32", "--seed", 3, "--quiet")
    return lambda *words, prompt="a red circle": shell("generate", prompt, *where, *words)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def commands(ran: Ran) -> list[list[str]]:
    """The offered lines, as a shell takes them."""
    return [shlex.split(line)[1:] for line in re.findall(r"diffsynth decode .*", ran.err)]


def never(*_: object, **__: object) -> None:
    raise AssertionError("a model is loaded before the call was found good")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelManager, "load_models", never)


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Something happens while the steps are computed."""
    denoise = generate._generate

    def denoised(*words: Any) -> Any:
        latents = denoise(*words)
        act()
        return latents

    monkeypatch.setattr(generate, "_generate", denoised)


# ---- names ----------------------------------------------------------------------


def test_default_names_are_numbered_and_groups_never_meet_them(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    assert [make().out.partition(":")[0] for _ in range(2)] == ["video.mp4", "video_2.mp4"]
    ran = make("--num-videos-per-prompt", 2)
    assert [line.partition(":")[0] for line in ran.out.splitlines()] == ["video-1.mp4", "video-2.mp4"]
    ran = make("--preview", "--num-videos-per-prompt", 2)  # its sheet and its videos have one number
    assert {"video_2-1.mp4", "video_2-2.mp4", "video_2-sheet.png"} < set(names(folder))
    assert "video_2-sheet.png: 2 previews; " in ran.out and "video_2-1.mp4" in ran.out.splitlines()[-1]
    assert make("--overwrite").out.startswith("video.mp4:") and len(names(folder)) == 7


def test_a_named_file_needs_overwrite(make: Any, shell: Shell, tmp_path: Path, toy_folder: Path) -> None:
    video = tmp_path / "made" / "cat.mp4"
    assert make("--out", "cat.mp4", "--keep-latents").status == 0
    latents, before = latents_of(video), video.read_bytes()
    for line in (("generate", "a", "--out", "cat.mp4"), ("decode", latents, "--out", "cat.mp4"),
                 ("refine", "--from", "cat.mp4", "--model", toy_folder, "--out", "cat.mp4", "--overwrite"),
                 ("preprocess", "--task", "grey", "cat.mp4", "cat.mp4", "--overwrite")):  # fmt: skip
        ran = shell(*line)
        words = "is read here" if "--overwrite" in line else "cat.mp4 is there already. Add --overwrite to"
        assert ran.status == 1 and words in ran.err, ran.err
    assert video.read_bytes() == before
    assert shell("decode", latents, "--out", "cat.mp4", "--overwrite", "--crf", 30).status == 0
    assert video.read_bytes() != before
    made = shell("preprocess", "--task", "grey", "cat.mp4", "grey.mp4")
    again = shell("preprocess", "--task", "grey", "cat.mp4", "grey.mp4")
    assert made.status == 0 and again.status == 1 and "Add --overwrite" in again.err
    assert shell("preprocess", "--task", "grey", "cat.mp4", "grey.mp4", "--overwrite").status == 0


def test_a_decode_without_a_name_takes_the_next(make: Any, shell: Shell, tmp_path: Path) -> None:
    assert make("--out", "cat.mp4", "--keep-latents").status == 0
    ran = shell("decode", latents_of(tmp_path / "made" / "cat.mp4"), "--device", "cpu")
    assert ran.status == 0 and "cat_2.mp4: " in ran.out


@pytest.mark.usefixtures("no_model")
def test_a_file_that_is_there_is_told_before_a_model_is_loaded(make: Any, tmp_path: Path) -> None:
    for name in ("a.mp4", "b-1.mp4", "c-sheet.png"):
        (tmp_path / "made" / name).write_bytes(b"mine")
    (tmp_path / "made" / "d.mp4").symlink_to(tmp_path / "made" / "a.mp4")
    for words, taken in ((("--out", "a.mp4"), "a.mp4"), (("--out", "d.mp4"), "d.mp4"),
                         (("--out", "b.mp4", "--num-videos-per-prompt", 2), "b-1.mp4"),
                         (("--out", "c.mp4", "--preview"), "c-sheet.png")):  # fmt: skip
        ran = make(*words)
        assert ran.status == 1 and f"{taken} is there already. Add --overwrite" in ran.err, ran.err
    assert names(tmp_path / "made") == ["a.mp4", "b-1.mp4", "c-sheet.png", "d.mp4"]


def test_a_name_that_another_run_is_writing_gets_the_next_number(make: Any, tmp_path: Path) -> None:
    video = tmp_path / "made" / "cat.mp4"
    other = claim(video, "0000000a")
    assert isinstance(other, Claim)
    video.with_name("cat_2.mp4").write_bytes(b"mine")
    for words in (("--out", "cat.mp4"), ("--out", "cat.mp4", "--overwrite")):
        ran = make(*words)
        assert ran.status == 0 and "warning: cat.mp4 is there already, or another run is" in ran.err
    other.release()
    assert names(video.parent) == ["cat_2.mp4", "cat_3.mp4", "cat_4.mp4"]


def test_a_name_that_is_taken_while_it_denoises_costs_no_work(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    video = tmp_path / "made" / "cat.mp4"
    meanwhile(monkeypatch, lambda: video.write_bytes(b"mine"))
    ran = make("--out", "cat.mp4")
    assert ran.status == 0 and ran.out.startswith("cat_2.mp4: ") and "cat.mp4 was taken meanwhile" in ran.err
    assert video.read_bytes() == b"mine" and len(VideoData(video.with_name("cat_2.mp4"))) == 5


def test_the_official_save_file_overwrites(tmp_path: Path) -> None:
    values = {flag.name: flag.default for flag in (*FLAGS, *TASK_FLAGS)}
    line = {**values, "task": "t2v-1.3B", "ckpt_dir": "models"}
    named = with_task("a cat", {**line, "save_file": tmp_path / "a.mp4"})
    assert named["overwrite"] and not named["has_default_out"]
    unnamed = with_task("a cat", line)
    assert not unnamed["overwrite"] and unnamed["has_default_out"]


def test_a_run_that_goes_on_has_the_names_of_the_dead_one(tmp_path: Path) -> None:
    video, sheet = tmp_path / "a_2-1.mp4", tmp_path / "a_2-sheet.png"
    resumed = Resumed(run_id="1a2b3c4d", paths=(video,), sheet=sheet)
    asked = Names(out=video, naming=Naming.NEW, resumed=resumed)
    found = reserve(asked, VIDEOS)
    assert (found.run_id, found.paths, found.sheet) == ("1a2b3c4d", (video,), sheet)
    with pytest.raises(ArgumentError, match="Run 1a2b3c4d goes on already, in another process"):
        reserve(asked, VIDEOS)
    assert reserve(Names(out=video, naming=Naming.NEW), VIDEOS).paths == (tmp_path / "a_2-1_2.mp4",)
    found.release()
    video.write_bytes(b"of another run")
    again = reserve(asked, VIDEOS)
    assert (again.run_id, again.paths, again.overwrites) == ("1a2b3c4d", (tmp_path / "a_2-1_3.mp4",), False)


# ---- inputs ---------------------------------------------------------------------


@pytest.mark.usefixtures("no_model")
def test_no_output_is_one_of_the_inputs(make: Any, shell: Shell, tmp_path: Path) -> None:
    video, picture, folder = tmp_path / "in.mp4", tmp_path / "in.png", tmp_path / "pictures"
    save_video([noise()] * 5, video)
    save_image(noise(), picture)
    folder.mkdir()
    save_image(noise(), folder / "0.png")
    hard, soft = tmp_path / "hard.mp4", tmp_path / "soft.mp4"
    os.link(video, hard)
    soft.symlink_to(video)
    weights = tmp_path / "weights.mp4"
    lora = write_toy_dit(tmp_path / "lora.safetensors")
    os.link(lora, weights)
    flags = ("--input-video", "--control-video", "--vace-video", "--vace-video-mask")
    lines = [*((flag, video, video) for flag in flags), (flags[0], video, hard), (flags[1], video, soft)]
    lines += [(flag, picture, picture) for flag in ("--input-image", "--end-image", "--reference-image")]
    lines += [("--vace-reference-image", picture, picture), ("--input-video", folder, folder / "0.png")]
    lines += [("--lora", lora, weights), ("--lora", f"{lora}:0.5", weights), ("--model", lora, weights)]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flag, source, out in lines:
        ran = make(flag, source, "--out", out, "--overwrite")
        assert ran.status == 1 and "is the same file as" in ran.err, (flag, ran.err)
    assert "is the same file as" in make("--input-video", video, "--out", video).err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_loras_and_models_are_never_written_over(shell: Shell, tmp_path: Path) -> None:
    base = write_toy_dit(tmp_path / "base.safetensors")
    down, up = torch.zeros(2, 48), torch.zeros(48, 2)
    name = "diffusion_model.blocks.0.self_attn.q.lora"
    lora, link = tmp_path / "lora.safetensors", tmp_path / "link.safetensors"
    save_tensors(lora, {f"{name}_A.weight": down, f"{name}_B.weight": up}, {"title": "half of \ud83d"})
    os.link(base, link)
    for words, out in (
        (("convert", lora, "--to", "kohya"), lora),
        (("merge", base, "--lora", lora), base),
        (("merge", base, "--lora", lora), lora),
        (("merge", base, "--lora", lora), link),
        (("extract", base, base), base),
        (("extract", base, lora), lora),
    ):
        before = out.read_bytes()
        ran = shell("lora", *words, "--out", out, "--overwrite")
        assert ran.status == 1 and "is the same file as" in ran.err and out.read_bytes() == before
    ran = shell("lora", "convert", lora, "--to", "kohya", "--out", tmp_path / "base.safetensors")
    assert ran.status == 1 and "is there already. Add --overwrite" in ran.err


# ---- what is written is tried first ---------------------------------------------


@pytest.mark.usefixtures("no_model")
def test_texts_that_cannot_be_written_are_told_before_a_model_is_loaded(make: Any, tmp_path: Path) -> None:
    latin = os.fsdecode(b"a red \xe9")
    ran = make(prompt=latin)
    assert ran.status == 1 and r"The prompt is not UTF-8: 'a red \udce9'. Write it in UTF-8" in ran.err
    ran = make("--negative-prompt", latin)
    assert ran.status == 1 and "--negative-prompt is not UTF-8" in ran.err
    ran = make("--out", "a.jpg", prompt="a" * 66_000)
    assert ran.status == 1 and "a.jpg cannot hold these settings; save as .png" in ran.err
    assert names(tmp_path / "made") == []


def test_names_that_are_not_utf8_are_kept_as_they_are(shell: Shell, toy_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"red\xe9")
    try:
        shutil.copytree(toy_folder, folder / "model")
    except OSError:
        pytest.skip("a disk whose names are text")
    where = ("--model", folder / "model", "--device", "cpu", "--dtype", "float32")
    made = shell("generate", "a red circle", *where, "--out", folder / "b.mp4", "--keep-latents")
    assert made.status == 0, made.err
    latents = latents_of(folder / "b.mp4")
    assert read_latents(latents).vae == folder / "model" / "vae.safetensors"
    assert shell("decode", latents, "--device", "cpu").status == 0
    assert str(read_metadata(folder / "b.mp4")["models"]["dit"]).endswith("dit.safetensors")  # type: ignore[index]
    assert shell_word(str(folder)).endswith(r"red\xe9'") and shell_word("a b") == "'a b'"


def test_a_rehearsal_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"mine")
    VideoWriter(tmp_path / "a.mp4", metadata={"prompt": "a cat"}).rehearse(16, 32)
    assert names(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"mine"
    with pytest.raises(ArgumentError, match="width 33 cannot be written"):
        VideoWriter(tmp_path / "a.mp4").rehearse(16, 33)


def test_a_small_video_asks_for_little_room(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100_000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    assert make().status == 0


# ---- what the disk refuses at the end -------------------------------------------


def swap(folder: Path) -> Iterator[None]:
    """A file takes the place of the folder, which stops root as well; then the folder is back."""
    shutil.rmtree(folder)
    folder.write_text("no folder")
    yield
    folder.unlink()
    folder.mkdir()


@pytest.mark.parametrize("has_cache", [True, False], ids=["cache", "temporary"])
def test_a_folder_that_cannot_be_written_any_more_costs_no_work(
    make: Any, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_cache: bool
) -> None:
    made, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    if not has_cache:
        (tmp_path / "cache").write_text("no folder")
    assert make("--out", tmp_path / "expected.mp4", "--crf", 0).status == 0
    changes = swap(made)
    meanwhile(monkeypatch, lambda: next(changes))
    ran = make("--out", made / "cat.mp4", "--crf", 0)
    assert ran.status == 1 and "cat.mp4 cannot be written" in ran.err and "Traceback" not in ran.err
    (line,) = commands(ran)
    latents = Path(line[1])
    assert latents.is_relative_to(tmp_path / "cache" / "diffsynth" / "latents" if has_cache else temporary)
    assert (latents.stat().st_mode & 0o777, latents.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    next(changes, None)
    assert line[2:4] == ["--out", str(made / "cat.mp4")]
    assert shell(*line).status == 0
    pairs = zip(VideoData(made / "cat.mp4"), VideoData(tmp_path / "expected.mp4"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_where_no_disk_takes_the_latents_every_reason_is_told(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    (tmp_path / "cache").write_text("no folder")
    changes = swap(tmp_path / "out")
    meanwhile(monkeypatch, lambda: next(changes))
    ran = make("--out", tmp_path / "out" / "cat.mp4")
    assert ran.status == 1 and "No other folder takes the latents either." in ran.err


def test_latents_that_vanish_with_their_folder_are_saved_again(
    make: Any, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write, changes = VideoWriter.write, swap(tmp_path / "out")

    def vanish(self: VideoWriter, frame: Any) -> None:
        write(self, frame)
        if self.num_frames == 3:
            next(changes)

    monkeypatch.setattr(VideoWriter, "write", vanish)
    ran = make("--out", tmp_path / "out" / "cat.mp4")
    assert ran.status == 1 and "Traceback" not in ran.err
    (line,) = commands(ran)
    assert line[1].startswith(str(tmp_path / "cache")) and read_latents(line[1]).latents.ndim == 5


def test_each_video_that_is_not_made_yet_is_told(
    make: Any, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = VideoWriter.write

    def press(self: VideoWriter, frame: Any) -> None:
        write(self, frame)
        if self.path.name == "cat-2.mp4" and self.num_frames == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(VideoWriter, "write", press)
        ran = make("--out", "cat.mp4", "--num-videos-per-prompt", 3)
    assert ran.status == 130 and names(tmp_path / "made")[0] == "cat-1.mp4"
    lines = commands(ran)
    assert [Path(line[1]).name.partition(".")[0] for line in lines] == ["cat-2", "cat-3"]
    assert all(shell(*line).status == 0 for line in lines)
    assert {"cat-1.mp4", "cat-2.mp4", "cat-3.mp4"} < set(names(tmp_path / "made"))


def test_latents_of_an_earlier_run_are_told_before_the_work(
    make: Any, shell: Shell, toy_folder: Path, tmp_path: Path
) -> None:
    assert make("--out", "cat.mp4", "--keep-latents").status == 0
    latents = latents_of(tmp_path / "made" / "cat.mp4")
    (tmp_path / "made" / "cat.mp4").unlink()
    ran = shell("generate", "a", "--out", "cat.mp4", "--model", toy_folder, "--device", "cpu")
    assert (
        f"{latents.name} is there, of an earlier run with this name; to go on from it: diffsynth" in ran.err
    )
    assert ran.status == 0 and latents.exists()


def test_the_command_that_is_offered_after_nan_works(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The tiny Wan's VAE overflows in float16."""
    monkeypatch.chdir(tmp_path)
    ran = shell("generate", "a red circle", "--steps", 1, "--dtype", "float16", "--out", "a.mp4", "--quiet")
    (line,) = commands(ran)
    assert ran.status == 1 and "NaN" in ran.err and line[-2:] == ["--dtype", "float32"]
    failed = shell(*line[:2], "--device", "cpu", "--quiet")
    assert failed.status == 1 and commands(failed)[0][-2:] == ["--dtype", "float32"]
    assert shell(*line).status == 0 and len(VideoData(tmp_path / "a.mp4")) == 17


def test_a_pipeline_keeps_what_the_disk_refuses_and_spares_its_models(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(toy_folder, model)
    pipe = WanVideoPipeline.from_pretrained(model, torch_dtype=torch.float32, device="cpu")
    link = tmp_path / "link.safetensors"
    os.link(model / "dit.safetensors", link)
    for name, path in (
        ("save_latents", link),
        ("save_latents", model / "vae.safetensors"),
        ("save_steps", link),
    ):
        with pytest.raises(OutputPathError, match="is the same file as"):
            pipe("a red circle", seed=0, **{name: path})
    with pytest.raises(ArgumentError, match="prompt is not UTF-8"):
        pipe(["a", "red \udce9"], seed=0)
    changes, out = swap(tmp_path / "out"), tmp_path / "out" / "cat.latents.safetensors"
    latents = pipe("a red circle", seed=0, save_latents=out, output_type="latent", num_inference_steps=1,
                   callback_on_step_end=lambda *_: next(changes))  # fmt: skip
    (kept,) = (tmp_path / "cache" / "diffsynth" / "latents").iterdir()
    assert torch.equal(read_latents(kept).latents, latents)
    assert f"diffsynth decode {kept} --out {tmp_path}/out/cat.mp4" in caplog.text
