"""Checkpoints of a runner: what they hold, and how a run goes on from one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized, is_main_process
from torch import nn

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import written_whole
from lavis_aurora.training.order import random_state, set_random_state

LATEST, PREVIOUS, BEST = "checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
KEYS = {"model", "optimizer", "scaler", "epoch", "step", "best_metric", "best_epoch"}
# Keys of ``run`` that may differ when a run goes on: they do not change what is computed. Of the number of processes
# and their batches the product counts, see _essential.
INCIDENTAL = {
    *("resume", "resume_ckpt_path", "evaluate", "output_dir", "rank", "gpu", "dist_url", "dist_backend"),
    *("num_workers", "log_freq", "checkpoint_every", "distributed"),
}


def write_checkpoint(state: dict[str, Any], path: str | Path, previous: str | Path | None = None) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        state: what to write.
        path: where.
        previous: where an older file of that name is kept.

    Raises:
        AuroraError: the file cannot be written; the older one is still there.
    """
    with written_whole(path, previous) as file:
        torch.save(state, file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of :func:`write_checkpoint`; tensors and plain values only are unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each have errors of their own
        raise AuroraError(f"{path} is not a readable checkpoint ({error})") from error
    missing = KEYS - (set(state) if isinstance(state, dict) else set())
    if missing:
        raise AuroraError(f"{path} is not a checkpoint of a run: it has no {', '.join(sorted(missing))}")
    if not all(isinstance(value, torch.Tensor) for value in dict(state["model"]).values()):
        raise AuroraError(f"{path} is not a checkpoint of a run: its model is no state dict of tensors")
    return state


def read_latest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest readable checkpoint of a run's folder and its path; None if there is none."""
    for name in (LATEST, PREVIOUS):
        path = folder / name
        if path.is_file():
            try:
                return read_checkpoint(path), path
            except AuroraError as error:
                logging.warning("%s; trying the one before it", error)
    return None


def same_run(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two resolved configurations compute the same."""
    return _essential(config) == _essential(other)


def _essential(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the numbers of a run.

    A step computes the same in any number of processes with the same global batch: so it is that one which counts.
    Where negatives are each process's own (``negative_all_rank: false``), or the model inside is LAVIS's, each
    process's share matters too.
    """
    run = {key: value for key, value in config.get("run", {}).items() if key not in INCIDENTAL}
    processes, model = run.pop("world_size", 1), config.get("model", {})
    if model.get("arch") != "mode_approx" and model.get("negative_all_rank", True):
        run["batch_size_train"] = run.get("batch_size_train", 0) * processes
    else:
        run["world_size"] = processes
    return {**config, "run": run}


def run_to_resume(output_dir: str | Path, config: Mapping[str, Any]) -> Path | None:
    """The newest folder under ``output_dir`` with a checkpoint of this very configuration; None if there is none."""
    by_time: Callable[[Path], float] = lambda folder: folder.stat().st_mtime  # noqa: E731
    folders = {path.parent for name in (LATEST, PREVIOUS) for path in Path(output_dir).glob(f"*/{name}")}
    for folder in sorted(folders, key=by_time, reverse=True):
        found = read_latest(folder)
        if found is not None and same_run(found[0].get("config", {}), config):
            return folder
    return None


class SavingMixin:
    """In front of LAVIS's runner: what is trained and where the run stands, and nothing of the frozen backbone.

    Attributes:
        start_epoch, start_step: where training begins, from 0.
        best_metric, best_epoch: of the best epoch so far.
    """

    start_step = 0
    best_metric = float("-inf")
    best_epoch: int | None = None

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
        model.load_run_state(read_checkpoint(path)["model"], str(path))
        return model

    def _resume(self) -> None:
        """Go on with this very run, or from the checkpoint that the YAML names."""
        if self.resume_ckpt_path:
            self._load_checkpoint(read_checkpoint(self.resume_ckpt_path), Path(self.resume_ckpt_path))
        elif self.config.run_cfg.resume == "auto" and (found := read_latest(self.output_dir)):
            self._load_checkpoint(*found)

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
        except (KeyError, ValueError) as error:
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
        self.best_metric, self.best_epoch = state["best_metric"], state["best_epoch"]
        self._keep_best(path, state["epoch"])
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
        if self.start_step and state["steps_per_epoch"] != steps:
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

    def _keep_best(self, resumed: Path, epoch: int) -> None:
        """Take over the best epoch so far, which may stay the best; without its file, look for a new one."""
        best = resumed.with_name(BEST)
        source = best if best.is_file() else resumed if self.best_epoch == epoch else None
        if self.best_epoch is None or source is None:
            self.best_metric, self.best_epoch = float("-inf"), None
        elif is_main_process() and source.parent != self.output_dir:
            write_checkpoint(read_checkpoint(source), self.output_dir / BEST)
