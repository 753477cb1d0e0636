"""What tasks ask of a model."""

from __future__ import annotations

from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from lavis.tasks.captioning import CaptionTask
from lavis.tasks.multimodal_classification import MultimodalClassificationTask
from lavis.tasks.retrieval import RetrievalTask
from lavis.tasks.vqa import VQATask
from lavis.tasks.vqa_reading_comprehension import VQARCTask
from torch import nn

from lavis_aurora.errors import AuroraError

# The model's method by which a task of LAVIS evaluates; other tasks need no more than the model's loss.
EVALUATES_BY = {
    RetrievalTask: "compute_sim_matrix",
    VQATask: "predict_answers",
    CaptionTask: "generate",
    MultimodalClassificationTask: "predict",
    VQARCTask: None,  # for models that cannot be trained
}


def needed_method(task: type[BaseTask]) -> str | None:
    """The method by which a task evaluates a model: its ``evaluates_by``, or that of the LAVIS task it is one of."""
    own = getattr(task, "evaluates_by", None)
    return own or next((EVALUATES_BY[cls] for cls in task.__mro__ if cls in EVALUATES_BY), None)


def check_model(task: type[BaseTask], model: nn.Module, cfg) -> None:
    """Refuse a model that the task cannot evaluate, before it is trained for that.

    Args:
        task: class of the task.
        model: as built.
        cfg: the whole configuration.

    Raises:
        AuroraError: names the tasks that the model can do.
    """
    run, method = cfg.run_cfg, needed_method(task)
    if method is None or hasattr(model, method) or not (run.valid_splits or run.test_splits):
        return
    arch = cfg.model_cfg.arch
    if "base" in cfg.model_cfg:
        arch += f" around {cfg.model_cfg.base.arch}"
    tasks = registry.mapping["task_name_mapping"].items()
    needs = ((name, needed_method(cls)) for name, cls in tasks)
    fitting = sorted(name for name, need in needs if need is not None and hasattr(model, need))
    remedy = f"name a task that it can do, {' or '.join(fitting)}, or" if fitting else "to train alone,"
    raise AuroraError(
        f"run.task: {run.task} evaluates by a model's {method}, which {arch} does not have; {remedy} set "
        f"run.valid_splits and run.test_splits to []"
    )
