"""Bad input through the command line: one line that names file or key and remedy, exit code 1, nothing written."""

from __future__ import annotations

import ctypes
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny import project_yaml, tiny_model

from lavis_aurora.project import load_config
from lavis_aurora.training.start import _printable_record
from lavis_aurora_cli import end_with_parent, evaluate, main, train

ROOT = Path(__file__).resolve().parents[1]
# What a run may leave before its first epoch has ended.
HARMLESS = {"config.yaml", "data.json", "log.txt", "metrics.csv", "summary.json", "result"}
COUNT = 4


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_yaml(tmp_path, count=COUNT)


@pytest.fixture
def data(tmp_path: Path, project: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def failing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run, and return the one line of an error after which nothing half-written is left."""

    def run(path: Path, *options: object, command: Callable = train) -> str:
        before = {file for file in tmp_path.rglob("*") if file.is_file()}
        argv = ["--cfg-path", str(path)]
        with pytest.raises(SystemExit) as caught:
            command([*argv, "--options", *map(str, options)] if options else argv)
        assert caught.value.code == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "Traceback" not in line
        new = {file for file in tmp_path.rglob("*") if file.is_file()} - before
        assert {file.name for file in new} <= HARMLESS
        return line

    return run


def _edit(path: Path, **sections: object) -> None:
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), sections), path)


# The YAML itself


def test_missing_yaml(tmp_path: Path, failing: Callable[..., str]) -> None:
    line = failing(tmp_path / "absent.yaml")
    assert str(tmp_path / "absent.yaml") in line and "no such file; --cfg-path names a YAML" in line


def test_folder_in_place_of_the_yaml(tmp_path: Path, failing: Callable[..., str]) -> None:
    assert f"{tmp_path}: it is a folder, not a file" in failing(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"model: [1, 2\nrun: }", b"a: b: c", b"\tmodel: 1", b"3", b"hello", b"[model, run]", bytes(range(256)), b"\xe9"],
    ids=["bracket", "colon", "tab", "number", "word", "list", "binary", "latin-1"],
)
def test_yaml_that_is_none_or_no_mapping(tmp_path: Path, failing: Callable[..., str], content: bytes) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert failing(path).startswith(f"error: {path}: ")


@pytest.mark.parametrize("section", ["model", "datasets", "run"])
@pytest.mark.parametrize("how", ["absent", "null", "empty"])
def test_missing_section(project: Path, failing: Callable[..., str], section: str, how: str) -> None:
    config = OmegaConf.load(project)
    if how == "absent":
        del config[section]
    else:
        config[section] = None if how == "null" else {}
    OmegaConf.save(config, project)
    assert failing(project) == f"error: {project}: {section}: the section is missing"


def test_empty_yaml(tmp_path: Path, failing: Callable[..., str]) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert "the section is missing" in failing(tmp_path / "empty.yaml")


@pytest.mark.parametrize("section", ["model", "datasets", "run"])
@pytest.mark.parametrize("value", ["text", "3", "[a]"])
@pytest.mark.parametrize("where", ["yaml", "options"])
def test_section_that_is_no_mapping(
    project: Path, failing: Callable[..., str], section: str, value: str, where: str
) -> None:
    if where == "yaml":
        config = OmegaConf.to_container(OmegaConf.load(project))
        config[section] = json.loads(value) if value == "3" else ["a"] if value == "[a]" else value
        OmegaConf.save(OmegaConf.create(config), project)
        line = failing(project)
    else:
        line = failing(project, f"{section}={value}")
    assert line.startswith(f"error: {project}: ") and section in line


def test_preprocess_of_the_yaml_overrides_the_model_types(project: Path) -> None:
    _edit(project, preprocess={"vis_processor": {"train": {"name": "blip_image_train"}}})
    cfg = load_config(str(project))
    processors = cfg.datasets_cfg.coco_retrieval.vis_processor
    assert (processors.train.name, processors.eval.name) == ("blip_image_train", "blip_image_eval")


def test_processor_of_a_dataset_without_a_name_is_the_models(project: Path) -> None:
    """Its keys go over those of the model's."""
    cfg = load_config(str(project), ["datasets.coco_retrieval.text_processor.train.max_words=7"])
    processor, default = (
        cfg.datasets_cfg.coco_retrieval.text_processor.train,
        cfg.config.preprocess.text_processor.train,
    )
    assert processor == {**default, "max_words": 7} and processor.name == "blip_caption"


def test_dataset_without_anything_takes_its_defaults(project: Path) -> None:
    """``coco_retrieval:`` with nothing behind it is the default type."""
    config = OmegaConf.load(project)
    config.datasets = {"coco_retrieval": None}
    OmegaConf.save(config, project)
    assert load_config(str(project)).datasets_cfg.coco_retrieval.data_type == "images"


# Names and keys

NAMES = [
    ({"model": {"arch": "blip_retrieval_auror"}}, "model.arch", "blip_retrieval_aurora"),
    ({"model": {"model_type": "tinny"}}, "model.model_type", "tiny"),
    ({"datasets": {"coco_retreival": {"type": "default"}}}, "datasets.coco_retreival", "coco_retrieval"),
    ({"run": {"task": "retrieval_auror"}}, "run.task", "retrieval_aurora"),
    ({"run": {"runner": "runner_auror"}}, "run.runner", "runner_aurora"),
    ({"run": {"lr_sched": "linear_warmup_cosin_lr"}}, "run.lr_sched", "linear_warmup_cosine_lr"),
    ({"run": {"max_epochs": 3}}, "run.max_epochs", "max_epoch"),
    ({"model": {"mode_approx": {"rnak": 3}}}, "model.mode_approx.rnak", "rank"),
    ({"modle": {"tuning": "full"}}, "modle", "model"),
]


@pytest.mark.parametrize(("change", "key", "near"), NAMES, ids=[key for _, key, _ in NAMES])
def test_unknown_name_comes_with_the_nearest(
    project: Path, failing: Callable[..., str], change: dict, key: str, near: str
) -> None:
    _edit(project, **change)
    line = failing(project)
    assert line.startswith(f"error: {project}: {key}: ") and f"did you mean {near!r}" in line


@pytest.mark.parametrize(
    ("option", "key"),
    [("run.max_epochs=3",) * 2, ("modle.tuning=full", "modle"), ("run.k_test=-1",) * 2, ("run.k_test=few",) * 2],
)
def test_options_are_checked_like_the_yaml(project: Path, failing: Callable[..., str], option: str, key: str) -> None:
    assert f" {key.partition('=')[0]}: " in failing(project, option)


def test_options_cannot_be_parsed(project: Path, failing: Callable[..., str]) -> None:
    assert failing(project, "run.train_splits=[train").startswith(f"error: {project}: ")


@pytest.mark.parametrize("command", [evaluate, lambda argv: main(["train", *argv])], ids=["evaluate", "main"])
def test_every_command_reports_alike(project: Path, failing: Callable[..., str], command: Callable) -> None:
    assert "run.max_epochs: unknown key" in failing(project, "run.max_epochs=3", command=command)


# Weights


def test_missing_checkpoint(project: Path, tmp_path: Path, failing: Callable[..., str]) -> None:
    path = tmp_path / "absent.pth"
    for key in ("model.pretrained", "run.resume_ckpt_path"):
        assert f"{key}: no such file: {path}" in failing(project, f"{key}={path}")


def test_url_that_cannot_be_reached(project: Path, failing: Callable[..., str]) -> None:
    line = failing(project, "model.pretrained=http://127.0.0.1:9/model.pth")
    assert "model.pretrained: cannot download http://127.0.0.1:9/model.pth" in line and "local file" in line


class _RunsCode:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


WRONG_FILES = {
    "garbage": b"garbage",
    "empty": b"",
    "html": b"<!doctype html>\n<html>\nnot found\n</html>\n",
    "list": [1, 2],
    "number": 3,
    "tensor": torch.ones(2),
    "number as model": {"model": 3, "optimizer": {}, "epoch": 0},
    "text as weights": {"model": {"temp": "hot"}, "optimizer": {}, "epoch": 0},
    "other model": {"model": {"layer.weight": torch.ones(2, 2)}, "optimizer": {}, "epoch": 0},
}


@pytest.mark.parametrize("key", ["model.pretrained", "run.resume_ckpt_path"])
@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_checkpoint(project: Path, tmp_path: Path, failing: Callable[..., str], key: str, kind: str) -> None:
    path = tmp_path / "wrong.pth"
    content = WRONG_FILES[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert str(path) in failing(project, f"{key}={path}")


@pytest.mark.parametrize("key", ["model.pretrained", "run.resume_ckpt_path"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(
    project: Path, tmp_path: Path, failing: Callable[..., str], key: str, zipped: bool
) -> None:
    path, trace = tmp_path / "code.pth", tmp_path / "trace"
    state = {"model": {"x": _RunsCode(trace)}, "optimizer": {}, "epoch": 0}
    if zipped:
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    assert str(path) in failing(project, f"{key}={path}")
    assert not trace.exists()


def test_truncated_checkpoint(project: Path, tmp_path: Path, failing: Callable[..., str]) -> None:
    path = tmp_path / "short.pth"
    torch.save(tiny_model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    assert f"model.pretrained: {path} is not a readable checkpoint" in failing(project, f"model.pretrained={path}")


def test_weights_of_another_size(project: Path, tmp_path: Path, failing: Callable[..., str]) -> None:
    path = tmp_path / "other.safetensors"
    state = {k: v.clone() for k, v in tiny_model(embed_dim=32, tuning="heads").state_dict().items()}
    save_file(state, path)
    line = failing(project, f"model.pretrained={path}")
    assert f"model.pretrained {path} does not fit the model: text_proj.bias is (32,) there and (64,) here" in line


def test_checkpoint_of_another_tuning(project: Path, tmp_path: Path, failing: Callable[..., str]) -> None:
    path = tmp_path / "heads.pth"
    rest = {"optimizer": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 0, "step": 1}
    rest |= {"best_metric": 0.0, "best_epoch": 0}
    torch.save({"model": tiny_model(tuning="heads").run_state(), **rest}, path)
    line = failing(project, f"run.resume_ckpt_path={path}")
    assert f"{path} does not fit this model" in line and "mode_approx" in line


def test_checkpoint_without_the_state_of_its_run(project: Path, tmp_path: Path, failing: Callable[..., str]) -> None:
    path = tmp_path / "weights_alone.pth"
    torch.save({"model": tiny_model(queue_size=16).run_state(), "optimizer": {}, "epoch": 0}, path)
    assert str(path) in failing(project, f"run.resume_ckpt_path={path}")


# Data


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_missing_annotations(project: Path, data: Path, failing: Callable[..., str], split: str) -> None:
    (data / f"{split}.json").unlink()
    line = failing(project)
    assert f"annotations.{split}.storage: {data / split}.json is missing" in line and "AURORA_DATA" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_in_training(project: Path, data: Path, failing: Callable[..., str], workers: int) -> None:
    path = data / "images" / "train" / "001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    line = failing(project, f"run.num_workers={workers}")
    assert line.startswith(f"error: coco_retrieval train: cannot read {path} (")


def test_caption_string_at_evaluation(project: Path, data: Path, failing: Callable[..., str]) -> None:
    entries = json.loads((data / "val.json").read_text())
    entries[1]["caption"] = "a cat"
    (data / "val.json").write_text(json.dumps(entries))
    expected = (
        f"the caption of entry 1 of {data / 'val.json'} must be a list of strings, each with words, "
        f"e.g. [\"a cat\"], not 'a cat'"
    )
    assert expected in failing(project)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_empty_split(project: Path, data: Path, failing: Callable[..., str], split: str) -> None:
    (data / f"{split}.json").write_text("[]")
    line = failing(project)
    assert f"annotations.{split}.storage: {data / split}.json is empty; a split needs at least one sample" in line


def test_missing_picture_folder(project: Path, data: Path, failing: Callable[..., str]) -> None:
    (data / "images").rename(data / "elsewhere")
    with pytest.warns(UserWarning, match="does not exist"):
        line = failing(project)
    assert f"build_info.images.storage: no such folder: {data / 'images'}" in line


# The run


@pytest.mark.parametrize(
    ("key", "typo", "near"),
    [("train_splits", "trian", "train"), ("valid_splits", "vla", "val"), ("test_splits", "tset", "test")],
)
def test_split_name_typo(project: Path, failing: Callable[..., str], key: str, typo: str, near: str) -> None:
    line = failing(project, f"run.{key}=[{typo}]")
    assert f"run.{key}: no split {typo!r}" in line and f"did you mean {near!r}" in line


@pytest.mark.parametrize("splits", ["[]", "[val]"])
def test_training_needs_the_train_split(project: Path, failing: Callable[..., str], splits: str) -> None:
    assert "run.train_splits" in failing(project, f"run.train_splits={splits}")


@pytest.mark.parametrize("key", ["valid_splits", "test_splits"])
def test_train_split_cannot_be_ranked(project: Path, failing: Callable[..., str], key: str) -> None:
    """Its samples are pairs, not pictures with all their captions; said before an epoch is spent."""
    assert f"run.{key}" in failing(project, f"run.{key}=[train]")


def test_two_datasets_cannot_be_ranked_together(project: Path, failing: Callable[..., str]) -> None:
    config = OmegaConf.load(project)
    _edit(project, datasets={"flickr30k": config.datasets.coco_retrieval})
    line = failing(project)
    assert "coco_retrieval" in line and "flickr30k" in line


def test_evaluation_needs_a_split(project: Path, failing: Callable[..., str]) -> None:
    assert "run.test_splits: name a split to evaluate" in failing(project, "run.test_splits=[]", command=evaluate)


def test_options_given_twice_all_count(project: Path, failing: Callable[..., str]) -> None:
    line = failing(project, "run.max_epoch=1", "--options", "run.batch_size_train=0")
    assert "run.batch_size_train: 0" in line
    line = failing(project, "run.max_epoch=0", "--options", "run.batch_size_train=1")
    assert "run.max_epoch: 0" in line


def test_batch_larger_than_the_split(project: Path, failing: Callable[..., str]) -> None:
    line = failing(project, f"run.batch_size_train={COUNT + 1}")
    assert f"run.batch_size_train: {COUNT + 1} on 1 processes is more than the {COUNT} samples" in line
    assert line.rstrip().endswith("train split; lower it")
    assert not (project.parent / "output").exists()


def test_a_batch_of_training_does_not_matter_to_an_evaluation(project: Path) -> None:
    evaluate(["--cfg-path", str(project), "--options", f"run.batch_size_train={COUNT + 1}"])


def test_batch_larger_than_the_queue(project: Path, failing: Callable[..., str]) -> None:
    line = failing(project, "model.queue_size=3")
    assert "model.queue_size: 3 is less than the 4 samples" in line and "0 for no queue" in line


def test_frozen_model_cannot_be_trained(project: Path, failing: Callable[..., str]) -> None:
    assert "model.tuning: nothing is trained; use evaluate.py" in failing(project, "model.tuning=frozen")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(project: Path, failing: Callable[..., str]) -> None:
    assert failing(project, "run.device=cuda") == ("error: run.device: cuda, but torch sees no GPU; use auto or cpu")


def test_unwritable_output_folder(project: Path, tmp_path: Path, failing: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("in the way")
    line = failing(project, f"run.output_dir={tmp_path / 'file' / 'output'}")
    assert f"run.output_dir: cannot write to {tmp_path / 'file' / 'output'}" in line and "another folder" in line


# What is no user's mistake


def test_a_bug_keeps_its_traceback(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_cfg: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lavis_aurora.training.start.run_config", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(["--cfg-path", str(project)])


def test_one_of_several_processes_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        train(["--cfg-path", str(tmp_path / "absent.yaml")])
    assert capsys.readouterr().err.startswith(f"error [process 3]: {tmp_path}")


def test_a_real_process_prints_that_line_and_nothing_else(tmp_path: Path) -> None:
    """Also importing warns of nothing that a user could not change."""
    path = tmp_path / "absent.yaml"
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--cfg-path", path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {path}: no such file")


def test_lines_of_the_log_do_not_act_on_the_terminal():
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "skipped %s\n%d in all", ("a\x1b[2J.mp4", 3), None)
    assert _printable_record(record)
    assert record.getMessage() == "skipped a\\x1b[2J.mp4\n3 in all"


def test_only_linux_is_asked_to_end_a_process_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere its C library has no such function."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    end_with_parent()
