"""Dataset builders: MSRVTT-QA with open answers, and the user's own pictures, videos and questions."""

from __future__ import annotations

from typing import Any

import torch
from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.builders.video_qa_builder import VideoQABuilder
from lavis.datasets.datasets.gqa_datasets import GQADataset, GQAEvalDataset
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)
from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset
from torch.utils.data import default_collate

from lavis_aurora.common.errors import AuroraError, shown
from lavis_aurora.common.files import read_json
from lavis_aurora.common.paths import package_file


class OwnBuilder(BaseDatasetBuilder):
    """Annotation files that their user writes; the comments of the project YAMLs say how.

    Attributes:
        FILE_KEYS: what a split's annotations may have; there is no url.
    """

    FILE_KEYS = ("storage",)

    def _download_ann(self) -> None:
        """Nothing: a missing file is the user's to write."""


@registry.register_builder("own_retrieval")
class OwnRetrievalBuilder(OwnBuilder):
    """Pictures with captions; see projects/aurora/own_ret.yaml."""

    train_dataset_cls = RetrievalDataset
    eval_dataset_cls = RetrievalEvalDataset
    DATASET_CONFIG_DICT = {"default": package_file("configs/datasets/own_retrieval.yaml")}


@registry.register_builder("own_video_retrieval")
class OwnVideoRetrievalBuilder(OwnBuilder):
    """Videos with captions; see projects/aurora/own_video_ret.yaml."""

    train_dataset_cls = VideoRetrievalDataset
    eval_dataset_cls = VideoRetrievalEvalDataset
    DATASET_CONFIG_DICT = {"default": package_file("configs/datasets/own_video_retrieval.yaml")}


@registry.register_builder("own_vqa")
class OwnVqaBuilder(OwnBuilder):
    """Questions about pictures with one right answer each; see projects/aurora/own_vqa.yaml.

    LAVIS's GQA has this format. VQAv2's needs ten answers to a question, in four files for each split.
    """

    train_dataset_cls = GQADataset
    eval_dataset_cls = GQAEvalDataset
    DATASET_CONFIG_DICT = {"default": package_file("configs/datasets/own_vqa.yaml")}


class OpenVideoQADataset(VideoQADataset):
    """LAVIS's VideoQADataset with answers as text, one to each question.

    Attributes:
        answer_list: the answers of LAVIS's classification, frequent ones of the train split, to rank.
        answer_weight: of each answer in the loss.
    """

    answer_weight = 1.0

    @property
    def answer_list(self) -> list[str]:
        return list(self.class_labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        sample["answer"] = self.annotation[index]["answer"]
        del sample["answers"]  # the number of a class
        return sample

    def collater(self, samples: list[dict]) -> dict[str, Any]:
        """A batch with ``answer``, ``weight`` and ``n_answers`` as BLIP's VQA takes them."""
        batch = default_collate(samples)
        batch["weight"] = torch.full((len(samples),), self.answer_weight)
        batch["n_answers"] = torch.ones(len(samples), dtype=torch.long)
        return batch


@registry.register_builder("msrvtt_qa_aurora")
class OpenVideoQABuilder(VideoQABuilder):
    """MSRVTT-QA (paper 4.1, table 3), open-ended; the files are those of LAVIS's msrvtt_qa."""

    train_dataset_cls = OpenVideoQADataset
    eval_dataset_cls = OpenVideoQADataset
    DATASET_CONFIG_DICT = {"default": package_file("configs/datasets/msrvtt_qa_aurora.yaml")}

    def build(self) -> dict[str, OpenVideoQADataset]:
        """Datasets by split.

        Raises:
            AuroraError: the file of answers is not there or holds something else.
        """
        key = "datasets.msrvtt_qa_aurora.build_info.annotations.ans2label"
        info = self.config.build_info.annotations.get("ans2label")
        if info is None:
            raise AuroraError(f"{key}: missing; name the file of answers (url and storage)")
        path = get_cache_path(info.storage)  # an absolute one stays
        labels = read_json(path, f"{key}.storage")
        if not isinstance(labels, dict) or not labels:
            raise AuroraError(f'{key}.storage: {path} must hold answers with their numbers, e.g. {{"man": 0}}')
        weight = self.config.get("answer_weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1e6:
            raise AuroraError(f"datasets.msrvtt_qa_aurora.answer_weight: {shown(weight)} must be a number above 0")
        made = super().build()
        for dataset in made.values():
            dataset.answer_weight = float(weight)
        return made
