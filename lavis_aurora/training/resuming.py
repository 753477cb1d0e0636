"""What a run saves of its state, and how it goes on from that."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized, is_main_process
from torch import Tensor

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.evaluation.encode import broadcast
from lavis_aurora.training.checkpoints import (
    BEST,
    DAMAGED,
    LATEST,
    PREVIOUS,
    read_checkpoint,
    read_latest,
    write_checkpoint,
)
from lavis_aurora.training.loop import TrainableModel, TrainingState
from lavis_aurora.training.order import random_state, set_random_state


def load_weights(model: TrainableModel, path: Path) -> None:
    """Put what a checkpoint holds of the model back, for an evaluation."""
    model.load_run_state(read_checkpoint(path)["model"], str(path))


class RunCheckpoints:
    """Checkpoints of one run: what is trained and where the run stands, and nothing of the frozen backbone.

    Args:
        folder: of the run.
        cfg: LAVIS's configuration, with ``run_cfg``.
        state: of the run; :meth:`resume` changes it.
    """

    def __init__(self, folder: Path, cfg: Any, state: TrainingState) -> None:
        self.folder, self.cfg, self.state = folder, cfg, state

    def save(self, epoch: int, validated: bool = False, name: str = LATEST) -> None:
        """Write a checkpoint, whole or not at all; the one before it stays as checkpoint_previous.pth.

        Args:
            epoch: from 0.
            validated: the epoch is done, validation and all; else ``state.step`` batches of it are.
            name: of the file.
        """
        state = self.state
        sums, counts = ({key: float(x[i]) for key, x in state.totals.items()} for i in (0, 1))
        local = dict(
            random=random_state(), losses=sums, counts=counts, skipped=state.guard.skipped, broken=state.broken
        )
        processes: list[dict[str, Any]] = [local]
        if is_dist_avail_and_initialized():
            processes = [{}] * get_world_size()
            dist.all_gather_object(processes, local)
        if not is_main_process():
            return
        content = {
            "model": state.unwrapped.run_state(),
            "queue": state.unwrapped.queue_state() if self.cfg.run_cfg.save_queue else {},
            "optimizer": state.optimizer.state_dict(),
            "trained": self._trained_names(),
            "scaler": state.scaler.state_dict() if state.scaler else None,
            "config": self.cfg.to_dict(),
            "epoch": epoch,
            "step": state.steps if validated else state.step,
            "steps_per_epoch": state.steps,
            "validated": validated,
            "processes": processes,
            "best_metric": state.best_metric,
            "best_epoch": state.best_epoch,
        }
        write_checkpoint(content, self.folder / name, previous=self.folder / PREVIOUS if name == LATEST else None)

    def load_best(self) -> None:
        """Put the best epoch's weights back; all processes must call it."""
        if is_dist_avail_and_initialized():
            dist.barrier()  # the main process may be writing it
        try:
            load_weights(self.state.unwrapped, self.folder / BEST)
        except AuroraError as error:
            raise AuroraError(f"{error}; start the run again with run.resume=auto, which writes it anew") from error

    def resume(self) -> Path | None:
        """Go on with this very run, or from the checkpoint that the YAML names; its path, None at a new start."""
        named = self.cfg.run_cfg.resume_ckpt_path
        if named:
            path = Path(named)
            self._load(read_checkpoint(path), path)
            return path
        if self.cfg.run_cfg.resume != "auto":
            return None
        # All processes go on from the same one.
        found = read_latest(self.folder) if is_main_process() else None
        chosen = broadcast(found[1] if found else None)
        if chosen is not None:
            self._load(found[0] if found else read_checkpoint(chosen), chosen)
            if is_main_process():
                self._set_damaged_aside(chosen)
        return chosen

    def _set_damaged_aside(self, resumed: Path) -> None:
        """A latest checkpoint that is not the one resumed from: the next one would push a good one out for it."""
        latest = self.folder / LATEST
        if resumed != latest and latest.exists():
            latest.replace(self.folder / DAMAGED)
            logging.warning("%s is kept as %s; the run goes on from %s", latest, DAMAGED, resumed.name)

    def _load(self, content: dict[str, Any], path: Path) -> None:
        """Take up a run where its checkpoint left it."""
        state, epochs = self.state, int(self.cfg.run_cfg.max_epoch)
        state.unwrapped.load_run_state(content["model"], str(path))
        self._load_optimizer(content, path)
        if not state.unwrapped.load_queue_state(content.get("queue") or {}):
            logging.warning("the queue of features starts anew: it is not in %s (run.save_queue)", path)
        self._load_position(content)
        if state.epoch >= epochs and path.parent != self.folder:
            raise AuroraError(f"run.max_epoch: {epochs} epochs are done; raise it, or test with evaluate.py")
        best = broadcast(self._keep_best(content, path) if is_main_process() else None)
        state.best_lost = best is None and content["best_epoch"] is not None and content.get("validated", True)
        state.best_metric, state.best_epoch = best or (float("-inf"), None)
        if state.epoch >= epochs:
            logging.info("run.resume: %s is finished (epochs: %d) and is only tested again", path.parent, epochs)
        else:
            logging.info("resumed at epoch %d, step %d from %s", state.epoch + 1, state.step + 1, path)

    def _trained_names(self) -> list[list[str]]:
        """Of the parameters of each group of the optimizer."""
        names = {id(parameter): name for name, parameter in self.state.unwrapped.named_parameters()}
        return [[names[id(one)] for one in group["params"]] for group in self.state.optimizer.param_groups]

    def _load_optimizer(self, content: dict[str, Any], path: Path) -> None:
        """Moments and scale; groups of rates, weight decay and betas are this YAML's."""
        optimizer, scaler = self.state.optimizer, self.state.scaler
        saved, trained, names = content["optimizer"], content.get("trained"), self._trained_names()
        # The rate is the schedule's, set before each step: until then that of the checkpoint stands.
        settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        rates, before = (one.get("run", {}).get("lr_scales") for one in (self.cfg.to_dict(), content["config"]))
        if trained is None and (rates or {}) != (before or {}):
            raise AuroraError(
                f"run.resume_ckpt_path: {path} is of an older version, which does not say what its moments are of; "
                f"go on with the run.lr_scales that it was trained with: {before or {}}"
            )
        try:
            if trained is not None and trained != names:  # torch goes by the order alone, which other groups change
                saved = {**optimizer.state_dict(), "state": _reordered(saved["state"], trained, names)}
            optimizer.load_state_dict(saved)
            for parameter, moments in optimizer.state.items():
                if moments and moments["exp_avg"].shape != parameter.shape:
                    raise ValueError(f"moments of {moments['exp_avg'].shape} for a parameter of {parameter.shape}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AuroraError(
                f"run.resume_ckpt_path: {path} does not fit the optimizer ({error}); go on with the model.tuning and "
                f"the groups of run.lr_scales that it was trained with"
            ) from error
        for group, own in zip(optimizer.param_groups, settings):
            group.update(own)
        if scaler and content["scaler"]:
            scaler.load_state_dict(content["scaler"])

    def _load_position(self, content: dict[str, Any]) -> None:
        """Epoch, step, and each process's random numbers and losses so far; skipped steps and broken videos."""
        state, validated = self.state, content.get("validated", True)
        state.epoch, state.step = (content["epoch"] + 1, 0) if validated else (content["epoch"], content["step"])
        if state.step and content.get("steps_per_epoch") != state.steps:
            logging.warning("epoch %d starts anew: it now has %d steps", state.epoch + 1, state.steps)
            state.step = 0
        processes = content.get("processes", [])
        state.guard.skipped = max((process.get("skipped", 0) for process in processes), default=0)
        if get_rank() == 0:  # only all of them together are asked for
            state.broken = [video for process in processes for video in process.get("broken", ())]
        losses = [_totals(process, state.step) for process in processes]
        if len(processes) == get_world_size():
            set_random_state(processes[get_rank()]["random"])
            losses = [losses[get_rank()]]
        else:
            logging.warning("random numbers start anew: there were %d processes", len(processes))
        # Of other processes' losses the mean: that over all of them stays what it was.
        state.totals = {
            key: torch.stack([one[key] for one in losses]).mean(dim=0) for key in (losses[0] if losses else ())
        }

    def _keep_best(self, content: dict[str, Any], path: Path) -> tuple[float, int] | None:
        """Metric and epoch of the best so far, whose file is afterwards this run's too; None if there is none."""
        if content["best_epoch"] is None:
            return None
        source = path.with_name(BEST)
        try:
            best = read_checkpoint(source)
            of_another = best["epoch"] != best["best_epoch"] or _shapes(best) != _shapes(content)
            if of_another or best["epoch"] > content["epoch"]:
                raise AuroraError(f"{source} is not the best epoch of the run of {path}")
        except AuroraError as error:
            if content["best_epoch"] != content["epoch"] or not content.get("validated", True):
                logging.warning("%s; the best so far, epoch %d, is lost", error, content["best_epoch"] + 1)
                return None
            logging.warning("%s; it is written anew: %s is of that epoch", error, path)
            best, source = content, path
        if source != self.folder / BEST:
            write_checkpoint(best, self.folder / BEST)
        return best["best_metric"], best["epoch"]


def _totals(process: dict[str, Any], step: int) -> dict[str, Tensor]:
    """Sum and count of each loss; older versions counted every batch, ``step`` of them."""
    counts = process.get("counts") or dict.fromkeys(process["losses"], step)
    return {key: torch.tensor([x, counts[key]], dtype=torch.float64) for key, x in process["losses"].items()}


def _reordered(moments: dict[int, Any], names: list[list[str]], wanted: list[list[str]]) -> dict[int, Any]:
    """Moments of named parameters, by their numbers among the wanted ones; a KeyError where one is not named."""
    numbers = {name: i for i, name in enumerate(chain.from_iterable(names))}
    before = ((i, numbers[name]) for i, name in enumerate(chain.from_iterable(wanted)))
    return {i: moments[number] for i, number in before if number in moments}


def _shapes(content: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in content["model"].items()}
