"""LAVIS's own tasks under runner_aurora."""

from __future__ import annotations

from typing import Any

from lavis.tasks.base_task import BaseTask
from lavis.tasks.retrieval import RetrievalTask
from lavis.tasks.vqa_reading_comprehension import VQARCTask

from lavis_aurora.errors import AuroraError
from lavis_aurora.training.loop import AuroraTrainMixin
from lavis_aurora.training.task_base import AuroraTaskBase


class LavisTaskMixin(AuroraTrainMixin):
    """In front of a task of LAVIS: it trains as the tasks of this package do, and evaluates where the model is."""

    def evaluation(self, model, data_loader, **_kwargs) -> Any:
        """LAVIS's, which expects a GPU unless it is told otherwise."""
        return super().evaluation(model, data_loader, cuda_enabled=next(model.parameters()).is_cuda)


def runnable_task(cls: type[BaseTask]) -> type[BaseTask]:
    """The task itself, if it is made for runner_aurora, or a subclass that is.

    Raises:
        AuroraError: the task is of LAVIS's for models without a training loss.
    """
    if issubclass(cls, AuroraTrainMixin):
        return cls
    if issubclass(cls, VQARCTask):
        raise AuroraError(
            "run.task: vqa_reading_comprehension and gqa_reading_comprehension evaluate models that have no training "
            "loss, by keys of their own and in several processes only; run them by LAVIS's runner_base"
        )
    shards = not issubclass(cls, RetrievalTask)
    return type(cls.__name__, (LavisTaskMixin, cls, AuroraTaskBase), {"shards_evaluation": shards})
