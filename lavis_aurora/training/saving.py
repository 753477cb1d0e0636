"""Checkpoints of a runner: what they hold, and how a run goes on from one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized, is_main_process
from torch import nn

from lavis_aurora.errors import AuroraError
from lavis_aurora.training.checkpointing import (
    BEST,
    DAMAGED,
    LATEST,
    PREVIOUS,
    read_checkpoint,
    read_latest,
    write_checkpoint,
)
from lavis_aurora.training.order import random_state, set_random_state

T = TypeVar("T")


class SavingMixin:
    """In front of LAVIS's runner: what is trained and where the run stands, and nothing of the frozen backbone.

    Attributes:
        start_epoch, start_step: where training begins, from 0.
        best_metric, best_epoch: of the best epoch so far.
        best_lost: its file is; the epoch that the run goes on from is the first to be compared with.
    """

    start_step = 0
    best_metric = float("-inf")
    best_epoch: int | None = None
    best_lost = False

    def _save_checkpoint(self, epoch: int, step: int, validated: bool = False, name: str = LATEST) -> None:
        """Write a checkpoint, whole or not at all; the one before it stays as checkpoint_previous.pth.

        Args:
            epoch: from 0.
            step: batches of it that are done.
            validated: the epoch is done, validation and all.
            name: of the file.
        """
        local = {"random": random_state(), "losses": {key: float(x) for key, x in self.task.totals.items()}}
        processes = [local]
        if is_dist_avail_and_initialized():
            processes = [None] * get_world_size()
            dist.all_gather_object(processes, local)
        if not is_main_process():
            return
        model = self.unwrap_dist_model(self.model)
        state = {
            "model": model.run_state(),
            "queue": model.queue_state() if self.config.run_cfg.save_queue else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "config": self.config.to_dict(),
            "epoch": epoch,
            "step": step,
            "steps_per_epoch": len(self.train_loader),
            "validated": validated,
            "processes": processes,
            "best_metric": self.best_metric,
            "best_epoch": self.best_epoch,
        }
        path = self.output_dir / name
        write_checkpoint(state, path, previous=self.output_dir / PREVIOUS if name == LATEST else None)

    def _reload_best_model(self, model: nn.Module) -> nn.Module:
        """Put the best epoch's weights back."""
        path = self.output_dir / BEST
        try:
            model.load_run_state(read_checkpoint(path)["model"], str(path))
        except AuroraError as error:
            raise AuroraError(f"{error}; start the run again with run.resume=auto, which writes it anew") from error
        return model

    def _resume(self) -> None:
        """Go on with this very run, or from the checkpoint that the YAML names."""
        if self.resume_ckpt_path:
            self._load_checkpoint(read_checkpoint(self.resume_ckpt_path), Path(self.resume_ckpt_path))
        elif self.config.run_cfg.resume == "auto":
            # All processes go on from the same one.
            found = read_latest(self.output_dir) if is_main_process() else None
            path = _of_main_process(found and found[1])
            if path is not None:
                self._load_checkpoint(found[0] if found else read_checkpoint(path), path)
                if is_main_process():
                    self._set_damaged_aside(path)

    def _set_damaged_aside(self, resumed: Path) -> None:
        """A latest checkpoint that is not the one resumed from: the next one would push a good one out for it."""
        latest = self.output_dir / LATEST
        if resumed != latest and latest.exists():
            latest.replace(self.output_dir / DAMAGED)
            logging.warning("%s is kept as %s; the run goes on from %s", latest, DAMAGED, resumed.name)

    def _load_checkpoint(self, state: dict[str, Any], path: Path) -> None:
        """Take up a run where its checkpoint left it; for evaluation, only its weights."""
        model = self.unwrap_dist_model(self.model)
        model.load_run_state(state["model"], str(path))
        if self.evaluate_only:
            return
        groups = self.optimizer.param_groups
        # The rate is the schedule's, set before each step: until then that of the checkpoint stands.
        settings = [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, moments in self.optimizer.state.items():
                if moments and moments["exp_avg"].shape != parameter.shape:
                    raise ValueError(f"moments of {moments['exp_avg'].shape} for a parameter of {parameter.shape}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AuroraError(f"run.resume_ckpt_path: {path} does not fit the optimizer ({error})") from error
        for group, own in zip(self.optimizer.param_groups, settings):
            group.update(own)  # weight decay and betas are this YAML's
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if not model.load_queue_state(state.get("queue") or {}):
            logging.warning("the queue of features starts anew: it is not in %s (run.save_queue)", path)
        self._take_position(state)
        if self.start_epoch >= self.max_epoch and not self._is_own(path):
            raise AuroraError(f"run.max_epoch: {self.max_epoch} epochs are done; raise it, or test with evaluate.py")
        best = _of_main_process(self._keep_best(state, path) if is_main_process() else None)
        self.best_lost = best is None and state["best_epoch"] is not None and state.get("validated", True)
        self.best_metric, self.best_epoch = best or (float("-inf"), None)
        if self.start_epoch >= self.max_epoch:
            logging.info(
                "run.resume: %s is finished (epochs: %d) and is only tested again", path.parent, self.max_epoch
            )
        else:
            logging.info("resumed at epoch %d, step %d from %s", self.start_epoch + 1, self.start_step + 1, path)

    def _is_own(self, path: Path) -> bool:
        return path.parent == self.output_dir

    def _take_position(self, state: dict[str, Any]) -> None:
        """Epoch, step, and each process's random numbers and losses so far."""
        steps = len(self.train_loader)
        validated = state.get("validated", True)
        self.start_epoch, self.start_step = (state["epoch"] + 1, 0) if validated else (state["epoch"], state["step"])
        if self.start_step and state.get("steps_per_epoch") != steps:
            logging.warning("epoch %d starts anew: it now has %d steps", self.start_epoch + 1, steps)
            self.start_step = 0
        processes = state.get("processes", [])
        losses = [process["losses"] for process in processes]
        if len(processes) == get_world_size():
            set_random_state(processes[get_rank()]["random"])
            losses = [losses[get_rank()]]
        else:
            logging.warning("random numbers start anew: there were %d processes", len(processes))
        # Of other processes' losses the mean: that over all of them stays what it was.
        self.task.totals = {
            key: torch.tensor(sum(one[key] for one in losses) / len(losses), dtype=torch.float64)
            for key in (losses[0] if losses else ())
        }

    def _keep_best(self, state: dict[str, Any], path: Path) -> tuple[float, int] | None:
        """Metric and epoch of the best so far, whose file is afterwards this run's too; None if there is none."""
        if state["best_epoch"] is None:
            return None
        source = path.with_name(BEST)
        try:
            best = read_checkpoint(source)
            of_another = best["epoch"] != best["best_epoch"] or _shapes(best) != _shapes(state)
            if of_another or best["epoch"] > state["epoch"]:
                raise AuroraError(f"{source} is not the best epoch of the run of {path}")
        except AuroraError as error:
            if state["best_epoch"] != state["epoch"] or not state.get("validated", True):
                logging.warning("%s; the best so far, epoch %d, is lost", error, state["best_epoch"] + 1)
                return None
            logging.warning("%s; it is written anew: %s is of that epoch", error, path)
            best, source = state, path
        if source != self.output_dir / BEST:
            write_checkpoint(best, self.output_dir / BEST)
        return best["best_metric"], best["epoch"]

    def _validate_again(self) -> None:
        """Let the epoch that the run goes on from take the place of a lost best one; no random number is drawn."""
        before = random_state()
        self._validate(self.start_epoch - 1)
        set_random_state(before)


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in state["model"].items()}


def _of_main_process(value: T) -> T:
    """The main process's, on all."""
    values = [value]
    if is_dist_avail_and_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]
