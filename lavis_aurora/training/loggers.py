"""Where the numbers of a run go besides its log: metrics.csv always, and the loggers that ``run.loggers`` names."""

from __future__ import annotations

import csv
import html
import importlib
import io
import logging
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lavis.common.dist_utils import is_main_process
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import appended, write_text
from lavis_aurora.config.check import resolved
from lavis_aurora.data.samples import read_visual
from lavis_aurora.training.order import random_state, set_random_state

METRICS = "metrics.csv"
COLUMNS = ("step", "epoch", "metric", "value")
# What each logger imports, and a name that is in it: an empty folder called wandb can be imported too.
NEEDED = {
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter"),
    "wandb": ("wandb", "init"),
    "mlflow": ("mlflow", "start_run"),
}


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of the run at its start.

    Attributes:
        folder: of the run; its name is that of the run everywhere, by which one that is resumed is found again.
        step: batches that were done before, 0 for a new run.
        config: as resolved; empty where there is metrics.csv alone, which does not hold it.
    """

    folder: Path
    step: int
    config: Mapping[str, Any]


class Logger(Protocol):
    """Takes what a run reports; ``step`` counts batches since the start of the run, resumed or not."""

    def scalars(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """Numbers by name; ``epoch`` is from 0."""

    def text(self, name: str, text: str) -> None:
        """A text."""

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture in RGB."""

    def close(self, failed: bool) -> None:
        """Write what is left; ``failed``: the run did not end by itself."""


class MetricsFile:
    """metrics.csv: a line for each number. What was logged after the step that a run is resumed from is dropped."""

    def __init__(self, run: LoggedRun) -> None:
        self._path, self._last = run.folder / METRICS, run.step
        rows: list[list[str]] = []
        if self._path.is_file():
            # What a run that was killed has cut off goes too: a line without an end, and zeros in place of text.
            text = self._path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
            rows = list(csv.reader(text.split("\n")[:-1]))
        whole = (row for row in rows if len(row) == len(COLUMNS) and row[0].isdecimal())
        self._rows = [row for row in whole if int(row[0]) <= run.step]
        self._rewrite()

    def _rewrite(self) -> None:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([COLUMNS, *self._rows])
        write_text(self._path, lines.getvalue())

    def scalars(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """Append; an evaluation that is done again at the step resumed from replaces its lines."""
        if step == self._last and self._rows:
            again = {(str(step), name) for name in values}
            kept = [row for row in self._rows if (row[0], row[2]) not in again]
            if len(kept) < len(self._rows):
                self._rows = kept
                self._rewrite()
        with appended(self._path), self._path.open("a", encoding="utf-8", newline="") as file:
            rows = ((step, epoch, name, f"{value:.8g}") for name, value in values.items())
            csv.writer(file, lineterminator="\n").writerows(rows)

    def text(self, name: str, text: str) -> None:
        """Nothing: the run's folder has its configuration."""

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Nothing."""

    def close(self, failed: bool) -> None:
        """Nothing is left to write."""


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run."""

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the step that a run is resumed from is not shown.
        self._writer: Any = SummaryWriter(
            str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None
        )

    def scalars(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """A chart for each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def text(self, name: str, text: str) -> None:
        """As it is, which Markdown shows of what is indented."""
        self._writer.add_text(name, textwrap.indent(text, "    "))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture."""
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, by its own environment: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        self._wandb: Any = wandb
        name = run.folder.name
        project = os.environ.get("WANDB_PROJECT", "lavis_aurora")
        self._run = self._wandb.init(
            project=project, id=name, name=name, dir=str(run.folder), config=dict(run.config), resume="allow"
        )
        # Its own steps cannot go back, as those of a resumed run do.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """A chart for each, over ``step``."""
        self._run.log({**values, "epoch": epoch, "step": step})

    def text(self, name: str, text: str) -> None:
        """As it is."""
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture."""
        self._run.log({name: self._wandb.Image(picture), "step": step})

    def close(self, failed: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, by its own environment: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, run: LoggedRun) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        name = run.folder.name
        named = f"attributes.run_name = '{name}'"
        found = self._mlflow.search_runs(filter_string=named, max_results=1, output_format="list")
        if found:
            self._mlflow.start_run(run_id=found[0].info.run_id)
            return
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_params(dict(_leaves(run.config)))  # they cannot be changed later

    def scalars(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """A chart for each."""
        self._mlflow.log_metrics({**values, "epoch": epoch}, step=step)

    def text(self, name: str, text: str) -> None:
        """An artifact."""
        self._mlflow.log_text(text, f"{name}.txt")

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """An artifact."""
        self._mlflow.log_image(picture, artifact_file=f"pictures/{name}_step_{step}.png")

    def close(self, failed: bool) -> None:
        """End it."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# By name in run.loggers, see config.run.LOGGERS.
LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "csv": MetricsFile,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def check_loggers(names: Iterable[str]) -> None:
    """Refuse loggers whose library is not installed, before anything is read or trained."""
    for name in names:
        module, attribute = NEEDED.get(name, ("", ""))
        try:
            if module:
                getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            remedy = f'pip install "lavis-aurora[{name}]", or leave it out'
            raise AuroraError(f"run.loggers: {name} cannot be imported ({error}); {remedy}") from error


class Loggers:
    """All loggers of a run. One that fails is named in the log, and has nothing more to say: the run goes on."""

    def __init__(self) -> None:
        self._open: dict[str, Logger] = {}

    def start(self, cfg: Any, folder: Path, step: int = 0) -> None:
        """Open metrics.csv and what ``run.loggers`` names, on the main process; random numbers go on as without.

        Args:
            cfg: LAVIS's configuration.
            folder: of the run.
            step: how many batches were done before.
        """
        if not is_main_process():
            return
        names = dict.fromkeys(("csv", *cfg.run_cfg.loggers))
        config = resolved(cfg.to_dict()) if len(names) > 1 else {}
        run, before = LoggedRun(folder, step, config), random_state()
        for name in names:
            self._attempt(name, partial(self._start, name, run))
        set_random_state(before)
        if config:
            self.text("config", OmegaConf.to_yaml(config))

    def _start(self, name: str, run: LoggedRun) -> None:
        self._open[name] = LOGGERS[name](run)

    def _attempt(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # each library has errors of its own
            self._open.pop(name, None)
            said = " ".join(str(error).split()) or type(error).__name__
            logging.warning("run.loggers: %s fails and is left out from now on (%s)", name, said)

    def scalars(self, prefix: str, values: Mapping[str, Any], step: int, epoch: int) -> None:
        """The numbers among ``values``, as PREFIX/NAME."""
        numbers = {f"{prefix}/{name}": float(value) for name, value in values.items() if _is_number(value)}
        for name, logger in list(self._open.items()):
            self._attempt(name, partial(logger.scalars, numbers, step, epoch))

    def epoch(self, split: str, stats: Mapping[str, Any], step: int, best: int | None) -> None:
        """What a line of log.txt holds; ``best`` is the epoch that a final test is of.

        The mean losses of an epoch are named train_epoch: train are those of single steps.
        """
        epoch = stats["epoch"] if isinstance(stats.get("epoch"), int) else best
        name = "train_epoch" if split == "train" else split
        self.scalars(name, {key: value for key, value in stats.items() if key != "epoch"}, step, epoch or 0)

    def text(self, title: str, text: str) -> None:
        """A text."""
        for name, logger in list(self._open.items()):
            self._attempt(name, partial(logger.text, title, text))

    def cases(self, title: str, cases: Callable[[], Sequence[tuple[str, str]]], step: int) -> None:
        """Pictures with words below, as one picture; they are not asked for where no logger would show them."""
        if self._open.keys() <= {"csv"}:
            return
        try:
            picture = contact_sheet(cases())
        except Exception as error:  # whatever a dataset lacks, the run needs no pictures
            logging.warning("run.loggers: no pictures of %s (%s: %s)", title, type(error).__name__, error)
            return
        for name, logger in list(self._open.items()):
            if picture is not None:
                self._attempt(name, partial(logger.picture, title, picture, step))

    def close(self, failed: bool) -> None:
        """Close all of them."""
        for name, logger in list(self._open.items()):
            self._attempt(name, partial(logger.close, failed))
        self._open = {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


TILE, LINE, LETTERS = 192, 12, 31  # pixels of a side and of a line, letters of a line


def contact_sheet(cases: Sequence[tuple[str, str]], columns: int = 4) -> Image.Image | None:
    """Files of pictures, or of videos (middle frames), in rows with the words of each below; None without any."""
    if not cases:
        return None
    words = [[line for part in text.splitlines() for line in textwrap.wrap(part, LETTERS)] for _, text in cases]
    height = TILE + LINE * max(map(len, words)) + 4
    size = (TILE * min(columns, len(cases)), height * math.ceil(len(cases) / columns))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, ((file, _), lines) in enumerate(zip(cases, words)):
        left, top = TILE * (i % columns), height * (i // columns)
        picture = Image.fromarray(read_visual(file))
        picture.thumbnail((TILE - 4, TILE - 4))
        sheet.paste(picture, (left + 2, top + 2))
        # Its own font knows no letters beyond ASCII.
        draw.multiline_text((left + 4, top + TILE), "\n".join(lines).encode("ascii", "replace").decode(), "black")
    return sheet
