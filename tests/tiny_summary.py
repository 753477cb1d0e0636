"""The summary that a run leaves, for tests of what reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavis_aurora.common.summary import FORMAT, write_summary


def leave_summary(folder: Path, **entries: Any) -> None:
    """Write the summary of a finished run that was not tested, with ``entries`` in place of these."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = {
        "format": FORMAT,
        "status": "finished",
        "task": "retrieval_aurora",
        "arch": "blip_retrieval_aurora",
        "model_type": "tiny",
        "tuning": "aurora",
        "parameters": counts({}, 1000),
        "seconds": {"training": 9.0, "validation": 1.0, "test": 1.0, "all": 12.0, "per_step": 0.1},
        "best_epoch": None,
        "metrics": {},
        "validation": [],
        "data": {},
        "versions": {},
        "machine": {},
    }
    write_summary(folder, {**summary, **entries})


def counts(trained: dict[str, int], total: int) -> dict[str, Any]:
    """``parameters`` of a summary: scalars by group, each group in one tensor."""
    groups = {group: {"tensors": 1, "parameters": count} for group, count in trained.items()}
    return {"groups": groups, "trainable": sum(trained.values()), "total": total}
