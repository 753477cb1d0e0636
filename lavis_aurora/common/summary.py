"""``summary.json``: what a run did, in its folder, for programs to read; written by the runner, whole each time."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Optional, TypedDict, cast

import torch

from lavis_aurora.common import __version__
from lavis_aurora.common.errors import AuroraError, shown
from lavis_aurora.common.files import read_json, write_text

SUMMARY = "summary.json"
DATA_REPORT = "data.json"  # what is in a run's data, beside it
FORMAT = 1
STATUSES = ("running", "finished", "stopped")
SECONDS = ("training", "validation", "test", "all", "per_step")
PACKAGES = ("transformers", "numpy")
MAIN = "main"  # LAVIS's main branch, as lavis_version tells it

Metrics = dict[str, Any]  # numbers and words by name, numbers of percent; sections of them


class GroupCount(TypedDict):
    """Tensors of a group, and scalars in them."""

    tensors: int
    parameters: int


class ParameterCounts(TypedDict):
    """Trained parameters by group, ``frozen`` not among them; scalars that are trained, and all of the model's."""

    groups: dict[str, GroupCount]
    trainable: int
    total: int


class Validation(TypedDict):
    """One evaluation of a validation split; ``epoch`` from 0."""

    epoch: int
    split: str
    metrics: Metrics


class Summary(TypedDict):
    """Content of the file.

    Attributes:
        format: 1.
        status: running (also of a run that was killed), finished, or stopped (by a signal or an error).
        error: the signal or error; None of any other run, and of one of an older version.
        task: ``run.task``.
        arch, model_type: of the model; ``mode_approx`` for a wrapped one.
        tuning: ``model.tuning``; ``mode_approx`` for a wrapped model, none for LAVIS's own, which is evaluated only.
        parameters: by group.
        seconds: ``training``, ``validation``, ``test`` and ``all`` of them with everything around them, and
            ``per_step``, a step of the optimizer in the mean; a resumed run adds to them.
        best_epoch: from 0; None without a validation.
        metrics: of the last test, by split.
        validation: in the order of the epochs.
        data: sizes by split: ``samples``, and ``images`` or ``videos`` and ``texts`` of what is ranked.
        versions: of packages and Python.
        machine: ``processor``, ``gpu`` (None without), ``processes``, ``threads`` of each.
    """

    format: int
    status: str
    error: Optional[str]
    task: str
    arch: str
    model_type: Optional[str]
    tuning: str
    parameters: ParameterCounts
    seconds: dict[str, float]
    best_epoch: Optional[int]
    metrics: dict[str, Metrics]
    validation: list[Validation]
    data: dict[str, dict[str, int]]
    versions: dict[str, str]
    machine: dict[str, Any]


def write_summary(folder: str | Path, summary: Summary) -> None:
    """Write a run's summary, whole or not at all; metrics that are NaN, infinite or of another type are left out.

    Raises:
        AuroraError: it cannot be written.
    """
    validation = [{**one, "metrics": numbers_and_words(one["metrics"])} for one in summary["validation"]]
    plain = {**summary, "metrics": numbers_and_words(summary["metrics"]), "validation": validation}
    write_text(Path(folder) / SUMMARY, json.dumps(plain, indent=1, allow_nan=False) + "\n")


def read_summary(folder: str | Path) -> Summary:
    """The summary of a run's folder, every key of :class:`Summary` in it and of its type.

    Raises:
        AuroraError: there is none, as older versions wrote none, or it is damaged.
    """
    path = Path(folder) / SUMMARY
    if not path.exists():
        raise AuroraError(
            f"{path} is not there; name the folder of a run. Older versions wrote none: evaluate such a run again, "
            f"python evaluate.py --cfg-path {folder}/config.yaml --options "
            f"run.resume_ckpt_path={folder}/checkpoint_best.pth"
        )
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        there = shown(found.get("format")) if isinstance(found, dict) else "none"
        raise AuroraError(f"{path}: its format is {there}, and this version reads {FORMAT}")
    wrong = [key for key, fits in ENTRIES.items() if not fits(found.get(key))]
    if wrong:
        raise AuroraError(f"{path} is no summary of a run: no run writes such {', '.join(wrong)}")
    return cast(Summary, {"error": None, **found})


def is_count(value: Any) -> bool:
    """Whether it is a whole number, 0 or more."""
    return type(value) is int and value >= 0


def _are_seconds(value: Any) -> bool:
    numbers: list[Any] = [value.get(key) for key in SECONDS] if isinstance(value, dict) else [None]
    return all(type(x) in (int, float) and 0 <= float(x) < math.inf for x in numbers)


def _are_counts(value: Any) -> bool:
    groups = value.get("groups") if isinstance(value, dict) else None
    return (
        isinstance(groups, dict)
        and all(isinstance(x, dict) and is_count(x.get("tensors")) for x in groups.values())
        and all(map(is_count, (value.get("trainable"), value.get("total"))))
        and all(is_count(x.get("parameters")) for x in groups.values())
    )


def _are_sections(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(part, dict) for part in value.values())


def _are_validations(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and is_count(one.get("epoch"))
        and isinstance(one.get("split"), str)
        and isinstance(one.get("metrics"), dict)
        for one in value
    )


# What is right for each key.
ENTRIES: dict[str, Callable[[Any], bool]] = {
    "status": lambda value: isinstance(value, str) and value in STATUSES,
    **dict.fromkeys(("task", "arch", "tuning"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("model_type", "error"), lambda value: value is None or isinstance(value, str)),
    "parameters": _are_counts,
    "seconds": _are_seconds,
    "best_epoch": lambda value: value is None or is_count(value),
    "metrics": _are_sections,
    "validation": _are_validations,
    "data": _are_sections,
    **dict.fromkeys(("versions", "machine"), lambda value: isinstance(value, dict)),
}


def numbers_and_words(metrics: Mapping[str, Any]) -> Metrics:
    """What a JSON file can hold of metrics: numbers that are finite, words, and sections of them."""
    return {key: _plain(value) for key, value in metrics.items() if _plain(value) is not None}


def _plain(value: Any) -> Any:
    """The value as Python's own; None for what is left out."""
    if isinstance(value, Mapping):
        return numbers_and_words(value)
    if isinstance(value, (str, int)):
        return value
    # numpy's numbers too.
    number = float(value) if isinstance(value, Real) else math.nan
    if not math.isfinite(number):
        return None
    return int(value) if isinstance(value, Integral) else number


def versions() -> dict[str, str]:
    """What computes, as far as it is installed."""
    found = {"lavis_aurora": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name, number in [("lavis", lavis_version()), *((name, _version(name)) for name in PACKAGES)]:
        if number is not None:
            found[name] = number
    return found


def lavis_version() -> str | None:
    """Which LAVIS computes: the number of its release, :data:`MAIN` for its main branch, None where there is none.

    Main calls itself 1.0.1, which is older than 1.0.2 and not the same; what only its tasks have tells it.
    """
    if find_spec("lavis") is None:
        return None
    from lavis.tasks.base_task import BaseTask  # those who import this module need not have LAVIS

    return MAIN if hasattr(BaseTask, "before_training") else _version("salesforce-lavis")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: str | torch.device = "cpu", processes: int = 1) -> dict[str, Any]:
    """What times depend on: processor, GPU (None without), processes, and threads of each."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line[:10] == "model name"), processor)
    device = torch.device(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"processor": processor, "gpu": gpu, "processes": processes, "threads": torch.get_num_threads()}
