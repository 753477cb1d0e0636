"""What is fetched on first use is checked like all else; nothing is fetched to a path of the user's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lavis
import pytest
import torch
from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders import base_dataset_builder as lavis_builder
from omegaconf import DictConfig
from tiny import SPLITS, project_yaml, write_pictures
from tiny_vqa import write_vqa

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.paths import data_root
from lavis_aurora.data import fetch as fetching
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.fetch import annotation_files, use_data_root
from lavis_aurora.project import load_config

FILES = {split: f"{split}.json" for split in SPLITS}

VIDEO = [f"datasets.didemo_retrieval.vis_processor.{split}.name=aurora_video_{split}" for split in ("train", "eval")]


def config(tmp_path: Path, name: str, *options: str) -> DictConfig:
    """A dataset with all defaults of its builder but the options'."""
    yaml = project_yaml(tmp_path)
    text = yaml.read_text()
    head, tail = text[: text.index("datasets:")], text[text.index("run:") :]
    yaml.write_text(f"{head}datasets:\n  {name}: {{}}\n{tail}")
    return load_config(str(yaml), options).datasets_cfg[name]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data root, with the pictures of Flickr30K."""
    made = write_pictures(tmp_path / "made", 3)
    folder = tmp_path / "root"
    shutil.copytree(made["images"], folder / "flickr30k/images")
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(folder))
    return folder


@pytest.fixture
def host(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that LAVIS's downloads come from: the file named last in the url, without ``flickr30k_``."""
    folder = tmp_path / "made"

    def download(url: str, root: str, filename: str) -> None:
        target = Path(root) / filename
        if not target.exists():
            shutil.copyfile(folder / url.rpartition("/")[2].replace("flickr30k_", ""), target)

    monkeypatch.setattr(lavis_builder, "download_url", download)
    return folder


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """LAVIS's own paths as they are before anything is set, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", lavis.cache_root)
    monkeypatch.delenv("AURORA_DATA", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return registry.mapping["paths"]


def test_data_lie_under_aurora_data_or_the_current_directory(
    tmp_path: Path, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = torch.hub.get_dir()
    use_data_root()
    assert get_cache_path("coco/images") == str(tmp_path / "data/coco/images")
    assert torch.hub.get_dir() == hub
    (tmp_path / "another").mkdir()
    monkeypatch.chdir(tmp_path / "another")
    use_data_root()
    assert get_cache_path("coco/images") == str(tmp_path / "another/data/coco/images")
    monkeypatch.setenv("AURORA_DATA", str(tmp_path))
    use_data_root()
    assert data_root() == tmp_path
    assert get_cache_path("coco/images") == str(tmp_path / "coco/images")
    assert torch.hub.get_dir() == str(tmp_path / "weights")


def test_a_cache_root_that_the_program_has_set_stays(
    tmp_path: Path, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths["cache_root"] = "/its/own"
    use_data_root()
    assert paths["cache_root"] == "/its/own"
    monkeypatch.setenv("AURORA_DATA", str(tmp_path))
    use_data_root()
    assert paths["cache_root"] == str(tmp_path)


def edit(path: Path, how) -> None:
    entries = json.loads(path.read_text())
    how(entries)
    path.write_text(json.dumps(entries))


def test_what_is_missing_is_fetched_and_good_files_build(tmp_path: Path, root: Path, host: Path) -> None:
    datasets = build_checked("flickr30k", config(tmp_path, "flickr30k"))
    assert {split: len(dataset) for split, dataset in datasets.items()} == dict.fromkeys(SPLITS, 3)
    for file in FILES.values():
        assert (root / "flickr30k/annotations" / file).read_bytes() == (host / file).read_bytes()


@pytest.mark.parametrize(
    ("split", "how", "message"),
    [
        ("val", lambda entries: entries[0].update(caption="a cat"), "caption of entry 0 of .* must be a list"),
        ("test", lambda entries: entries.append(entries[0]), "entries 0 and 3 of .* have the same image"),
        ("train", lambda entries: entries[1].pop("image_id"), "entry 1 of .* has no 'image_id'"),
    ],
)
def test_fetched_files_are_checked_the_first_time_and_after(
    tmp_path: Path, root: Path, host: Path, split: str, how, message: str
) -> None:
    edit(host / FILES[split], how)
    cfg = config(tmp_path, "flickr30k")
    for _ in range(2):
        with pytest.raises(AuroraError, match=f"annotations.{split}.storage: .*{message}"):
            build_checked("flickr30k", cfg)


def test_fetched_paragraphs_and_questions_are_checked(tmp_path: Path, root: Path, host: Path) -> None:
    for split in SPLITS:
        entry = {"video": f"{split}.mp4", "caption": "a" if split == "train" else ["a", "b"]}
        (host / f"retrieval_{split}.json").write_text(json.dumps([entry]))
    with pytest.raises(AuroraError, match="didemo_retrieval.*val.storage: entry 0 of .* has 2 captions"):
        build_checked("didemo_retrieval", config(tmp_path, "didemo_retrieval", *VIDEO))

    write_vqa(tmp_path / "vqa", 3)
    official = {"questions": "v2_OpenEnded_mscoco_val2014_questions", "truth": "v2_mscoco_val2014_annotations"}
    names = {"train": "vqa_train", "val": "vqa_val_eval", "test": "vqa_test", "answers": "answer_list", **official}
    for ours, theirs in names.items():
        shutil.copyfile(tmp_path / f"vqa/{ours}.json", host / f"{theirs}.json")
    shutil.copyfile(tmp_path / "vqa/train.json", host / "vqa_val.json")
    edit(host / "vqa_val_eval.json", lambda entries: entries[1].update(question_id=entries[0]["question_id"]))
    with pytest.raises(AuroraError, match="entries 0 and 1 of .*vqa_val_eval.json have the same question_id"):
        build_checked("coco_vqa", config(tmp_path, "coco_vqa"))


def test_other_processes_wait_for_the_main_one_and_check_too(
    tmp_path: Path, root: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, "flickr30k")
    edit(host / "val.json", lambda entries: entries[0].update(caption="a cat"))

    def main_process_is_done() -> None:
        shutil.copytree(host, root / "flickr30k/annotations")

    monkeypatch.setattr(fetching, "is_main_process", lambda: False)
    monkeypatch.setattr(fetching, "is_dist_avail_and_initialized", lambda: True)
    monkeypatch.setattr(fetching.dist, "barrier", main_process_is_done)
    with pytest.raises(AuroraError, match="caption of entry 0 of .* must be a list"):
        build_checked("flickr30k", cfg)


def test_what_cannot_be_fetched_is_named(tmp_path: Path, root: Path, host: Path) -> None:
    (host / "val.json").unlink()
    with pytest.raises(AuroraError, match="val.storage: .*annotations/val.json is missing and could not be fetched"):
        build_checked("flickr30k", config(tmp_path, "flickr30k"))
    assert (root / "flickr30k/annotations/train.json").is_file(), "the ones before it"


# A path of the user's own


@pytest.mark.parametrize("place", ["absolute/mine.json", "mine.json"])
def test_a_benchmark_is_not_fetched_to_a_path_of_the_user(tmp_path: Path, root: Path, host: Path, place: str) -> None:
    path = str(tmp_path / place) if place.startswith("absolute") else place
    cfg = config(tmp_path, "flickr30k", f"datasets.flickr30k.build_info.annotations.train.storage={path}")
    with pytest.raises(AuroraError) as caught:
        build_checked("flickr30k", cfg)
    message = str(caught.value)
    full = tmp_path / place if place.startswith("absolute") else root / place
    assert message.startswith(f"datasets.flickr30k.build_info.annotations.train.storage: {full} is missing; ")
    assert "correct the path" in message and str(root / "flickr30k/annotations/train.json") in message
    assert not full.exists() and not full.parent.joinpath("val.json").exists()
    assert not (root / "flickr30k/annotations").exists(), "nothing at all is fetched"


def test_a_file_at_the_users_path_is_taken_and_the_rest_is_fetched(tmp_path: Path, root: Path, host: Path) -> None:
    mine = tmp_path / "mine.json"
    shutil.copyfile(host / "train.json", mine)
    edit(mine, lambda entries: entries.pop())
    cfg = config(tmp_path, "flickr30k", f"datasets.flickr30k.build_info.annotations.train.storage={mine}")
    datasets = build_checked("flickr30k", cfg)
    assert (len(datasets["train"]), len(datasets["test"])) == (2, 3)


def test_each_of_several_files_counts(tmp_path: Path, root: Path, host: Path) -> None:
    part = "datasets.coco_vqa.build_info.annotations.train.storage"
    cfg = config(tmp_path, "coco_vqa", f"{part}=[coco/annotations/vqa_train.json,vqa_vall.json]")
    with pytest.raises(
        AuroraError, match=f"{part}: {root}/vqa_vall.json is missing; .*coco/annotations/vqa_val.json"
    ):
        build_checked("coco_vqa", cfg)


def test_another_data_root_is_no_path_of_the_users(
    tmp_path: Path, root: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AURORA_DATA moves all default paths; written out in full, they are still LAVIS's."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(root / "flickr30k", tmp_path / "elsewhere/flickr30k")
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path / "elsewhere"))
    full = tmp_path / "elsewhere/flickr30k/../flickr30k/annotations/train.json"
    cfg = config(tmp_path, "flickr30k", f"datasets.flickr30k.build_info.annotations.train.storage={full}")
    assert len(build_checked("flickr30k", cfg)["train"]) == 3
    assert (tmp_path / "elsewhere/flickr30k/annotations/val.json").is_file()


def test_a_file_with_its_own_url_is_fetched_to_any_path(tmp_path: Path, root: Path, host: Path) -> None:
    part = "datasets.flickr30k.build_info.annotations.train"
    options = [f"{part}.url=http://example.org/train.json", f"{part}.storage={tmp_path / 'new/mine.json'}"]
    assert len(build_checked("flickr30k", config(tmp_path, "flickr30k", *options))["train"]) == 3


def test_a_split_without_url_stands_beside_those_that_are_fetched(tmp_path: Path, root: Path, host: Path) -> None:
    """LAVIS asks each for its url."""
    cfg = config(tmp_path, "flickr30k")
    mine = tmp_path / "mine.json"
    shutil.copyfile(host / "val.json", mine)
    cfg.build_info.annotations.val = {"storage": str(mine)}
    assert {*build_checked("flickr30k", cfg)} == {*SPLITS}
    mine.unlink()
    with pytest.raises(AuroraError, match=r"annotations.val.storage: .*mine.json is missing; put it there"):
        build_checked("flickr30k", cfg)


def test_url_null_is_named(tmp_path: Path, root: Path) -> None:
    part = "datasets.flickr30k.build_info.annotations.train"
    with pytest.raises(AuroraError, match=f"{part}.url: null; leave it out"):
        annotation_files("flickr30k", config(tmp_path, "flickr30k", f"{part}.url=null"))
