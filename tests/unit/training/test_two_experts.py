"""Two experts in one run: each with its range, optimizer, logs and file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffsynth.errors import ArgumentError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.models.wan.dit import WanDiT
from diffsynth.tiny import tiny_folder
from diffsynth.tiny.measure import main as measure
from diffsynth.training import module as training_module
from diffsynth.training.config import MemoryConfig
from diffsynth.training.resting import Resting
from diffsynth.training.run import RunReport, train
from tests.pairs import DIT, write_tiny_pair
from tests.unit.training.toy_runs import (
    config_of,
    first_gradients,
    on_two_ranks,
    toy_settings,
    trained_tensors,
)

ADAMW = {"name": "adamw", "learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 2, "ema": 0.9,
         "options": {"weight_decay": 0.1}}  # fmt: skip
ROLES = ("high", "low")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = toy_settings(tmp_path_factory.mktemp("toy"))
    high, low, *_ = toy_files("t2v", num_experts=2)
    return {**made, "model": {**made["model"], "dit": [high], "dit_low": [low]}}


def rows(report: RunReport) -> list[dict[str, str]]:
    assert report.folder is not None
    with (report.folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {key: bits(one) for key, one in value.items()} if isinstance(value, dict) else value


def is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def everything_of(module: Any, number: int) -> dict[str, Any]:
    """All tensors of an expert, frozen or not, with its optimizer's state and its average."""
    optimizer = module.optimizers(use_pl_optimizer=False)[number]
    named = dict(module.learners[number].denoiser.named_parameters())
    state = {"tensors": named, "state": optimizer.state_dict()["state"]}
    if module.averages:
        state["average"] = module.averages[number].average
    found: dict[str, Any] = bits(state)
    return found


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_of_one_expert_changes_nothing_of_the_other(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    turns: list[int] = []
    step = training_module.WanTrainingModule.training_step

    def comparing(self: Any, *args: Any) -> None:
        before = [everything_of(self, number) for number in (0, 1)]
        step(self, *args)
        after = [everything_of(self, number) for number in (0, 1)]
        changed = [not is_equal(one, other) for one, other in zip(before, after, strict=True)]
        assert changed.count(True) == 1
        turns.append(changed.index(True))
        assert turns[-1] == self.expert_of(self.done - 1)

    monkeypatch.setattr(training_module.WanTrainingModule, "training_step", comparing)
    train(
        config_of(settings, tmp_path, optimizer=ADAMW, tune={"kind": kind}, run={"steps": 6, "batch_size": 1})
    )
    assert set(turns) == {0, 1}


def test_a_run_that_stopped_goes_on_as_if_it_had_not(settings: dict[str, Any], tmp_path: Path) -> None:
    sections = {"optimizer": ADAMW, "experts": {"low_learning_rate": 0.002, "low_rank": 2}}
    common = {"batch_size": 1, "save_every": 4, "keep_last": 0}
    whole = train(config_of(settings, tmp_path / "whole", **sections, run={"steps": 9, **common}))
    cut = tmp_path / "cut"
    first = train(config_of(settings, cut, **sections, run={"steps": 9, **common}))
    assert first.checkpoint is not None
    for path in first.checkpoint.parent.iterdir():  # as after a kill between steps 5 and 8
        if "step=4" not in path.name:
            path.unlink()
    second = train(config_of(settings, cut, **sections, run={"steps": 9, **common, "resume": "latest"}))
    assert second.losses == whole.losses[4:]
    varying = ("steps_per_s", "data_wait_s", "peak_gb")
    told = [[{k: v for k, v in row.items() if k not in varying} for row in rows(r)] for r in (whole, second)]
    assert told[0] == told[1]
    for name, tensor in trained_tensors(whole).items():
        assert torch.equal(trained_tensors(second)[name], tensor), name
    for role in ROLES:
        for name, tensor in load_file(export(whole, role)).items():  # the average
            assert torch.equal(load_file(export(second, role))[name], tensor), name


def export(report: RunReport, role: str) -> Path:
    assert report.checkpoint is not None
    return report.checkpoint.with_name(f"{report.checkpoint.stem}_{role}_noise.safetensors")


def test_each_has_its_rate_rank_share_and_columns(settings: dict[str, Any], tmp_path: Path) -> None:
    experts = {"low_learning_rate": 0.02, "low_rank": 2, "boundary": 0.6, "turn": 2, "high_share": 0.5}
    report = train(config_of(settings, tmp_path, experts=experts, run={"steps": 8, "batch_size": 1}))
    seen = {role: 0 for role in ROLES}
    whose = []
    for row in rows(report):
        role = next(one for one in ROLES if row[f"loss_{one}_noise"])
        seen[role] += 1
        whose.append(role)
        assert row[f"loss_{role}_noise"] == row["loss"]
        assert row[f"learning_rate_{role}_noise"] == {"high": "0.1", "low": "0.02"}[role]
        assert row[f"steps_{role}_noise"] == str(seen[role])
        # the bins of timesteps below 600 belong to the low-noise expert
        assert any(row[name] for name in ("loss_t600_800", "loss_t800_1000")) == (role == "high")
    assert whose[::2] == whose[1::2] and set(whose) == set(ROLES)
    ranks = {
        prefix: {
            t.shape[0] for n, t in trained_tensors(report).items() if n.startswith(prefix) and "lora_A" in n
        }
        for prefix in ("pipe.dit.", "pipe.dit2.")
    }
    assert ranks == {"pipe.dit.": {4}, "pipe.dit2.": {2}}


def test_two_files_load_by_the_name_that_they_share(settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(settings, tmp_path, experts={"low_rank": 2}, run={"steps": 6, "batch_size": 1})
    report = train(config)
    assert report.checkpoint is not None and report.export == export(report, "high")
    files = [settings["model"]["dit"][0], settings["model"]["dit_low"][0]]

    def weights(lora: Path | None) -> list[Tensor]:
        manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(files)
        if lora is not None:
            assert len(manager.load_lora(lora)) == 2
        dits = [entry.model for entry in manager.loaded if entry.name == "wan_video_dit"]
        return [dit.get_parameter("blocks.1.cross_attn.k.weight").detach() for dit in dits]

    base = weights(None)
    pair = weights(report.checkpoint.with_suffix(".safetensors"))
    state = weights(report.checkpoint)  # where alpha / rank, which is 2 for both, stands beside the factors
    for before, one, other in zip(base, pair, state, strict=True):
        assert (one - before).abs().max() > 1e-6
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    again = config_of(settings, tmp_path, experts={"low_rank": 2}, run={"keep_last": 1, "steps": 7,
                      "batch_size": 1, "resume": "latest"})  # fmt: skip
    last = train(again)
    assert last.checkpoint is not None
    assert sorted(path.name for path in last.checkpoint.parent.iterdir()) == sorted(
        [last.checkpoint.name, export(last, "high").name, export(last, "low").name]
    )


def test_validation_measures_each_level_with_its_expert_and_samples_with_both(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, float, bool]] = []
    forward = WanDiT.forward

    def noting(self: WanDiT, latents: Tensor, timestep: Tensor, *rest: Any) -> Any:
        if not torch.is_grad_enabled():
            told.append((id(self), float(timestep.max()), False))
        return forward(self, latents, timestep, *rest)

    monkeypatch.setattr(WanDiT, "forward", noting)
    samples = {"every": 2, "holdout": 1, "quantiles": [0.1, 0.9], "prompts": ["a red circle"]}
    report = train(config_of(settings, tmp_path, samples=samples, run={"steps": 2, "batch_size": 1}))
    assert rows(report)[-1]["validation_loss"]
    high = {who for who, time, _ in told if time >= 875}
    low = {who for who, time, _ in told if time < 875}
    assert len(high) == len(low) == 1 and high != low
    # two quantiles and a video of two steps or more, with guidance, before the first step and after the last
    assert len(told) >= 2 * (2 + 2) and len(list((tmp_path / "samples").glob("*.mp4"))) == 2


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which CUDA does not survive")
def test_ddp_equals_one_process(settings: dict[str, Any], tmp_path: Path) -> None:
    alone = config_of(settings, tmp_path / "one", run={"steps": 6, "batch_size": 2})
    both = config_of(settings, tmp_path / "two", run={"steps": 6, "batch_size": 1})
    expected, expected_gradients = first_gradients(lambda: train(alone))
    found, gradients = on_two_ranks(both, tmp_path / "ranks")
    assert {role for row in rows(expected) for role in ROLES if row[f"loss_{role}_noise"]} == set(ROLES)
    # fp32: the sums over samples are taken in another order
    assert list(found.losses) == pytest.approx(list(expected.losses), rel=1e-5)
    for one, two in zip(expected_gradients, gradients, strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm() + 1e-12
    after = trained_tensors(found)
    for name, tensor in trained_tensors(expected).items():
        assert (after[name] - tensor).abs().max() <= 1e-5, name


@pytest.mark.skipif(not (tiny_folder() / DIT).is_file(), reason="the tiny Wan's weights are not in this tree")
def test_the_tiny_pair_is_measured_with_both_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = write_tiny_pair(tmp_path / "pair")
    layer = "diffusion_model.blocks.0.self_attn.q"
    dim = load_file(pair / "high_noise_model" / DIT)["blocks.0.self_attn.q.weight"].shape[0]
    for role in ROLES:
        factors = {f"{layer}.lora_A.weight": torch.ones(1, dim), f"{layer}.lora_B.weight": torch.ones(dim, 1)}
        save_file(factors, tmp_path / f"lime_{role}_noise.safetensors")
    words = ["--model", str(pair), "--colour", "lime", "--captions", "1", "--steps", "2", "--num-frames", "5"]
    with caplog.at_level("INFO", logger="diffsynth"):
        measure(
            [*words, "--sampler", "unipc", "--no-two-shapes", "--lora", str(tmp_path / "lime.safetensors")]
        )
    told = [record.message for record in caplog.records if "LoRA" in record.message]
    assert all(any(f"lime_{role}_noise" in line for line in told) for role in ROLES), told


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_only_the_expert_in_turn_is_on_the_device(tmp_path: Path, place: Any) -> None:
    experts = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False) for _ in range(2)]
    experts[0][0].bias.requires_grad_(True)
    values = [bits(dict(expert.state_dict())) for expert in experts]
    (tmp_path / ".resting-999999999").write_bytes(b"of a process that has ended")
    # A device to which a copy is made, as to a GPU.
    resting = Resting([[expert] for expert in experts], torch.device("cpu", 1), place, tmp_path)
    home = [{n: t.data_ptr() for n, t in expert.state_dict().items()} for expert in experts]
    for number in (0, 1, None):
        resting.bring_in(number)
        for other, expert in enumerate(experts):
            is_home = {n: t.data_ptr() == home[other][n] for n, t in expert.state_dict().items()}
            trains = is_home.pop("0.bias") if other == 0 else True
            assert trains, "what trains stays where the optimizer put it"
            assert set(is_home.values()) == {other != number}
            assert is_equal(dict(expert.state_dict()), values[other])
    assert bool(list(tmp_path.iterdir())) == (place == "ram")


STREAMED = {"stream": True, "gradient_checkpointing": "full"}


@pytest.mark.parametrize(
    "memory",
    [{"idle_expert": "device"}, {"idle_expert": "disk"}, STREAMED],
    ids=["device", "disk", "streamed"],
)
def test_where_the_idle_expert_rests_changes_no_number(
    settings: dict[str, Any], tmp_path: Path, memory: dict[str, Any]
) -> None:
    run = {"steps": 4, "batch_size": 1}
    usual = train(config_of(settings, tmp_path / "usual", run=run))
    assert MemoryConfig().idle_expert == "ram"
    other = train(config_of(settings, tmp_path / "other", run=run, memory=memory))
    # fp32: a block that is computed again adds up in the same order; the same bits
    assert other.losses == usual.losses
    for name, tensor in trained_tensors(usual).items():
        assert torch.equal(trained_tensors(other)[name], tensor), name


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"dit_low": []}, "experts": {"turn": 2}}, r"model\.dit_low is empty"),
        ({"experts": {"boundary": 1.5}}, r"experts\.boundary is 1\.5; give a number between 0 and 1"),
        ({"experts": {"low_rank": 2}, "tune": {"kind": "full"}}, "tune.kind 'full' has no rank"),
        ({"memory": {"idle_expert": "disk", "stream": True, "gradient_checkpointing": "full"}}, "leave one"),
        ({"objective": {"max_timestep": 500.0}}, "No noise level is drawn between the timesteps 875 and 500"),
    ],
    ids=["one-expert", "boundary", "rank", "disk-and-stream", "an-expert-without-levels"],
)
def test_settings_that_cannot_be_meant_are_refused(
    settings: dict[str, Any], tmp_path: Path, sections: dict[str, Any], told: str
) -> None:
    with pytest.raises(ArgumentError, match=told):
        train(config_of(settings, tmp_path, **sections))
