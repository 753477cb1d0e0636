"""What runs leave in their folders, read back: configuration, metrics, counts of parameters."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lavis.common.registry import registry
from omegaconf import DictConfig
from PIL import Image

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json, regular
from lavis_aurora.config.check import READING_ERRORS, read_yaml
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.frames import read_frames, uniform_indices
from lavis_aurora.data.samples import CheckedDataset
from lavis_aurora.project import AuroraConfig, load_config
from lavis_aurora.training.checkpoints import BEST, read_checkpoint, read_latest

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


VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov")


def run_config(run: str | Path) -> AuroraConfig:
    """The checked configuration of a run's folder."""
    return load_config(str(Path(run) / "config.yaml"))


def untrained_model(run: str | Path):
    """The model of a run as it was before training, on the CPU, in eval mode.

    Raises:
        AuroraError: it started from random weights, which no file holds.
    """
    config = run_config(run)
    cfg, section = config.model_cfg, tuned_model(config.config).section
    if section.get("pretrained") is None and not section.get("load_finetuned"):
        raise AuroraError(f"{run}: its backbone had random weights, which are lost; name a run of a pretrained one")
    return registry.get_model_class(cfg.arch).from_config(cfg).eval()


def load_trained(model, run: str | Path) -> None:
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
    for name, config in run_config(run).datasets_cfg.items():
        splits = build_checked(name, config)
        if split in splits:
            return splits[split]
        known += list(splits)
    raise AuroraError(f"{run}: no split {split!r}; its data have {', '.join(known)}")


def result_file(run: str | Path, pattern: str) -> Any:
    """The newest result file of a name, read.

    Raises:
        AuroraError: there is none.
    """
    files = result_files(run, pattern)
    if not files:
        raise AuroraError(f"{run}: its folder result holds no {pattern}; name the folder of a run that was tested")
    return read_json(files[-1])


def read_visual(path: str | Path) -> np.ndarray:
    """A picture, or the middle frame of a video: (height, width, 3), uint8.

    Raises:
        AuroraError: it cannot be read.
    """
    try:
        if Path(path).suffix.lower() in VIDEOS:
            [frame] = read_frames(str(path), partial(uniform_indices, count=1))
            return frame.permute(1, 2, 0).numpy()
        with Image.open(regular(path)) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # PIL has errors of its own
        raise AuroraError(f"{path}: cannot be shown ({error})") from error
