"""Checks of a dataset, registered from outside: for a builder, a kind of data, a class of datasets."""

from __future__ import annotations

from pathlib import Path

import pytest
from lavis.common.registry import registry
from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset
from omegaconf import DictConfig
from tiny import project_yaml, refused

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.checks import CHECKS, DatasetChecks, Rule, checks_of, register_dataset_checks
from lavis_aurora.project import load_config

NAME = "coco_retrieval"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    before = {target: list(checks) for target, checks in CHECKS.items()}
    monkeypatch.setattr("lavis_aurora.data.checks.CHECKS", before)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_yaml(tmp_path)


@pytest.mark.parametrize("target", [NAME, "images", RetrievalDataset])
def test_a_check_of_the_yaml_is_asked_when_a_project_is_read(project: Path, target: str | type) -> None:
    @register_dataset_checks(target)
    class NoFolderOfThatName(DatasetChecks):
        def check_config(self, cfg: DictConfig, key: str) -> None:
            if cfg.vis_processor.train.name != "blip_image_train":
                raise AuroraError(f"{key}.vis_processor.train.name: mine wants blip_image_train")

    where = f"datasets.{NAME}.vis_processor.train.name"
    refused(project, f"{where}: mine wants blip_image_train", options=[f"{where}=blip_image_eval"])
    load_config(str(project), [f"{where}=blip_image_train"])


@pytest.mark.parametrize("target", [NAME, "images", RetrievalDataset])
def test_entries_and_files_are_checked_when_it_is_built(project: Path, target: str | type) -> None:
    seen = []

    @register_dataset_checks(target)
    class Mine(DatasetChecks):
        entries = {"caption": Rule(lambda value: value != "mine", "another caption")}

        def check_entries(self, entries: list[dict], split: str, path: str, key: str) -> None:
            seen.append((split, Path(path).name, len(entries)))

        def check_files(self, entries: list[dict], files: list[str], key: str) -> None:
            if len(files) != 1:
                raise AuroraError(f"{key}: {len(files)} files")

    cfg = load_config(str(project)).datasets_cfg[NAME]
    sizes = {split: len(dataset.annotation) for split, dataset in build_checked(NAME, cfg).items()}
    wanted = [(split, f"{split}.json", sizes[split]) for split in ("train", "val", "test")]
    assert seen == (wanted[:1] if target is RetrievalDataset else wanted)
    path = Path(cfg.build_info.annotations.train.storage)
    path.write_text(path.read_text().replace('"caption": "', '"caption": "mine", "was": "', 1))
    with pytest.raises(AuroraError, match=f"the caption of entry 0 of {path} must be another caption, not 'mine'"):
        build_checked(NAME, cfg)


def test_checks_of_the_nearest_class_come_first_and_those_of_the_builder_last() -> None:
    class Child(RetrievalDataset):
        pass

    [inherited] = checks_of("none", "none", Child)
    assert [inherited] == CHECKS[RetrievalDataset]

    @register_dataset_checks(Child, "mine")
    class Mine(type(inherited)):
        pass

    first, last = checks_of("mine", "images", Child)
    assert type(first) is type(last) is Mine and first.entries == inherited.entries
    assert registry.get_builder_class("mine") is None


def test_processors_that_read_by_decord_are_named(caplog: pytest.LogCaptureFixture) -> None:
    path = Path(__file__).resolve().parents[2] / "projects" / "aurora" / "msrvtt_ret.yaml"
    where = "datasets.msrvtt_retrieval.vis_processor"
    load_config(str(path), [])
    assert "decord" not in caplog.text
    load_config(str(path), [f"{where}.eval.name=alpro_video_eval"])
    assert f"{where}.eval: alpro_video_eval reads by decord, which gives wrong frames of some files" in caplog.text
