"""What a run left, and a run's loop without a run, for tests."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from torch import nn

from lavis_aurora.common.summary import MAIN, lavis_version
from lavis_aurora.config.check import parse_run
from lavis_aurora.training.checkpoints import read_checkpoint
from lavis_aurora.training.guards import FiniteGuard
from lavis_aurora.training.loop import TrainingState, epoch_stats, train_steps
from lavis_aurora.training.tasks.base import runnable_task

# LAVIS's main branch, see scripts/test_lavis_main.sh.
ON_MAIN = lavis_version() == MAIN
STATE = ("model", "queue", "optimizer", "epoch", "step", "best_metric", "best_epoch", "processes")


def only_run(tmp_path: Path) -> Path:
    """The folder of the single run so far."""
    [folder] = (tmp_path / "output").iterdir()
    return folder


def logged(folder: Path, key: str) -> list[dict]:
    """Lines of log.txt that hold ``key``; the configuration comes first and is no line."""
    lines = [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith('{"')]
    return [entry for entry in map(json.loads, lines) if key in entry]


def assert_same(one, other, path="") -> None:
    """Nested states are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{path}/{i}")
    else:
        assert one == other, path


def final(folder: Path) -> dict:
    """What must be equal at the end, tested ranks included."""
    run = only_run(folder)
    states = {name: read_checkpoint(run / f"checkpoint_{name}.pth") for name in ("latest", "best")}
    for process in (process for state in states.values() for process in state["processes"]):
        process["broken"] = [video.replace(str(folder), "") for video in process["broken"]]
    results = {path.name: json.loads(path.read_text()) for path in (run / "result").glob("test_epoch_best*.json")}
    for result in results.values():
        if isinstance(result, dict):
            result.pop("seconds")
    return {name: {key: state[key] for key in STATE} for name, state in states.items()} | {"results": results}


def task_of(name: str, cls: type[BaseTask] | None = None) -> BaseTask:
    """A task with the default settings, as the command line makes it."""
    cfg = SimpleNamespace(run_cfg=parse_run({"task": name}))
    return runnable_task(cls or registry.get_task_class(name)).setup_task(cfg=cfg)


def training_state(
    task: Any, model: nn.Module, batches: Sequence[dict], folder: Path, optimizer: torch.optim.Optimizer, **run: Any
) -> TrainingState:
    """A run at its start, at a constant rate; ``run`` are keys of the YAML."""
    return TrainingState(
        task=task,
        model=model,
        loader=batches,
        optimizer=optimizer,
        schedule=SimpleNamespace(step=lambda cur_epoch, cur_step: None),
        guard=FiniteGuard(folder, skip=False),
        run=parse_run(run),
        folder=folder,
    )


def train_epoch(state: TrainingState) -> dict[str, float]:
    """An epoch by the loop, and what it reports."""
    for _ in train_steps(state):
        pass
    return epoch_stats(state)


def patch_open(monkeypatch: pytest.MonkeyPatch, instead: Callable[..., Any]) -> None:
    """``instead`` for ``open``, also where pathlib opens."""
    monkeypatch.setattr(io, "open", instead)
    monkeypatch.setattr("builtins.open", instead)
    if sys.version_info[:2] == (3, 10):  # its pathlib keeps the function
        monkeypatch.setattr("pathlib._NormalAccessor.open", staticmethod(instead))
