"""The demo's datasets: made on first use in the numbers asked for, and never changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data import demo_builder
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.project import load_config

COUNTS = {"train": 5, "val": 4, "test": 3}
MODELS = {
    "demo_retrieval": "blip_retrieval_aurora",
    "demo_video": "blip_retrieval_aurora",
    "demo_vqa": "blip_vqa_aurora",
}
FRAMES = {"name": "aurora_video_eval", "n_frms": 4, "image_size": 48}


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture
def build(tmp_path: Path, monkeypatch, name: str):
    """Build the dataset under ``tmp_path``, with so few pictures."""
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path))

    def build_so(kind: str = "default", **info) -> dict:
        annotations = {split: {"count": count} for split, count in COUNTS.items()}
        info = {"annotations": {}, **info}
        info["annotations"] = {**annotations, **info["annotations"]}
        project = {
            "model": {"arch": MODELS[name], "model_type": "tiny", "pretrained": None},
            "datasets": {name: {"type": kind, "build_info": info}},
            "run": {"task": "vqa_aurora" if "vqa" in name else "retrieval_aurora"},
        }
        if name == "demo_video":
            project["datasets"][name]["vis_processor"] = {"train": FRAMES, "eval": FRAMES}
        path = tmp_path / "project.yaml"
        OmegaConf.save(project, path)
        return build_checked(name, config(path).datasets_cfg[name])

    def config(path: Path) -> DictConfig:
        return load_config(str(path))

    return build_so


def _made(monkeypatch) -> list[dict]:
    """The numbers of pictures of each time that something is made."""
    made = []
    for function in ("generate_pictures", "generate_clips", "generate_questions"):
        real = getattr(demo_builder, function)
        monkeypatch.setattr(
            demo_builder, function, lambda *args, real=real: (made.append(dict(args[2])), real(*args))[1]
        )
    return made


@pytest.mark.parametrize("kind", ["default", "clean"])
def test_made_on_first_use_and_kept(build, name: str, kind: str, tmp_path: Path, monkeypatch) -> None:
    made = _made(monkeypatch)
    datasets = build(kind)
    each = {"demo_vqa": 3 if kind == "clean" else 4}.get(name, 1)
    expected = {split: count * each for split, count in COUNTS.items()}
    if (name, kind) == ("demo_vqa", "clean"):
        expected["train"] += COUNTS["train"]  # captions
    assert {split: len(dataset) for split, dataset in datasets.items()} == expected
    sample = datasets["train"][0]
    key, shape = ("video", (3, 4, 48, 48)) if name == "demo_video" else ("image", (3, 48, 48))
    assert sample[key].shape == datasets["val"][0][key].shape == shape and sample["text_input"]
    domain = "clean" if kind == "clean" else "shifted"
    assert datasets["val"].annotation[0][key].startswith(f"{domain}/val/")
    build(kind)
    assert made == [COUNTS]


def test_questions_come_with_weights_and_true_answers(build, name: str) -> None:
    if name != "demo_vqa":
        pytest.skip("of questions")
    datasets = build()
    for sample in datasets["train"]:
        assert sum(sample["weights"]) == pytest.approx(1) and max(sample["weights"]) > 0.79
    assert datasets["test"].answer_list and datasets["test"].coco_fmt_anno_file.endswith("test_annotations.json")


def _contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and number on disk of every file: a file that was written anew has another number."""
    return {
        str(p): (p.read_bytes(), p.stat().st_ino)
        for p in folder.rglob("*")
        if p.is_file() and "project" not in p.name
    }


def test_other_numbers_and_seeds_have_folders_of_their_own(build, name: str, tmp_path: Path, monkeypatch) -> None:
    """What a run reads stays as it is, whatever another run asks for."""
    first = build()
    before = _contents(tmp_path)
    made = _made(monkeypatch)
    changes = [{"seed": 1}, {"annotations": {split: {"count": 6} for split in COUNTS}}]
    changes += [{"each": 2}, {"captions": True}] if name == "demo_vqa" else []
    for number, change in enumerate(changes, start=1):
        build(**change)
        build(**change)
        assert len(made) == number
    after = _contents(tmp_path)
    assert before == {path: after[path] for path in before} and len(after) > 2 * len(before)
    assert first["train"][0]["text_input"]


def test_completed_where_a_file_is_gone(build, name: str, tmp_path: Path, monkeypatch) -> None:
    build()
    made = _made(monkeypatch)
    pattern = "*_val_annotations.json" if name == "demo_vqa" else "*_val.json"
    [path] = tmp_path.rglob(pattern)
    path.unlink()
    before = _contents(tmp_path)
    build()
    assert made == [{"val": COUNTS["val"]}] and path.is_file()
    after = _contents(tmp_path)
    changed = [Path(name).relative_to(tmp_path).as_posix() for name in before if before[name] != after[name]]
    assert not [name for name in changed if "train" in name or "test" in name]


def test_other_data_in_a_folder_that_the_yaml_names_stay(build, tmp_path: Path) -> None:
    folder = str(tmp_path / "mine")
    build(folder=folder)
    # of data that are not complete, the rest stays too
    next((tmp_path / "mine").glob("shifted*_test.json")).unlink()
    before = _contents(tmp_path)
    for change in ({"seed": 1}, {"annotations": {"val": {"count": 2}}}):
        with pytest.raises(AuroraError, match=f"build_info: {folder} holds other data than asked for; remove it, or"):
            build(folder=folder, **change)
    assert _contents(tmp_path) == before


def test_two_runs_that_make_the_same_at_once(build, name: str, tmp_path: Path, monkeypatch) -> None:
    """The one that ends later takes what the other one made."""
    builder = registry.get_builder_class(name)
    make, others = builder._make, []

    def interrupted(self, folder: Path, counts: dict, info: DictConfig) -> None:
        if not others:
            others.append(True)
            build()  # the other run
            others.append(_contents(tmp_path))
        make(self, folder, counts, info)

    monkeypatch.setattr(builder, "_make", interrupted)
    assert build()["train"][0]["text_input"]
    there = {path: content for path, content in others[1].items() if ".unfinished" not in path}
    assert there and _contents(tmp_path) == there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "dirty"}, "unknown domain 'dirty': choose one of clean, shifted"),
        ({"seed": "x"}, "invalid literal for int"),
        ({"annotations": {"train": {"count": -3}}}, "count of 'train' is -3"),
        ({"annotations": {"train": {"count": None}}}, "build_info: the demo's data cannot be made"),
        ({"each": 0}, "0 questions about each picture: give 1 to 99"),
        ({"each": 90}, "90 questions about each picture are too many"),
    ],
)
def test_keys_that_cannot_be_used(build, name: str, change: dict, message: str, tmp_path: Path) -> None:
    if "each" in change and name != "demo_vqa":
        pytest.skip("of questions")
    with pytest.raises(AuroraError, match=message):
        build(**change)
    assert not [*tmp_path.rglob("*vqa_train.json" if name == "demo_vqa" else "*_train.json")]


def test_shipped_types_name_their_own_files(name: str) -> None:
    builder = registry.get_builder_class(name)
    for kind in ("default", "clean"):
        info = OmegaConf.load(builder.DATASET_CONFIG_DICT[kind]).datasets[name].build_info
        assert info.domain == ("clean" if kind == "clean" else "shifted")
        for split, part in info.annotations.items():
            files = [part.storage] if isinstance(part.storage, str) else part.storage
            assert all(file.split("/")[2].startswith(info.domain) for file in files)
            assert all(str(part.count) in file.split("/")[1] for file in files)
            assert all(split in file or "answers" in file for file in files)
