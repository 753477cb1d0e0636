"""The steps of an epoch, on CPU and GPU, in one process or several."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lavis.common.dist_utils import is_dist_avail_and_initialized
from lavis.datasets.data_utils import prepare_sample
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lavis_aurora.adapters.companions import trained_buffers
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.samples import BROKEN, report_undecodable
from lavis_aurora.training.guards import CollapseGuard, FiniteGuard
from lavis_aurora.training.loggers import Loggers
from lavis_aurora.training.nested import NestedSteps
from lavis_aurora.training.rates import Schedule

Samples = dict[str, Any]


def in_several_processes(model: nn.Module, gpu: int | None) -> DistributedDataParallel:
    """The model, alike in all processes, which exchange its gradients.

    Args:
        gpu: of this process; None on a CPU.
    """
    # Queues start alike, are filled alike on all processes, and need not be sent each step.
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    return DistributedDataParallel(model, device_ids=None if gpu is None else [gpu], broadcast_buffers=False)


@runtime_checkable
class TrainableModel(Protocol):
    """What a run asks of a model, an ``nn.Module``, besides its loss."""

    def run_state(self) -> dict[str, Tensor]:
        """What training changes, by name, on the CPU."""

    def load_run_state(self, state: dict[str, Tensor], source: str) -> None:
        """Load that; an AuroraError that names ``source`` where it does not fit."""

    def queues(self) -> dict[str, Tensor]:
        """Features of earlier batches, by name; empty for most models."""

    def queue_state(self) -> dict[str, Tensor]:
        """Copies of them, for a checkpoint."""

    def load_queue_state(self, state: dict[str, Tensor]) -> bool:
        """Put them back; False where they are not there, or of another kind."""

    def share_buffers(self) -> None:
        """Let all processes have the main one's buffers of trained modules."""

    def frozen_teacher(self) -> AbstractContextManager[None]:
        """Context in which momentum copies stay as they are."""

    def compile_layers(self) -> None:
        """Compile the layers of the towers; an AuroraError where they are others than LAVIS's ViT and BERT."""


def check_trainable(model: nn.Module, arch: str) -> None:
    """Refuse a model, registered as ``arch``, that is no :class:`TrainableModel`."""
    if not isinstance(model, TrainableModel):
        raise AuroraError(
            f"model.arch: runner_aurora trains models of this package; to tune {arch}, wrap it: "
            f"model: {{arch: mode_approx, base: {{arch: {arch}}}}}"
        )


class TrainableTask(Protocol):
    """What a step asks of a task.

    Attributes:
        in_batch: the ITC loss among the pairs of the last batch alone, and how many they are; None without one.
    """

    in_batch: Optional[tuple[Tensor, int]]

    def losses(self, model: nn.Module, samples: Samples) -> dict[str, Tensor]:
        """Losses of a batch by name; ``loss`` is minimised."""


class Batches(Protocol):
    """A loader: batches, and how many an epoch has."""

    def __iter__(self) -> Iterator[Samples]: ...

    def __len__(self) -> int: ...


@dataclass
class TrainingState:
    """What the steps of a run need, and where it stands: all that runner, loop and checkpoints share.

    Attributes:
        task: gives the losses of a batch.
        model: on its device, wrapped for several processes.
        loader: of the training samples, see :func:`lavis_aurora.training.order.start_epoch`.
        optimizer, schedule: LAVIS's; the first group of the optimizer has the rate of the schedule.
        autocast: what mixed precision computes in; None without.
        scaler: of losses in float16; None without.
        guard: watches the numbers of each step.
        collapse: stops a run whose features have become alike.
        nested: which rank a step trains; None where a model has one.
        loggers: are given the losses of every ``log_freq``-th step.
        run: the ``run:`` part of the YAML.
        folder: of the run.
        epoch, step: where training stands: the epoch, from 0, and how many batches of it are done.
        totals: of the steps made of these batches, the sum of each loss on this process, and over how many batches.
        broken: videos of them that could not be read, on this process.
        gradient_norm: of the last step of the optimizer, before it was clipped; None before the first.
        running_stats: buffers that training changes, and their values before the step of the optimizer.
        best_metric, best_epoch: of the best epoch so far.
        best_lost: its file is; the epoch that the run goes on from is the first to be compared with.
    """

    task: TrainableTask
    model: nn.Module
    loader: Batches
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    guard: FiniteGuard
    run: Mapping[str, Any]
    folder: Path
    autocast: Optional[torch.dtype] = None
    scaler: Optional[torch.amp.GradScaler] = None
    nested: Optional[NestedSteps] = None
    loggers: Loggers = field(default_factory=Loggers)
    epoch: int = 0
    step: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    gradient_norm: Optional[Tensor] = None
    running_stats: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    best_metric: float = float("-inf")
    best_epoch: Optional[int] = None
    best_lost: bool = False

    def __post_init__(self) -> None:
        self.collapse = CollapseGuard(self.run)

    @property
    def unwrapped(self) -> Any:
        """The model itself, a :class:`TrainableModel`."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self.loader)

    @property
    def batches(self) -> int:
        """Done since the start of the run."""
        return self.epoch * self.steps + self.step


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


def train_steps(state: TrainingState) -> Iterator[int]:
    """Train on what is left of an epoch; LAVIS's own loop waits for the GPU every step.

    ``state.step``, ``state.totals`` and ``state.broken`` go along.

    Yields:
        After each step of the optimizer, how many batches of the epoch are done.

    Raises:
        Diverged: numbers that are not finite, or collapsed features.
        AuroraError: more broken videos than ``run.max_broken_share``.
    """
    run, first, steps = state.run, state.step, state.steps
    accumulated, log_freq = int(run["accum_grad_iters"]), int(run["log_freq"])
    progress = TrainingProgress(state.epoch, int(run["max_epoch"]), steps, first)
    if not first:
        state.totals, state.broken = {}, []
        state.guard.start_epoch()
    state.running_stats = [(buffer, buffer.clone()) for buffer in trained_buffers(state.unwrapped).values()]
    pending: dict[str, Tensor] = {}
    # The last batches of an epoch may be fewer than are accumulated.
    rest = steps % accumulated
    for i, samples in enumerate(state.loader, start=first):
        samples = prepare_sample(samples, cuda_enabled=next(state.model.parameters()).is_cuda)
        state.broken += samples.pop(BROKEN, [])
        samples.update(epoch=state.epoch, num_iters_per_epoch=steps, iters=i)
        state.schedule.step(cur_epoch=state.epoch, cur_step=i)
        parts = rest if i >= steps - rest else accumulated
        begins = i == first or i % accumulated == 0
        updates = (i + 1) % accumulated == 0 or i + 1 == steps
        losses = _backward(state, samples, parts, begins, updates)
        _add(pending, {key: _counted(value) for key, value in losses.items()})
        place = f"epoch {state.epoch + 1}, step {i + 1}"
        state.collapse.note(state.task.in_batch, place)
        if updates:
            if _update(state, losses, samples):
                _add(state.totals, pending)
            pending = {}  # of a step that is skipped, nothing counts
        else:
            state.guard.note(get_total_norm(_gradients(state.optimizer)), losses.values(), samples)
        state.step = i + 1
        if state.step % log_freq == 0 or state.step == steps:
            shown, lr = {key: float(v) for key, v in losses.items()}, state.optimizer.param_groups[0]["lr"]
            progress.log(i, shown, lr)
            logged = shown if state.gradient_norm is None else {**shown, "gradient_norm": float(state.gradient_norm)}
            state.loggers.scalars("train", {**logged, "lr": lr}, state.batches, state.epoch)
        if updates:
            yield state.step
    state.guard.flush()
    count = steps * int(run["batch_size_train"])
    path = state.folder / f"broken_videos_epoch_{state.epoch}.txt"
    report_undecodable(state.broken, count, float(run["max_broken_share"]), path)


def epoch_stats(state: TrainingState) -> dict[str, float]:
    """Of an epoch that is done: the mean of each loss over processes and the steps that were made, the last ``lr``,
    and ``skipped_steps`` if there are any."""
    skipped = {"skipped_steps": state.guard.skipped} if state.guard.skipped else {}
    return {**_means(state.totals), "lr": state.optimizer.param_groups[0]["lr"], **skipped}


def _backward(state: TrainingState, samples: Samples, parts: int, begins: bool, updates: bool) -> dict[str, Tensor]:
    """Add a batch's part to the gradient; its losses, detached.

    Args:
        state: of the run.
        samples: the batch.
        parts: batches of the step of the optimizer.
        begins, updates: whether this is the first of them, and the last.
    """
    model, scaler, nested = state.model, state.scaler, state.nested
    if begins:
        for buffer, before in state.running_stats:
            before.copy_(buffer)
    with ExitStack() as stack:
        if nested is not None:
            stack.enter_context(nested.trained(samples["epoch"], samples["iters"]))
        if not begins:
            # The student has not moved: the teacher follows it once a step.
            stack.enter_context(state.unwrapped.frozen_teacher())
        if not updates and isinstance(model, DistributedDataParallel):
            stack.enter_context(model.no_sync())
        device = next(model.parameters()).device.type
        with torch.autocast(device, dtype=state.autocast, enabled=state.autocast is not None):
            losses = state.task.losses(model, samples)
        part = losses["loss"] / parts
        torch.autograd.backward(part if scaler is None else scaler.scale(part))
    return {name: loss.detach() for name, loss in losses.items()}


def _update(state: TrainingState, losses: dict[str, Tensor], samples: Samples) -> bool:
    """One step of the optimizer, unless its numbers are refused; whether it was made. The scaler learns of it."""
    optimizer, scaler = state.optimizer, state.scaler
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = state.gradient_norm = get_total_norm(_gradients(optimizer))
    if clip := float(state.run["grad_clip"]):
        clip_grads_with_norm_(_trained(optimizer), clip, norm)
    made = state.guard.accepts(norm, losses.values(), samples, scaled=scaler is not None)
    if made:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
    else:
        # Its batches must not live on in running statistics either.
        for buffer, before in state.running_stats:
            buffer.copy_(before)
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return made


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter.grad for parameter in _trained(optimizer) if parameter.grad is not None]


def _counted(value: Tensor) -> Tensor:
    """A loss and 1, (2,); zeros for one that is not finite, as a part that only the log shows may be."""
    value = value.double()
    return torch.stack([value.nan_to_num(0.0, 0.0, 0.0), value.isfinite().double()])


def _add(totals: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for key, value in more.items():
        totals[key] = totals[key].to(value.device) + value if key in totals else value


def _means(totals: dict[str, Tensor]) -> dict[str, float]:
    """Mean over what was counted on all processes; what never was has none."""
    if not totals:
        return {}
    stacked = torch.stack(list(totals.values()))
    if is_dist_avail_and_initialized():
        dist.all_reduce(stacked)
    return {key: total / count for key, (total, count) in zip(totals, stacked.tolist()) if count}
