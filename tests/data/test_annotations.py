"""What users bring: every mistake in annotations and pictures is named, and good data pass unchanged."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from lavis.datasets.datasets import retrieval_datasets as retrieval
from lavis.datasets.datasets.caption_datasets import CaptionDataset
from lavis.datasets.datasets.gqa_datasets import GQADataset, GQAEvalDataset
from omegaconf import DictConfig, OmegaConf
from tiny import SPLITS, project_yaml
from torch.utils.data import DataLoader, Dataset

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import build_checked, check_entries, check_split
from lavis_aurora.data.checks import CHECKS, checks_of
from lavis_aurora.data.fetch import annotation_files
from lavis_aurora.data.samples import CheckedDataset
from lavis_aurora.project import load_config

NAME = "coco_retrieval"
COUNT = 3


def _key(split: str) -> str:
    return f"datasets.{NAME}.build_info.annotations.{split}.storage"


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    """The dataset's part of a configuration over pictures in ``tmp_path/data``, two captions each."""
    return load_config(str(project_yaml(tmp_path, count=COUNT, captions_each=2))).datasets_cfg[NAME]


@pytest.fixture
def data(tmp_path: Path, cfg: DictConfig) -> Path:
    return tmp_path / "data"


def _refused(cfg: DictConfig, *parts: object) -> str:
    """The error of building, which names all of ``parts``."""
    with pytest.raises(AuroraError) as caught:
        build_checked(NAME, cfg)
    message = str(caught.value)
    for part in parts:
        assert str(part) in message
    return message


def _edit(path: Path, index: int, **changes: object) -> None:
    """Change keys of an entry; None removes one."""
    entries = json.loads(path.read_text())
    entries[index].update(changes)
    entries[index] = {key: value for key, value in entries[index].items() if value is not None}
    path.write_text(json.dumps(entries))


# Good data


def test_good_data_are_lavis_datasets_with_every_sample_readable(cfg: DictConfig, data: Path) -> None:
    datasets = build_checked(NAME, cfg)
    own = registry.get_builder_class(NAME)(cfg).build_datasets()
    assert set(datasets) == set(own) == {"train", "val", "test"}
    for split, dataset in datasets.items():
        assert len(dataset) == len(own[split]) == (2 * COUNT if split == "train" else COUNT)
        for i in range(len(dataset)):
            sample, plain = dataset[i], own[split][i]
            assert sample.keys() == plain.keys()
            assert torch.equal(sample.pop("image"), plain.pop("image"))
            assert sample == plain
    assert datasets["train"][0]["image"].shape == (3, 48, 48)
    first = json.loads((data / "train.json").read_text())[0]
    assert datasets["train"][0]["text_input"] == first["caption"]


def test_attributes_of_lavis_dataset_shine_through(cfg: DictConfig) -> None:
    dataset = build_checked(NAME, cfg)["val"]
    for name in ("text", "image", "txt2img", "img2txt", "annotation", "vis_root"):
        assert getattr(dataset, name) == getattr(dataset.inner, name)
    assert len(dataset.text) == 2 * COUNT and dataset.img2txt[1] == [2, 3]
    with pytest.raises(AttributeError, match="no_such_attribute"):
        dataset.no_such_attribute  # noqa: B018


def test_iteration_ends_after_the_last_sample(cfg: DictConfig) -> None:
    assert [sample["index"] for sample in build_checked(NAME, cfg)["test"]] == list(range(COUNT))


def test_pickling_keeps_samples_and_attributes(cfg: DictConfig) -> None:
    dataset = build_checked(NAME, cfg)["val"]
    copy = pickle.loads(pickle.dumps(dataset))
    assert isinstance(copy, CheckedDataset)
    assert (copy.name, len(copy), copy.text) == (dataset.name, len(dataset), dataset.text)
    assert torch.equal(copy[1]["image"], dataset[1]["image"])


def test_relative_paths_start_at_the_data_root(cfg: DictConfig, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(data))
    for split, info in cfg.build_info.annotations.items():
        info.storage = f"{split}.json"
    cfg.build_info.images.storage = "images"
    assert [file.path for file in annotation_files(NAME, cfg)] == [str(data / f"{s}.json") for s in SPLITS]
    assert torch.isfinite(build_checked(NAME, cfg)["val"][0]["image"]).all()


def test_a_split_may_have_several_files_and_each_is_checked(cfg: DictConfig, data: Path) -> None:
    files = [str(data / "val.json"), str(data / "test.json")]
    cfg.build_info.annotations.val = {"url": files, "storage": files}
    assert [file.path for file in annotation_files(NAME, cfg) if file.split == "val"] == files
    assert len(build_checked(NAME, cfg)["val"]) == 2 * COUNT
    _edit(data / "test.json", 1, caption="a string")
    _refused(cfg, _key("val"), "entry 1 of", data / "test.json")


def test_number_of_urls_and_files_must_agree(cfg: DictConfig, data: Path) -> None:
    cfg.build_info.annotations.val.storage = [str(data / "val.json"), str(data / "test.json")]
    _refused(cfg, "datasets.coco_retrieval.build_info.annotations.val")


# Annotation files


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_missing_file(cfg: DictConfig, data: Path, split: str) -> None:
    (data / f"{split}.json").unlink()
    _refused(cfg, _key(split), data / f"{split}.json", "is missing and could not be fetched", "AURORA_DATA")


def test_missing_file_whose_url_cannot_be_reached(cfg: DictConfig, tmp_path: Path) -> None:
    missing = tmp_path / "absent" / "train.json"
    cfg.build_info.annotations.train = {"url": "http://127.0.0.1:9/train.json", "storage": str(missing)}
    _refused(cfg, _key("train"), missing, "is missing and could not be fetched", "AURORA_DATA")


def test_a_folder_in_place_of_the_file(cfg: DictConfig, data: Path) -> None:
    (data / "val.json").unlink()
    (data / "val.json").mkdir()
    _refused(cfg, _key("val"), data / "val.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"not json", "is not readable json"),
        (b"[{", "is not readable json"),
        (b"", "is not readable json"),
        (b"\xff\xfe\x00", "is not readable json"),
        (b'{"image": "a.jpg", "caption": "a"}', "must hold a list of entries"),
        (b"3", "must hold a list of entries"),
        (b'["a.jpg"]', "must hold a list of entries"),
        (b"[]", "is empty; a split needs at least one sample"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_that_is_no_list_of_entries(
    cfg: DictConfig, data: Path, split: str, content: bytes, problem: str
) -> None:
    (data / f"{split}.json").write_bytes(content)
    _refused(cfg, _key(split), data / f"{split}.json", problem)


# Entries


@pytest.mark.parametrize(
    ("split", "key", "wrong"),
    [
        ("train", "image", "imgae"),
        ("train", "caption", "captions"),
        ("train", "image_id", "imageid"),
        ("val", "image", "images"),
        ("val", "caption", "captoin"),
    ],
)
def test_missing_key_comes_with_those_that_are_there(
    cfg: DictConfig, data: Path, split: str, key: str, wrong: str
) -> None:
    path = data / f"{split}.json"
    _edit(path, 2, **{wrong: json.loads(path.read_text())[2][key], key: None})
    _refused(cfg, _key(split), f"entry 2 of {path} has no {key!r}; it has ", repr(wrong))


@pytest.mark.parametrize("image_id", [float("nan"), 1.5, [1]])
def test_an_id_that_is_none_would_make_all_pictures_one(cfg: DictConfig, data: Path, image_id: object) -> None:
    _edit(data / "train.json", 1, image_id=image_id)
    _refused(cfg, _key("train"), f"the image_id of entry 1 of {data / 'train.json'} must be a whole number or a")


def test_an_id_that_is_null(cfg: DictConfig, data: Path) -> None:
    path = data / "train.json"
    entries = [{**entry, "image_id": None} for entry in json.loads(path.read_text())]
    path.write_text(json.dumps(entries))
    _refused(cfg, _key("train"), f"the image_id of entry 0 of {path} must be", "not None")


def test_a_picture_is_ranked_once_however_it_is_named(cfg: DictConfig, data: Path) -> None:
    _edit(data / "val.json", 2, image="./val//000.jpg")
    _refused(cfg, _key("val"), f"entries 0 and 2 of {data / 'val.json'} have the same image, './val//000.jpg'")


def test_evaluation_needs_no_image_id(cfg: DictConfig, data: Path) -> None:
    assert "image_id" not in json.loads((data / "val.json").read_text())[0]
    assert len(build_checked(NAME, cfg)["val"]) == COUNT


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("caption", ["a cat", [], ["a cat", 3], {"0": "a cat"}, 3, ["a cat", "..."], ["\u200b"]])
def test_evaluation_takes_a_list_of_strings(cfg: DictConfig, data: Path, split: str, caption: object) -> None:
    path = data / f"{split}.json"
    _edit(path, 1, caption=caption)
    message = _refused(cfg, _key(split), f"the caption of entry 1 of {path} must be a list of strings")
    assert f"not {caption!r}" in message
    assert "data.convert" not in message  # these names are none of the benchmark's


@pytest.mark.parametrize("caption", [["a cat"], [], 3, "", " \n", "...", '"*"', "\u200b", "\u0301", "\ufeff. "])
def test_training_takes_one_string(cfg: DictConfig, data: Path, caption: object) -> None:
    _edit(data / "train.json", 4, caption=caption)
    expected = f"the caption of entry 4 of {data / 'train.json'} must be one string with words, not {caption!r}"
    _refused(cfg, _key("train"), expected)


@pytest.mark.parametrize(
    ("dataset_cls", "entry", "problem"),
    [
        (retrieval.VideoRetrievalDataset, {"image": "a.mp4", "caption": "a"}, "has no 'video'"),
        (retrieval.VideoRetrievalDataset, {"video": "a.mp4", "caption": ["a"]}, "must be one string"),
        (retrieval.VideoRetrievalEvalDataset, {"video": "a.mp4", "caption": "a"}, "must be a list of strings"),
    ],
)
def test_video_entries_are_checked_too(dataset_cls: type, entry: dict, problem: str) -> None:
    good = {"video": "a.mp4", "caption": ["a"] if "Eval" in dataset_cls.__name__ else "a"}
    [checks] = checks_of("", None, dataset_cls)
    check_entries([good], checks.entries, "a.json", "key")
    with pytest.raises(AuroraError, match=f"key: .*entry 1 of a.json.* {problem}"):
        check_entries([good, entry], checks.entries, "a.json", "key")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("caption", 7, '; put numbers in quotes, "7"'),
        ("caption", float("nan"), ""),
        ("caption", float("-inf"), ""),
        ("image_id", float("nan"), ""),
        ("image_id", 1.5, ""),
        ("image", 3, ""),
    ],
)
def test_quotes_are_a_remedy_for_numbers_in_texts_alone(key: str, value: float, said: str) -> None:
    [checks] = checks_of("", None, retrieval.RetrievalDataset)
    with pytest.raises(AuroraError, match=f"the {key} of entry 0") as caught:
        check_entries([{**checks.example, key: value}], checks.entries, "a.json", "key")
    assert str(caught.value).endswith(f"not {value!r}{said}")


def test_the_example_that_errors_show_is_a_good_entry() -> None:
    shown = [checks for registered in CHECKS.values() for checks in registered if checks.example]
    assert len(shown) == 6
    for checks in shown:
        check_entries([checks.example], checks.entries, "a.json", "key")


def test_behind_questions_to_evaluate_stands_a_list_of_answers(tmp_path: Path) -> None:
    """As LAVIS's gqa and aok_vqa have it."""
    [asked], [trained] = (list(checks_of("", None, cls)) for cls in (GQAEvalDataset, GQADataset))
    (tmp_path / "asked.json").write_text(json.dumps([asked.example]))
    (tmp_path / "answers.json").write_text('["yes", "no"]')
    files = [str(tmp_path / name) for name in ("asked.json", "answers.json")]
    check_split(files, [asked], "test", "key")
    with pytest.raises(AuroraError, match="answers.json must hold a list of entries"):
        check_split(files, [trained], "train", "key")


def test_a_split_that_is_null_is_left_out(cfg: DictConfig, data: Path) -> None:
    (data / "val.json").unlink()
    cfg.build_info.annotations.val = None
    assert set(build_checked(NAME, cfg)) == {"train", "test"}
    assert "val" in cfg.build_info.annotations, "the configuration of the run stays"


def test_entries_of_datasets_that_are_not_for_retrieval_pass() -> None:
    assert not list(checks_of("", None, CaptionDataset))


# Pictures


def test_missing_picture_folder(cfg: DictConfig, data: Path) -> None:
    (data / "images").rename(data / "elsewhere")
    with pytest.warns(UserWarning, match="does not exist"):
        _refused(cfg, f"datasets.{NAME}.build_info.images.storage", "no such folder", data / "images", "AURORA_DATA")


def _break(path: Path, how: str) -> None:
    if how == "text":
        path.write_text("this is not a picture")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:400])
    elif how == "zero-byte":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["text", "truncated", "zero-byte", "missing", "folder"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_unreadable_picture_is_named_by_its_path(cfg: DictConfig, data: Path, split: str, how: str) -> None:
    dataset = build_checked(NAME, cfg)[split]
    path = data / "images" / split / "001.jpg"
    index = 2 if split == "train" else 1
    _break(path, how)
    with pytest.raises(AuroraError, match=f"^{NAME} {split}: cannot read {re.escape(str(path))} \\("):
        dataset[index]
    assert torch.isfinite(dataset[index + 2 if split == "train" else index + 1]["image"]).all()


class _Videos(Dataset):
    """A dataset whose entries name videos, or nothing at all."""

    vis_root = "videos"
    annotation = [{"video": "one.mp4"}, {}]

    def __getitem__(self, index: int) -> dict:
        raise RuntimeError("cannot decode")


@pytest.mark.parametrize(("index", "file"), [(0, "videos/one.mp4"), (1, r"videos/\?")])
def test_unreadable_video_is_named_too(index: int, file: str) -> None:
    with pytest.raises(AuroraError, match=rf"^msrvtt test: cannot read {file} \(RuntimeError: cannot decode\)$"):
        CheckedDataset(_Videos(), "msrvtt test")[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader_reports_the_file_from_its_own_and_from_a_worker_process(
    cfg: DictConfig, data: Path, workers: int
) -> None:
    dataset = build_checked(NAME, cfg)["val"]
    path = data / "images" / "val" / "002.jpg"
    _break(path, "truncated")
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=dataset.collater)
    batches = iter(loader)
    assert next(batches)["image"].shape == (2, 3, 48, 48)
    with pytest.raises(AuroraError, match=re.escape(str(path))):
        next(batches)


# The dataset's part of the YAML


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"build_info": {"images": None}}, "build_info.images"),
        ({"build_info": {"annotations": None}}, "build_info.annotations"),
        ({"build_info": {"annotations": {"train": {"storage": None}}}}, "build_info.annotations.train.storage"),
        ({"data_type": "image"}, "data_type"),
    ],
)
def test_sections_that_cannot_be_used_are_named(cfg: DictConfig, change: dict, key: str) -> None:
    _refused(OmegaConf.merge(cfg, change), f"datasets.{NAME}.{key}")
