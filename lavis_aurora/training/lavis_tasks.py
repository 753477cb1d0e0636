"""LAVIS's own tasks under runner_aurora."""

from __future__ import annotations

from typing import Any

from lavis.tasks.base_task import BaseTask
from lavis.tasks.retrieval import RetrievalTask

from lavis_aurora.training.loop import AuroraTrainMixin


class LavisTaskMixin(AuroraTrainMixin):
    """In front of a task of LAVIS: it trains as the tasks of this package do, and evaluates where the model is."""

    def evaluation(self, model, data_loader, **_kwargs) -> Any:
        """LAVIS's, which expects a GPU unless it is told otherwise."""
        return super().evaluation(model, data_loader, cuda_enabled=next(model.parameters()).is_cuda)


def runnable_task(cls: type[BaseTask]) -> type[BaseTask]:
    """The task itself, if it is made for runner_aurora, or a subclass that is."""
    if issubclass(cls, AuroraTrainMixin):
        return cls
    return type(cls.__name__, (LavisTaskMixin, cls), {"shards_evaluation": not issubclass(cls, RetrievalTask)})
