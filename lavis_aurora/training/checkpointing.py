"""Checkpoints of a run: written whole or not at all, read without running code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lavis_aurora.errors import AuroraError
from lavis_aurora.files import written_whole
from lavis_aurora.models.checkpoint import why_unreadable

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
        raise AuroraError(f"{path} is not a readable checkpoint ({why_unreadable(error)})") from error
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
