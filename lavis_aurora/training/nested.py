"""Nested training: which components of an adapter a step trains, and afterwards how many of them are enough."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from lavis.common.dist_utils import is_main_process
from torch import Tensor, nn

from lavis_aurora.adapters.config import read_adapter
from lavis_aurora.adapters.files import truncated_adapter, write_adapter
from lavis_aurora.adapters.switching import find_adapters
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import write_text
from lavis_aurora.common.summary import numbers_and_words
from lavis_aurora.evaluation.encode import broadcast
from lavis_aurora.mode_approx.factors import ModeFactors

AUTO, RANKS = "auto", "ranks.json"
GROWTH = 0.6  # share of the run in which the components in use grow
FEWER = {"growing": 0.3, "one": 0.5}  # share of the steps that train fewer than are in use


def nested_factors(model: nn.Module) -> ModeFactors | None:
    """The factors of a model that is trained with ``mode_approx.nested``; None of any other."""
    sets = find_adapters(model)
    return sets if isinstance(sets, ModeFactors) and sets["default"].config.nested else None


class NestedSteps:
    """The rank that each step trains, and an optimizer that leaves the components above them alone.

    Neither momentum nor weight decay moves a component that was not trained, and its moments stay what they are. (Its
    gradients are zeros, which would not keep Adam from it.) The count of steps, by which Adam corrects its moments at
    the start, is that of all components.

    Args:
        factors: those that are trained.
        optimizer: of the run; gets hooks.
        seed: of the run, the same in all processes.
        epochs: of the run.
        batches: of an epoch.
        accumulated: batches of a step.
    """

    def __init__(
        self,
        factors: ModeFactors,
        optimizer: torch.optim.Optimizer,
        seed: int,
        epochs: int,
        batches: int,
        accumulated: int = 1,
    ) -> None:
        self.factors, self.config = factors, factors["default"].config
        self.seed, self.epochs, self.batches, self.accumulated = seed, epochs, batches, accumulated
        self._trained = self.config.rank
        self._reached: int | None = None
        self._idle: list[tuple[Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._remember_idle)
        optimizer.register_step_post_hook(self._put_back)

    @contextmanager
    def trained(self, epoch: int, batch: int) -> Iterator[None]:
        """Inside, the model has those components alone that this batch trains; the next step moves no others."""
        self._trained = self.rank_of(epoch, batch)
        with self.factors.first(self._trained):
            yield

    def rank_of(self, epoch: int, batch: int) -> int:
        """How many components a batch of an epoch trains, both from 0: the same for all of a step.

        It follows from the seed and that step alone; ``growing`` never goes back behind components that are trained
        already, as where a finished run goes on with more epochs.
        """
        config, step = self.config, batch // self.accumulated
        draw = random.Random(f"{self.seed} {epoch} {step}")
        if config.nested_steps == "uniform":
            return draw.randint(1, config.rank)
        ranks = [*config.smaller_ranks, config.rank]
        if config.nested_steps == "growing":
            done = (epoch + step * self.accumulated / self.batches) / self.epochs
            if self._reached is None:
                self._reached = self._components_that_are_trained()
            stages = int(done / GROWTH * (len(ranks) - 1))
            ranks = ranks[: 1 + max(stages, sum(rank < self._reached for rank in ranks))]
        fewer = len(ranks) > 1 and draw.random() < FEWER[config.nested_steps]
        return draw.choice(ranks[:-1]) if fewer else ranks[-1]

    def _components_that_are_trained(self) -> int:
        """The last whose V has left zero, where all start."""
        moved = torch.stack([v.detach().ne(0).any(dim=0) for v in self.factors["default"].V.values()]).any(dim=0)
        return int(moved.nonzero().max()) + 1 if moved.any() else 0

    def _remember_idle(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """What the step must not change: columns, and Adam's moments of them."""
        self._idle, first = [], self._trained
        if first == self.config.rank:
            return
        for parameter in self.factors["default"].parameters():
            moments = optimizer.state.get(parameter, {}).values()
            of_columns = [one for one in moments if isinstance(one, Tensor) and one.shape == parameter.shape]
            for one in (parameter.detach(), *of_columns):
                self._idle.append((one[:, first:], one[:, first:].clone()))

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        for columns, before in self._idle:
            columns.copy_(before)
        self._idle = []


def nested_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, Any], batches: int
) -> NestedSteps | None:
    """Those of a model that is trained with ``mode_approx.nested``; None of any other.

    Args:
        run: the ``run:`` part of the YAML.
        batches: of an epoch.
    """
    factors = nested_factors(model)
    if factors is None:
        return None
    return NestedSteps(factors, optimizer, run["seed"], run["max_epoch"], batches, run["accum_grad_iters"])


class RankRow(NamedTuple):
    """What was measured of a rank.

    Attributes:
        rank: how many components are in use.
        metric: ``agg_metrics`` of the split.
        error: standard error of it, over pictures (with their texts) or questions.
        parameters: of the adapter of this rank, gates and heads included.
    """

    rank: int
    metric: float
    error: float
    parameters: int


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of independent scores; infinite for less than two."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else math.inf


def enough(rows: Sequence[RankRow]) -> RankRow:
    """The smallest rank whose metric is within one standard error of the best, that of the best."""
    best = max(rows, key=lambda row: row.metric)
    return min((row for row in rows if row.metric >= best.metric - best.error), key=lambda row: row.rank)


class RankedRun(Protocol):
    """What the choice of a rank asks of the runner, whose model has the weights of the best epoch.

    Attributes:
        model: on its device.
        config: LAVIS's configuration.
        task: keeps the score of each picture or question of an evaluation, ``scores``.
        valid_splits, test_splits: by name.
        output_dir: folder of the run.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def valid_splits(self) -> Sequence[str]: ...

    @property
    def test_splits(self) -> Sequence[str]: ...

    config: Any
    task: Any
    output_dir: Path

    def eval_epoch(self, split_name: str, cur_epoch: str) -> dict[str, Any] | None:
        """Metrics of a split, on the main process."""


def choose_rank(run: RankedRun) -> None:
    """Evaluate each rank of a nested adapter on the first validation split, and write the adapter of that which is
    :func:`enough` as ``adapter_auto``, the table as ``ranks.json``.

    Raises:
        AuroraError: the training was not nested.
    """
    factors = nested_factors(run.model)
    if factors is None:
        raise AuroraError(
            "run.rank: auto needs an adapter of which the first components matter most; train it with "
            "model.mode_approx.nested: true"
        )
    config, split, rows = factors["default"].config, run.valid_splits[0], []
    for rank in (*config.smaller_ranks, config.rank):
        metric, error = _evaluated(run, factors, split, rank)
        rows.append(RankRow(rank, metric, error, _parameters(factors, rank)))
    chosen = broadcast(enough(rows) if is_main_process() else None)
    assert chosen is not None
    tests = {}
    for name in run.test_splits:
        with factors.first(chosen.rank):
            tests[name] = run.eval_epoch(split_name=name, cur_epoch=f"rank_{chosen.rank}")
    if is_main_process():
        _write(run, split, rows, chosen, tests)


def _evaluated(run: RankedRun, factors: ModeFactors, split: str, rank: int) -> tuple[float, float]:
    """``agg_metrics`` of a split and its standard error, on the main process; NaN on the others."""
    with factors.first(rank):
        log = run.eval_epoch(split_name=split, cur_epoch=f"rank_{rank}")
    return (math.nan, math.nan) if log is None else (float(log["agg_metrics"]), standard_error(run.task.scores))


def _parameters(factors: ModeFactors, rank: int) -> int:
    """Scalars of the adapter cut to a rank, gates and heads included."""
    whole = factors["default"].config.rank
    own = sum(parameter.numel() * rank // whole for parameter in factors["default"].parameters())
    parts = factors.companion_groups().values()
    return own + sum(tensor.numel() for part in parts for tensor in part.tensors_of("default").values())


def _write(
    run: RankedRun, split: str, rows: Sequence[RankRow], chosen: RankRow, tests: Mapping[str, dict[str, Any] | None]
) -> None:
    """The table, the adapter, and the line that says which it is."""
    best, folder = max(rows, key=lambda row: row.metric), run.output_dir / f"adapter_{AUTO}"
    content = {
        "split": split,
        "metric": "agg_metrics",
        "chosen": chosen.rank,
        "ranks": [row._asdict() for row in rows],
        "metrics": tests,
    }
    config, tensors = read_adapter(run.output_dir / "adapter_best")
    metrics = {"epoch": config.metrics.get("epoch"), split: {"agg_metrics": chosen.metric}, **tests}
    config, tensors = truncated_adapter(config, tensors, chosen.rank, "adapter_best")
    write_adapter(folder, replace(config, metrics=numbers_and_words(metrics)), tensors)
    write_text(run.output_dir / RANKS, json.dumps(content, indent=1) + "\n")
    print(table(split, rows, chosen), flush=True)
    logging.info(
        "run.rank: %d of %d components are enough: %.1f on %s, the best %.1f +- %.1f at %d; written to %s",
        chosen.rank,
        rows[-1].rank,
        chosen.metric,
        split,
        best.metric,
        best.error,
        best.rank,
        folder,
    )


def table(split: str, rows: Sequence[RankRow], chosen: RankRow) -> str:
    """A line for each rank; the one that is enough has a mark. One more where the ranks score alike."""
    lines = [f"{'rank':>6}{split:>9}{'error':>8}{'parameters':>12}"]
    for row in rows:
        mark = "  enough" if row == chosen else ""
        lines.append(f"{row.rank:>6}{row.metric:>9.2f}{row.error:>8.2f}{row.parameters:>12,}{mark}")
    best = max(rows, key=lambda row: row.metric)
    if min(row.metric for row in rows) >= best.metric - best.error:
        lines.append(
            f"the ranks do not differ by more than the error of the best, {best.error:.2f}: fewer components may be "
            f"enough, or nothing was learned; compare with model.tuning=frozen before you take the smallest"
        )
    return "\n".join(lines)
