"""What optimises: LAVIS's schedules with a warm-up of any length, rates for parts of a model, mixed precision."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lavis.common.optims import LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from lavis.runners.runner_base import RunnerBase
from torch import nn
from torch.optim import Optimizer

from lavis_aurora.adapters.switching import trained_groups
from lavis_aurora.common.errors import AuroraError, did_you_mean

# In a group of an optimizer: its rate by that of the schedule, as timm and later versions of LAVIS name it.
LR_SCALE = "lr_scale"


# What Linux says of a processor, on x86 and ARM.
CPU_INFO = Path("/proc/cpuinfo")
CPU_FLAGS = re.compile(r"^(?:flags|Features)\s*:(.*)$", re.MULTILINE)
CPU_BF16 = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")


def emulates_bfloat16(cuda: bool) -> bool:
    """Whether the GPU, or else the processor, is known to lack instructions for bfloat16, which then takes longer."""
    if cuda:
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    flags = CPU_FLAGS.search(CPU_INFO.read_text(encoding="utf-8")) if CPU_INFO.is_file() else None
    return flags is not None and not CPU_BF16.search(flags[1])


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
                f"trains: {', '.join(groups)}; one rate for all: run.lr_scales={{}}"
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


class OptimizedRunner(RunnerBase):
    """RunnerBase with rates for parts of a model, a warm-up of any length, and bfloat16."""

    _model: nn.Module
    _optimizer: Optimizer | None
    _scaler: torch.amp.GradScaler | None
    _lr_sched: Any

    @property
    def optimizer(self) -> Optimizer:
        """LAVIS's AdamW over what is trained, groups of it at a rate of their own."""
        if self._optimizer is None:
            if not any(p.requires_grad for p in self._model.parameters()):
                raise AuroraError("model.tuning: nothing is trained; use evaluate.py, or another model.tuning")
            made = cast(Optimizer, super().optimizer)
            if self.config.run_cfg.weight_decay_all:
                for group in made.param_groups:
                    group["weight_decay"] = self.config.run_cfg.weight_decay
            scale_rates(made, self._model, self.config.run_cfg.lr_scales)
        return cast(Optimizer, super().optimizer)

    @property
    def lr_scheduler(self) -> Any:
        """LAVIS's, with a warm-up of any length, scaled for each group of the optimizer."""
        if self._lr_sched is None:
            made = super().lr_scheduler
            if isinstance(made, WITH_WARMUP):
                made = LongWarmup(made, len(self.train_loader))
            self._lr_sched = ScaledRates(made, self.optimizer) if self.config.run_cfg.lr_scales else made
        return self._lr_sched

    @property
    def autocast(self) -> torch.dtype | None:
        """What mixed precision computes in; None for single precision."""
        half = torch.float16 if self.cuda_enabled else None
        return {"bf16": torch.bfloat16, True: half}.get(self.config.run_cfg.amp)

    def warn_of_precision(self) -> None:
        """Say in one line where mixed precision does not give what it is for."""
        keys = self.config.run_cfg
        amp = None if self.evaluate_only else keys.amp  # which is of training alone
        if amp is True and not self.cuda_enabled:
            logging.warning("run.amp: true is for a GPU; computing in single precision; bf16 is for CPUs too")
        wanted = {"run.amp: bf16": amp == "bf16", "run.eval_bf16: true": keys.get("eval_bf16")}
        if any(wanted.values()) and emulates_bfloat16(self.cuda_enabled):
            logging.warning(
                "%s: this %s has no instructions for bfloat16; single precision takes less time",
                " and ".join(key for key, value in wanted.items() if value),
                "GPU" if self.cuda_enabled else "processor",
            )

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaling, which float16 needs."""
        if self._scaler is None and self.autocast is torch.float16:
            self._scaler = torch.amp.GradScaler("cuda")
        return self._scaler
