"""Checkpoints of a run: written whole or not at all, read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lavis_aurora.errors import AuroraError
from lavis_aurora.files import written_whole


def write_checkpoint(state: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint, whole or not at all."""
    with written_whole(path) as file:
        torch.save(state, file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of :func:`write_checkpoint`; tensors and plain values only are unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each have errors of their own
        raise AuroraError(f"{path} is not a readable checkpoint ({error})") from error
    known = set(state) if isinstance(state, dict) else set()
    missing = {"model", "optimizer", "scaler", "epoch", "best_metric", "best_epoch"} - known
    if missing:
        raise AuroraError(f"{path} is not a checkpoint of a run: it has no {', '.join(sorted(missing))}")
    if not all(isinstance(value, torch.Tensor) for value in dict(state["model"]).values()):
        raise AuroraError(f"{path} is not a checkpoint of a run: its model is no state dict of tensors")
    return state
