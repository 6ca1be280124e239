from __future__ import annotations

import errno
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffsynth.errors import ArgumentError, LoRAError, NotFiniteError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.encoding import EncodingSession
from diffsynth.sampling.schedule import add_noise
from diffsynth.training import logs
from diffsynth.training import run as training_run
from diffsynth.training.batches import Batches
from diffsynth.training.cached_dataset import open_cache
from diffsynth.training.callbacks import Saver
from diffsynth.training.checkpoints import State
from diffsynth.training.objective import FlowMatchObjective
from diffsynth.training.run import RunReport, course_of, train
from tests.unit.training.toy_runs import (
    ADAMW,
    config_of,
    first_gradients,
    rows,
    toy_settings,
    trained_tensors,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return toy_settings(tmp_path_factory.mktemp("toy"))


def weight_after(settings: dict[str, Any], lora: Path | None) -> Tensor:
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(settings["model"]["dit"])
    if lora is not None:
        manager.load_lora(lora)
    dit = manager.fetch_model("wan_video_dit")
    assert dit is not None
    return dit.get_parameter("blocks.1.cross_attn.k.weight").detach()


def test_gradients_of_a_step_are_those_of_a_plain_loop(settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(settings, tmp_path, run={"steps": 1, "batch_size": 2})
    report, gradients = first_gradients(lambda: train(config))

    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(settings["model"]["dit"])
    dit: Any = manager.fetch_model("wan_video_dit")
    dit.requires_grad_(False)
    start = training_run.load_networks(config, FlowMatchObjective()).learners[0].parameters()
    factors = {name: p.detach().clone().requires_grad_(True) for name, p in start.items()}
    for name, layer in list(dit.named_modules()):
        if f"{name}.lora_A.default.weight" in factors:
            assert isinstance(layer, nn.Linear)
            down, up = (factors[f"{name}.lora_{ab}.default.weight"] for ab in "AB")
            layer.register_forward_hook(
                lambda _, x, y, down=down, up=up: y + 8.0 / 4 * (x[0] @ down.T @ up.T)
            )
    samples = open_cache([Path(settings["data"][0]["path"])])
    objective, total = FlowMatchObjective(), torch.zeros(())
    by_id = {samples.sample_id(i): samples[i] for i in range(len(samples))}
    for pick in training_run.Run(config, torch.device("cpu"), training_run.Ranks(
        devices=1, nodes=1, rank=0, is_external=False)).module.batches.at(0):  # fmt: skip
        sample = by_id[pick.sample_id]
        sigma, noise = objective.draw(0, 0, [pick.draw_id], sample.latents.shape[1:])
        noisy = add_noise(sample.latents, noise, sigma.float())
        (velocity,) = dit(noisy, 1000 * sigma, [dit.prepare(sample.positive)])
        error = (velocity - (noise - sample.latents)).square().mean()
        total = total + objective.weight(sigma)[0] * error / 2
    total.backward()
    assert report.losses[0] == pytest.approx(float(total.detach()), rel=1e-6)
    for name, own in zip(factors, gradients, strict=True):
        wanted = factors[name].grad
        assert wanted is not None
        # fp32: two samples side by side or one after the other
        assert (own - wanted).norm() <= 1e-5 * wanted.norm() + 1e-10, name


def test_a_run_that_stopped_goes_on_as_if_it_had_not(settings: dict[str, Any], tmp_path: Path) -> None:
    common = {"batch_size": 2, "save_every": 2, "keep_last": 0}
    whole = train(config_of(settings, tmp_path / "whole", optimizer=ADAMW, run={"steps": 7, **common}))
    assert whole.step == 7 and [row["step"] for row in rows(whole)] == list("1234567")
    cut = tmp_path / "cut"
    first = train(config_of(settings, cut, optimizer=ADAMW, run={"steps": 7, **common}))
    assert first.folder is not None and first.checkpoint is not None
    # as after a kill in step 6: the checkpoint of step 4 is the last, rows 5 and 6 stand in the CSV
    for path in first.checkpoint.parent.iterdir():
        if "step=4" not in path.name and "step=2" not in path.name:
            path.unlink()
    rest = {"steps": 7, **common, "resume": "latest"}
    second = train(config_of(settings, cut, optimizer=ADAMW, run=rest))
    assert second.folder == first.folder and second.losses == whole.losses[4:]
    assert [(r["step"], r["loss"], r["learning_rate"]) for r in rows(second)] == [
        (r["step"], r["loss"], r["learning_rate"]) for r in rows(whole)
    ]
    for name, tensor in trained_tensors(whole).items():
        assert torch.equal(trained_tensors(second)[name], tensor), name
    assert whole.export is not None and second.export is not None
    for name, tensor in load_file(whole.export).items():  # the average
        assert torch.equal(load_file(second.export)[name], tensor), name


def test_accumulated_passes_equal_one_batch(settings: dict[str, Any], tmp_path: Path) -> None:
    one = train(config_of(settings, tmp_path / "one", run={"steps": 3, "batch_size": 2}))
    two = train(config_of(settings, tmp_path / "two", run={"steps": 3, "batch_size": 1, "accumulate": 2}))
    # fp32: the sums over samples are taken in another order
    assert list(two.losses) == pytest.approx(one.losses, rel=1e-5)


def test_checkpoint_and_export_load_with_the_scale_that_was_trained(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    report = train(config_of(settings, tmp_path, run={"steps": 3, "trigger": "sks"}))
    assert report.checkpoint is not None and report.export is not None
    state = trained_tensors(report)
    layer = "blocks.1.cross_attn.k"
    down, up = (state[f"{layer}.lora_{ab}.default.weight"] for ab in "AB")
    delta = 8.0 / 4 * up @ down
    assert delta.abs().max() > 1e-6
    base = weight_after(settings, None)
    for path in (report.checkpoint, report.export):
        torch.testing.assert_close(weight_after(settings, path), base + delta, rtol=1e-6, atol=1e-7)
    with safe_open(report.export, "pt") as file:
        told, names = file.metadata(), list(file.keys())
    assert (told["rank"], told["alpha"], told["trigger"], told["steps"]) == ("4", "8", "sks", "3")
    assert {"base_model", "data_hash", "modelspec.architecture", "ss_network_dim"} <= told.keys()
    assert f"diffusion_model.{layer}.lora_A.weight" in names and f"diffusion_model.{layer}.alpha" in names
    # the file of v1 has no alpha beside it: its scale is 1
    torch.save(state, tmp_path / "v1.ckpt")
    torch.testing.assert_close(weight_after(settings, tmp_path / "v1.ckpt"), base + delta / 2)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_checkpoint_and_export_of_other_factors_agree(
    settings: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    report = train(config_of(settings, tmp_path, tune={"kind": kind}, run={"steps": 2}))
    assert report.checkpoint is not None and report.export is not None
    base, one, other = (weight_after(settings, p) for p in (None, report.checkpoint, report.export))
    assert (one - base).abs().max() > 1e-6
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_full_training_gives_files_that_load_as_the_model(settings: dict[str, Any], tmp_path: Path) -> None:
    report = train(config_of(settings, tmp_path, tune={"kind": "full"}, run={"steps": 2}))
    assert report.checkpoint is not None and report.export is not None
    base = weight_after(settings, None)
    for path in (report.checkpoint, report.export):
        manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models([path])
        dit = manager.fetch_model("wan_video_dit")
        assert dit is not None and dit.config.num_heads == 2  # told by the metadata alone
        found = dit.get_parameter("blocks.1.cross_attn.k.weight")
        assert torch.equal(found, trained_tensors(report)["blocks.1.cross_attn.k.weight"])
        assert not torch.equal(found, base)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_sample(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(settings, tmp_path, run={"steps": 6, "batch_size": 1})
    at = Batches.at
    broken = "none yet"
    losses = FlowMatchObjective.losses
    calls = 0

    def bad(self: FlowMatchObjective, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return losses(self, *args) * (math.nan if calls == 4 else 1.0)

    def noting(self: Batches, step: int) -> Any:
        nonlocal broken
        if step == 3:
            broken = self.samples.name(at(self, step)[0].index)
        return at(self, step)

    monkeypatch.setattr(FlowMatchObjective, "losses", bad)
    monkeypatch.setattr(Batches, "at", noting)
    with pytest.raises(NotFiniteError, match="loss of step 4 is not finite, at sample") as caught:
        train(config)
    assert broken in str(caught.value)
    (saved,) = (tmp_path / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt")
    assert saved.name.endswith("step=3.ckpt")
    assert all(torch.isfinite(t).all() for t in torch.load(saved, weights_only=True)["state_dict"].values())


STOPPED_BY = {"file": "a signal or the file 'stop'", "SIGTERM": "SIGTERM", "Ctrl-C": "Ctrl-C"}


@pytest.mark.parametrize("wish", STOPPED_BY)
def test_a_wish_to_stop_saves_first(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    wish: str,
) -> None:
    before = Saver.on_train_batch_end

    def wishing(self: Saver, trainer: Any, module: Any, *rest: Any) -> None:
        before(self, trainer, module, *rest)
        if module.done == 1:
            os.kill(os.getpid(), signal.SIGUSR1)  # saves, and goes on
        if module.done == 3 and wish == "file":
            (tmp_path / "stop").touch()
        elif module.done == 3:
            signal.raise_signal(signal.SIGINT if wish == "Ctrl-C" else signal.SIGTERM)

    monkeypatch.setattr(Saver, "on_train_batch_end", wishing)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    report = train(config_of(settings, tmp_path, run={"steps": 20, "keep_last": 0}))
    assert report.step == 4 and report.stopped_by == STOPPED_BY[wish]
    assert report.exit_code == (130 if wish == "Ctrl-C" else 0)
    assert ("the run saves after this step and stops" in capfd.readouterr().err) == (wish == "Ctrl-C")
    assert report.checkpoint is not None
    names = sorted(p.name.partition("-")[2] for p in report.checkpoint.parent.glob("*.ckpt"))
    assert names == ["step=2.ckpt", "step=4.ckpt"]
    assert not (tmp_path / "stop").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize(("at", "kept"), [(0, "Nothing was saved"), (3, "step=2.ckpt; run.resume: latest")])
def test_a_second_ctrl_c_stops_at_once_and_the_first_where_no_step_was_done(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, kept: str
) -> None:
    finish = training_run.WanTrainingModule._finish

    def pressing(self: Any, step: int, learner: Any) -> None:
        if step == at:
            signal.raise_signal(signal.SIGINT)
            assert at, "before the first step there is nothing to wait for"
            signal.raise_signal(signal.SIGINT)
        assert step < 3
        finish(self, step, learner)

    monkeypatch.setattr(training_run.WanTrainingModule, "_finish", pressing)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=kept):
        train(config_of(settings, tmp_path, run={"steps": 20, "save_every": 2, "workers": 1}))
    assert signal.getsignal(signal.SIGINT) == handler and not list(tmp_path.rglob(".part-*"))


def test_ctrl_c_while_encoding_keeps_what_is_done_and_begins_no_training(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path)
    for path in (tmp_path / "data").glob("*.tensors.safetensors"):
        path.unlink()
    latents, num_coded = EncodingSession.latents, 0

    def pressing(self: Any, *args: Any, **tiles: Any) -> Any:
        nonlocal num_coded
        num_coded += 1
        if num_coded == 2:
            signal.raise_signal(signal.SIGINT)
        return latents(self, *args, **tiles)

    config = config_of(settings, tmp_path / "out", run={"task": "both"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncodingSession, "latents", pressing)
        with pytest.raises(KeyboardInterrupt, match="2 of 6 missing clips were encoded and are kept"):
            train(config)
    assert len(list((tmp_path / "data").glob("*.tensors.safetensors"))) == 2
    assert train(config).step == 4


def test_a_file_of_the_user_named_stop_is_neither_a_wish_nor_removed(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "stop").write_text("notes")
    report = train(config_of(settings, tmp_path, run={"steps": 2}))
    assert report.step == 2 and report.stopped_by is None
    assert (tmp_path / "stop").read_text() == "notes"


def test_another_model_is_refused_at_resume(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config_of(settings, tmp_path, run={"steps": 1}))
    changed = load_file(settings["model"]["dit"][0])
    changed["blocks.0.ffn.0.weight"][0] += 1
    with safe_open(settings["model"]["dit"][0], "pt") as file:
        save_file(changed, tmp_path / "other.safetensors", file.metadata())
    other = {"dit": [str(tmp_path / "other.safetensors")]}
    with pytest.raises(
        ArgumentError, match=r"trained with model \w+ \(dit\.safetensors\).*this run has \w+ \(other\.safe"
    ):
        train(config_of(settings, tmp_path, model=other, run={"steps": 2, "resume": "latest"}))
    with pytest.raises(ArgumentError, match="method lora of dit, rank 4"):
        train(config_of(settings, tmp_path, tune={"rank": 2}, run={"steps": 2, "resume": "latest"}))
    encoding = {"steps": 2, "resume": "latest", "task": "both"}  # told before that
    for changed in ({"model": other}, {"tune": {"rank": 2}}, {"optimizer": {"name": "adamw"}}):
        config = config_of(settings, tmp_path, run=encoding, **changed)
        with monkeypatch.context() as patch, pytest.raises(ArgumentError, match="was trained with"):
            patch.setattr(training_run, "_fill_cache", lambda *_: pytest.fail("it was encoded"))
            train(config)


def test_two_experts_learn_in_turn_each_in_its_range(settings: dict[str, Any], tmp_path: Path) -> None:
    low = toy_files("t2v", seed=1)[0]
    config = config_of(settings, tmp_path, model={"dit_low": [low]}, run={"steps": 6, "batch_size": 1})
    seen: list[tuple[int, float]] = []
    finish = training_run.WanTrainingModule._finish

    def noting(self: Any, step: int, learner: Any) -> None:
        finish(self, step, learner)
        seen.append((self.learners.index(learner), float(self.report.timesteps[0])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run.WanTrainingModule, "_finish", noting)
        report = train(config)
    assert {number for number, _ in seen} == {0, 1}
    assert all((told >= 875) == (number == 0) for number, told in seen)
    assert report.checkpoint is not None and report.export is not None and report.export.is_file()
    state = trained_tensors(report)
    for prefix in ("pipe.dit.", "pipe.dit2."):
        assert (state[f"{prefix}blocks.1.cross_attn.k.lora_B.default.weight"] != 0).any()
    manager = ModelManager(torch_dtype=torch.float32, device="cpu")
    manager.load_models([settings["model"]["dit"][0], low])
    assert len(manager.load_lora(report.checkpoint)) == 2
    again = config_of(
        settings, tmp_path, model={"dit_low": [low]}, run={"steps": 7, "batch_size": 1, "resume": "latest"}
    )
    assert train(again).step == 7


def test_a_run_that_is_extended_goes_on_from_its_learning_rate_without_a_jump(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = {"name": "sgd", "learning_rate": 0.1, "schedule": "cosine", "final_share": 0.01}
    common: dict[str, Any] = {"batch_size": 1, "save_every": 2, "keep_last": 0}

    def run(folder: str, steps: int, **more: Any) -> RunReport:
        run = {**common, "steps": steps, "resume": "latest", **more.pop("run", {})}
        return train(config_of(settings, tmp_path / folder, optimizer={**optimizer, **more}, run=run))

    run("a", 6)
    assert "learning rate" not in caplog.text
    extended = run("a", 12)
    assert "run.steps was 6 and is 12 now: the learning rate was" in caplog.text
    rates = [float(row["learning_rate"]) for row in rows(extended)]
    assert len(rates) == 12 and rates == sorted(rates, reverse=True) and rates[6] == rates[5]
    # A kill behind step 8 and another start change nothing of it.
    assert extended.checkpoint is not None
    for path in extended.checkpoint.parent.glob("*.ckpt"):
        if int(path.stem.partition("step=")[2]) > 8:
            path.unlink()
    assert [float(row["learning_rate"]) for row in rows(run("a", 12))] == rates
    run("b", 6)
    caplog.clear()
    other = run("b", 8, schedule="constant")
    assert "The schedule is another: the learning rate was" in caplog.text
    assert [float(row["learning_rate"]) for row in rows(other)][6:] == [0.1, 0.1]


def test_a_model_under_another_name_is_the_same_model(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config_of(settings, tmp_path, run={"steps": 1}))
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(Path(settings["model"]["dit"][0]).read_bytes())
    again = {"steps": 2, "resume": "latest"}
    assert train(config_of(settings, tmp_path, model={"dit": [str(renamed)]}, run=again)).step == 2
    assert "model files was dit.safetensors and is renamed.safetensors now" in caplog.text


def test_options_of_an_optimizer_are_those_of_the_run_that_goes_on(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(
        config_of(settings, tmp_path, optimizer={**ADAMW, "options": {"weight_decay": 0.5}}, run={"steps": 1})
    )
    rest = config_of(
        settings, tmp_path, optimizer={**ADAMW, "options": {"weight_decay": 0.25}},
        run={"steps": 2, "resume": "latest"},
    )  # fmt: skip
    report = train(rest)
    assert report.checkpoint is not None
    (group,) = torch.load(report.checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.25 and "optimizer settings was" in caplog.text


@pytest.mark.parametrize("kind", ["dora", "lokr", "full"])
def test_a_format_that_cannot_hold_what_trains_is_told_before_the_first_step(
    settings: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    config = config_of(settings, tmp_path, tune={"kind": kind}, run={"export_format": "diffusers"})
    with pytest.raises((ArgumentError, LoRAError), match="diffusers"):
        train(config)
    assert not list(tmp_path.rglob("*.csv"))


def test_a_log_on_a_full_disk_costs_rows_and_not_the_run(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    append = logs._append

    def full(path: Path, columns: Any, lines: Any) -> None:
        if lines[0][0] == "2":
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, columns, lines)

    monkeypatch.setattr(logs, "_append", full)
    report = train(config_of(settings, tmp_path, run={"steps": 3}))
    assert report.step == 3 and [row["step"] for row in rows(report)] == ["1", "3"]
    assert "No row of step 2" in caplog.text and "Training goes on" in caplog.text


def test_a_schedule_free_optimizer_is_told_that_it_trains(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tests.unit.training.test_run.Switching"
    report = train(config_of(settings, tmp_path, optimizer={"name": name}, run={"steps": 2, "save_every": 1}))
    assert report.step == 2
    with pytest.raises(ArgumentError, match="looks at all weights at once"):
        config_of(
            settings, tmp_path, optimizer={"name": "schedule_free"},
            tune={"kind": "full", "rounding": "stochastic"},
        )  # fmt: skip


class Switching(torch.optim.SGD):
    """Refuses to step where it was not told to train, as schedule-free ones do."""

    trains = False

    def train(self) -> None:
        self.trains = True

    def eval(self) -> None:
        self.trains = False

    def step(self, closure: Any = None) -> Any:
        assert self.trains, "not in train mode"
        return super().step(closure)


@pytest.mark.parametrize(("schedule", "count"), [("cosine", 1), ("constant", 0)])
def test_a_checkpoint_that_does_not_tell_its_steps_warns_of_a_jump(
    schedule: str, count: int, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(settings, tmp_path, optimizer={"schedule": schedule})
    of_before = State(step=1, epoch=0, tensors={}, optimizers=[], averages={}, facts={})
    assert course_of(config, of_before) is None
    assert sum("does not tell how many steps" in message for message in caplog.messages) == count
