"""What is checked of a dataset beyond the names of its keys: registered for builders, for kinds of data, for classes.

@register_dataset_checks("my_builder")
class MyChecks(DatasetChecks):
    entries = {"image": FILE, "caption": CAPTION}
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lavis.common.registry import registry
from lavis.datasets.datasets import retrieval_datasets as retrieval
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset, COCOVQAEvalDataset
from lavis.datasets.datasets.gqa_datasets import GQADataset, GQAEvalDataset
from lavis.datasets.datasets.vg_vqa_datasets import VGVQADataset
from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset
from lavis.datasets.datasets.vqa_datasets import VQAEvalDataset
from omegaconf import DictConfig

from lavis_aurora.common.errors import AuroraError, shown
from lavis_aurora.common.summary import MAIN, lavis_version
from lavis_aurora.data.layouts import has_words, is_visible
from lavis_aurora.data.raw import BENCHMARKS, check_answers, check_vqa_files

LOG = logging.getLogger(__name__)


class Rule(NamedTuple):
    """What a value must be, and how to say so."""

    holds: Callable[[Any], bool]
    need: str


def _text(value: Any) -> bool:
    return isinstance(value, str) and any(map(is_visible, value))


def _each(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(rule, value))


TEXT = Rule(_text, "one string, not empty")
TEXTS = Rule(_each(_text), 'a list of strings, none empty, e.g. ["a cat"]')
CAPTION = Rule(has_words, "one string with words")
CAPTIONS = Rule(_each(has_words), 'a list of strings, each with words, e.g. ["a cat"]')
QUESTION = Rule(has_words, "a string with words")
# A list, null or NaN in its place would be no key, or the same one for all samples.
NUMBER_OR_TEXT = Rule(
    lambda value: isinstance(value, str) or type(value) is int and abs(value) < 2**63, "a whole number or a string"
)
FILE = Rule(_text, "the path of one file, a string")


class DatasetChecks:
    """What is checked of some datasets; a subclass says it, :func:`register_dataset_checks` says of which.

    Attributes:
        entries: what each entry of an annotation file must hold, by key.
        example: an entry, for the message about a file that is missing.
        unique: the key of which no two entries of a file may hold the same value; empty for none.
        answers_follow: only the first file of a split holds entries; the second is a list of answers.
    """

    entries: Mapping[str, Rule] = {}
    example: Mapping[str, Any] = {}
    unique: str = ""
    answers_follow: bool = False

    def check_config(self, cfg: DictConfig, key: str) -> None:
        """Refuse a dataset's part of a project YAML, processors included, before anything is built.

        Args:
            cfg: the part.
            key: its name in the YAML, ``datasets.NAME``.

        Raises:
            AuroraError: names the key and the remedy.
        """

    def check_entries(self, entries: list[dict[str, Any]], split: str, path: str, key: str) -> None:
        """Refuse entries of an annotation file that have all keys they need.

        Args:
            entries: of the file.
            split: train, val or test.
            path: of the file.
            key: the YAML key that names it.

        Raises:
            AuroraError: names key, entry and file.
        """

    def check_files(self, entries: list[dict[str, Any]], files: Sequence[str], key: str) -> None:
        """Refuse the files of a split that do not fit each other.

        Args and errors as of :meth:`check_entries`; the entries are those of the first file.
        """


CHECKS: dict[str | type, list[DatasetChecks]] = {}
Checks = TypeVar("Checks", bound="type[DatasetChecks]")


def register_dataset_checks(*targets: str | type) -> Callable[[Checks], Checks]:
    """Let a class of checks be asked about datasets, besides those that are registered already.

    Args:
        targets: names of builders; kinds of data (``images``, ``videos``); or classes of datasets, whose subclasses
            are checked likewise unless checks are registered for them.
    """

    def register(cls: Checks) -> Checks:
        for target in targets:
            CHECKS.setdefault(target, []).append(cls())
        return cls

    return register


def checks_of(name: str, kind: str | None, *classes: type | None) -> Iterator[DatasetChecks]:
    """The checks of a dataset by the name of its builder, by its kind, and by classes of its splits.

    Args:
        name: of the builder.
        kind: ``data_type`` of its part of the YAML.
        classes: of datasets.
    """
    nearest = (next((one for one in (cls.__mro__ if cls else ()) if one in CHECKS), None) for cls in classes)
    for target in dict.fromkeys((*nearest, kind, name)):
        yield from CHECKS.get(target, ()) if target is not None else ()


def check_dataset_config(name: str, cfg: DictConfig) -> None:
    """Ask all checks of a dataset about its part of a project YAML; see :meth:`DatasetChecks.check_config`."""
    builder = registry.get_builder_class(name)
    classes = (getattr(builder, f"{part}_dataset_cls", None) for part in ("train", "eval"))
    for checks in checks_of(name, cfg.get("data_type"), *classes):
        checks.check_config(cfg, f"datasets.{name}")


# What LAVIS's datasets read from each entry, and would misread.


@register_dataset_checks(retrieval.RetrievalDataset)
class Captions(DatasetChecks):
    """Pictures to train on, a caption each."""

    entries = {"image": FILE, "caption": CAPTION, "image_id": NUMBER_OR_TEXT}
    example = {"image": "beach/1.jpg", "caption": "two dogs on a beach", "image_id": 1}


@register_dataset_checks(retrieval.RetrievalEvalDataset)
class RankedImages(DatasetChecks):
    """Pictures to rank, each with all its captions."""

    entries = {"image": FILE, "caption": CAPTIONS}
    example = {"image": "beach/2.jpg", "caption": ["a dog in the sand", "a dog sleeps"]}
    unique = "image"


@register_dataset_checks(retrieval.VideoRetrievalDataset)
class VideoCaptions(DatasetChecks):
    """Videos to train on, a caption each."""

    entries = {"video": FILE, "caption": CAPTION}
    example = {"video": "beach/1.mp4", "caption": "two dogs run along a beach"}


@register_dataset_checks(retrieval.VideoRetrievalEvalDataset)
class RankedVideos(DatasetChecks):
    """Videos to rank, each with all its captions."""

    entries = {"video": FILE, "caption": CAPTIONS}
    example = {"video": "beach/2.mp4", "caption": ["a dog digs", "a dog in the sand"]}
    unique = "video"


@register_dataset_checks("didemo_retrieval")
class Paragraphs(DatasetChecks):
    """Retrieval of videos by one paragraph each, of all their descriptions (paper, appendix C)."""

    def check_entries(self, entries: list[dict[str, Any]], split: str, path: str, key: str) -> None:
        first: dict[str, int] = {}
        for i, entry in enumerate(entries):
            if split != "train" and len(entry["caption"]) > 1:
                raise AuroraError(
                    f"{key}: entry {i} of {path} has {len(entry['caption'])} captions; for paragraph-to-video "
                    f"retrieval they are one"
                )
            before = first.setdefault(BENCHMARKS["didemo"].key(entry["video"], Path(path)), i)
            if entries[before]["video"] != entry["video"]:
                raise AuroraError(
                    f"{key}: entries {before} and {i} of {path} are one video under two names, "
                    f"{shown(entries[before]['video'])} and {shown(entry['video'])}; for paragraph-to-video "
                    f"retrieval their texts are one"
                )


@register_dataset_checks(COCOVQADataset)
class Questions(DatasetChecks):
    """Questions to train on, with all answers that people gave."""

    entries = {"image": FILE, "question": QUESTION, "answer": TEXTS}


class AnsweredQuestions(DatasetChecks):
    """Questions to train on, with one answer each."""

    entries = {"image": FILE, "question": QUESTION, "answer": TEXT}


@register_dataset_checks(VGVQADataset)
class GenomeQuestions(AnsweredQuestions):
    """Visual Genome's."""

    def check_config(self, cfg: DictConfig, key: str) -> None:
        if lavis_version() == MAIN:
            LOG.warning("%s: its answers weigh 1 in the loss in LAVIS's main branch, 0.2 in LAVIS 1.0.2", key)


@register_dataset_checks(GQADataset)
class OwnQuestions(AnsweredQuestions):
    """GQA's, which one's own questions have the form of."""

    example = {"image": "beach/1.jpg", "question": "how many dogs are there?", "answer": "two"}


@register_dataset_checks(VideoQADataset)
class VideoQuestions(DatasetChecks):
    """Questions about videos, with one answer each."""

    entries = {"video": FILE, "question": QUESTION, "answer": TEXT, "question_id": NUMBER_OR_TEXT}


@register_dataset_checks(VQAEvalDataset)
class Asked(DatasetChecks):
    """Questions to answer, and the answers to rank for them."""

    answers_follow = True

    def check_files(self, entries: list[dict[str, Any]], files: Sequence[str], key: str) -> None:
        for path in files[1:2]:
            check_answers(path, key)


@register_dataset_checks(COCOVQAEvalDataset)
class OfficialQuestions(Asked):
    """VQAv2's, with its official files."""

    entries = {"image": FILE, "question": QUESTION, "question_id": NUMBER_OR_TEXT}
    unique = "question_id"

    def check_files(self, entries: list[dict[str, Any]], files: Sequence[str], key: str) -> None:
        super().check_files(entries, files, key)
        check_vqa_files(entries, files, key)


@register_dataset_checks(GQAEvalDataset)
class OwnQuestionsAsked(Asked):
    """GQA's, which one's own questions have the form of."""

    entries = {"image": FILE, "question": QUESTION, "answer": TEXT, "question_id": NUMBER_OR_TEXT}
    example = {"image": "beach/2.jpg", "question": "what lies here?", "answer": "a dog", "question_id": 1}
    unique = "question_id"


@register_dataset_checks("videos")
class Videos(DatasetChecks):
    """Videos get the model's processors where they name none, which are for pictures."""

    def check_config(self, cfg: DictConfig, key: str) -> None:
        for split in ("train", "eval"):
            processor = (cfg.get("vis_processor") or {}).get(split) or {}
            where, name = f"{key}.vis_processor.{split}", processor.get("name", "_image_")
            if "_image_" in name:
                raise AuroraError(
                    f"{where}: {processor.get('name')} cannot read videos; they need aurora_video_{split} with "
                    f"n_frms, see projects/aurora/msrvtt_ret.yaml"
                )
            if name.startswith("alpro_video_"):
                wrong = "reads by decord, which gives wrong frames of some files (docs/data.md)"
                LOG.warning("%s: %s %s; aurora_video_%s does not", where, name, wrong, split)
