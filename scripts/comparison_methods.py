"""What the YAMLs of scripts/comparison say of the methods that scripts/comparison.py compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import OmegaConf
from processes import ROOT

from lavis_aurora.common.errors import AuroraError, did_you_mean, one_of
from lavis_aurora.common.parsing import parse
from lavis_aurora.config.check import read_yaml

TASKS = {"pictures": "demo_ret.yaml", "clips": "demo_video.yaml", "questions": "demo_vqa.yaml"}
METHODS = ROOT / "scripts" / "comparison"


@dataclass
class Method:
    """A YAML of the comparison.

    Attributes:
        label: in tables and pictures.
        options: of its runs, KEY=VALUE.
        task_options: further ones by task.
        size: key that holds its size, if it has one.
        budgets: that size by the name of a budget of adapter parameters.
        rates: values of run.init_lr to try; none where nothing is trained.
        task_rates: those in their place, by task.
        tasks: that it can do.
        cost: row of scripts/bench_train.py that such a step costs on BLIP base, for ``figures.py frontier``.
    """

    label: str
    options: list[str]
    size: Optional[str] = None
    budgets: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    task_options: dict[str, list[str]] = field(default_factory=dict)
    task_rates: dict[str, list[float]] = field(default_factory=dict)
    cost: Optional[str] = None

    def options_at(self, budget: str, task: str) -> dict[str, str]:
        """Options of its runs at a budget; the one without a name is that of a method of one size."""
        options = dict(option.split("=", 1) for option in [*self.options, *self.task_options.get(task, ())])
        return {**options, **({self.size: str(self.budgets[budget])} if self.size else {})}

    def rates_of(self, task: str) -> list[float]:
        """Rates to try for a task."""
        return self.task_rates.get(task, self.rates)


def read_methods(names: Sequence[str] | None) -> dict[str, Method]:
    """Methods by the names of their YAMLs; all without ``names``.

    Raises:
        AuroraError: there is no such YAML, or it holds something else.
    """
    known = sorted(path.stem for path in METHODS.glob("*.yaml"))
    for name in names or ():
        if name not in known:
            raise AuroraError(f"--methods {name}: there is no {METHODS / name}.yaml{did_you_mean(name, known)}")
    found = {}
    for name in names or known:
        content = OmegaConf.to_container(read_yaml(str(METHODS / f"{name}.yaml")))
        method = found[name] = parse(Method, content, f"{METHODS / name}.yaml", convert=True)
        for task in (*method.tasks, *method.task_options, *method.task_rates):
            one_of(f"{METHODS / name}.yaml: a task", task, TASKS)
    return found
