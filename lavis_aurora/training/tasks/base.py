"""What tasks of runner_aurora share, what they ask of a model, and LAVIS's own tasks made to run there."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from lavis.tasks.captioning import CaptionTask
from lavis.tasks.multimodal_classification import MultimodalClassificationTask
from lavis.tasks.retrieval import RetrievalTask
from lavis.tasks.vqa import VQATask
from lavis.tasks.vqa_reading_comprehension import VQARCTask
from omegaconf import DictConfig
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.samples import set_ids_apart

# The model's method by which a task of LAVIS evaluates; other tasks need no more than the model's loss.
EVALUATION_METHODS = {
    RetrievalTask: "compute_sim_matrix",
    VQATask: "predict_answers",
    CaptionTask: "generate",
    MultimodalClassificationTask: "predict",
    VQARCTask: None,  # for models that cannot be trained
}


def needed_method(task: type[BaseTask]) -> str | None:
    """The method by which a task evaluates a model: its ``evaluation_method``, or that of LAVIS's task it derives."""
    own = getattr(task, "evaluation_method", None)
    return own or next((EVALUATION_METHODS[cls] for cls in task.__mro__ if cls in EVALUATION_METHODS), None)


def check_model(task: type[BaseTask], model: nn.Module, cfg: Any) -> None:
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


def evaluated_keys(run: DictConfig) -> tuple[str, ...]:
    """The keys of ``run`` that name the splits to evaluate."""
    return ("test_splits",) if run.get("evaluate") else ("valid_splits", "test_splits")


class AuroraTaskBase(BaseTask):
    """Last of a task's bases, :class:`LavisTaskMixin` being the first.

    So what LAVIS's task between them does with its datasets and in a step runs on top of this.

    Attributes:
        cfg: the ``run:`` part of the YAML.
        shard_evaluation: whether processes may share an evaluation split by samples; retrieval ranks it as a whole.
        evaluation_method: the model's method by which the task evaluates, see :func:`needed_method`.
    """

    shard_evaluation = True
    evaluation_method: str | None = None
    cfg: DictConfig

    def build_model(self, cfg: Any) -> nn.Module:
        """LAVIS's; a model that this task cannot evaluate is refused."""
        model: nn.Module = super().build_model(cfg)
        check_model(type(self), model, cfg)
        return model

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Datasets by name and split, their files checked; ids of different training sets are different.

        A split that the run neither trains on nor evaluates is left out, and needs no files.
        """
        run = cfg.run_cfg
        keys = evaluated_keys(run) if run.get("evaluate") else ("train_splits", *evaluated_keys(run))
        splits = {split for key in keys for split in run.get(key) or ()}
        datasets: dict[str, dict[str, Any]] = {
            name: build_checked(name, dataset, splits) for name, dataset in cfg.datasets_cfg.items()
        }
        set_ids_apart({name: splits["train"] for name, splits in datasets.items() if "train" in splits})
        return datasets

    def losses(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch: ``loss``, of :meth:`train_step`, and what the model's output holds under such names."""
        self._reported: dict[str, Tensor] = {}
        loss = self.train_step(model=model, samples=samples)
        return {**self._reported, "loss": loss}

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> Tensor:
        """LAVIS's hook: the loss of a batch, a scalar.

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
        self._reported = {key: output[key].detach() for key in output if "loss" in key and output[key] is not None}
        loss: Tensor = output["loss"]
        return loss


class LavisTaskMixin(BaseTask):
    """In front of a task of LAVIS: it keeps all of its settings, and evaluates where the model is."""

    @classmethod
    def setup_task(cls, cfg: Any) -> BaseTask:
        """LAVIS's task with the settings of ``run:``, not all of which it keeps."""
        task = super().setup_task(cfg=cfg)
        task.cfg = cfg.run_cfg
        return task

    def evaluation(self, model: nn.Module, data_loader: Any, **_kwargs: Any) -> Any:
        """LAVIS's, which expects a GPU unless it is told otherwise."""
        return super().evaluation(model, data_loader, cuda_enabled=next(model.parameters()).is_cuda)


def runnable_task(cls: type[BaseTask]) -> type[BaseTask]:
    """The task itself, if it is made for runner_aurora, or a subclass that is.

    Raises:
        AuroraError: the task is of LAVIS's for models without a training loss, or has a training loop of its own.
    """
    if issubclass(cls, VQARCTask):
        raise AuroraError(
            "run.task: vqa_reading_comprehension and gqa_reading_comprehension evaluate models that have no training "
            "loss, by keys of their own and in several processes only; run them by LAVIS's runner_base"
        )
    for loop in ("train_epoch", "_train_inner_loop"):
        if getattr(cls, loop) is not getattr(BaseTask, loop):
            raise AuroraError(
                f"run.task: {cls.__name__} has a {loop} of its own, which runner_aurora does not call; give it a "
                f"train_step, the loss of a batch, or run it by LAVIS's runner_base"
            )
    if issubclass(cls, AuroraTaskBase):
        return cls
    shards = not issubclass(cls, RetrievalTask)
    return type(cls.__name__, (LavisTaskMixin, cls, AuroraTaskBase), {"shard_evaluation": shards})
