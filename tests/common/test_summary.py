"""``summary.json``: written whole, read with every key of its type, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lavis.tasks.base_task import BaseTask

from lavis_aurora.common import summary as summary_module
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.summary import (
    FORMAT,
    MAIN,
    SUMMARY,
    Summary,
    lavis_version,
    machine,
    numbers_and_words,
    read_summary,
    versions,
    write_summary,
)


def summary(**changes: Any) -> Summary:
    whole = {
        "format": FORMAT,
        "status": "running",
        "error": None,
        "task": "retrieval_aurora",
        "arch": "blip_retrieval_aurora",
        "model_type": "tiny",
        "tuning": "aurora",
        "parameters": {"groups": {"heads": {"tensors": 2, "parameters": 30}}, "trainable": 30, "total": 100},
        "seconds": {"training": 1.5, "validation": 0, "test": 0.25, "all": 2, "per_step": 0.1},
        "best_epoch": None,
        "metrics": {"test": {"r1": 12.5}},
        "validation": [{"epoch": 0, "split": "val", "metrics": {"r1": 10.0}}],
        "data": {"train": {"samples": 8}},
        "versions": versions(),
        "machine": machine(),
    }
    return {**whole, **changes}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_summary(tmp_path, summary())
    assert read_summary(tmp_path) == summary()


def test_numbers_that_json_has_no_word_for_are_left_out(tmp_path: Path) -> None:
    odd = {"r1": math.nan, "r5": math.inf, "r10": 1.0, "none": None, "name": "x", "ranks": [1]}
    write_summary(tmp_path, summary(metrics={"test": odd}))
    assert "NaN" not in (tmp_path / SUMMARY).read_text() and "Inf" not in (tmp_path / SUMMARY).read_text()
    assert read_summary(tmp_path)["metrics"] == {"test": {"r10": 1.0, "name": "x"}}


def test_without_one_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="summary.json is not there; name the folder of a run"):
        read_summary(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", '{"format": 2}', "{", '"x"', "\udcff"])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / SUMMARY).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(AuroraError, match=SUMMARY):
        read_summary(tmp_path)


@pytest.mark.parametrize("key", [key for key in summary() if key != "format"])
@pytest.mark.parametrize("value", [7, "?", {"groups": 3}, [{}], math.nan])
def test_a_key_of_another_type_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    right = {"best_epoch": 7} | dict.fromkeys(("task", "arch", "model_type", "tuning", "error"), "?")
    right |= dict.fromkeys(("versions", "machine"), {"groups": 3})
    if right.get(key) == value:
        return
    (tmp_path / SUMMARY).write_text(json.dumps({**summary(), key: value}))
    with pytest.raises(AuroraError, match=f"no run writes such {key}"):
        read_summary(tmp_path)


@pytest.mark.parametrize(
    "key", [key for key in summary() if key not in ("format", "model_type", "best_epoch", "error")]
)
def test_a_missing_key_is_refused_by_name(tmp_path: Path, key: str) -> None:
    (tmp_path / SUMMARY).write_text(json.dumps({k: v for k, v in summary().items() if k != key}))
    with pytest.raises(AuroraError, match=f"no run writes such {key}"):
        read_summary(tmp_path)


def test_the_machine_and_versions_are_named() -> None:
    assert machine(processes=2)["processes"] == 2 and machine()["processor"] and machine()["gpu"] is None
    assert {"lavis_aurora", "lavis", "torch", "python"} <= versions().keys()


def test_metrics_are_numbers_and_words():
    odd = {"none": None, "numpy": np.float32(0.5)}
    metrics = {"epoch": 1, "test": {"r1": 2.5, "bad": math.nan, "ranks": [1]}, "name": "x", **odd}
    assert numbers_and_words(metrics) == {"epoch": 1, "test": {"r1": 2.5}, "name": "x", "numpy": 0.5}


def test_lavis_is_told_by_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its main branch calls itself 1.0.1, whatever it has."""
    with monkeypatch.context() as patch:
        patch.setattr(BaseTask, "before_training", None, raising=False)
        assert lavis_version() == versions()["lavis"] == MAIN == "main"
    with monkeypatch.context() as patch:
        patch.delattr(BaseTask, "before_training", raising=False)
        patch.setattr(summary_module, "version", lambda package: {"salesforce-lavis": "1.0.2"}[package])
        assert lavis_version() == "1.0.2"
        patch.setattr(summary_module, "find_spec", lambda name: None)
        assert lavis_version() is None
