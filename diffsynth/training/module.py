"""One training step, for one DiT or two experts, in Lightning.

Optimization is manual: a step belongs to one expert, and only that expert's optimizer moves. Everything drawn
(which samples, which expert, noise, noise level, caption dropout) is a function of (seed, step, sample).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffsynth.checkpoints.hints import Role
from diffsynth.errors import ArgumentError, NotFiniteError
from diffsynth.training.batches import Batches, Pick, chance
from diffsynth.training.config import TrainConfig
from diffsynth.training.ema import Ema
from diffsynth.training.learners import Learner
from diffsynth.training.objective import FlowMatchObjective
from diffsynth.training.optimizers import Course, learning_rate_factor, named_state, set_learning_rate
from diffsynth.training.placing import Placing
from diffsynth.training.samples import Batch
from diffsynth.training.sharding import full, like
from diffsynth.training.zero import Zero

SAVE, STOP = 1, 2  # bits of what is wished from outside


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What one pass of one rank works on."""

    batch: Batch
    picks: tuple[Pick, ...]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a finished step tells its listeners; the same on every rank."""

    step: int  # done, counted from 1
    picks: tuple[Pick, ...]  # of all ranks
    losses: Tensor  # (samples of the step,), in the order of the picks
    timesteps: Tensor  # (samples of the step,), 0..1000
    learning_rate: float
    grad_norm: float  # before it was clipped
    wishes: int  # SAVE and STOP, of any rank
    role: Role | None = None  # of two experts, whose step it was
    steps_of_expert: int = 0  # that it has done, this one counted

    @property
    def loss(self) -> float:
        """Mean over the samples."""
        return float(self.losses.mean())


class WanTrainingModule(LightningModule):
    """See this module's legend.

    Args:
        learners: one per expert.
        objective: draws noise levels and judges velocities.
        batches: say what a step sees.
        config: of the run.
        start: steps done before, by the run that this one goes on with.
        optimizer_states: of that run.
        averages: of that run.
        course: of the learning rate; None: from the first step to the last.
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        objective: FlowMatchObjective,
        batches: Batches,
        config: TrainConfig,
        *,
        start: int = 0,
        optimizer_states: Sequence[dict[str, Any]] = (),
        averages: Sequence[dict[str, Tensor]] = (),
        course: Course | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learners, self.objective, self.batches, self.config = list(learners), objective, batches, config
        self.start, self.done = start, start
        self.course = course or Course(stop=config.run.steps)
        self.report: StepReport | None = None  # of the step that the last pass finished
        self.wishes: Callable[[], int] = lambda: 0
        self.averages: list[Ema] = []
        self._restored = (list(optimizer_states), list(averages))
        self._measured: list[Tensor] = []
        self._is_placed = False
        self.placing = Placing(config.memory, Path(config.run.output))
        self._steps_of = [0] * len(self.learners)  # done by each expert
        for step in range(start) if len(self.learners) > 1 else ():
            self._steps_of[self.expert_of(step)] += 1
        # Only what is trained: a frozen base is neither moved, nor compared between ranks, nor saved.
        self.trained = nn.ParameterList(p for one in self.learners for p in one.parameters().values())

    def configure_model(self) -> None:
        """Networks come to the device; under FSDP2 each rank keeps a part of every weight."""
        if self._is_placed:
            return
        strategy = self.trainer.strategy
        mesh = strategy.device_mesh["data_parallel"] if isinstance(strategy, ModelParallelStrategy) else None
        self.placing.enter(self.learners, strategy.root_device, mesh)
        if mesh is not None:
            del self.trained  # these were whole; the shards stand in their modules
            self.denoisers = nn.ModuleList(learner.denoiser for learner in self.learners)
        self._is_placed = True

    def teardown(self, stage: str) -> None:
        """The networks are as they were, but for what they learnt."""
        self.placing.leave()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One per expert, as the restored run left them."""
        states, averages = self._restored
        optimizers = []
        for number, learner in enumerate(self.learners):
            parameters = learner.parameters()
            optimizer = learner.make_optimizer(self.config.optimizer)
            if states:
                require_same_names(states[number], list(parameters))
            if states and not self._has_zero:
                load_optimizer(optimizer, states[number], self.config.optimizer.options)
            if hasattr(optimizer, "train"):  # a schedule-free one, which stands at its other point until told
                optimizer.train()
            optimizers.append(optimizer)
            if self.config.optimizer.ema:
                ema = Ema(parameters, self.config.optimizer.ema)
                if averages:
                    ema.load({name: like(ema.average[name], t) for name, t in averages[number].items()})
                self.averages.append(ema)
        return optimizers

    def on_train_start(self) -> None:
        """What DeepSpeed has cut into pieces is restored once it has."""
        states = self._restored[0]
        if states and self._has_zero:
            self._zero.load(states[0], self.learners[0].parameters(), self.config.optimizer.options)

    def plain_optimizers(self) -> list[torch.optim.Optimizer]:
        """One per expert, without what Lightning puts around them."""
        optimizers = cast("Any", self.optimizers(use_pl_optimizer=False))
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def optimizer_states(self) -> list[dict[str, Any]]:
        """Of each expert, whole or in shards, with the names of the parameters; every rank must ask."""
        if self._has_zero:
            return [self._zero.state(self.learners[0].parameters())]
        return [
            named_state(optimizer, list(learner.parameters()))
            for learner, optimizer in zip(self.learners, self.plain_optimizers(), strict=True)
        ]

    def transfer_batch_to_device(self, batch: Drawn, device: torch.device, dataloader_idx: int) -> Drawn:
        """Stays where it is: the DiT takes what it needs to its own device."""
        return batch

    def shown(self, number: int) -> AbstractContextManager[None]:
        """An expert's weights as they are shown and exported: their average, where one is kept."""
        if not self.averages:
            return nullcontext()
        return self.averages[number].in_place_of(self.learners[number].parameters())

    def reshard(self) -> None:
        """Under FSDP2 a pass without gradients leaves weights whole; what follows wants shards."""
        for learner in self.learners:
            if isinstance(learner.denoiser, FSDPModule):
                learner.denoiser.reshard()

    def expert_of(self, step: int) -> int:
        """Whose turn it is: a function of (seed, step), the same on every rank."""
        shares = [learner.share for learner in self.learners]
        turn = step // self.config.experts.turn
        place, reached = chance(self.config.run.seed, turn, "expert") * sum(shares), 0.0
        for number, share in enumerate(shares):
            reached += share
            if place < reached:
                return number
        return len(shares) - 1

    def training_step(self, drawn: Drawn, batch_idx: int) -> None:
        """One pass; the last one of a step moves the weights."""
        self.report = None
        step = drawn.picks[0].step
        learner = self.learners[self.expert_of(step)]
        # For an optimizer that draws from torch's own generator: it too depends on the step alone.
        torch.manual_seed(int(chance(self.config.run.seed, step, "torch") * 2**62))
        losses, timesteps = self.losses(learner, drawn.batch, step, [pick.draw_id for pick in drawn.picks])
        # Nothing here waits for the device, so that the backward pass is launched while the forward one runs.
        told = timesteps.to(losses.device, non_blocking=True)
        self._measured.append(torch.stack([losses.detach().float(), told.float()]))
        is_last = len(self._measured) == self.config.run.accumulate
        weights = torch.tensor([pick.weight for pick in drawn.picks])
        weights = weights.to(losses.device, non_blocking=True)
        with self._sync(is_last):
            self.manual_backward((losses * weights).mean() / self.config.run.accumulate)
        if is_last:
            self._finish(step, learner)

    def losses(
        self,
        learner: Learner,
        batch: Batch,
        step: int,
        draw_ids: Sequence[str],
        sigma: float | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss of each sample (B,), and the timesteps (B,) that the network was told.

        Args:
            learner: who answers.
            batch: of one bucket.
            step: noise and noise level are functions of it, of the seed, and of ``draw_ids``.
            draw_ids: one per sample.
            sigma: this noise level, one of this learner's, instead of drawn ones.
            seed: instead of the run's.
        """
        self.placing.use(learner)
        objective, pinned = self.objective, batch.plan.num_pinned
        device = learner.denoiser.dit.device
        latents = batch.clean.to(device, torch.float32)
        sigmas, noise = objective.draw(
            self.config.run.seed if seed is None else seed, step, draw_ids, latents.shape[1:], learner.low,
            learner.high,
        )  # fmt: skip
        if sigma is not None:
            sigmas = torch.full_like(sigmas, sigma)
        noise = noise.to(device)
        noisy = batch.plan.pin(objective.noisy(latents, noise, sigmas))
        told = objective.timesteps(sigmas, latents.shape[2], pinned)
        velocity = learner.denoiser(noisy, told, batch.conditions)
        return objective.losses(velocity, latents, noise, sigmas, pinned), sigmas * 1000

    def _sync(self, is_last: bool) -> AbstractContextManager[None]:
        """Gradients travel between ranks once per step, not once per pass."""
        strategy = self.trainer.strategy
        if self._has_zero:
            self._zero.expect(is_last=is_last)
        if self._has_zero or is_last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        return cast("AbstractContextManager[None]", strategy.block_backward_sync())

    def _finish(self, step: int, learner: Learner) -> None:
        losses, timesteps, wishes = self._gathered()
        picks = self.batches.at(step)
        require_finite(losses, timesteps, picks, step, self.batches.samples.name)
        number = self.learners.index(learner)
        optimizers = cast("list[Any]", self.optimizers(use_pl_optimizer=True))
        optimizer = (optimizers if isinstance(optimizers, list) else [optimizers])[number]
        rate = learner.learning_rate * learning_rate_factor(
            step, self.config.run.steps, self.config.optimizer, self.course
        )
        set_learning_rate(optimizer.optimizer, rate)
        norm = self._move(optimizer, learner, step)
        if not math.isfinite(norm):
            raise NotFiniteError(
                f"The gradients of step {step + 1} are not finite (the loss is {float(losses.mean()):.4g}), "
                f"with {self._named(picks)}. Lower optimizer.learning_rate, or look at these samples."
            )
        optimizer.zero_grad(set_to_none=True)
        if self.averages:
            self.averages[number].update(learner.parameters(), step + 1)
        self.done = step + 1
        self._steps_of[number] += 1
        self.report = StepReport(
            step=self.done,
            picks=picks,
            losses=losses,
            timesteps=timesteps,
            learning_rate=rate,
            grad_norm=norm,
            wishes=wishes,
            role=learner.role,
            steps_of_expert=self._steps_of[number],
        )

    def _move(self, optimizer: Any, learner: Learner, step: int) -> float:
        """Clip and step; the norm of the gradients before that. Where it is not finite nothing has moved."""
        if self._has_zero:
            optimizer.step()
            return self._zero.grad_norm
        norm = clip(list(learner.parameters().values()), self.config.optimizer.clip_norm)
        if math.isfinite(norm):
            rounding = learner.tuned.rounding
            if rounding is None:
                optimizer.step()
            else:
                rounding.step(optimizer.step, self.config.run.seed, step)
        return norm

    def _named(self, picks: Sequence[Pick]) -> str:
        names = [self.batches.samples.name(pick.index) for pick in picks]
        return f"samples {', '.join(names[:4])}{' ...' if names[4:] else ''}"

    @property
    def _has_zero(self) -> bool:
        return isinstance(self.trainer.strategy, DeepSpeedStrategy)

    @property
    def _zero(self) -> Zero:
        return Zero(self.trainer.model)

    def _gathered(self) -> tuple[Tensor, Tensor, int]:
        """Losses and timesteps of the step's samples, in the order of its picks, and wishes; of all ranks."""
        measured, wished = torch.cat(self._measured, dim=1), self.wishes()
        self._measured = []
        if dist.is_available() and dist.is_initialized():
            own = torch.cat([measured.flatten(), measured.new_tensor([float(wished)])])
            ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, own)
            every = torch.stack(ranks).cpu()
            for value in every[:, -1].tolist():
                wished |= int(value)
            every = every[:, :-1]
        else:
            every = measured.flatten()[None].cpu()
        # (rank, 2, pass, sample) -> (2, pass, rank, sample)
        passes = every.reshape(len(every), 2, self.config.run.accumulate, -1)
        table = passes.permute(1, 2, 0, 3).reshape(2, -1)
        return table[0], table[1], wished


def require_finite(
    losses: Tensor, timesteps: Tensor, picks: Sequence[Pick], step: int, name_of: Callable[[int], str]
) -> None:
    """Stop before a loss that is no number reaches the weights.

    Args:
        losses: (samples of the step,).
        timesteps: (samples of the step,), 0..1000.
        picks: the samples.
        step: counted from 0.
        name_of: the file of a sample, by its index.

    Raises:
        NotFiniteError: names the samples.
    """
    broken = [(pick, float(t)) for pick, t, fine in zip(picks, timesteps, torch.isfinite(losses), strict=True)
              if not fine]  # fmt: skip
    if broken:
        told = "; ".join(f"{name_of(pick.index)} at timestep {t:.0f}" for pick, t in broken[:4])
        raise NotFiniteError(
            f"The loss of step {step + 1} is not finite, at sample {told}. The weights are those before this "
            "step. Usual causes: a damaged sample (remove it and run data_process again), a learning rate "
            "that is too high, or weights in float16 (use bfloat16)."
        )


def clip(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale gradients down to a norm, 0: leave them; returns the norm that they had, over all ranks."""
    given = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(given, limit or math.inf)
    return float(full(norm))


def require_same_names(saved: dict[str, Any], names: list[str]) -> None:
    """Refuse the state of an optimizer that moved other parameters.

    Raises:
        ArgumentError: when it belongs to other parameters.
    """
    if saved["names"] != names:
        strange = sorted(set(saved["names"]) ^ set(names))
        raise ArgumentError(
            f"The checkpoint's optimizer moved {len(saved['names'])} tensors and this run trains "
            f"{len(names)}; only one of them has {', '.join(strange[:3]) or 'this order'}. Go on with the "
            "same tune section."
        )


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], options: Mapping[str, object]
) -> None:
    """Put a saved state back, cut into shards where the parameters are; ``options`` are this run's."""
    own = [{k: v for k, v in group.items() if k in options} for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {name: like(parameters[int(number)], value) for name, value in one.items()}
        for number, one in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
