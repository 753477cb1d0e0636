"""Files of checkpoints: written, read and judged; and which of them a run may go on from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from lavis_aurora.common.errors import AuroraError, abbreviated
from lavis_aurora.common.files import atomic_write, is_finite, load_torch, why_unreadable
from lavis_aurora.common.paths import packaged_name
from lavis_aurora.common.summary import is_count
from lavis_aurora.config.check import map_text, resolved, run_keys
from lavis_aurora.config.run import RUN_KEYS
from lavis_aurora.training.order import is_random_state

LATEST, PREVIOUS, BEST = "checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
DAMAGED = "checkpoint_damaged.pth"  # a latest one that could not be read, out of the way of the next
KEYS = {"model", "optimizer", "scaler", "epoch", "step", "best_metric", "best_epoch"}
# Keys of ``run`` that may differ when a run goes on: they do not change what is computed. Of the number of processes
# and their batches the product counts, see _numeric_config.
NON_NUMERIC_KEYS = {
    *("resume", "resume_ckpt_path", "evaluate", "output_dir", "rank", "gpu", "dist_url", "dist_backend"),
    *("num_workers", "log_freq", "checkpoint_every", "distributed", "dist_timeout_minutes", "stop_collapsed"),
    *("cache_limit_gb", "loggers"),
}

# What may differ besides when a run's best epoch is evaluated.
OF_NO_EVALUATION = (
    *("world_size", "batch_size_train", "batch_size_eval", "test_splits"),
    *("max_epoch", "save_queue", "skip_nonfinite", "max_broken_share", "compile"),
    *("cache_features", "cache_dtype"),
)


def write_checkpoint(state: dict[str, Any], path: str | Path, previous: str | Path | None = None) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        state: what to write.
        path: where.
        previous: where an older file of that name is kept.

    Raises:
        AuroraError: the file cannot be written; the older one is still there.
    """
    with atomic_write(path, previous) as file:
        torch.save(state, file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of :func:`write_checkpoint`; tensors and plain values only are unpickled.

    Raises:
        AuroraError: it is damaged, holds NaN or infinite values, or what no run writes.
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
        raise AuroraError(f"{path} is not a checkpoint of a run: no run writes such {abbreviated(wrong)}")
    if spoiled := [name for key in NUMBERS for name in _not_finite(state.get(key), key)]:
        raise AuroraError(f"{path} holds NaN or infinite numbers: {abbreviated(spoiled)}; take another checkpoint")
    return dict(state)


def _holds(condition: Callable[[Any], bool], value: Any) -> bool:
    """Whether a value fulfils it, of whatever type it is."""
    try:
        return bool(condition(value))
    except Exception:  # a value of another type can do anything
        return False


def _are_tensors(value: dict[str, Tensor]) -> bool:
    return all(isinstance(name, str) and isinstance(x, Tensor) for name, x in value.items())


def _is_adamw(value: dict[str, Any]) -> bool:
    """A state dict of LAVIS's optimizer; whether it is that of the model's parameters is seen on loading."""
    moments, groups = [one for one in value["state"].values() if one], value["param_groups"]
    return all(isinstance(group["params"], list) and group["lr"] >= 0 for group in groups) and all(
        float(one["step"]) >= 0 and one["exp_avg"].shape == one["exp_avg_sq"].shape for one in moments
    )


def _is_scaler(value: dict[str, Any] | None) -> bool:
    return not value or (value["scale"] > 0 and is_count(value["_growth_tracker"]))


def _are_processes(value: list[dict[str, Any]]) -> bool:
    losses = [one["losses"] for one in value]
    return all(
        one.keys() == losses[0].keys() and all(isinstance(x, float) for x in one.values()) for one in losses
    ) and all(is_random_state(one["random"]) and _is_tally(one) for one in value)


def _is_tally(process: dict[str, Any]) -> bool:
    """Counts of an epoch so far, which older versions did not write."""
    counts, losses = process.get("counts") or process["losses"], process["losses"]
    return (
        counts.keys() == losses.keys()
        and all(isinstance(x, float) for x in counts.values())
        and is_count(process.get("skipped", 0))
        and all(isinstance(video, str) for video in process.get("broken", []))
    )


# What is right for each entry; those that older versions did not write may be missing.
ENTRIES: dict[str, Callable[[Any], bool]] = {
    # Running statistics come with a count of batches.
    "model": lambda value: (
        _are_tensors(value)
        and all(x.is_floating_point() or (x.dtype == torch.int64 and not x.dim()) for x in value.values())
    ),
    "queue": _are_tensors,
    "optimizer": _is_adamw,
    "trained": lambda value: all(isinstance(name, str) for group in value for name in group),
    "scaler": _is_scaler,
    "config": lambda value: _numeric_config(value) is not None,
    "epoch": is_count,
    "step": is_count,
    "steps_per_epoch": is_count,
    "validated": lambda value: isinstance(value, bool),
    "processes": _are_processes,
    "best_metric": lambda value: isinstance(value, (int, float)) and not math.isnan(value),
    "best_epoch": lambda value: value is None or is_count(value),
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
    """Names of the numbers inside of a value that are NaN or infinite."""
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


def same_computation(config: Mapping[str, Any], other: Mapping[str, Any], evaluate: bool = False) -> bool:
    """Whether two configurations compute the same; or one evaluates what the other trains."""
    return _numeric_config(config, evaluate) == _numeric_config(other, evaluate)


def _numeric_config(config: Mapping[str, Any], evaluate: bool = False) -> dict[str, Any]:
    """What decides the numbers of a run.

    A step computes the same in any number of processes with the same global batch: so it is that one which counts.
    Where negatives are each process's own (``negative_all_rank: false``), or the model inside is LAVIS's, each
    process's share matters too.
    """
    with suppress(OmegaConfBaseException):  # what it refers to may be gone, such as a variable of the environment
        config = resolved(config)
    # A file that comes with the package is the same wherever that is.
    config = map_text(config, lambda text: packaged_name(text) or text)
    section = config.get("run", {})
    # Older versions wrote the keys of other tasks too.
    own = {one.name for cls in run_keys(section.get("task")) for one in fields(cls)}
    others = {one.name for cls in RUN_KEYS.values() for one in fields(cls)} - own
    run = {key: value for key, value in section.items() if key not in NON_NUMERIC_KEYS and key not in others}
    if evaluate:
        return {**config, "run": {key: value for key, value in run.items() if key not in OF_NO_EVALUATION}}
    processes, model = run.pop("world_size", 1), config.get("model", {})
    if model.get("arch") != "mode_approx" and model.get("negative_all_rank", True):
        run["batch_size_train"] = run.get("batch_size_train", 0) * processes
    else:
        run["world_size"] = processes
    return {**config, "run": run}


def find_resumable_run(output_dir: str | Path, config: Mapping[str, Any], evaluate: bool = False) -> Path | None:
    """The newest folder under ``output_dir`` with a checkpoint of this very configuration; None if there is none.

    Args:
        output_dir: of the runs.
        config: of the run.
        evaluate: it is to be evaluated, by any number of processes on any splits.
    """
    for folder, found in _configurations(output_dir):
        if same_computation(found, config, evaluate):
            return folder
    return None


def _configurations(output_dir: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders with a checkpoint, the newest first, and the configuration that it holds."""
    by_time: Callable[[Path], float] = lambda folder: folder.stat().st_mtime  # noqa: E731
    folders = {path.parent for name in (LATEST, PREVIOUS, BEST) for path in Path(output_dir).glob(f"*/{name}")}
    for folder in sorted(folders, key=by_time, reverse=True):
        found = read_latest(folder)
        if found is not None:
            yield folder, found[0].get("config", {})


def newest_run_differs(output_dir: str | Path, config: Mapping[str, Any]) -> str:
    """The newest run under ``output_dir``, and the keys that hinder its evaluation, as text; empty without runs."""
    for folder, found in _configurations(output_dir):
        here, there = (dict(_leaves(_numeric_config(one, evaluate=True))) for one in (config, found))
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        # What differs only resolved refers to another key.
        here, there = dict(_leaves(config)), dict(_leaves(found))
        written = [key for key in keys if there.get(key) != here.get(key)]
        causes = [key for key in written if not _may_follow(key, written)] or keys
        said = f"; the newest, {folder}, differs in {abbreviated(causes)}"
        rest = len(keys) - len(causes)
        return f"{said} ({rest} more differ, which may follow)" if rest else said
    return ""


def _may_follow(key: str, others: Sequence[str]) -> bool:
    """Whether a key may have its value from another of these: a type, or the model's size of pictures."""
    types, processor = ("arch", "model_type", "type"), key.startswith("preprocess.") or "_processor." in key
    if key.rpartition(".")[2] in types:
        return False
    for other in others:
        section, _, name = other.rpartition(".")
        of_model = processor and section in ("model", "model.base")
        if name in types and (of_model or key.startswith(f"{section}.")):
            return True
        if name == "image_size" and of_model and key.endswith(".image_size"):
            return True
    return False


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
