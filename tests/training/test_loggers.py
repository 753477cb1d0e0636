"""metrics.csv, TensorBoard, Weights & Biases and MLflow: read back by the libraries themselves, offline."""

from __future__ import annotations

import csv
import json
import logging
import struct
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from runs import assert_same, final, logged, only_run
from tiny import project_yaml, refused
from tiny_vqa import vqa_project

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.run import LOGGERS
from lavis_aurora.training import loggers as module
from lavis_aurora.training.loggers import METRICS, LoggedRun, Loggers, contact_sheet
from lavis_aurora.training.tasks.base import extremes
from lavis_aurora_cli import evaluate, train

# 8 pairs in batches of 4.
STEPS = 2


def run(yaml: Path, *options: str) -> None:
    train(["--cfg-path", str(yaml), *(["--options", *options] if options else [])])


def metrics(folder: Path) -> dict[str, dict[int, tuple[int, float]]]:
    """By name: epoch and value of each step; a step has one line."""
    found: dict[str, dict[int, tuple[int, float]]] = {}
    with (folder / METRICS).open(newline="") as file:
        for row in csv.DictReader(file):
            steps = found.setdefault(row["metric"], {})
            assert int(row["step"]) not in steps, row
            steps[int(row["step"])] = int(row["epoch"]), float(row["value"])
    return found


class Config:
    """LAVIS's configuration, as loggers ask for it."""

    def __init__(self, *names: str) -> None:
        self.run_cfg = OmegaConf.create({"loggers": list(names)})

    def to_dict(self) -> dict:
        return {"run": {"init_lr": 0.5, "loggers": list(self.run_cfg.loggers)}, "model": {"arch": "a"}}


def write_two_parts(name: str, folder: Path) -> None:
    """Log six steps, and after a resumption from the third one, steps four to seven once more."""
    for first, last, scale in ((1, 6, 1.0), (4, 7, 10.0)):
        loggers = Loggers()
        loggers.start(Config(name), folder, first - 1)
        for step in range(first, last + 1):
            loggers.scalars("train", {"loss": scale * step, "note": "a word", "flag": True}, step, 0)
        loggers.cases("val/cases", lambda: [(str(folder / "picture.png"), "a red circle\nrank 3 of 8")], last)
        loggers.close(failed=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "20261126_120000_abcdef"
    folder.mkdir()
    Image.new("RGB", (300, 200), "red").save(folder / "picture.png")
    return folder


# Its gradients are always clipped.
TWO_EPOCHS = ("run.max_epoch=2", "run.log_freq=1", "run.grad_clip=1e-3", "run.resume=auto", "run.save_queue=true")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a run of two epochs that was not stopped, with TensorBoard where that is installed."""
    folder = tmp_path_factory.mktemp("whole")
    names = "tensorboard" if find_spec("tensorboard") else "csv"
    run(project_yaml(folder), *TWO_EPOCHS, f"run.loggers=[{names}]")
    return folder


def test_a_run_writes_what_its_log_has_by_step_and_epoch(whole):
    folder = only_run(whole)
    found = metrics(folder)
    assert list(found["train/loss"]) == [1, 2, 3, 4] and [e for e, _ in found["train/loss"].values()] == [0, 0, 1, 1]
    epochs, validated = logged(folder, "train_loss"), logged(folder, "val_agg_metrics")
    for i, line in enumerate(epochs):
        end, losses = STEPS * (i + 1), [value for epoch, value in found["train/loss"].values() if epoch == i]
        assert found["train_epoch/loss"][end] == (i, pytest.approx(np.mean(losses), abs=1e-6))
        assert found["train_epoch/loss_itc"][end][1] == pytest.approx(float(line["train_loss_itc"]), abs=1e-3)
        assert found["train/lr"][end][1] == pytest.approx(float(line["train_lr"]))
        assert found["val/agg_metrics"][end][1] == pytest.approx(validated[i]["val_agg_metrics"], rel=1e-6)
    assert all(value > 1e-3 for _, value in found["train/gradient_norm"].values()), "before it is clipped"
    best = int(json.loads((folder / "summary.json").read_text())["best_epoch"])
    assert found["test/agg_metrics"].keys() == {4} and found["test/agg_metrics"][4][0] == best


@pytest.mark.slow
def test_a_resumed_run_has_each_step_once_and_the_numbers_of_one_that_was_not_stopped(tmp_path, whole, monkeypatch):
    from lavis_aurora.training import runner

    original = runner.AuroraRunner._save_adapter

    def stopped(self, kind, metrics):
        # Epoch 1 is trained and validated, but its checkpoint says trained.
        if kind == "last" and metrics["epoch"] == 1:
            raise KeyboardInterrupt
        original(self, kind, metrics)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner.AuroraRunner, "_save_adapter", stopped)
        run(project_yaml(tmp_path), *TWO_EPOCHS)
    folder = only_run(tmp_path)
    with (folder / METRICS).open("a") as file:
        file.write("9,1,train/loss,1.0\n7,1,tra")
    run(project_yaml(tmp_path), *TWO_EPOCHS, "run.loggers=[csv]")
    assert metrics(folder) == metrics(only_run(whole))


@pytest.mark.parametrize("cut", ["4,0,train/loss,0.1", '4,0,"a, b/lo', "4,0,tra\0\0\0\0", "\0" * 9, "\udcff"])
def test_of_a_file_that_was_cut_off_whole_lines_stay(folder, cut):
    path = folder / METRICS
    for step, rest in ((0, cut), (4, "")):
        loggers = Loggers()
        loggers.start(Config(), folder, step)
        loggers.scalars("a, b", {"loss": 0.125}, step + 3, 0)
        loggers.close(failed=False)
        with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(rest)
    assert path.read_text() == 'step,epoch,metric,value\n3,0,"a, b/loss",0.125\n7,0,"a, b/loss",0.125\n'


def test_a_split_that_is_validated_on_and_tested_has_a_name_for_each(tmp_path):
    run(project_yaml(tmp_path), "run.max_epoch=2", "run.valid_splits=[test]", "run.test_splits=[test]")
    found, lines = metrics(only_run(tmp_path)), logged(only_run(tmp_path), "final_test_agg_metrics")
    assert list(found["test/agg_metrics"]) == [2, 4] and list(found["final_test/agg_metrics"]) == [4]
    assert found["final_test/agg_metrics"][4][1] == pytest.approx(lines[0]["final_test_agg_metrics"], rel=1e-6)


def test_a_norm_is_logged_once_there_is_one(tmp_path):
    run(project_yaml(tmp_path), "run.max_epoch=1", "run.log_freq=1", "run.accum_grad_iters=2")
    found = metrics(only_run(tmp_path))
    assert list(found["train/loss"]) == [1, 2] and list(found["train/gradient_norm"]) == [2]


def test_an_evaluation_leaves_its_metrics(tmp_path):
    evaluate(["--cfg-path", str(project_yaml(tmp_path))])
    assert metrics(only_run(tmp_path))["test/agg_metrics"].keys() == {0}


def test_tensorboard_reads_a_run_back(whole):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = only_run(whole)
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    for name, values in metrics(folder).items():
        shown = {one.step: one.value for one in read.Scalars(name)}
        assert shown == pytest.approx({step: value for step, (_, value) in values.items()}, rel=1e-5), name
    assert {one.step for one in read.Images("val/cases")} == {2, 4}
    assert read.Images("val/cases")[0].width == 4 * module.TILE
    [text] = read.Tensors("config/text_summary")
    assert "blip_retrieval_aurora" in text.tensor_proto.string_val[0].decode()


def test_tensorboard_shows_of_a_resumed_run_what_followed(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_two_parts("tensorboard", folder)
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("train/loss")] == [
        *((i, i) for i in (1, 2, 3)),
        *((i, 10 * i) for i in (4, 5, 6, 7)),
    ]
    assert read.Tags()["scalars"] == ["train/loss"]


def wandb_records(path: Path) -> Iterator[bytes]:
    """The messages in a file of wandb, in blocks as LevelDB's log has them."""
    # Its own process may still be writing after finish.
    for _ in range(120):
        size = path.stat().st_size
        time.sleep(0.5)
        if size == path.stat().st_size and size:
            break
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        _crc, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind:
            part = data[place + 7 : place + 7 + length]
            record = part if kind in (1, 2) else record + part
            place += 7 + length
        if kind in (1, 4):
            yield record
        left = 2**15 - place % 2**15
        if left < 7 or not kind:  # too few for a part: padding
            place += left


def test_wandb_offline_goes_on_with_the_same_run(folder, monkeypatch, caplog):
    pytest.importorskip("wandb", minversion="0.13")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_two_parts("wandb", folder)
    assert not [record.message for record in caplog.records if "run.loggers" in record.message]
    points: list[tuple[int, float]] = []
    ids, configs = set(), set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                configs |= {one.key for one in record.run.config.update}
            row = {(one.key or one.nested_key[0]): one.value_json for one in record.history.item}
            if "train/loss" in row:
                points.append((int(row["step"]), float(row["train/loss"])))
    assert ids == {folder.name} and {"run", "model"} <= configs
    assert list(folder.glob("wandb/offline-run-*/files/media/images/val/cases_*.png"))
    # Its steps cannot go back; the chart is over ours.
    assert points == [(i, i) for i in range(1, 7)] + [(i, 10 * i) for i in range(4, 8)]


def test_mlflow_goes_on_with_the_same_run(folder, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.chdir(tmp_path)
    before = list(logging.getLogger().handlers)
    write_two_parts("mlflow", folder)
    assert logging.getLogger().handlers == before
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs.db")
    [found] = client.search_runs(["0"])
    assert found.info.run_name == folder.name and found.info.status == "FINISHED"
    assert found.data.params["run.init_lr"] == "0.5" and found.data.params["model.arch"] == "a"
    points = {(one.step, one.value) for one in client.get_metric_history(found.info.run_id, "train/loss")}
    assert points == {(i, i) for i in range(1, 7)} | {(i, 10 * i) for i in range(4, 8)}
    assert {one.path for one in client.list_artifacts(found.info.run_id)} >= {"config.txt", "pictures"}


def test_a_run_computes_the_same_with_loggers(tmp_path, whole):
    pytest.importorskip("tensorboard")
    run(project_yaml(tmp_path), *TWO_EPOCHS, "run.log_freq=10")
    assert_same(final(tmp_path), final(whole))


class Silent:
    """A logger that takes everything."""

    def __init__(self, run: LoggedRun) -> None:
        pass

    def scalars(self, values: dict, step: int, epoch: int) -> None:
        pass

    def text(self, name: str, text: str) -> None:
        pass

    def close(self, failed: bool) -> None:
        pass


class Failing(Silent):
    """A logger whose disk or network fails."""

    def __init__(self, run: LoggedRun) -> None:
        if not run.step:
            raise ConnectionError("no route\nto host")

    def scalars(self, values: dict, step: int, epoch: int) -> None:
        raise OSError(28, "No space left on device")


def test_a_logger_that_fails_is_named_once_and_the_others_go_on(folder, monkeypatch, caplog):
    monkeypatch.setitem(module.LOGGERS, "wandb", Failing)
    for start, said in ((0, "no route to host"), (1, "No space left on device")):
        caplog.clear()
        loggers = Loggers()
        loggers.start(Config("wandb"), folder, start)
        loggers.scalars("train", {"loss": 1.0}, 1, 0)
        loggers.scalars("train", {"loss": 2.0}, 2, 0)
        loggers.close(failed=False)
        [record] = caplog.records
        assert "run.loggers: wandb fails and is left out from now on" in record.message and said in record.message
        assert [row[1] for row in metrics(folder)["train/loss"].values()] == [1.0, 2.0]


def test_a_training_ends_well_where_its_logger_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(module.LOGGERS, "wandb", Failing)
    monkeypatch.setattr(module, "NEEDED", {})
    run(project_yaml(tmp_path), "run.loggers=[wandb]")
    assert json.loads((only_run(tmp_path) / "summary.json").read_text())["status"] == "finished"


def test_each_name_that_the_key_takes_has_a_logger():
    assert set(module.LOGGERS) == set(LOGGERS) == {"csv", *module.NEEDED}


def test_unknown_and_missing_loggers_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    yaml = project_yaml(tmp_path)
    refused(yaml, "run.loggers", "did you mean 'tensorboard'", options=["run.loggers=[tensorbord]"])
    refused(yaml, "run.loggers", options=["run.loggers=tensorboard"])
    (tmp_path / "wandb").mkdir()  # a folder of that name can be imported
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(module.NEEDED, "wandb", ("wandb", "no_such_name"))
    with pytest.raises(AuroraError, match=r'wandb cannot be imported .*pip install "lavis-aurora\[wandb\]"'):
        module.check_loggers(["csv", "wandb"])
    monkeypatch.setitem(module.NEEDED, "mlflow", ("no_such_module", "start_run"))
    with pytest.raises(SystemExit):
        run(yaml, "run.loggers=[mlflow]")
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_metrics_of_a_questions_run_have_pictures_of_questions(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setitem(module.LOGGERS, "wandb", Silent)
    monkeypatch.setattr(module, "NEEDED", {})
    monkeypatch.setattr(module, "contact_sheet", lambda cases: shown.update(cases=cases))
    run(vqa_project(tmp_path), "run.loggers=[wandb]")
    [folder] = (tmp_path / "output").iterdir()
    assert metrics(folder)["val/agg_metrics"]
    results = json.loads(next((folder / "result").glob("val_epoch_0_vqa_result.json")).read_text())
    assert len(shown["cases"]) == min(8, len(results))
    for file, words in shown["cases"]:
        assert Path(file).is_file()
        assert any(f"\n{one['answer']} (true: " in words for one in results)


def test_the_worst_come_first_and_a_sheet_holds_all():
    assert extremes([3, 1, 2], 4) == [1, 2, 0]
    assert extremes([5, 0, 9, 3, 4, 1], 2) == [1, 5, 0, 2]
    assert contact_sheet([]) is None


def test_a_sheet_has_a_tile_for_each_picture(folder):
    one = (str(folder / "picture.png"), "wörds\n" + "many " * 20)
    sheet = np.asarray(contact_sheet([one] * 5))
    assert sheet.shape[1] == 4 * module.TILE and sheet.shape[0] % 2 == 0
    red = (sheet == (255, 0, 0)).all(axis=2)
    assert red[40, 50] and red[sheet.shape[0] // 2 + 40, 50] and not red[sheet.shape[0] // 2 + 40, 50 + module.TILE]
