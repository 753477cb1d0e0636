"""Checkpoints of a runner: what they hold, and how a run goes on from one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized, is_main_process
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError, some
from lavis_aurora.common.files import load_torch, why_unreadable, written_whole
from lavis_aurora.models.weights import is_finite
from lavis_aurora.training.order import is_random_state, random_state, set_random_state

LATEST, PREVIOUS, BEST = "checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
DAMAGED = "checkpoint_damaged.pth"  # a latest one that could not be read, out of the way of the next
KEYS = {"model", "optimizer", "scaler", "epoch", "step", "best_metric", "best_epoch"}
# Keys of ``run`` that may differ when a run goes on: they do not change what is computed. Of the number of processes
# and their batches the product counts, see _essential.
INCIDENTAL = {
    *("resume", "resume_ckpt_path", "evaluate", "output_dir", "rank", "gpu", "dist_url", "dist_backend"),
    *("num_workers", "log_freq", "checkpoint_every", "distributed", "dist_timeout_minutes"),
}

# What may differ besides when a run's best epoch is evaluated.
OF_NO_EVALUATION = ("world_size", "batch_size_train", "batch_size_eval", "test_splits")


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
    """A checkpoint of :func:`write_checkpoint`; tensors and plain values only are unpickled.

    Raises:
        AuroraError: it is damaged, holds numbers that are none, or what no run writes.
        MemoryError: there is no room for it.
    """
    try:
        state = load_torch(path)
    except MemoryError:
        raise
    except Exception as error:  # torch, pickle and zipfile each have errors of their own
        raise AuroraError(f"{path} is not a readable checkpoint ({why_unreadable(error)})") from error
    missing = KEYS - (set(state) if isinstance(state, dict) else set())
    if missing:
        raise AuroraError(f"{path} is not a checkpoint of a run: it has no {', '.join(sorted(missing))}")
    wrong = [key for key, is_right in ENTRIES.items() if key in state and not _holds(is_right, state[key])]
    if wrong or not _holds(_fit_together, state):
        wrong = wrong or ["epoch, step and best epoch together"]
        raise AuroraError(f"{path} is not a checkpoint of a run: no run writes such {some(wrong)}")
    if spoiled := [name for key in NUMBERS for name in _not_finite(state.get(key), key)]:
        raise AuroraError(f"{path} holds NaN or infinite numbers: {some(spoiled)}; take another checkpoint")
    return state


def _holds(condition: Callable[[Any], bool], value: Any) -> bool:
    """Whether a value fulfils it, of whatever type it is."""
    try:
        return bool(condition(value))
    except Exception:  # a value of another type can do anything
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_tensors(value: dict[str, Tensor]) -> bool:
    return all(isinstance(name, str) and isinstance(x, Tensor) for name, x in value.items())


def _is_adamw(value: dict[str, Any]) -> bool:
    """A state dict of LAVIS's optimizer; whether it is that of the model's parameters is seen on loading."""
    moments, groups = [one for one in value["state"].values() if one], value["param_groups"]
    return all(isinstance(group["params"], list) and group["lr"] >= 0 for group in groups) and all(
        float(one["step"]) >= 0 and one["exp_avg"].shape == one["exp_avg_sq"].shape for one in moments
    )


def _is_scaler(value: dict[str, Any] | None) -> bool:
    return not value or (value["scale"] > 0 and _is_count(value["_growth_tracker"]))


def _are_processes(value: list[dict[str, Any]]) -> bool:
    losses = [one["losses"] for one in value]
    return all(
        one.keys() == losses[0].keys() and all(isinstance(x, float) for x in one.values()) for one in losses
    ) and all(is_random_state(one["random"]) for one in value)


# What is right for each entry; those that older versions did not write may be missing.
ENTRIES: dict[str, Callable[[Any], bool]] = {
    # Running statistics come with a count of batches.
    "model": lambda value: _are_tensors(value)
    and all(x.is_floating_point() or (x.dtype == torch.int64 and not x.dim()) for x in value.values()),
    "queue": _are_tensors,
    "optimizer": _is_adamw,
    "scaler": _is_scaler,
    "config": lambda value: _essential(value) is not None,
    "epoch": _is_count,
    "step": _is_count,
    "steps_per_epoch": _is_count,
    "validated": lambda value: isinstance(value, bool),
    "processes": _are_processes,
    "best_metric": lambda value: isinstance(value, (int, float)) and not math.isnan(value),
    "best_epoch": lambda value: value is None or _is_count(value),
}
# The others may be infinite: the best metric before the first, a limit in the configuration.
NUMBERS = ("model", "queue", "optimizer", "scaler", "processes")


def _fit_together(state: dict[str, Any]) -> bool:
    """Whether a run can have been where the checkpoint says that it was."""
    epoch, best = state["epoch"], state["best_epoch"]
    return (
        state["step"] <= state.get("steps_per_epoch", state["step"])
        and epoch < state.get("config", {}).get("run", {}).get("max_epoch", math.inf)
        and (best is None or (best <= epoch and math.isfinite(state["best_metric"])))
    )


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """Names of the numbers inside of a value that are none."""
    if isinstance(value, (Mapping, list, tuple)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _not_finite(inner, f"{name}.{key}")
    elif isinstance(value, (Tensor, float)):
        if not _holds(is_finite if isinstance(value, Tensor) else math.isfinite, value):
            yield name


def read_latest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest readable checkpoint of a run's folder, at worst the best epoch's, and its path; None without any.

    The log names what is passed over.
    """
    for name in (LATEST, PREVIOUS, BEST):
        path = folder / name
        if path.is_file():
            try:
                return read_checkpoint(path), path
            except AuroraError as error:
                logging.warning("%s; it is passed over", error)
    return None


def same_run(config: Mapping[str, Any], other: Mapping[str, Any], evaluate: bool = False) -> bool:
    """Whether two resolved configurations compute the same; or one evaluates what the other trains."""
    return _essential(config, evaluate) == _essential(other, evaluate)


def _essential(config: Mapping[str, Any], evaluate: bool = False) -> dict[str, Any]:
    """What decides the numbers of a run.

    A step computes the same in any number of processes with the same global batch: so it is that one which counts.
    Where negatives are each process's own (``negative_all_rank: false``), or the model inside is LAVIS's, each
    process's share matters too.
    """
    run = {key: value for key, value in config.get("run", {}).items() if key not in INCIDENTAL}
    if evaluate:
        return {**config, "run": {key: value for key, value in run.items() if key not in OF_NO_EVALUATION}}
    processes, model = run.pop("world_size", 1), config.get("model", {})
    if model.get("arch") != "mode_approx" and model.get("negative_all_rank", True):
        run["batch_size_train"] = run.get("batch_size_train", 0) * processes
    else:
        run["world_size"] = processes
    return {**config, "run": run}


def run_to_resume(output_dir: str | Path, config: Mapping[str, Any], evaluate: bool = False) -> Path | None:
    """The newest folder under ``output_dir`` with a checkpoint of this very configuration; None if there is none.

    Args:
        output_dir: of the runs.
        config: as resolved.
        evaluate: it is to be evaluated, by any number of processes on any splits.
    """
    by_time: Callable[[Path], float] = lambda folder: folder.stat().st_mtime  # noqa: E731
    folders = {path.parent for name in (LATEST, PREVIOUS, BEST) for path in Path(output_dir).glob(f"*/{name}")}
    for folder in sorted(folders, key=by_time, reverse=True):
        found = read_latest(folder)
        if found is not None and same_run(found[0].get("config", {}), config, evaluate):
            return folder
    return None


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
