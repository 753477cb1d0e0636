"""One's own data, from the project YAMLs as they are: train, test, compare; what is said of missing files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf
from runs import logged, only_run
from tiny import SPLITS, write_pictures
from tiny_video import write_videos

from lavis_aurora.analysis.compare import compare
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.dataset_keys import check_dataset_keys
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.checks import checks_of
from lavis_aurora.project import load_config
from lavis_aurora_cli import evaluate, train

PROJECTS = Path(__file__).resolve().parents[2] / "projects" / "aurora"
COUNT = 4
NAMES = {"own_ret": "own_retrieval", "own_video_ret": "own_video_retrieval", "own_vqa": "own_vqa"}
PREFIX = {"own_ret": "", "own_video_ret": "video_", "own_vqa": "vqa_"}
SMALL = [
    *("model.model_type=tiny", "model.pretrained=null", "run.max_epoch=1", "run.batch_size_train=2"),
    *("run.num_workers=0", "run.device=cpu"),
]


def options(project: str) -> list[str]:
    """What makes a project small; its data are where it says."""
    if project != "own_video_ret":
        return SMALL
    part = "datasets.own_video_retrieval.vis_processor"
    frames = [f"{part}.{split}.{key}" for split in ("train", "eval") for key in ("n_frms=2", "image_size=48")]
    return [*SMALL, "model.image_size=48", *frames]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``own`` of a data root."""
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path / "root"))
    return tmp_path / "root" / "own"


def write_own(project: str, own: Path) -> None:
    """Write the files of a project where its YAML expects them."""
    if project == "own_video_ret":
        made, kind = write_videos(own / "made", COUNT), "videos"
    else:
        made, kind = write_pictures(own / "made", COUNT, captions_each=2), "images"
    shutil.move(made[kind], own / kind)
    (own / "annotations").mkdir()
    for split in SPLITS:
        entries = json.loads(made[split].read_text())
        if project == "own_vqa":
            entries = [
                {"image": entry["image"], "question": f"what is shape {i}?", "answer": "a star", "question_id": i}
                for i, entry in enumerate(entries)
            ]
        (own / f"annotations/{PREFIX[project]}{split}.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("project", NAMES)
def test_a_project_trains_and_tests(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture, project: str) -> None:
    write_own(project, data)
    yaml = PROJECTS / f"{project}.yaml"
    train(["--cfg-path", str(yaml), "--options", *options(project), f"run.output_dir={tmp_path / 'output'}"])
    folder = only_run(tmp_path)
    assert logged(folder, "train_loss")[0]["train_loss"] > 0
    out = capsys.readouterr().out
    if project == "own_vqa":
        [answers] = (folder / "result").glob("test*_vqa_result.json")
        assert {entry["truth"] for entry in json.loads(answers.read_text())} == {"a star"}
        assert f"test: {COUNT} questions, accuracy" in out
    else:
        result = json.loads((folder / "result/test_epoch_best.json").read_text())
        kind = "videos" if "video" in project else "images"
        assert result[kind] == COUNT and f"test: {COUNT} {kind}, " in out
    assert f"the paper has no row for {NAMES[project]}, " in compare([str(folder)])


@pytest.mark.parametrize("project", NAMES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_file_is_named_with_what_it_holds(data: Path, project: str, split: str) -> None:
    write_own(project, data)
    path = data / f"annotations/{PREFIX[project]}{split}.json"
    path.unlink()
    name = NAMES[project]
    cfg = load_config(str(PROJECTS / f"{project}.yaml"), options(project)).datasets_cfg[name]
    with pytest.raises(AuroraError) as caught:
        build_checked(name, cfg)
    message = str(caught.value)
    assert message.startswith(f"datasets.{name}.build_info.annotations.{split}.storage: {path} is missing; ")
    builder = registry.get_builder_class(name)
    cls = builder.train_dataset_cls if split == "train" else builder.eval_dataset_cls
    [example] = (checks.example for checks in checks_of(name, None, cls))
    assert example and "AURORA_DATA" in message and message.endswith(f" such as {json.dumps(example)}")


@pytest.mark.parametrize(("project", "name"), NAMES.items())
def test_samples_of_the_yaml_are_good(data: Path, project: str, name: str) -> None:
    """What its comments show, a user may copy."""
    comment = [line.lstrip("# ") for line in (PROJECTS / f"{project}.yaml").read_text().splitlines()]
    lists, decoder, text = [], json.JSONDecoder(), " ".join(comment)
    for start in (i for i in range(len(text)) if text.startswith('[{"', i)):
        lists.append(decoder.raw_decode(text[start:])[0])
    assert len(lists) == (1 if project == "own_vqa" else 2) and {len(one) for one in lists} == {3}
    kind = "videos" if "video" in project else "images"
    (data / kind).mkdir(parents=True)
    (data / "annotations").mkdir()
    for split in SPLITS:
        shown = lists[0] if split == "train" else lists[-1]
        (data / f"annotations/{PREFIX[project]}{split}.json").write_text(json.dumps(shown))
    datasets = build_checked(
        name, load_config(str(PROJECTS / f"{project}.yaml"), options(project)).datasets_cfg[name]
    )
    assert {split: len(dataset) for split, dataset in datasets.items()} == dict.fromkeys(SPLITS, 3)


def test_the_yaml_names_the_default_paths() -> None:
    for project, name in NAMES.items():
        shown = OmegaConf.load(PROJECTS / f"{project}.yaml").datasets[name].build_info
        default = OmegaConf.load(registry.get_builder_class(name).default_config_path()).datasets[name].build_info
        assert shown == default


def test_answers_of_one_s_own_are_ranked(tmp_path: Path, data: Path) -> None:
    """As the comment in own_vqa.yaml says."""
    write_own("own_vqa", data)
    answers = ["a circle", "a star", "two"]
    (data / "annotations/answers.json").write_text(json.dumps(answers))
    files = "own/annotations/vqa_test.json,own/annotations/answers.json"
    more = [
        "run.inference_method=rank",
        "run.test_splits=[test]",
        f"datasets.own_vqa.build_info.annotations.test.storage=[{files}]",
        f"run.output_dir={tmp_path / 'output'}",
    ]
    evaluate(["--cfg-path", str(PROJECTS / "own_vqa.yaml"), "--options", *options("own_vqa"), *more])
    [result] = (only_run(tmp_path) / "result").glob("test*_vqa_result.json")
    assert {entry["answer"] for entry in json.loads(result.read_text())} <= set(answers)


def test_a_url_would_not_be_read() -> None:
    cfg = OmegaConf.create({"build_info": {"annotations": {"train": {"url": "http://example.org/train.json"}}}})
    with pytest.raises(
        AuroraError, match="own_retrieval.build_info.annotations.train.url: unknown key; known: storage"
    ):
        check_dataset_keys("own_retrieval", cfg)


@pytest.mark.parametrize("content", ['{"a": 1}', "[1, 2]", '["a", ""]', "[]", "[oops"])
def test_answers_of_ones_own_are_checked(data: Path, content: str) -> None:
    write_own("own_vqa", data)
    (data / "annotations/answers.json").write_text(content)
    part = "datasets.own_vqa.build_info.annotations.val.storage"
    files = f"[own/annotations/{PREFIX['own_vqa']}val.json,own/annotations/answers.json]"
    cfg = load_config(str(PROJECTS / "own_vqa.yaml"), [*SMALL, f"{part}={files}"])
    with pytest.raises(
        AuroraError, match=rf"{part}: .*answers.json (must hold a list of answers|is not readable json)"
    ):
        build_checked("own_vqa", cfg.datasets_cfg.own_vqa)


@pytest.mark.parametrize("key", ["valid_splits", "test_splits"])
def test_answers_are_not_ranked_without_a_list(
    tmp_path: Path, data: Path, key: str, capsys: pytest.CaptureFixture
) -> None:
    """Before anything is trained."""
    write_own("own_vqa", data)
    given = [*SMALL, "run.inference_method=rank", "run.valid_splits=[]", "run.test_splits=[]", f"run.{key}=[val]"]
    with pytest.raises(SystemExit):
        train(["--cfg-path", str(PROJECTS / "own_vqa.yaml"), "--options", *given, f"run.output_dir={tmp_path}"])
    assert "rank needs a list of answers, the second file" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/checkpoint*"))
