"""What runs leave in their folders, read back: configuration, metrics, counts of parameters."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lavis_aurora.config.reading import READING_ERRORS, read_yaml
from lavis_aurora.errors import AuroraError

# A row of trainable_parameters_summary: group, tensors, parameters, percent.
COUNT_LINE = re.compile(r"^(\S.*?) +[\d,]+ +([\d,]+) +[\d.]+$")


def read_config(run: str | Path) -> DictConfig:
    """The resolved ``config.yaml`` of a run's folder.

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
        section: the model's part of the configuration.
    """

    arch: str
    tuning: str
    section: DictConfig


def tuned_model(config: DictConfig) -> TunedModel:
    """The model of a run's configuration."""
    model = config.model
    if model.get("arch") == "mode_approx":
        return TunedModel(str(model.base.arch), "mode_approx", model.base)
    return TunedModel(str(model.get("arch")), model.get("tuning", "aurora"), model)


@dataclass
class Evaluation:
    """One line of ``log.txt``.

    Attributes:
        split: of the data.
        epoch: number or ``best``.
        final: of the test after training.
        metrics: percent, as the tasks report them; what is no number is left out.
    """

    split: str
    epoch: int | str
    final: bool
    metrics: dict[str, float]


def numbers_of(values: Any) -> dict[str, float]:
    """What is a number in a part of a file; nothing if that is no section."""
    entries = values.items() if isinstance(values, dict) else ()
    return {k: float(v) for k, v in entries if isinstance(v, (int, float)) and not isinstance(v, bool)}


def evaluations(run: str | Path) -> list[Evaluation]:
    """Every evaluation that a run's ``log.txt`` holds, in order."""
    path = Path(run) / "log.txt"
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        # Other lines are the configuration, or cut off.
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        heads = [key for key in entry if key.endswith("_epoch")] if isinstance(entry, dict) else []
        # "best_epoch" is a metric of the validation.
        head = next(
            (key[: -len("epoch")] for key in heads if all(other.startswith(key[:-5]) for other in entry)), None
        )
        if head is None or head == "train_":
            continue
        numbers = {key[len(head) :]: value for key, value in entry.items()}
        epoch = numbers.pop("epoch")
        split, final = head[:-1].removeprefix("final_"), head.startswith("final_")
        found.append(Evaluation(split, epoch, final, numbers_of(numbers)))
    return found


def final_metrics(run: str | Path) -> dict[str, dict[str, float]]:
    """Metrics by split of the last test of each; empty before the first."""
    return {one.split: one.metrics for one in evaluations(run) if one.final}


def newest_run(folder: str | Path) -> Path | None:
    """The newest run under ``run.output_dir`` that was tested; None if there is none."""
    runs = [path.parent for path in Path(folder).glob("*/log.txt") if final_metrics(path.parent)]
    return max(runs, key=lambda run: (run / "log.txt").stat().st_mtime, default=None)


def trained_parameters(output: str) -> dict[str, int]:
    """Trained parameters by group, from the summary that a run prints; empty if there is none.

    Args:
        output: what the run printed.
    """
    counts: dict[str, int] = {}
    for line in output.splitlines():
        match = COUNT_LINE.match(line)
        if match:
            counts[match[1]] = int(match[2].replace(",", ""))
        elif line.startswith("trainable params:"):
            counts.pop("frozen", None)
            return counts
        else:
            counts = {}
    return {}


def result_files(run: str | Path, pattern: str) -> list[Path]:
    """Files of that name in a run's folder ``result``, the newest last."""
    return sorted((Path(run) / "result").glob(pattern), key=lambda path: path.stat().st_mtime)
