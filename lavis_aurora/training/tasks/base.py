"""What tasks of runner_aurora share, what they ask of a model, and LAVIS's own tasks made to run there."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lavis.common.dist_utils import get_world_size
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from lavis.tasks.captioning import CaptionTask
from lavis.tasks.multimodal_classification import MultimodalClassificationTask
from lavis.tasks.retrieval import RetrievalTask
from lavis.tasks.vqa import VQATask
from lavis.tasks.vqa_reading_comprehension import VQARCTask
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.summary import MAIN, lavis_version
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.report import DataReport
from lavis_aurora.data.samples import set_ids_apart

# The model's method by which a task of LAVIS evaluates; other tasks need no more than the model's loss.
EVALUATION_METHODS = {
    RetrievalTask: "compute_sim_matrix",
    VQATask: "predict_answers",
    CaptionTask: "generate",
    MultimodalClassificationTask: "predict",
    VQARCTask: None,  # for models that cannot be trained
}
# What tasks of LAVIS's main branch give that method, one or the other, and not each of its models takes.
MAIN_ARGUMENTS = {
    CaptionTask: (("repetition_penalty", "length_penalty", "top_p", "temperature"),),
    MultimodalClassificationTask: (("n_segments",), ("max_length", "min_length", "length_penalty")),
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
    if run.get("rank") and not run.get("evaluate") and getattr(task, "scores", None) is None:
        raise AuroraError(
            f"run.rank: auto needs the score of each sample, which run.task {run.task} does not tell; name "
            f"retrieval_aurora, vqa_aurora or video_qa_aurora, or leave it out"
        )
    if method is None or not (run.valid_splits or run.test_splits):
        return
    if hasattr(model, method):
        _check_main(task, getattr(model, method), cfg)
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


def _check_main(task: type[BaseTask], method: Any, cfg: Any) -> None:
    """Refuse what LAVIS's main branch cannot evaluate: there some tasks give the model what not each takes."""
    lavis_task: Any = next((cls for cls in task.__mro__ if cls in MAIN_ARGUMENTS), None)
    if lavis_version() != MAIN or lavis_task is None or task.valid_step is not lavis_task.valid_step:
        return
    taken, given = inspect.signature(method).parameters.keys(), MAIN_ARGUMENTS[lavis_task]
    if lavis_task is MultimodalClassificationTask and not hasattr(inspect, "getargspec"):
        why = "asks for inspect.getargspec, which Python 3.11 has no more"
    elif any(taken >= set(names) for names in given):
        return
    else:
        why = f"gives {method.__name__} the arguments {', '.join(given[0])}, not all of which this model's takes"
    raise AuroraError(
        f"run.task: {cfg.run_cfg.task} of LAVIS's main branch {why}; use LAVIS 1.0.2, or to train alone, set "
        f"run.valid_splits and run.test_splits to []"
    )


def evaluated_keys(run: DictConfig) -> tuple[str, ...]:
    """The keys of ``run`` that name the splits to evaluate."""
    return ("test_splits",) if run.get("evaluate") else ("valid_splits", "test_splits")


def extremes(scores: Sequence[float], count: int = 4) -> list[int]:
    """The places of the lowest and of the highest scores, so many of each, from the lowest on."""
    ordered = sorted(range(len(scores)), key=scores.__getitem__)
    return ordered if len(ordered) <= 2 * count else ordered[:count] + ordered[-count:]


class AuroraTaskBase(BaseTask):
    """Last of a task's bases, :class:`LavisTaskMixin` being the first.

    So what LAVIS's task between them does with its datasets and in a step runs on top of this.

    Attributes:
        cfg: the ``run:`` part of the YAML.
        shard_evaluation: whether processes may share an evaluation split by samples; retrieval ranks it as a whole.
        evaluation_method: the model's method by which the task evaluates, see :func:`needed_method`.
        data_report: of the data, on the main process of a run.
        in_batch: of the last batch, see :func:`itc_in_batch`; None with ``run.stop_collapsed: false``.
        scores: of the split that was evaluated last, on the main process: of each picture with its texts, or of
            each question, the score; the mean is ``agg_metrics``. None (of the class too) where a task does not tell.
    """

    shard_evaluation = True
    evaluation_method: str | None = None
    data_report: DataReport | None = None
    in_batch: tuple[Tensor, int] | None = None
    scores: Sequence[float] | None = None
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

    def complete_report(self, report: DataReport, datasets: dict[str, dict[str, Any]]) -> None:
        """Hook: add to the report of the data what the task alone knows; here nothing."""

    def cases(self) -> list[tuple[str, str]]:
        """Hook: samples of the split that was evaluated last, the worst first, then the best; here none.

        Of each the file of its picture or video, and in words what was asked of it and what was found.
        """
        return []

    def print_findings(self, split: str) -> None:
        """Print what the report of the data says of a split, below its figures."""
        for line in self.data_report.beside(split) if self.data_report is not None else ():
            print(f"  {line}", flush=True)

    def losses(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch: ``loss``, of :meth:`train_step`, and what the model's output holds under such names."""
        self._reported: dict[str, Tensor] = {}
        loss = self.train_step(model=model, samples=samples)
        if isinstance(loss, tuple):  # of a task written for LAVIS's main branch: the loss, and all of them to report
            loss, reported = loss
            self._reported = {key: value.detach() for key, value in reported.items() if isinstance(value, Tensor)}
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
        # BLIP's and ALBEF's.
        watched = self.cfg.get("stop_collapsed", True)
        self.in_batch = itc_in_batch(getattr(output, "sims", None)) if watched else None
        loss: Tensor = output["loss"]
        return loss


@torch.no_grad()
def itc_in_batch(sims: Any) -> tuple[Tensor, int] | None:
    """ITC loss of images among the pairs of a batch alone, of all processes, and how many these are.

    The queue, which starts at random, has no part in it: a model that has learned nothing tells that from its own.

    Args:
        sims: BLIP's or ALBEF's similarities; None where a model has none, and then the result is.
    """
    similarity, targets = (getattr(sims, name, None) for name in ("sim_i2t", "sim_i2t_targets"))
    if similarity is None or targets is None:
        return None
    # The pairs of the batch stand before the queue.
    count = min(len(similarity) * get_world_size(), similarity.shape[1])
    own = targets[:, :count].float()
    losses = -(F.log_softmax(similarity[:, :count].float(), dim=1) * own).sum(dim=1) / own.sum(dim=1)
    return losses.mean(), count


class LavisTaskMixin(BaseTask):
    """In front of a task of LAVIS: it keeps all of its settings, and evaluates where the model is."""

    @classmethod
    def setup_task(cls, cfg: Any) -> BaseTask:
        """LAVIS's task with the settings of ``run:``, not all of which it keeps."""
        run, given = cfg.run_cfg, cfg
        if issubclass(cls, CaptionTask) and lavis_version() == MAIN and not run.valid_splits:
            # There it must have one split, also where nothing is validated.
            given = SimpleNamespace(run_cfg=OmegaConf.merge(run, {"valid_splits": run.test_splits or ["none"]}))
        try:
            task = super().setup_task(cfg=given)
        except AssertionError as error:
            raise AuroraError(f"run.valid_splits: LAVIS's {run.task} refuses them ({error})") from error
        task.cfg = run
        return task

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """LAVIS's; a VQA task has the questions and answers of every split that there is, as in LAVIS 1.0.2.

        Main's looks for run.valid_splits in every dataset, Visual Genome's too, and GQA's passes over our checks.
        """
        build = super().build_datasets
        if build.__module__ != VQATask.__module__:
            datasets: dict[str, dict[str, Any]] = build(cfg)
            return datasets
        datasets = AuroraTaskBase.build_datasets(self, cfg)
        for splits in datasets.values():
            for split, dataset in splits.items():
                if getattr(dataset, "coco_fmt_qust_file", None) is not None:
                    self.ques_files[split] = dataset.coco_fmt_qust_file
                    self.anno_files[split] = dataset.coco_fmt_anno_file
                self.answer_list: Any = getattr(dataset, "answer_list", self.answer_list)
        return datasets

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
