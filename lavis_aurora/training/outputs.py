"""What a run leaves beside its checkpoints: adapters to load, share and merge, and ``summary.json``."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lavis.common.dist_utils import get_world_size, is_main_process
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import Dataset

from lavis_aurora.adapters.config import CONFIG, read_adapter_config
from lavis_aurora.adapters.files import save_adapter
from lavis_aurora.adapters.switching import find_adapters, parameter_groups
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import write_text
from lavis_aurora.common.summary import (
    FORMAT,
    SECONDS,
    SUMMARY,
    Metrics,
    ParameterCounts,
    Summary,
    machine,
    numbers_and_words,
    read_summary,
    versions,
    write_summary,
)
from lavis_aurora.config.check import resolved
from lavis_aurora.config.dataset_keys import PROCESSOR_KINDS, is_portable_processor

Phase = Literal["training", "validation", "test"]


class RunSummary:
    """``summary.json`` of a run, which its main process keeps up to date; elsewhere nothing is written.

    Args:
        folder: of the run.
        cfg: LAVIS's configuration, with ``model_cfg`` and ``run_cfg``.
        model: as it is trained.
        datasets: by name and split.
    """

    def __init__(
        self, folder: Path, cfg: Any, model: nn.Module, datasets: Mapping[str, Mapping[str, Dataset[Any]]]
    ) -> None:
        self.folder, self.steps, self._start, self._before = folder, 0.0, time.time(), 0.0
        run, section = cfg.run_cfg, cfg.model_cfg
        wrapped = "mode_approx" if section.arch == "mode_approx" else "none"
        self.content = Summary(
            format=FORMAT,
            status="running",
            error=None,
            task=run.task,
            arch=section.arch,
            model_type=section.get("model_type"),
            tuning=getattr(getattr(model, "settings", None), "tuning", wrapped),
            parameters=_counts(model),
            seconds=dict.fromkeys(SECONDS, 0.0),
            best_epoch=None,
            metrics={},
            validation=[],
            data=_sizes(datasets),
            versions=versions(),
            machine=machine(run.device, get_world_size()),
        )

    def resume(self, folder: Path, epoch: int, best_epoch: int | None) -> None:
        """Go on with the summary of a run of which ``epoch`` epochs are done; one that is damaged is written anew."""
        self.content["best_epoch"] = best_epoch
        if not (folder / SUMMARY).exists():
            return
        try:
            before = read_summary(folder)
        except AuroraError as error:
            logging.warning("%s; it is written anew", error)
            return
        seconds = self.content["seconds"] = dict(before["seconds"])
        self._before = seconds["all"]
        self.steps = seconds["training"] / seconds["per_step"] if seconds["per_step"] else 0.0
        self.content["validation"] = [one for one in before["validation"] if one["epoch"] < epoch]

    @contextmanager
    def timed(self, phase: Phase, steps: int = 0) -> Iterator[None]:
        """Count the time inside the block; ``steps`` of the optimizer are done in it."""
        start = time.time()
        try:
            yield
        finally:
            self.content["seconds"][phase] += time.time() - start
            self.steps += steps

    def add_validation(self, epoch: int, split: str, metrics: Metrics, best_epoch: int | None) -> None:
        """Note an evaluation, and which epoch is the best so far; one of the same epoch and split gives way to it."""
        kept = [one for one in self.content["validation"] if (one["epoch"], one["split"]) != (epoch, split)]
        self.content["validation"] = [*kept, {"epoch": epoch, "split": split, "metrics": metrics}]
        self.content["best_epoch"] = best_epoch

    def finish(self, metrics: Mapping[str, Metrics | None]) -> None:
        """Write the metrics of the test by split; a process that has none says None."""
        self.content["metrics"] = {split: log for split, log in metrics.items() if log is not None}
        self.write("finished")

    def write(self, status: str = "running") -> None:
        """Write it, whole or not at all."""
        seconds = self.content["seconds"]
        seconds["all"] = self._before + time.time() - self._start
        seconds["per_step"] = seconds["training"] / self.steps if self.steps else 0.0
        self.content["status"] = status
        if is_main_process():
            write_summary(self.folder, self.content)

    def write_stopped(self, error: BaseException) -> None:
        """Say what stopped the run; no error of its own comes before that, which is the caller's."""
        kind = "" if isinstance(error, AuroraError) else f"{type(error).__name__}: "
        self.content["error"] = f"{kind}{error}".rstrip(": ")
        try:
            self.write("stopped")
        except AuroraError as error:
            logging.warning("%s", error)


def _counts(model: nn.Module) -> ParameterCounts:
    groups = parameter_groups(model)
    frozen = groups.pop("frozen")["parameters"]
    trainable = sum(group["parameters"] for group in groups.values())
    return ParameterCounts(groups=groups, trainable=trainable, total=trainable + frozen)


def _sizes(datasets: Mapping[str, Mapping[str, Dataset[Any]]]) -> dict[str, dict[str, int]]:
    """``samples`` by split, of all datasets together, and what LAVIS's datasets to rank hold besides."""
    sizes: dict[str, dict[str, int]] = {}
    for splits in datasets.values():
        for split, dataset in splits.items():
            found = {"samples": len(dataset)} if hasattr(dataset, "__len__") else {}
            texts, pictures, entries = (getattr(dataset, name, None) for name in ("text", "image", "annotation"))
            if isinstance(texts, list) and isinstance(pictures, list):
                kind = "videos" if entries and "video" in entries[0] else "images"
                found |= {kind: len(pictures), "texts": len(texts)}
            size = sizes.setdefault(split, {})
            size.update({key: size.get(key, 0) + count for key, count in found.items()})
    return sizes


def save_run_adapter(model: nn.Module, folder: Path, datasets: DictConfig, metrics: Mapping[str, Any]) -> None:
    """Write the adapter as it is now, on the main process; nothing for a model that is tuned without any.

    Args:
        model: without a wrapper.
        folder: ``adapter_best`` or ``adapter_last`` of a run.
        datasets: that part of the configuration, for the processors.
        metrics: to add to those that the folder holds of the same epoch; a split's are a section.
    """
    if find_adapters(model) is None or not is_main_process():
        return
    known = _metrics(folder) if (folder / CONFIG).is_file() else {}
    if known.get("epoch") != metrics.get("epoch", known.get("epoch")):
        known = {}
    processors = _processors(datasets)
    save_adapter(
        model,
        folder,
        metrics={**known, **numbers_and_words(metrics)},
        description={"preprocess": processors} if processors else None,
    )


def _metrics(folder: Path) -> dict[str, Any]:
    """Those that an adapter's folder holds; none if it is damaged, for it is written anew."""
    try:
        return read_adapter_config(folder).metrics
    except AuroraError as error:
        logging.warning("%s; its metrics are lost, and the adapter is written anew", error)
        return {}


def _processors(datasets: DictConfig) -> dict[str, Any]:
    """The processors of the first dataset that has any; without those whose settings may name files."""
    for dataset in datasets.values():
        found = {kind: dataset[kind] for kind in PROCESSOR_KINDS if dataset.get(kind) is not None}
        if found:
            return {
                kind: {split: part for split, part in splits.items() if is_portable_processor(part or {})}
                for kind, splits in resolved(found).items()
            }
    return {}


def forget_epoch(log: Path, key: str, epoch: int | str | None) -> None:
    """Drop the line of an epoch from log.txt, which a run leaves that is killed before its checkpoint.

    Args:
        log: the file, which need not be there.
        key: by which the line begins, e.g. ``train_epoch``.
        epoch: from 0; of a final test, which is none, nothing is dropped.
    """
    if not isinstance(epoch, int) or not is_main_process() or not log.is_file():
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(f'{{"{key}": {json.dumps(epoch)},')]
    if kept != lines:
        write_text(log, "".join(kept))
