"""What tasks ask of a model."""

from __future__ import annotations

import torch.distributed as dist
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from lavis.tasks.captioning import CaptionTask
from lavis.tasks.multimodal_classification import MultimodalClassificationTask
from lavis.tasks.retrieval import RetrievalTask
from lavis.tasks.vqa import VQATask
from lavis.tasks.vqa_reading_comprehension import VQARCTask
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.samples import set_ids_apart

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


class AuroraTaskBase(BaseTask):
    """Last of a task's bases, so that what LAVIS's task does with its datasets and in a step runs on top of it.

    Attributes:
        losses: of the last step, detached: what the model's output holds under names with "loss".
    """

    losses: dict[str, Tensor]

    def build_datasets(self, cfg) -> dict:
        """Datasets by name and split, their files checked; ids of different training sets are different."""
        datasets = {name: build_checked(name, cfg.datasets_cfg[name]) for name in cfg.datasets_cfg}
        set_ids_apart({name: splits["train"] for name, splits in datasets.items() if "train" in splits})
        return datasets

    def train_step(self, model: nn.Module, samples: dict) -> Tensor:
        """The loss of a batch.

        Raises:
            AuroraError: the model asks for other processes, and there are none.
        """
        try:
            output = model(samples)
        except ValueError as error:
            if dist.is_initialized() or "process group" not in str(error):
                raise
            # BLIP-2's, CLIP's and ALPRO's losses, and LAVIS's blip_retrieval with negative_all_rank.
            raise AuroraError(
                "this model gathers the features of all processes and asks for them even where it is alone; start "
                "it by python -m torch.distributed.run --nproc_per_node=1 train.py, or leave that out where its "
                "configuration can (model.base.negative_all_rank: false)"
            ) from error
        self.losses = {key: output[key].detach() for key in output if "loss" in key and output[key] is not None}
        return output["loss"]
