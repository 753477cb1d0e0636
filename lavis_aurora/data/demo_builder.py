"""The demo's pictures as a LAVIS dataset: made on first use, as other datasets are downloaded."""

from __future__ import annotations

import json
from pathlib import Path

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset

from lavis_aurora.demo.pictures import generate_pictures
from lavis_aurora.demo.scenes import iter_captions
from lavis_aurora.paths import package_file


@registry.register_builder("demo_retrieval")
class DemoRetrievalBuilder(BaseDatasetBuilder):
    """Captioned pictures of shapes, in two domains: ``clean`` to pretrain on, ``shifted`` to tune on."""

    train_dataset_cls = RetrievalDataset
    eval_dataset_cls = RetrievalEvalDataset
    DATASET_CONFIG_DICT = {
        "default": package_file("configs/datasets/demo_ret_shifted.yaml"),
        "clean": package_file("configs/datasets/demo_ret_clean.yaml"),
    }

    def _download_data(self) -> None:
        """Make the pictures unless they are there, in the numbers that the YAML asks for."""
        info = self.config.build_info
        counts = {split: int(part.count) for split, part in info.annotations.items()}
        files = {split: Path(get_cache_path(part.storage)) for split, part in info.annotations.items()}
        seed = int(info.seed)
        if all(_holds(files[split], info.domain, split, count, seed) for split, count in counts.items()):
            return
        folder = next(iter(files.values())).parent
        generate_pictures(folder, info.domain, counts, seed)


def _holds(path: Path, domain: str, split: str, count: int, seed: int) -> bool:
    """Whether the pictures are there, as many as asked for and of this seed."""
    if not path.is_file():
        return False
    entries = json.loads(path.read_text())
    first = next(iter_captions(domain, seed, split))
    return len(entries) == count and entries[0]["caption"] in (first, [first])
