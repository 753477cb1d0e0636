"""Data of one's own, in the formats of LAVIS's datasets: nothing is fetched, and no benchmark's name is borrowed."""

from __future__ import annotations

from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.gqa_datasets import GQADataset, GQAEvalDataset
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)

from lavis_aurora.paths import package_file


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
