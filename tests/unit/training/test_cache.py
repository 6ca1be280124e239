from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsynth.conditioning.conditions import Merged
from diffsynth.errors import (
    ArgumentError,
    MediaReadError,
    MissingModelError,
    OutputPathError,
    UnusedInputError,
)
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.training.cache import process
from diffsynth.training.cache_config import CacheConfig
from diffsynth.training.cache_facts import assuming
from diffsynth.training.dataset.clips import Clip, DatasetPlan
from diffsynth.training.dataset.reading import read_clip
from diffsynth.training.samples import EncodedSample, map_tensors
from diffsynth.video import frames_to_tensor
from diffsynth.video.paths import replacing
from tests.unit.training.clips_of_noise import (
    FRAMES,
    HEIGHT,
    WIDTH,
    clip,
    pictures,
    write_picture,
    write_video,
)

EXACT = CacheConfig(dtype="float32", workers=2)


@pytest.fixture(scope="module")
def toy() -> WanVideoPipeline:
    return WanVideoPipeline.from_pretrained(toy_files("t2v"), torch_dtype=torch.float32, device="cpu")


def with_inputs(kind: str, folder: Path) -> Clip:
    """A clip of five frames with the inputs that a kind of model trains on."""
    media = write_video(folder / "clip.mp4")
    video = write_video(folder / "other.mp4", seed=1)
    picture = write_picture(folder / "picture.png", seed=2)
    videos: dict[str, tuple[str, ...]] = {"control": ("control_video",), "reference": ("control_video",),
                                          "vace": ("vace_video", "vace_video_mask")}  # fmt: skip
    inputs: dict[str, object] = dict.fromkeys(videos.get(kind, ()), video)
    inputs |= {
        "flf2v": {"input_image": picture, "end_image": picture},
        "camera": {"input_image": picture, "camera_control_direction": "Left"},
        "speed": {"motion_bucket_id": 30.0},
        "vace": {"vace_reference_image": (picture,)},
        "reference": {"reference_image": picture},
    }.get(kind, {})  # type: ignore[operator]
    indices = {name: tuple(range(FRAMES)) for name in videos.get(kind, ())}
    return clip(media, inputs=inputs, num_frames=FRAMES, input_indices=indices)


def tensors_of(value: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(value, lambda tensor: (found.append(tensor), tensor)[1])
    return found


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "control", "reference", "camera", "vace", "speed"])
def test_a_sample_holds_what_a_generation_is_told(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_files(kind), torch_dtype=torch.float32, device="cpu")
    one = with_inputs(kind, tmp_path)
    report = process(DatasetPlan(clips=(one,)), pipe, EXACT)
    sample = EncodedSample.load(report.samples[0])
    pixels = read_clip(one)
    inputs = dict(pixels.inputs)
    if kind == "i2v":  # its own first frame
        inputs["input_image"] = pixels.video[0]
    told: list[Merged] = []
    denoise = WanVideoPipeline._denoise
    monkeypatch.setattr(
        WanVideoPipeline, "_denoise", lambda self, request, conditions, *rest: (
            told.append(conditions), denoise(self, request, conditions, *rest))[1],
    )  # fmt: skip
    pipe(
        prompt=one.item.caption, height=HEIGHT, width=WIDTH, num_frames=FRAMES, output_type="latent", seed=0,
        num_inference_steps=1, cfg_scale=5.0, **inputs,
    )  # fmt: skip
    kept = (sample.positive, sample.negative, sample.plan)
    for stored, given in zip(kept, (told[0].positive, told[0].negative, told[0].latents), strict=True):
        pairs = list(zip(tensors_of(stored), tensors_of(given), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
    assert sample.positive.adapters.keys() == told[0].positive.adapters.keys()
    assert sample.plan.extra_frames == told[0].latents.extra_frames
    assert pipe.parts.vae is not None
    with torch.no_grad():
        clean = pipe.parts.vae.encode(frames_to_tensor(pixels.video, HEIGHT, WIDTH))
    assert torch.equal(sample.latents, clean)


def test_each_caption_is_encoded_once_and_each_encoder_comes_once_per_block(
    toy: WanVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pictures(tmp_path, 7, captions=("a", "b", "c"))
    texts: list[torch.Tensor] = []
    phases: list[tuple[str, ...]] = []
    encoder = toy.parts.text_encoder
    assert encoder is not None
    hook = encoder.register_forward_hook(lambda module, args, result: texts.append(args[0]))
    enter = toy._residency.enter
    monkeypatch.setattr(toy._residency, "enter", lambda *names: (phases.append(names), enter(*names))[1])
    try:
        report = process(plan, toy, replace(EXACT, block_clips=4))
    finally:
        hook.remove()
    assert len(texts) == report.num_captions == 4  # three captions and the empty one
    changes = [names for i, names in enumerate(phases) if names and names != next(reversed(
        [n for n in phases[:i] if n]), ())]  # fmt: skip
    assert changes == [("text_encoder",), ("image_encoder", "vae")] * 2


def test_only_what_changed_is_redone(toy: WanVideoPipeline, tmp_path: Path) -> None:
    plan = pictures(tmp_path, 3)
    first = process(plan, toy, EXACT)
    assert (first.num_written, first.num_kept) == (3, 0)
    again = process(plan, toy, EXACT)
    assert (again.num_written, again.num_kept, again.num_captions) == (0, 3, 0)
    item = replace(plan.clips[1].item, caption="another")
    changed = DatasetPlan(clips=(plan.clips[0], replace(plan.clips[1], item=item), plan.clips[2]))
    third = process(changed, toy, EXACT)
    assert (third.num_written, third.num_kept, third.stale) == (1, 2, (first.samples[1],))
    assert first.samples[1].exists()
    write_picture(plan.clips[2].item.media, seed=99)  # other content under the same name
    fourth = process(changed, toy, replace(EXACT, remove_stale=True))
    assert (fourth.num_written, set(fourth.stale)) == (1, {first.samples[1], first.samples[2]})
    assert not first.samples[1].exists() and all(path.exists() for path in fourth.samples)


def test_another_vae_or_size_is_another_sample(
    toy: WanVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pictures(tmp_path, 1)
    keys = {process(plan, toy, EXACT).samples[0]}
    keys.add(process(DatasetPlan(clips=(replace(plan.clips[0], height=16),)), toy, EXACT).samples[0])
    keys.add(process(plan, toy, CacheConfig()).samples[0])
    vae = toy.parts.vae
    assert vae is not None
    with torch.no_grad():
        weight = next(vae.parameters())
        weight.view(-1)[0] += 1
    try:
        keys.add(process(plan, toy, EXACT).samples[0])
    finally:
        with torch.no_grad():
            weight.view(-1)[0] -= 1
    assert len(keys) == 4


def test_a_killed_run_goes_on_where_it_was(toy: WanVideoPipeline, tmp_path: Path) -> None:
    plan = pictures(tmp_path, 3)
    whole = {path: EncodedSample.load(path) for path in process(plan, toy, EXACT).samples}
    first, second, _ = whole
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    leftover = tmp_path / ".part-999999999-abcd.safetensors"  # of a process that is dead
    living = tmp_path / f".part-{os.getpid()}-abcd.safetensors"
    for file in (leftover, living):
        file.write_bytes(b"half")
    report = process(plan, toy, EXACT)
    assert (report.num_written, report.num_kept) == (2, 1)
    for path, before in whole.items():
        after = EncodedSample.load(path)
        parts = [(after.latents, before.latents), (after.positive.text, before.positive.text)]
        assert after.meta == before.meta and all(torch.equal(a, b) for a, b in parts)
    assert living.exists() and not leftover.exists()


@pytest.mark.parametrize("apart", [False, True], ids=["beside", "cache-dir"])
def test_ranks_share_the_files_and_leave_none(toy: WanVideoPipeline, tmp_path: Path, apart: bool) -> None:
    plan = pictures(tmp_path / "media", 5)
    mirrored = tuple(replace(one, flip=True) for one in plan.clips)
    plan = DatasetPlan(clips=plan.clips + mirrored)
    config = replace(EXACT, cache_dir=str(tmp_path / "cache") if apart else None)
    shares = [process(plan, toy, config, rank=rank, world=3) for rank in range(3)]
    paths = [path for share in shares for path in share.samples]
    assert len(set(paths)) == len(paths) == 10 and all(share.num_written for share in shares)
    assert not any(share.stale for share in shares)
    assert {path.parent for path in paths} == {tmp_path / ("cache" if apart else "media")}
    assert process(plan, toy, config).num_kept == 10


def test_a_broken_clip_is_listed_and_the_rest_is_encoded(toy: WanVideoPipeline, tmp_path: Path) -> None:
    plan = pictures(tmp_path, 3)
    broken = plan.clips[1].item.media
    broken.write_bytes(broken.read_bytes()[:200])
    report = process(replace(plan, list_folder=tmp_path / "out"), toy, EXACT)
    assert [dropped.media for dropped in report.dropped] == [broken] and report.dropped[0].reason
    listed = tmp_path / "out" / "diffsynth_not_encoded.txt"
    assert report.dropped_list == listed and str(listed) in str(report)
    reason = " ".join(report.dropped[0].reason.splitlines())
    assert listed.read_text() == f"{broken}\t{reason}\n"
    whole = replace(plan, clips=plan.clips[:1], list_folder=tmp_path / "out")
    assert process(whole, toy, EXACT).dropped_list is None and listed.read_text() == "", "no longer true"
    assert len(report.samples) == report.num_written == 2
    with pytest.raises(MediaReadError, match=broken.name):
        process(plan, toy, replace(EXACT, strict=True))
    with pytest.raises(ArgumentError, match="None of the 1 clips"):
        process(DatasetPlan(clips=plan.clips[1:2]), toy, EXACT)
    # one process of two has no other clip: the other one goes on
    assert process(plan, toy, EXACT, rank=1, world=3).samples == ()


def test_a_latent_that_is_not_finite_is_dropped(toy: WanVideoPipeline, tmp_path: Path) -> None:
    plan = pictures(tmp_path, 2)
    vae = toy.parts.vae
    assert vae is not None
    encode = vae.encode
    calls: list[int] = []

    def encode_once_wrong(video: torch.Tensor, **tiles: object) -> torch.Tensor:
        calls.append(1)
        return encode(video) * (float("nan") if len(calls) == 1 else 1.0)

    vae.encode = encode_once_wrong  # type: ignore[method-assign]
    try:
        report = process(plan, toy, EXACT)
    finally:
        del vae.encode
    assert "NaN" in report.dropped[0].reason and report.num_written == 1


def test_a_full_disk_is_said_and_whole_samples_stay(
    toy: WanVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, calls = pictures(tmp_path, 6), []

    def full_later(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_later)
        with pytest.raises(OutputPathError, match="No space left"):
            process(plan, toy, replace(EXACT, writers=1))
    assert not list(tmp_path.glob(".part-*"))
    report = process(plan, toy, EXACT)
    assert (report.num_written, report.num_kept) == (4, 2)


def test_too_small_a_disk_is_said_before_the_work(
    toy: WanVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    with pytest.raises(OutputPathError, match="2 cached clips need"):
        process(pictures(tmp_path, 2), toy, EXACT)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("inputs", "error", "says"),
    [
        pytest.param({"seed": 3}, UnusedInputError, "'seed', which training does not read", id="option"),
        pytest.param({"motion_bucket_id": 3.0}, UnusedInputError, "speed-control model", id="no-adapter"),
    ],
)
def test_an_input_that_nobody_reads_is_an_error(
    inputs: Mapping[str, object], error: type[Exception], says: str, toy: WanVideoPipeline, tmp_path: Path
) -> None:
    plan = DatasetPlan(clips=(clip(write_picture(tmp_path / "a.png"), inputs=inputs),))
    with pytest.raises(error, match=says):
        process(plan, toy, EXACT)


def test_a_missing_encoder_is_named(toy: WanVideoPipeline, tmp_path: Path) -> None:
    pipe = WanVideoPipeline(replace(toy.parts, text_encoder=None))
    with pytest.raises(MissingModelError, match="umt5"):
        process(pictures(tmp_path, 1), pipe, EXACT)


def test_encoders_alone_encode_for_a_dit_that_is_named(tmp_path: Path) -> None:
    dit, *encoders = toy_files("i2v")
    whole = WanVideoPipeline.from_pretrained([dit, *encoders], torch_dtype=torch.float32, device="cpu")
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(encoders)
    parts = WanVideoPipeline.from_model_manager(manager).parts
    assert whole.parts.high is not None
    alone = WanVideoPipeline(assuming(parts, whole.parts.facts))
    plan = DatasetPlan(clips=(clip(write_video(tmp_path / "a.mp4"), num_frames=FRAMES),))
    one = process(plan, alone, EXACT)
    assert process(plan, whole, EXACT).num_kept == 1  # the same key
    assert EncodedSample.load(one.samples[0]).positive.planes["mask"].shape[1] == 4


def test_a_decoder_that_runs_ahead_is_bounded(toy: WanVideoPipeline, tmp_path: Path) -> None:
    plan = pictures(tmp_path, 12)
    begun: list[str] = []
    ahead: list[int] = []
    vae = toy.parts.vae
    assert vae is not None
    encode: Callable[..., torch.Tensor] = vae.encode

    def counting(video: torch.Tensor, **tiles: object) -> torch.Tensor:
        ahead.append(len(begun) - len(ahead))
        return encode(video)

    vae.encode = counting  # type: ignore[method-assign, assignment]
    try:
        process(plan, toy, EXACT, read=lambda one: (begun.append(one.stem), read_clip(one))[1])
    finally:
        del vae.encode
    assert max(ahead) <= 2 * EXACT.workers


def test_a_read_only_dataset_is_one_error_before_any_file_is_read(
    toy: WanVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan, touch = pictures(tmp_path / "media", 3), Path.touch
    made = process(DatasetPlan(clips=plan.clips[:2]), toy, EXACT).samples

    def refuse(path: Path, *rest: object, **more: object) -> None:
        if path.parent == tmp_path / "media":
            raise OSError(errno.EROFS, "Read-only file system")
        touch(path)

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(OutputPathError, match=r"media \(Read-only file system\): set cache\.cache_dir to"):
        process(plan, toy, EXACT)
    assert not caplog.messages
    assert process(DatasetPlan(clips=plan.clips[:2]), toy, EXACT).samples == made  # nothing is left to write
    apart = process(plan, toy, replace(EXACT, cache_dir=str(tmp_path / "apart")))
    assert apart.num_written == 3


def test_a_disk_that_is_read_only_says_so_of_what_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)  # even of what was never there
    with pytest.raises(OutputPathError, match="Read-only"), replacing(tmp_path / "a.json"):
        refuse()
