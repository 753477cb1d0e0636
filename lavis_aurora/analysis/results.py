"""What runs and sweeps leave in their folders, read back: configuration, metrics, tables."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig
from torch import nn

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json, regular, writing
from lavis_aurora.common.summary import SUMMARY, Summary, read_summary
from lavis_aurora.config.check import READING_ERRORS, read_yaml
from lavis_aurora.config.dataset_keys import named_splits
from lavis_aurora.config.models import BlipAuroraConfig
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.samples import CheckedDataset
from lavis_aurora.project import load_run_config
from lavis_aurora.training.checkpoints import BEST, read_checkpoint, read_latest

SEED = "run.seed"
KINDS = ("cell", "mean", "spread")
Cells = Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]


def read_config(run: str | Path) -> DictConfig:
    """The ``config.yaml`` of a run's folder.

    Raises:
        AuroraError: there is none.
    """
    path = Path(run) / "config.yaml"
    try:
        config = read_yaml(path)
    except READING_ERRORS as error:
        raise AuroraError(f"{path}: cannot be read ({error}); name the folder of a run") from error
    sections = ("model", "datasets", "run")
    if not isinstance(config, DictConfig) or not all(isinstance(config.get(s), DictConfig) for s in sections):
        raise AuroraError(f"{path}: is not the configuration of a run; name the folder of one")
    return config


@dataclass
class TunedModel:
    """The model that a run tuned.

    Attributes:
        arch: its registered name; of the model inside, where the run wrapped one in mode_approx.
        tuning: ``model.tuning``, or ``mode_approx`` for such a wrapper.
        config: the model's part of the configuration.
    """

    arch: str
    tuning: str
    config: DictConfig


def tuned_model(config: DictConfig) -> TunedModel:
    """The model of a run's configuration."""
    model = config.model
    if model.get("arch") == "mode_approx":
        return TunedModel(str(model.base.arch), "mode_approx", model.base)
    return TunedModel(str(model.get("arch")), model.get("tuning", BlipAuroraConfig.tuning), model)


def numbers_of(values: Any) -> dict[str, float]:
    """The numbers in a part of a file, by name; none if that is no section."""
    entries = values.items() if isinstance(values, dict) else ()
    return {k: float(v) for k, v in entries if isinstance(v, (int, float)) and not isinstance(v, bool)}


def final_metrics(run: str | Path) -> dict[str, dict[str, float]]:
    """Metrics by split of a run's last test, percent; empty before the first.

    Raises:
        AuroraError: the folder has no summary.
    """
    return {split: numbers_of(metrics) for split, metrics in read_summary(run)["metrics"].items()}


def latest_run(folder: str | Path) -> Path | None:
    """The newest run under ``run.output_dir`` that was tested; None if there is none."""
    tested = [path for path in Path(folder).glob(f"*/{SUMMARY}") if final_metrics(path.parent)]
    newest = max(tested, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else newest.parent


def trained_parameters(summary: Summary) -> dict[str, int]:
    """Number of scalars that a run trained, by group."""
    return {group: count["parameters"] for group, count in summary["parameters"]["groups"].items()}


def result_file(run: str | Path, pattern: str) -> Any:
    """The newest file of that name in a run's folder ``result``, read; of the whole adapter (``run.rank``).

    Raises:
        AuroraError: there is none.
    """
    found = (path for path in (Path(run) / "result").glob(pattern) if "_epoch_rank_" not in path.name)
    files = sorted(found, key=lambda path: path.stat().st_mtime)
    if not files:
        raise AuroraError(f"{run}: its folder result holds no {pattern}; name the folder of a run that was tested")
    return read_json(files[-1])


def table_rows(cells: Cells) -> list[dict[str, Any]]:
    """Rows of kind cell, then mean and spread of cells that differ by ``run.seed`` alone.

    Spread is the sample standard deviation, and left empty for a single cell. Failed cells count for nothing.

    Args:
        cells: settings and result of each, as scripts/sweep.py has them.
    """
    rows: list[dict[str, Any]] = []
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, float]]] = defaultdict(list)
    for settings, result in cells:
        metrics = _cell_metrics(result)
        state = {"kind": "cell", "cells": 1, "status": result["status"]}
        rows.append({**state, **settings, **metrics, "error": result.get("error", "")})
        if result["status"] == "done":
            groups[tuple((key, value) for key, value in settings.items() if key != SEED)].append(metrics)
    for kind in KINDS[1:]:
        for settings, members in groups.items():
            row: dict[str, Any] = {"kind": kind, "cells": len(members), "status": "done", **dict(settings)}
            for key in members[0]:
                values = [member[key] for member in members if key in member]
                if kind == "mean":
                    row[key] = statistics.fmean(values)
                elif len(values) > 1:
                    row[key] = statistics.stdev(values)
            rows.append(row)
    return rows


def _cell_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a cell: seconds, trained parameters with and without heads, metrics by split."""
    values: dict[str, float] = {"seconds": result["seconds"]}
    counts = result.get("parameters") or {}
    if counts:
        values["trained"] = sum(counts.values())
        values["trained_without_heads"] = values["trained"] - counts.get("heads", 0)
    for split, metrics in (result.get("metrics") or {}).items():
        values.update({f"{split}.{key}": value for key, value in metrics.items()})
    return values


def write_table(cells: Cells, path: str | Path) -> None:
    """Write the rows of :func:`table_rows` as csv."""
    rows = table_rows(cells)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    # What is long stands last.
    columns = [column for column in columns if column != "error"] + ["error"]
    with writing(path), Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: str | Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a sweep's csv.

    Raises:
        AuroraError: the file cannot be read or lacks one of ``columns``.
    """
    try:
        with regular(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            known = reader.fieldnames or []
    except (OSError, UnicodeError, csv.Error) as error:
        raise AuroraError(
            f"{path}: cannot be read as csv ({error}); name the sweep.csv of scripts/sweep.py"
        ) from error
    for column in ("kind", *columns):
        if column not in known:
            raise AuroraError(f"{path}: has no column {column!r}; it has {', '.join(known)}")
    return rows


def series(path: str | Path, key: str, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean, spread and single cells of each metric by the values of ``key``.

    Raises:
        AuroraError: another key than ``key`` and the seed differs, so that the values do not stand alone.

    Returns:
        By value of ``key``, in the table's order: by metric, ``{"mean", "spread", "cells"}``; spread is None for a
        single cell.
    """
    rows = read_table(path, key, *metrics)
    varied = [c for c in rows[0] if "." in c and c.split(".")[0] in ("model", "run", "datasets")] if rows else []
    for column in varied:
        if column not in (key, SEED) and len({row[column] for row in rows}) > 1:
            raise AuroraError(
                f"{path}: {column} differs too; a figure of {key} needs a sweep of it and of seeds alone"
            )
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for metric in metrics:
            if row["status"] != "done" or row[metric] == "":
                continue
            one = found.setdefault(row[key], {}).setdefault(metric, {"mean": None, "spread": None, "cells": []})
            if row["kind"] == "cell":
                one["cells"].append(float(row[metric]))
            else:
                one[row["kind"]] = float(row[metric])
    if not found:
        raise AuroraError(f"{path}: no cell of it is done")
    return found


@dataclass
class ComparedMethod:
    """A way of tuning of one size in a comparison, see scripts/comparison.py.

    Attributes:
        method, label, budget: its names.
        parameters: trained scalars without those of heads; of all where there are no adapters.
        rates: score on the validation split by rate, with one seed; None of a run that failed.
        rate: the best of these; None where nothing is trained.
        seeds: runs at that rate.
        scores: percent on the test split at that rate, of each seed, by metric.
    """

    method: str
    label: str
    budget: str
    parameters: int
    rates: dict[float, float | None]
    rate: float | None
    seeds: int
    scores: dict[str, list[float]]

    @property
    def at_end(self) -> bool:
        """Whether the best rate is the lowest or the highest of several, so that one beyond might be better."""
        return len(self.rates) > 1 and self.rate in (min(self.rates), max(self.rates))


def compared_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """What methods are compared by: R@1 of both directions, reranked, or the accuracy."""
    return [name for name in metrics if name.endswith("_r1") and name.count("_") == 3] or ["agg_metrics"]


def best_rate(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The rate with the best score on the validation split; None where nothing is trained, or every run failed.

    Of equals the highest, which is the least likely to end before it has learned.

    Args:
        records: of one seed, a rate each.
    """
    scored = [run for run in records if run["rate"] is not None and run.get("validation") is not None]
    best = max(scored, key=lambda run: (run["validation"], run["rate"]), default=None)
    return None if best is None else float(best["rate"])


def compared(records: Sequence[Mapping[str, Any]]) -> list[ComparedMethod]:
    """The methods of a comparison at their best rates, by budget and parameters.

    Args:
        records: of its runs, as scripts/comparison.py writes them.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["method"], record["budget"]].append(record)
    found = []
    for (method, budget), runs in groups.items():
        seed = min(run["seed"] for run in runs)
        first = [run for run in runs if run["seed"] == seed]
        rate = best_rate(first)
        best = [run for run in runs if run["rate"] == rate and "metrics" in run]
        if not best:
            continue
        counts = {name: group["parameters"] for name, group in best[0]["parameters"].items()}
        own = sum(counts.values()) - counts.get("heads", 0)
        scores = {name: [run["metrics"][name] for run in best] for name in compared_metrics(best[0]["metrics"])}
        tried = {run["rate"]: run.get("validation") for run in first if run["rate"] is not None}
        found.append(ComparedMethod(method, best[0]["label"], budget, own, tried, rate, len(best), scores))
    return sorted(found, key=lambda one: (one.parameters, one.label))


def untrained_model(run: str | Path) -> nn.Module:
    """The model of a run as it was before training, on the CPU, in eval mode.

    Raises:
        AuroraError: it started from random weights, which no file holds.
    """
    cfg = load_run_config(run)
    inner = tuned_model(cfg.config).config
    if inner.get("pretrained") is None and not inner.get("load_finetuned"):
        raise AuroraError(f"{run}: its backbone had random weights, which are lost; name a run of a pretrained one")
    try:
        return registry.get_model_class(cfg.model_cfg.arch).from_config(cfg.model_cfg).eval()
    except AuroraError as error:
        raise AuroraError(f"{Path(run) / 'config.yaml'}: {error}") from error


def load_trained(model: nn.Module, run: str | Path) -> None:
    """Load what a run trained, of its best epoch if it chose one, into its model.

    Raises:
        AuroraError: the folder holds no checkpoint.
    """
    best = Path(run) / BEST
    if best.is_file():
        found = read_checkpoint(best), best
    else:
        found = read_latest(Path(run))
    if found is None:
        raise AuroraError(f"{run}: holds no checkpoint; name the folder of a run that trained")
    model.load_run_state(found[0]["model"], str(found[1]))


def split_data(run: str | Path, split: str) -> CheckedDataset:
    """The dataset of a run's split; the first one that has it.

    Raises:
        AuroraError: no dataset of the run has such a split.
    """
    known: list[str] = []
    for name, config in load_run_config(run).datasets_cfg.items():
        if split in named_splits(config):
            return build_checked(name, config, [split])[split]
        known += named_splits(config)
    raise AuroraError(f"{run}: no split {split!r}; its data have {', '.join(known)}")
