"""One's own data, from the project YAMLs as they are: train, test, compare; what is said of missing files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf
from runs import logged, only_run
from tiny import SPLITS, tiny_model, write_pictures
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


@pytest.mark.parametrize(
    "project", [pytest.param(name, marks=pytest.mark.slow) if name == "own_ret" else name for name in NAMES]
)
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


def test_questions_to_answer_have_ids_of_their_own(data: Path) -> None:
    """LAVIS keeps one answer of each."""
    write_own("own_vqa", data)
    path = data / f"annotations/{PREFIX['own_vqa']}test.json"
    entries = json.loads(path.read_text())
    entries[1]["question_id"] = entries[0]["question_id"]
    path.write_text(json.dumps(entries))
    name = NAMES["own_vqa"]
    cfg = load_config(str(PROJECTS / "own_vqa.yaml"), options("own_vqa")).datasets_cfg[name]
    with pytest.raises(AuroraError, match="entries 0 and 1 of .* have the same question_id, 0; give each its own"):
        build_checked(name, cfg)


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


@pytest.mark.parametrize("project", NAMES)
def test_an_evaluation_needs_the_files_of_its_split_alone(
    tmp_path: Path, data: Path, project: str, capsys: pytest.CaptureFixture
) -> None:
    """And no full batch to train on."""
    write_own(project, data)
    for split in ("train", "val"):
        (data / f"annotations/{PREFIX[project]}{split}.json").unlink()
    given = [*options(project), "run.batch_size_train=1000", f"run.output_dir={tmp_path / 'output'}"]
    evaluate(["--cfg-path", str(PROJECTS / f"{project}.yaml"), "--options", *given])
    assert f"test: {COUNT} " in capsys.readouterr().out
    [result] = (only_run(tmp_path) / "result").glob("test*")
    assert result.stat().st_size
    with pytest.raises(SystemExit):
        evaluate(["--cfg-path", str(PROJECTS / f"{project}.yaml"), "--options", *given, "run.test_splits=[val]"])
    assert f"{PREFIX[project]}val.json is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(["--cfg-path", str(PROJECTS / f"{project}.yaml"), "--options", *given, "run.test_splits=[tset]"])
    assert "run.test_splits: no split 'tset' in the datasets; did you mean 'test'?" in capsys.readouterr().err


def test_training_needs_no_files_of_splits_that_it_leaves_out(tmp_path: Path, data: Path) -> None:
    write_own("own_ret", data)
    for split in ("val", "test"):
        (data / f"annotations/{split}.json").unlink()
    given = [*SMALL, "run.valid_splits=[]", "run.test_splits=[]", f"run.output_dir={tmp_path / 'output'}"]
    train(["--cfg-path", str(PROJECTS / "own_ret.yaml"), "--options", *given])
    assert logged(only_run(tmp_path), "train_loss")


# What a text may hold


def rewrite(path: Path, key: str, values: list) -> None:
    entries = json.loads(path.read_text())
    for entry, value in zip(entries, values):
        entry[key] = value
    path.write_text(json.dumps(entries))


def built(project: str) -> dict:
    name = NAMES[project]
    return build_checked(name, load_config(str(PROJECTS / f"{project}.yaml"), options(project)).datasets_cfg[name])


@pytest.mark.parametrize(
    ("project", "split", "key", "value"),
    [
        ("own_ret", "train", "caption", 7),
        ("own_ret", "test", "caption", ["a cat", 1.5]),
        ("own_video_ret", "train", "caption", 7),
        ("own_vqa", "train", "answer", 2),
    ],
)
def test_numbers_without_quotes_are_refused(data: Path, project: str, split: str, key: str, value: object) -> None:
    """007 or 1.50 would be another text."""
    write_own(project, data)
    path = data / f"annotations/{PREFIX[project]}{split}.json"
    rewrite(path, key, [value])
    number = value[-1] if isinstance(value, list) else value
    with pytest.raises(AuroraError) as caught:
        built(project)
    assert f"the {key} of entry 0 of {path} must be " in str(caught.value)
    assert str(caught.value).endswith(f'; put numbers in quotes, "{number}"')
    quoted = [str(one) for one in value] if isinstance(value, list) else str(value)
    rewrite(path, key, [quoted])
    sample = built(project)[split][0]
    assert split == "test" or sample["text_input" if key == "caption" else "answers"] in (quoted, [quoted])


# A caption, what BLIP's processor makes of it, and another one that gives the same tokens.
TEXTS = [
    ("007", "007", "007"),
    ("A dog\nruns", "a dog\nruns", "a dog runs"),
    ("a dog \r\n\t runs.\n", "a dog runs", "a dog runs"),
    ("a dog\u00a0runs", "a dog\u00a0runs", "a dog runs"),
    ("Tom &amp; Jerry", "tom &amp jerry", "tom & amp jerry"),
    ("it&#39;s red", "it& 39 s red", "it & 39 s red"),
]


def test_texts_are_cleaned_as_blips_processors_do(data: Path) -> None:
    """As docs/data.md says; the report counts HTML entities, whose letters stay."""
    write_own("own_ret", data)
    path = data / "annotations/train.json"
    rewrite(path, "caption", [text for text, _, _ in TEXTS])
    train = built("own_ret")["train"]
    tokenizer = tiny_model().tokenizer
    for i, (_, cleaned, same) in enumerate(TEXTS):
        text = train[i]["text_input"]
        assert text == cleaned
        assert tokenizer(text).input_ids == tokenizer(same).input_ids
