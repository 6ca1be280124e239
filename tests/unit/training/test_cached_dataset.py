from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsynth.conditioning.conditions import Conditions, LatentPlan
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.conditioning.vace import VaceCondition
from diffsynth.errors import ArgumentError, CorruptCheckpointError, MediaReadError, UnsafeCheckpointError
from diffsynth.training.batches import Pick
from diffsynth.training.cache_facts import IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from diffsynth.training.cache_hashes import FileHashes
from diffsynth.training.cache_keys import Maker, facts_of_clip, sample_path
from diffsynth.training.cached_dataset import CachedDataset, open_cache
from diffsynth.training.dataset.clips import Clip, DatasetPlan
from diffsynth.training.samples import EncodedSample, collate
from diffsynth.training.v1_cache import V1_SUFFIX, load_v1
from tests.unit.training.clips_of_noise import clip, pictures, write_picture

SHAPE = (1, 16, 1, 4, 6)
TOY = DiTFacts(text_dim=32)


def cache(one: Clip, key: str = "0" * 16, vae: str = "vae-a", **slots: object) -> Path:
    """A sample of a clip as data_process would name it, with drawn numbers."""
    meta = {**facts_of_clip(one, FileHashes()), "vae": vae, "text_encoder": "t5", "key": key}
    path = sample_path(one.item.media, key, None)
    sides = [Conditions(text=torch.randn(1, n, 32), **slots) for n in (3, 1)]  # type: ignore[arg-type]
    EncodedSample(
        latents=torch.randn(SHAPE), positive=sides[0], negative=sides[1], plan=LatentPlan(), meta=meta
    ).save(path)
    return path


def key(number: int) -> str:
    return f"{number:016x}"


def write_v1(path: Path, is_video: bool = False, **changed: object) -> Path:
    """As v1 wrote them."""
    context = torch.zeros(1, 512, 4096)
    context[:, :7] = torch.randn(7, 4096)
    content: dict[str, object] = {
        "latents": torch.randn(16, 1, 4, 6).bfloat16(),
        "prompt_emb": {"context": context.bfloat16()},
        "image_emb": {
            "clip_feature": torch.randn(1, 257, 1280).bfloat16(),
            "y": torch.cat([torch.ones(1, 4, 1, 4, 6), torch.randn(SHAPE)], dim=1).bfloat16(),
        }
        if is_video
        else {},
    }
    torch.save({**content, **changed}, path)
    return path


def test_a_plan_opens_its_samples_in_its_order(tmp_path: Path) -> None:
    plan = pictures(tmp_path, 4, captions=("a", "b"))
    clips = tuple(
        replace(c, weight=i + 1.0, repeats=i + 1, caption_dropout=0.1) for i, c in enumerate(plan.clips)
    )
    for number in (2, 0, 3, 1):
        cache(clips[number], key(number))
    opened = open_cache(DatasetPlan(clips=clips), TOY)
    assert len(opened) == 4 and [opened.sample_id(i) for i in range(4)] == [key(i) for i in range(4)]
    assert [opened.weight(i) for i in range(4)] == [1.0, 2.0, 3.0, 4.0] and opened.repeats(3) == 4
    assert opened.caption_dropout(0) == 0.1 and opened.dataset(0) == "toy"
    assert opened.bucket(0)[:3] == (1, 4, 6) and len({opened.bucket(i) for i in range(4)}) == 1
    assert opened[2].meta["caption"] == clips[2].item.caption and opened[2].id == key(2)


def test_folders_and_files_are_taken_as_they_are(tmp_path: Path) -> None:
    plan = pictures(tmp_path / "deep", 3)
    paths = [cache(one, key(i)) for i, one in enumerate(plan.clips)]
    assert len(open_cache(tmp_path, TOY)) == 3 and len(open_cache(paths[:2], TOY)) == 2
    assert open_cache(str(tmp_path)).weight(0) == 1.0


def test_one_clip_in_two_datasets_is_two_samples(tmp_path: Path) -> None:
    one = pictures(tmp_path, 1).clips[0]
    cache(one)
    opened = open_cache(DatasetPlan(clips=(one, replace(one, dataset="other"))))
    assert [opened.sample_id(i) for i in range(2)] == [key(0), f"{key(0)}-2"]
    assert collate([opened[0], opened[1]], [False, True]).ids == (key(0), f"{key(0)}-2")


def test_moments_are_later_latents_of_a_clip_each_alone(tmp_path: Path) -> None:
    one = replace(pictures(tmp_path, 1).clips[0], moments=True, steps=(3, 9))
    path = cache(one)
    whole = replace(EncodedSample.load(path), latents=torch.randn(1, 16, 5, 4, 6))
    whole.save(path)
    opened = open_cache(DatasetPlan(clips=(one, replace(one, moments=False))), TOY)
    assert [opened.bucket(i)[0] for i in range(2)] == [1, 5] and opened.steps(0) == (3, 9)
    assert opened.is_moments(0) and not opened.is_moments(1)
    for place, number in ((0.0, 1), (0.3, 2), (0.99999, 4)):
        seen = opened.picked(
            Pick(index=0, sample_id="a", step=3, draw_id="a", drops_caption=False, moment=place)
        )
        assert torch.equal(seen.latents, whole.latents[:, :, number : number + 1])
        assert torch.equal(seen.positive.text, whole.positive.text)
    all_of_it = opened.picked(Pick(index=1, sample_id="a", step=3, draw_id="a", drops_caption=False))
    assert torch.equal(all_of_it.latents, whole.latents)


def test_moments_are_not_taken_from_what_a_picture_or_plane_belongs_to(tmp_path: Path) -> None:
    one = replace(pictures(tmp_path, 1).clips[0], moments=True)
    cache(one, planes={"image": torch.randn(SHAPE)})
    with pytest.raises(ArgumentError, match="leave moments out"):
        open_cache(DatasetPlan(clips=(one,)), DiTFacts(text_dim=32, planes={"image": 16}))


@pytest.mark.parametrize("of_plan", [True, False], ids=["plan", "folder"])
def test_a_mixture_is_refused_and_both_are_named(tmp_path: Path, of_plan: bool) -> None:
    plan = pictures(tmp_path, 3)
    for number, one in enumerate(plan.clips):
        cache(one, key(number), vae="vae-b" if number == 2 else "vae-a")
    with pytest.raises(ArgumentError, match=r"(?s)0[02]\.png.*0[02]\.png.*vae: vae-[ab] and vae-[ab].*anew"):
        open_cache(plan if of_plan else tmp_path, TOY)


def test_samples_of_two_makers_are_not_chosen_by_their_age(tmp_path: Path) -> None:
    plan = pictures(tmp_path, 2)
    for number, one in enumerate(plan.clips):
        os.utime(cache(one, key(number), vae="new"), (2e9, 2e9))
        os.utime(cache(one, key(number + 10), vae="old"), (1e9, 1e9))
    with pytest.raises(ArgumentError, match=r"(?s)0000\..*000a\..*two makers.*vae: new and old.*model\.vae"):
        open_cache(plan, TOY)
    for maker in ("old", "new"):
        opened = open_cache(plan, TOY, maker=Maker(facts={"vae": maker}))
        assert [opened[i].meta["vae"] for i in range(2)] == [maker, maker]


def test_a_clip_is_not_taken_from_another_maker_where_the_runs_own_is_missing(tmp_path: Path) -> None:
    plan = pictures(tmp_path, 2)
    for number, one in enumerate(plan.clips):
        cache(one, key(number + 10), vae="old")
    cache(plan.clips[0], key(0), vae="new")
    with pytest.raises(ArgumentError, match=r"(?s)1 of 2 clips.*01\.png.*vae: new and old.*anew"):
        open_cache(plan, TOY, maker=Maker(facts={"vae": "new"}))
    with pytest.raises(ArgumentError, match="2 of 2 clips"):
        open_cache(plan, TOY, maker=Maker(facts={"vae": "third"}))


def test_a_changed_caption_or_file_has_no_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = pictures(tmp_path, 3)
    for number, one in enumerate(plan.clips):
        cache(one, key(number))
    item = replace(plan.clips[1].item, caption="another")
    plan = DatasetPlan(clips=(plan.clips[0], replace(plan.clips[1], item=item), plan.clips[2]))
    write_picture(plan.clips[2].item.media, seed=77)
    assert len(open_cache(plan, TOY, list_folder=tmp_path)) == 1
    assert "2 of 3 clips have no cached sample" in caplog.text and "01.png, 02.png" in caplog.text
    listed = (tmp_path / "diffsynth_not_cached.txt").read_text().splitlines()
    assert [Path(line.split("\t")[0]).name for line in listed] == ["01.png", "02.png"]
    with pytest.raises(MediaReadError, match="2 of 3"):
        open_cache(plan, TOY, strict=True)


def test_two_captions_of_one_clip_are_not_both_taken_from_a_folder(tmp_path: Path) -> None:
    one = pictures(tmp_path, 1).clips[0]
    cache(one, key(0))
    cache(replace(one, item=replace(one.item, caption="another")), key(1))
    with pytest.raises(ArgumentError, match="two captions"):
        open_cache(tmp_path)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        pytest.param(DiTFacts(text_dim=32, latent_channels=48), "latent channels are 16.*reads 48", id="vae"),
        pytest.param(DiTFacts(), "text width are 32.*4096", id="text"),
        pytest.param(
            DiTFacts(text_dim=32, planes={"image": 16}), r"planes are none.*image \(16\)", id="planes"
        ),
        pytest.param(DiTFacts(text_dim=32, image_dim=1280), "no features of an image encoder", id="clip"),
        pytest.param(DiTFacts(text_dim=32, patch=(4, 4)), r"4 x 6.*\(4, 4\)", id="patch"),
    ],
)
def test_samples_that_the_dit_cannot_read_are_refused(facts: DiTFacts, says: str, tmp_path: Path) -> None:
    cache(pictures(tmp_path, 1).clips[0])
    with pytest.raises(ArgumentError, match=says):
        open_cache(tmp_path, facts)


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        pytest.param({"planes": {"image": torch.zeros(SHAPE)}}, "planes are image .*reads none", id="planes"),
        pytest.param({"image": torch.zeros(1, 5, 32)}, "features of an image encoder", id="clip"),
        pytest.param({"adapters": {"vace": VaceCondition(context=torch.zeros(1, 96, 1, 4, 6))}},
                     "inputs of vace", id="adapter"),
    ],
)  # fmt: skip
def test_samples_with_more_than_the_dit_reads_are_refused(
    slots: dict[str, object], says: str, tmp_path: Path
) -> None:
    cache(pictures(tmp_path, 1).clips[0], **slots)
    with pytest.raises(ArgumentError, match=says):
        open_cache(tmp_path, TOY)


def test_no_sample_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="make the cache first"):
        open_cache(pictures(tmp_path, 1), TOY)
    with pytest.raises(ArgumentError, match="does not exist"):
        open_cache(tmp_path / "absent")


def opened_v1(folder: Path, dropout: float = 0.0, is_video: bool = False) -> CachedDataset:
    one = clip(write_picture(folder / "a.png"), caption_dropout=dropout)
    write_v1(folder / f"a.png{V1_SUFFIX}", is_video)
    return open_cache(DatasetPlan(clips=(one,)), IMAGE_TO_VIDEO if is_video else TEXT_TO_VIDEO)


@pytest.mark.parametrize("is_video", [False, True], ids=["t2v", "i2v"])
def test_the_cache_of_v1_is_read(tmp_path: Path, is_video: bool) -> None:
    opened = opened_v1(tmp_path, is_video=is_video)
    sample = opened[0]
    stored = torch.load(tmp_path / f"a.png{V1_SUFFIX}", weights_only=True)
    assert torch.equal(sample.latents[0], stored["latents"]) and sample.negative is None
    assert torch.equal(sample.positive.text, stored["prompt_emb"]["context"][:, :7])
    if is_video:
        planes = sample.positive.planes
        assert torch.equal(torch.cat([planes["mask"], planes["image"]], 1), stored["image_emb"]["y"])
        assert sample.positive.image is not None and sample.positive.image.shape == (1, 257, 1280)
    assert sample.id == opened.sample_id(0) == open_cache(tmp_path).sample_id(0)


def test_a_cache_of_v1_of_another_size_is_none(tmp_path: Path) -> None:
    one = clip(write_picture(tmp_path / "a.png"), height=64, width=48)
    write_v1(tmp_path / f"a.png{V1_SUFFIX}")
    with pytest.raises(ArgumentError, match="No cached sample"):
        open_cache(DatasetPlan(clips=(one,)), TEXT_TO_VIDEO)


def test_v1_has_no_empty_caption_and_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"caption_dropout is 0\.1.*without the empty caption"):
        opened_v1(tmp_path, dropout=0.1)
    sample = load_v1(tmp_path / f"a.png{V1_SUFFIX}")
    with pytest.raises(ArgumentError, match="without the empty caption"):
        collate([sample], [True])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil-was-here",)


def test_a_file_of_v1_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeCheckpointError, match="nothing of it was run"):
        load_v1(write_v1(tmp_path / f"a{V1_SUFFIX}", extra=Evil()))
    assert not (tmp_path / "evil-was-here").exists()


def test_a_damaged_file_of_v1_is_named(tmp_path: Path) -> None:
    path = write_v1(tmp_path / f"a{V1_SUFFIX}")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises((CorruptCheckpointError, UnsafeCheckpointError), match=path.name):
        load_v1(path)
    with pytest.raises(CorruptCheckpointError, match="no clip cached by DiffSynth v1"):
        load_v1(write_v1(tmp_path / f"b{V1_SUFFIX}", prompt_emb={}))
