"""Question answering: LAVIS's task, on any device, with results for the official evaluators."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lavis.common.dist_utils import (
    get_rank,
    get_world_size,
    is_dist_avail_and_initialized,
    is_main_process,
    main_process,
)
from lavis.common.registry import registry
from lavis.datasets.datasets.vqa_datasets import VQADataset
from lavis.tasks.vqa import VQATask
from torch.utils.data import Dataset

from lavis_aurora.errors import AuroraError
from lavis_aurora.training.loop import AuroraTrainMixin


@registry.register_task("vqa_aurora")
class VqaAuroraTask(AuroraTrainMixin, VQATask):
    """LAVIS's vqa: the likeliest answer of a list, or a generated one, and VQAv2's accuracy by answer type."""

    @classmethod
    def setup_task(cls, cfg) -> VqaAuroraTask:
        """A task with the settings of ``run:``."""
        task = super().setup_task(cfg=cfg)
        task.cfg = cfg.run_cfg
        return task

    def build_datasets(self, cfg) -> dict:
        """Datasets by name and split, their files checked, with what the evaluation of each split needs.

        Raises:
            AuroraError: a split to evaluate has no list to rank, or one to select the best epoch by no true answers.
        """
        datasets = super().build_datasets(cfg)
        for name, splits in datasets.items():
            for split, dataset in splits.items():
                if getattr(dataset, "coco_fmt_anno_file", None):
                    self.ques_files[split] = dataset.coco_fmt_qust_file
                    self.anno_files[split] = dataset.coco_fmt_anno_file
                for key in ("valid_splits", "test_splits"):
                    if split in (cfg.run_cfg.get(key) or []):
                        self._check_split(f"datasets.{name}.build_info.annotations.{split}.storage", key, dataset)
        return datasets

    def _check_split(self, files: str, key: str, dataset: Dataset) -> None:
        if isinstance(getattr(dataset, "inner", dataset), VQADataset):
            raise AuroraError(f"run.{key}: {files} holds questions to train on; evaluate another split")
        if self.inference_method == "rank" and not getattr(dataset, "answer_list", None):
            raise AuroraError(
                f"{files}: run.inference_method rank needs a list of answers, the second file; name it, or set "
                f"run.inference_method: generate"
            )
        if key == "valid_splits" and not getattr(dataset, "coco_fmt_anno_file", None):
            raise AuroraError(
                f"{files}: run.valid_splits needs true answers to select the best epoch by, VQAv2's questions and "
                f"annotations as the third and fourth file; name them, or validate on another split"
            )

    def evaluation(self, model, data_loader, **_kwargs) -> list[dict[str, Any]]:
        """Answers of this process to its share of the questions."""
        self.answer_list = getattr(data_loader.dataset, "answer_list", None)
        return super().evaluation(model, data_loader, cuda_enabled=model.device.type == "cuda")

    def valid_step(self, model, samples: dict) -> list[dict[str, Any]]:
        """``question_id`` and ``answer`` of each question; ids are numbers or strings."""
        answers = model.predict_answers(
            samples=samples,
            answer_list=self.answer_list,
            inference_method=self.inference_method,
            num_beams=self.num_beams,
            max_len=self.max_len,
            min_len=self.min_len,
            num_ans_candidates=self.num_ans_candidates,
            prompt=self.prompt,
        )
        ids = samples["question_id"]
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return [{"question_id": i, "answer": answer} for i, answer in zip(ids, answers)]

    def after_evaluation(self, val_result, split_name, epoch, **_kwargs) -> dict[str, Any] | None:
        """Write ``result/SPLIT_epoch_N_vqa_result.json``, in the official server's format, and score it."""
        path = self.save_result(
            val_result,
            result_dir=registry.get_path("result_dir"),
            filename=f"{split_name}_epoch_{epoch}_vqa_result",
            remove_duplicate="question_id",
        )
        return self._report_metrics(result_file=path, split=split_name)

    @staticmethod
    def save_result(result, result_dir, filename, remove_duplicate="") -> str:
        """Join the results of all processes in one file; arguments and value are LAVIS's.

        LAVIS's time grows with the square of the number of results, and its parts stay behind.
        """
        folder = Path(result_dir)
        path = folder / f"{filename}.json"
        (folder / f"{filename}_rank{get_rank()}.json").write_text(json.dumps(result))
        if is_dist_avail_and_initialized():
            dist.barrier()
        if is_main_process():
            parts = [folder / f"{filename}_rank{rank}.json" for rank in range(get_world_size())]
            merged = [entry for part in parts for entry in json.loads(part.read_text())]
            if remove_duplicate:
                # Samplers repeat some samples, to give all processes equally many.
                first: dict[Any, dict] = {}
                for entry in merged:
                    first.setdefault(entry[remove_duplicate], entry)
                merged = list(first.values())
            path.write_text(json.dumps(merged))
            for part in parts:
                part.unlink()
        return str(path)

    @main_process
    def _report_metrics(self, result_file: str, split: str) -> dict[str, Any]:
        """VQAv2's accuracy in percent, over all questions and by answer type; None where answers are not known."""
        count = len(json.loads(Path(result_file).read_text()))
        metrics = {"agg_metrics": None, **super()._report_metrics(result_file, split), "questions": count}
        print(report(split, metrics), flush=True)
        logging.info("answers written to %s", result_file)
        return metrics


def report(split: str, metrics: dict[str, Any]) -> str:
    """One line: number of questions, accuracy, and accuracy by answer type."""
    head = f"{split}: {metrics['questions']} questions"
    if metrics["agg_metrics"] is None:
        return f"{head} answered; their true answers are not known here"
    kinds = {key: value for key, value in metrics.items() if key not in ("agg_metrics", "questions")}
    shown = ", ".join(f"{kind} {value:.2f}" for kind, value in kinds.items())
    return f"{head}, accuracy {metrics['agg_metrics']:.2f} % ({shown})"
