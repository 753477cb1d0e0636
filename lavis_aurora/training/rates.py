"""Learning rates: LAVIS's schedules with a warm-up of any length, and scales of the rate for parts of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from lavis.common.optims import LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from torch import nn
from torch.optim import Optimizer

from lavis_aurora.adapters.switching import trained_groups
from lavis_aurora.common.errors import AuroraError, did_you_mean

# In a group of an optimizer: its rate by that of the schedule, as timm and later versions of LAVIS name it.
LR_SCALE = "lr_scale"


class Schedule(Protocol):
    """One of LAVIS's schedules."""

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the rate of a batch of an epoch, both from 0."""


def scale_rates(optimizer: Optimizer, model: nn.Module, scales: Mapping[str, float]) -> None:
    """Move what has a rate of its own into groups of its own, behind those that the optimizer has.

    Args:
        optimizer: not used yet.
        model: whose parameters it has.
        scales: factors on the rate by group of :func:`trained_groups`.

    Raises:
        AuroraError: nothing of such a group is trained.
    """
    if not scales:
        return
    groups = trained_groups(model)
    for name in scales:
        if name not in groups:
            raise AuroraError(
                f"run.lr_scales: the model trains nothing called {name!r}{did_you_mean(name, groups)}; what it "
                f"trains: {', '.join(groups)}"
            )
    scale_of = {id(parameter): scale for name, scale in scales.items() for parameter in groups[name]}
    for group in list(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        parameters = group["params"]
        group["params"] = [parameter for parameter in parameters if id(parameter) not in scale_of]
        for scale in dict.fromkeys(scales.values()):
            moved = [parameter for parameter in parameters if scale_of.get(id(parameter)) == scale]
            if moved:
                optimizer.add_param_group({**settings, "params": moved, LR_SCALE: scale})


class ScaledRates:
    """A schedule whose rates are multiplied by each group's scale.

    Args:
        schedule: sets the same rate for all groups of the optimizer.
        optimizer: with the groups of :func:`scale_rates`.
    """

    def __init__(self, schedule: Schedule, optimizer: Optimizer) -> None:
        self.schedule, self.optimizer = schedule, optimizer

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the rates of a batch of an epoch, both from 0."""
        self.schedule.step(cur_epoch=cur_epoch, cur_step=cur_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= group.get(LR_SCALE, 1.0)


WITH_WARMUP = (LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler)


class LongWarmup:
    """One of LAVIS's schedules, whose warm-up goes on beyond the first epoch; LAVIS would cut it off there.

    At batch n of the run, from 0, in epoch e,

        lr = min(warmup_lr + (init_lr - warmup_lr) * n / warmup_steps, LAVIS's of epoch e)

    Args:
        schedule: of LAVIS.
        batches: of an epoch.
    """

    def __init__(self, schedule: LinearWarmupCosineLRScheduler | LinearWarmupStepLRScheduler, batches: int) -> None:
        self.schedule, self.batches = schedule, batches
        if schedule.warmup_steps > batches * schedule.max_epoch:
            logging.warning(
                "run.warmup_steps: %d are more than the %d batches of the run; it never reaches run.init_lr",
                schedule.warmup_steps,
                batches * schedule.max_epoch,
            )

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the rate of a batch of an epoch, both from 0."""
        groups, done = self.schedule.optimizer.param_groups, cur_epoch * self.batches + cur_step
        self.schedule.step(cur_epoch=cur_epoch, cur_step=cur_step)
        if cur_epoch == 0 or done >= self.schedule.warmup_steps:
            return
        rates = [group["lr"] for group in groups]
        # What LAVIS would set, were all batches in its first epoch.
        self.schedule.step(cur_epoch=0, cur_step=done)
        for group, rate in zip(groups, rates):
            group["lr"] = min(group["lr"], rate)
