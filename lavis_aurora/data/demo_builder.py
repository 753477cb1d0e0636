"""The demo's pictures, clips and questions as LAVIS datasets: made on first use, as other datasets are downloaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset, COCOVQAEvalDataset
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)
from omegaconf import DictConfig

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json
from lavis_aurora.common.paths import package_file
from lavis_aurora.demo import clips, scenes
from lavis_aurora.demo.clips import generate_clips
from lavis_aurora.demo.pictures import generate_pictures
from lavis_aurora.demo.question_files import generate_questions
from lavis_aurora.demo.questions import iter_questions


class DemoBuilder(BaseDatasetBuilder, ABC):
    """A dataset that is made as the YAML asks for it, unless it is there; what is there is never changed.

    The types' ``build_info.folder`` has a name for each setting, so that runs with different ones share nothing.
    """

    def _download_data(self) -> None:
        info = self.config.build_info
        try:
            files = {split: _paths(part.storage) for split, part in info.annotations.items()}
            folder = next(iter(files.values()))[0].parent
            same = self._hold(files, info)
            missing = [split for split, paths in files.items() if not all(path.is_file() for path in paths)]
            if same and missing:
                self._make_whole(folder, {split: int(info.annotations[split].count) for split in missing}, info)
                same = self._hold(files, info)  # another run may have made others
        except (TypeError, ValueError) as error:  # of values of another type, and of the generator
            raise AuroraError(f"build_info: the demo's data cannot be made of its keys ({error})") from error
        if not same:
            raise AuroraError(
                f"build_info: {folder} holds other data than asked for; remove it, or name another folder"
            )

    def _make_whole(self, folder: Path, counts: dict[str, int], info: DictConfig) -> None:
        """Make the folder as a whole: another run may be making it too. Of one that is there, what is missing."""
        if folder.exists():
            self._make(folder, counts, info)
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".unfinished_") as unfinished:
            made = Path(unfinished) / folder.name
            self._make(made, counts, info)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another run was first
                    raise

    def _hold(self, files: dict[str, list[Path]], info: DictConfig) -> bool:
        """Whether the splits that are there are as asked for."""
        return all(self._holds(paths[0], split, info) for split, paths in files.items() if paths[0].is_file())

    def _holds(self, path: Path, split: str, info: DictConfig) -> bool:
        """Whether a split's first file has as many samples as asked for, and those of this seed."""
        entries = read_json(path)
        return len(entries) == self._entries(info, split) and all(self._is_first(e, split, info) for e in entries[:1])

    def _entries(self, info: DictConfig, split: str) -> int:
        """Entries that the first file of a split must hold."""
        return int(info.annotations[split].count)

    @abstractmethod
    def _is_first(self, entry: dict[str, Any], split: str, info: DictConfig) -> bool:
        """Whether this is the first entry of the split and its seed."""

    @abstractmethod
    def _make(self, folder: Path, counts: dict[str, int], info: DictConfig) -> None:
        """Write the splits, with so many pictures or clips each."""


class CaptionedDemoBuilder(DemoBuilder):
    """Pictures or clips, one caption each."""

    captions: Callable[[str, int, str], Iterator[str]]

    def _is_first(self, entry: dict[str, Any], split: str, info: DictConfig) -> bool:
        first = next(self.captions(info.domain, int(info.seed), split))
        return entry["caption"] in (first, [first])


@registry.register_builder("demo_retrieval")
class DemoRetrievalBuilder(CaptionedDemoBuilder):
    """Captioned pictures of shapes, in two domains: ``clean`` to pretrain on, ``shifted`` to tune on."""

    train_dataset_cls = RetrievalDataset
    eval_dataset_cls = RetrievalEvalDataset
    DATASET_CONFIG_DICT = {
        "default": package_file("configs/datasets/demo_ret_shifted.yaml"),
        "clean": package_file("configs/datasets/demo_ret_clean.yaml"),
    }
    captions = staticmethod(scenes.iter_captions)

    def _make(self, folder: Path, counts: dict[str, int], info: DictConfig) -> None:
        generate_pictures(folder, info.domain, counts, int(info.seed))


@registry.register_builder("demo_video")
class DemoVideoBuilder(CaptionedDemoBuilder):
    """Captioned clips of shapes that stay or move, of which no frame alone tells the caption; in both domains."""

    train_dataset_cls = VideoRetrievalDataset
    eval_dataset_cls = VideoRetrievalEvalDataset
    DATASET_CONFIG_DICT = {
        "default": package_file("configs/datasets/demo_video_shifted.yaml"),
        "clean": package_file("configs/datasets/demo_video_clean.yaml"),
    }
    captions = staticmethod(clips.iter_captions)

    def _make(self, folder: Path, counts: dict[str, int], info: DictConfig) -> None:
        generate_clips(folder, info.domain, counts, int(info.seed))


@registry.register_builder("demo_vqa")
class DemoVqaBuilder(DemoBuilder):
    """Questions about pictures of shapes, in VQAv2's format and in two domains: ``clean`` and ``shifted``."""

    train_dataset_cls = COCOVQADataset
    eval_dataset_cls = COCOVQAEvalDataset
    DATASET_CONFIG_DICT = {
        "default": package_file("configs/datasets/demo_vqa_shifted.yaml"),
        "clean": package_file("configs/datasets/demo_vqa_clean.yaml"),
    }

    def _entries(self, info: DictConfig, split: str) -> int:
        captions = bool(info.captions) and split == "train"
        return super()._entries(info, split) * (int(info.each) + captions)

    def _is_first(self, entry: dict[str, Any], split: str, info: DictConfig) -> bool:
        _, question, answers = next(iter_questions(info.domain, split, int(info.seed), int(info.each)))
        return entry["question"] == question.text and entry.get("answer", answers) == answers

    def _make(self, folder: Path, counts: dict[str, int], info: DictConfig) -> None:
        generate_questions(folder, info.domain, counts, int(info.seed), int(info.each), bool(info.captions))


def _paths(storage: str | list[str]) -> list[Path]:
    return [Path(get_cache_path(path)) for path in ([storage] if isinstance(storage, str) else storage)]
