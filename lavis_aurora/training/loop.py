"""The steps of an epoch, on CPU and GPU, in one process or several."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_dist_avail_and_initialized
from lavis.common.optims import LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.tasks.base_task import BaseTask
from lavis.tasks.retrieval import RetrievalTask
from lavis.tasks.vqa_reading_comprehension import VQARCTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lavis_aurora.adapters.sets import trained_buffers
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.samples import BROKEN, report_broken
from lavis_aurora.mode_approx.inject import resting_teacher
from lavis_aurora.training.guards import FiniteGuard
from lavis_aurora.training.tasks.base import AuroraTaskBase, check_model


class TrainingProgress:
    """Says epoch, step, losses, learning rate and time left.

    Args:
        epoch: from 0.
        epochs: of the whole run.
        steps: of an epoch.
        first: step at which the epoch goes on, if it was interrupted.
    """

    def __init__(self, epoch: int, epochs: int, steps: int, first: int = 0) -> None:
        self.epoch, self.epochs, self.steps, self.first = epoch, epochs, steps, first
        self.start = time.time()

    def log(self, step: int, losses: dict[str, float], lr: float) -> None:
        """Log a line after ``step`` (from 0)."""
        per_step = (time.time() - self.start) / (step + 1 - self.first)
        left = per_step * (self.steps - step - 1)
        run_left = left + per_step * self.steps * (self.epochs - self.epoch - 1)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        logging.info(
            "epoch %d/%d  step %d/%d  %s  lr %.3g  %.3f s/step  left: epoch %s, training %s",
            self.epoch + 1,
            self.epochs,
            step + 1,
            self.steps,
            shown,
            lr,
            per_step,
            timedelta(seconds=round(left)),
            timedelta(seconds=round(run_left)),
        )


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


class AuroraTrainMixin:
    """Training for any LAVIS task: in front of it, with :class:`AuroraTaskBase` behind it.

    Attributes:
        cfg: the ``run:`` part of the YAML.
        shards_evaluation: whether processes may share an evaluation split by samples; retrieval ranks it as a whole.
        first_step: where the epoch begins, if it was interrupted; ``totals`` are then the losses of the steps before.
        after_step: called after each step of the optimizer with the number of batches done in the epoch.
        finite: what watches the numbers of each step.
    """

    shards_evaluation = True
    first_step = 0
    after_step: Callable[[int], None] = staticmethod(lambda done: None)
    finite: FiniteGuard | None = None
    totals: dict[str, Tensor]

    @classmethod
    def setup_task(cls, cfg) -> AuroraTrainMixin:
        """LAVIS's task with the settings of ``run:``, not all of which it keeps."""
        task = super().setup_task(cfg=cfg)
        task.cfg = cfg.run_cfg
        return task

    def build_model(self, cfg) -> nn.Module:
        """LAVIS's; a model that this task cannot evaluate is refused."""
        model = super().build_model(cfg)
        check_model(type(self), model, cfg)
        return model

    def _train_inner_loop(
        self,
        epoch,
        iters_per_epoch,
        model,
        data_loader,
        optimizer,
        lr_scheduler,
        scaler=None,
        start_iters=None,
        log_freq=50,
        cuda_enabled=False,
        accum_grad_iters=1,
    ) -> dict[str, float]:
        """One epoch; returns the mean of each loss over steps and processes, and the last ``lr``.

        Arguments are LAVIS's, whose own loop waits for the GPU every step and gathers its means on a GPU only.
        """
        first = self.first_step
        progress = TrainingProgress(epoch, int(self.cfg.max_epoch), iters_per_epoch, first)
        if not first:
            self.totals = {}
        broken: list[str] = []
        self._statistics = list(trained_buffers(getattr(model, "module", model)).values())
        for i, samples in enumerate(data_loader, start=first):
            samples = prepare_sample(samples, cuda_enabled=cuda_enabled)
            broken += samples.pop(BROKEN, [])
            samples.update(epoch=epoch, num_iters_per_epoch=iters_per_epoch, iters=i)
            lr_scheduler.step(cur_epoch=epoch, cur_step=i)
            # The last steps of an epoch may be fewer than are accumulated.
            rest = iters_per_epoch % accum_grad_iters
            parts = rest if i >= iters_per_epoch - rest else accum_grad_iters
            begins = i == first or i % accum_grad_iters == 0
            updates = (i + 1) % accum_grad_iters == 0 or i + 1 == iters_per_epoch
            losses = self._backward(model, samples, scaler, parts, begins, updates)
            for key, value in losses.items():
                # Of a step that is skipped, nothing counts.
                self.totals[key] = self.totals.get(key, 0.0) + value.double().nan_to_num(0.0, 0.0, 0.0)
            if updates:
                self._update(optimizer, scaler, losses, samples)
            elif self.finite is not None:
                self.finite.note(get_total_norm(_gradients(optimizer)), losses.values(), samples)
            if (i + 1) % log_freq == 0 or i + 1 == iters_per_epoch:
                progress.log(i, {key: float(v) for key, v in losses.items()}, optimizer.param_groups[0]["lr"])
            if updates:
                self.after_step(i + 1)
        if self.finite is not None:
            self.finite.flush()
        path = Path(registry.get_path("output_dir")) / f"broken_videos_epoch_{epoch}.txt"
        count = (iters_per_epoch - first) * int(self.cfg.batch_size_train)
        report_broken(broken, count, float(self.cfg.max_broken_share), path)
        return {**_means(self.totals, iters_per_epoch), "lr": optimizer.param_groups[0]["lr"]}

    def _backward(
        self, model: nn.Module, samples: dict, scaler, parts: int, begins: bool, updates: bool
    ) -> dict[str, Tensor]:
        """Add a batch's part to the gradient; its losses, detached.

        Args:
            parts: batches of the step of the optimizer.
            begins, updates: whether this is the first of them, and the last.
        """
        self.losses = {}
        if begins:
            self._before = [buffer.clone() for buffer in self._statistics]
        with ExitStack() as stack:
            if not begins:
                # The student has not moved: the teacher follows it once a step.
                stack.enter_context(resting_teacher(model))
            if not updates and isinstance(model, DistributedDataParallel):
                stack.enter_context(model.no_sync())
            with torch.autocast(next(model.parameters()).device.type, enabled=scaler is not None):
                loss = self.train_step(model=model, samples=samples)
            part = loss / parts
            (part if scaler is None else scaler.scale(part)).backward()
        return {**self.losses, "loss": loss.detach()}

    def _update(self, optimizer, scaler, losses: dict[str, Tensor], samples: dict) -> None:
        """One step of the optimizer, unless its numbers are refused; the scaler learns of them either way."""
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = get_total_norm(_gradients(optimizer))
        if clip := float(self.cfg.get("grad_clip", 0)):
            clip_grads_with_norm_(_trained(optimizer), clip, norm)
        if self.finite is None or self.finite.accepts(norm, losses.values(), samples, scaled=scaler is not None):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        else:
            # Its batches must not live on in running statistics either.
            for buffer, before in zip(self._statistics, self._before):
                buffer.copy_(before)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for p in _trained(optimizer) if p.grad is not None]


def _means(totals: dict[str, Tensor], steps: int) -> dict[str, float]:
    """Mean over steps and processes."""
    if not totals:
        return {}
    stacked = torch.stack(list(totals.values()))
    if is_dist_avail_and_initialized():
        dist.all_reduce(stacked)
    values = (stacked / (steps * get_world_size())).tolist()
    return dict(zip(totals, values))


class LavisTaskMixin(AuroraTrainMixin):
    """In front of a task of LAVIS: it trains as the tasks of this package do, and evaluates where the model is."""

    def evaluation(self, model, data_loader, **_kwargs) -> Any:
        """LAVIS's, which expects a GPU unless it is told otherwise."""
        return super().evaluation(model, data_loader, cuda_enabled=next(model.parameters()).is_cuda)


def runnable_task(cls: type[BaseTask]) -> type[BaseTask]:
    """The task itself, if it is made for runner_aurora, or a subclass that is.

    Raises:
        AuroraError: the task is of LAVIS's for models without a training loss.
    """
    if issubclass(cls, AuroraTrainMixin):
        return cls
    if issubclass(cls, VQARCTask):
        raise AuroraError(
            "run.task: vqa_reading_comprehension and gqa_reading_comprehension evaluate models that have no training "
            "loss, by keys of their own and in several processes only; run them by LAVIS's runner_base"
        )
    shards = not issubclass(cls, RetrievalTask)
    return type(cls.__name__, (LavisTaskMixin, cls, AuroraTaskBase), {"shards_evaluation": shards})
