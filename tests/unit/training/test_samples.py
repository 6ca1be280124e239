from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth.conditioning.camera import CameraPath, CameraRays
from diffsynth.conditioning.conditions import Conditions, LatentPlan
from diffsynth.conditioning.reference import Reference
from diffsynth.conditioning.speed import Speed
from diffsynth.conditioning.vace import VaceCondition
from diffsynth.errors import ArgumentError, CheckpointError, CorruptCheckpointError, OutputPathError
from diffsynth.models.wan.dit import WanDiT
from diffsynth.training.samples import FORMAT, EncodedSample, collate, map_tensors
from tests.toys import TOY_DIT

SHAPE = (1, 16, 2, 4, 6)


def camera() -> CameraPath:
    return CameraPath(
        camera_to_world=torch.randn(5, 3, 4), intrinsics=torch.rand(5, 4).double() + 1, height=32, width=48
    )


GIVEN = {
    "vace": lambda: VaceCondition(context=torch.randn(1, 96, 3, 4, 6), scales=(1.0, 0.5)),
    "reference": lambda: Reference(latents=torch.randn(1, 16, 1, 4, 6)),
    "speed": lambda: Speed(motion_bucket_id=torch.tensor([50.0], dtype=torch.float64)),
    "camera": camera,
}


def sample(tokens: int = 3, plan: LatentPlan | None = None, **slots: object) -> EncodedSample:
    """A sample whose sides differ in their text only, as conditioners make it."""
    positive = Conditions(text=torch.randn(1, tokens, 32).bfloat16(), **slots)  # type: ignore[arg-type]
    negative = Conditions(text=torch.randn(1, 1, 32).bfloat16(), **slots)  # type: ignore[arg-type]
    return EncodedSample(
        latents=torch.randn(SHAPE), positive=positive, negative=negative, plan=plan or LatentPlan(),
        meta={"key": f"{torch.randint(2**31, ()):x}", "caption": "a ball"},
    )  # fmt: skip


def tensors_of(value: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(value, lambda tensor: (found.append(tensor), tensor)[1])
    return found


def assert_same(first: object, second: object) -> None:
    assert type(first) is type(second)
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    assert pairs and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", GIVEN)
def test_a_sample_comes_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    saved = sample(
        image=torch.randn(1, 5, 32),
        planes={"mask": torch.ones(1, 1, 1, 1, 1).expand(1, 4, 2, 4, 6), "image": torch.randn(SHAPE)},
        adapters={name: GIVEN[name]()},
        plan=LatentPlan(extra_frames=1, pinned=torch.randn(1, 16, 1, 4, 6)),
    )
    saved.save(tmp_path / "a.safetensors")
    loaded = EncodedSample.load(tmp_path / "a.safetensors")
    for part in ("latents", "positive", "negative", "plan"):
        assert_same(getattr(saved, part), getattr(loaded, part))
    assert loaded.plan.extra_frames == 1 and loaded.meta == saved.meta
    given, back = saved.positive.adapters[name], loaded.positive.adapters[name]
    if isinstance(given, VaceCondition):
        assert isinstance(back, VaceCondition) and back.scales == given.scales
    if isinstance(given, CameraPath):
        assert isinstance(back, CameraPath)
        assert torch.equal(back.camera_to_world, given.camera_to_world) and back.shape == given.shape
        assert torch.equal(back.intrinsics, given.intrinsics) and back.intrinsics.dtype == torch.float64


def test_samples_with_a_field_that_is_gone_load_and_fall_into_the_same_bucket(tmp_path: Path) -> None:
    now, before = tmp_path / "now.safetensors", tmp_path / "before.safetensors"
    sample(adapters={"vace": VaceCondition(context=torch.randn(1, 96, 3, 4, 6))}).save(now)
    with safe_open(now, "pt") as opened:
        metadata = opened.metadata()
    structure = json.loads(metadata["structure"])
    for side in ("positive", "negative"):  # as versions wrote it that knew steps by their times
        structure[side]["fields"]["adapters"]["map"]["vace"]["fields"]["times"] = []
    save_file(load_file(now), before, {**metadata, "structure": json.dumps(structure)})
    assert_same(EncodedSample.load(before).positive, EncodedSample.load(now).positive)
    assert EncodedSample.header(before).bucket == EncodedSample.header(now).bucket


def test_what_both_sides_share_is_stored_once(tmp_path: Path) -> None:
    sample(planes={"image": torch.randn(SHAPE)}).save(tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == {
        "latents", "positive.text", "negative.text", "positive.planes.image",
    }  # fmt: skip
    loaded = EncodedSample.load(tmp_path / "a.safetensors")
    assert loaded.negative is not None
    assert loaded.negative.planes["image"] is loaded.positive.planes["image"]


@pytest.mark.parametrize(
    "structure",
    [
        pytest.param({"positive": {"type": "Popen", "fields": {"args": "ls"}}}, id="unknown-class"),
        pytest.param({"positive": {"type": "Speed", "fields": {"other": 1}}}, id="unknown-field"),
        pytest.param({"positive": {"tensor": "absent"}}, id="missing-tensor"),
        pytest.param({"positive": 3, "plan": None}, id="no-conditions"),
    ],
)
def test_a_file_cannot_name_what_is_not_known(structure: object, tmp_path: Path) -> None:
    meta = {"format": FORMAT, "structure": json.dumps(structure)}
    save_file({"latents": torch.zeros(SHAPE)}, tmp_path / "a.safetensors", meta)
    with pytest.raises(CheckpointError, match="anew"):
        EncodedSample.load(tmp_path / "a.safetensors")


def test_other_files_and_cut_off_ones_are_refused(tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(SHAPE)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no cached sample"):
        EncodedSample.header(tmp_path / "a.safetensors")
    sample().save(tmp_path / "b.safetensors")
    data = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(data[:-1])
    with pytest.raises(CorruptCheckpointError, match="cut off"):
        EncodedSample.header(tmp_path / "b.safetensors")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputPathError, match="No space left"):
        sample().save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_bucket_knows_everything_but_the_length_of_the_text(tmp_path: Path) -> None:
    def bucket(made: EncodedSample) -> object:
        made.save(tmp_path / "a.safetensors")
        read = EncodedSample.header(tmp_path / "a.safetensors").bucket
        assert read == made.described(tmp_path).bucket
        return read

    plain = bucket(sample(tokens=3))
    assert bucket(sample(tokens=7)) == plain
    others = [
        bucket(sample(adapters={"vace": VaceCondition(context=torch.randn(1, 96, 3, 4, 6), scales=(scale,))}))
        for scale in (1.0, 0.5)
    ]
    others += [
        bucket(sample(plan=LatentPlan(pinned=torch.zeros(1, 16, 1, 4, 6)))),
        bucket(sample(planes={"image": torch.zeros(SHAPE)})),
    ]
    assert len({plain, *others}) == 5


def test_dropout_takes_the_empty_caption_of_its_sample_and_pads_the_text() -> None:
    first, second = sample(tokens=3), sample(tokens=5)
    assert second.negative is not None
    batch = collate([first, second], [False, True])
    assert batch.conditions.text.shape == (2, 3, 32)
    assert torch.equal(batch.conditions.text[0], first.positive.text[0])
    assert torch.equal(batch.conditions.text[1, :1], second.negative.text[0])
    assert not batch.conditions.text[1, 1:].any()
    assert batch.ids == (first.id, second.id) and batch.latents.shape == (2, *SHAPE[1:])


def test_a_batch_moves_the_dit_as_its_samples_do() -> None:
    dit = WanDiT(TOY_DIT).eval()
    samples = [sample(tokens=3), sample(tokens=20)]
    batch = collate(samples, [False, False]).to("cpu")
    timestep = torch.tensor([300.0, 700.0])

    def velocity(latents: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        floats = map_tensors(conditions, lambda tensor: tensor.float())
        with torch.no_grad():
            return dit(latents, time, [dit.prepare(floats)])[0]

    together = velocity(batch.latents, timestep, batch.conditions)
    for index, one in enumerate(samples):
        alone = velocity(one.latents, timestep[index : index + 1], one.positive)
        # 1e-5: the same sums in fp32; padding of the shorter text is summed in another order
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-5, atol=1e-5)


def test_several_cameras_of_a_batch_become_their_rays() -> None:
    samples = [sample(adapters={"camera": camera()}) for _ in range(2)]
    given = collate(samples, [False, False]).conditions.adapters["camera"]
    assert isinstance(given, CameraRays)
    for index, one in enumerate(samples):
        path = one.positive.adapters["camera"]
        assert isinstance(path, CameraPath) and given.shape == path.shape
        assert torch.equal(given.latent_frame(1)[index : index + 1], path.latent_frame(1))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        pytest.param(lambda: sample(planes={"image": torch.zeros(SHAPE)}), "planes", id="planes"),
        pytest.param(lambda: sample(plan=LatentPlan(extra_frames=1)), "plan.extra_frames", id="plan"),
        pytest.param(
            lambda: EncodedSample(
                latents=torch.zeros(1, 16, 3, 4, 6), positive=sample().positive, negative=None
            ),
            "latents",
            id="size",
        ),
    ],
)
def test_samples_of_two_buckets_are_refused_by_name(other: object, named: str) -> None:
    with pytest.raises(ArgumentError, match=f"(?s){named}.*one bucket agree"):
        collate([sample(), other()], [False, False])  # type: ignore[operator]


def test_a_sample_has_no_start() -> None:
    with pytest.raises(ArgumentError, match="input_video"):
        sample(plan=LatentPlan(start=torch.zeros(SHAPE))).save("unused.safetensors")
