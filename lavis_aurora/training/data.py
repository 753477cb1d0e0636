"""What a run reads: its task, its datasets, and the report of them, by which bad data end it before training."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from lavis.common.config import Config
from lavis.common.dist_utils import get_rank
from lavis.common.registry import registry
from omegaconf import DictConfig

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import BlipAuroraConfig
from lavis_aurora.data.fetch import use_data_root
from lavis_aurora.data.report import Level, report_data
from lavis_aurora.data.texts import TokenLimit
from lavis_aurora.encoders.towers import build_tokenizer
from lavis_aurora.evaluation.encode import broadcast
from lavis_aurora.training import order
from lavis_aurora.training.tasks.base import runnable_task


def _token_limit(model: DictConfig) -> TokenLimit | None:
    """Where the model cuts texts; None if it is not of this package."""
    part = "model.base" if "base" in model else "model"
    section: Any = model.get("base", model)
    settings_cls = getattr(registry.get_model_class(section.arch), "CONFIG_CLASS", None)
    if settings_cls is None or not issubclass(settings_cls, BlipAuroraConfig):
        return None
    settings = parse_config(settings_cls, section, part)
    return TokenLimit(build_tokenizer(settings.tokenizer), settings.max_txt_len - 2, f"{part}.max_txt_len")


Say = Callable[[Level, str], None]


def read_data(cfg: Config, seconds: float | None, say: Say, decode: bool = False) -> tuple[Any, dict[str, Any]]:
    """The task, which keeps the report of the data on the main process, and its datasets.

    Args:
        cfg: LAVIS's configuration.
        seconds: for how long to look at pictures and videos, at most; None: at all of them.
        say: is given the lines of the report.
        decode: whether to read each picture and video, too.

    Raises:
        AuroraError: the run would stop at something that the report names, or trains on fewer samples than a batch;
            other processes end without a word.
    """
    task = runnable_task(registry.get_task_class(cfg.run_cfg.task)).setup_task(cfg=cfg)
    datasets = task.build_datasets(cfg)
    order.check_splits(cfg, datasets, task.shard_evaluation)
    good = False
    try:
        if get_rank() == 0:
            report = task.data_report = report_data(datasets, cfg, _token_limit(cfg.model_cfg), seconds, decode)
            task.complete_report(report, datasets)
            for level, line in report.lines():
                say(level, line)
            report.check()
            train = [splits["train"] for splits in datasets.values() if "train" in splits]
            if not cfg.run_cfg.evaluate and train and all(hasattr(data, "__len__") for data in train):
                order.check_batch(cfg.run_cfg.batch_size_train, sum(map(len, train)))
            good = True
    finally:
        good = broadcast(good)
    if not good:
        sys.exit(1)  # the main process says why
    return task, datasets


def log(level: Level, line: str) -> None:
    """For a run; what is refused, its error says."""
    logging.log({"warning": logging.WARNING, "note": logging.INFO, "refused": logging.DEBUG}[level], "%s", line)


def check_data(cfg: Config, decode: bool = False) -> None:
    """Print the report of the data that a run would read; no model is built.

    Args:
        cfg: LAVIS's configuration.
        decode: whether to read each picture and video, which takes about as long as an epoch's reading.

    Raises:
        AuroraError: the run would be refused.
    """
    refused = 0

    def say(level: Level, line: str) -> None:
        nonlocal refused
        refused += level == "refused"
        print(f"{level}: " * (level != "note") + line, flush=True)

    use_data_root()
    try:
        read_data(cfg, None, say, decode)
    except AuroraError as error:
        if not refused:
            raise
        things = "1 thing" if refused == 1 else f"{refused} things"
        raise AuroraError(f"{things} above would end the run") from error
