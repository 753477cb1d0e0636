"""Sweeps of a tiny project: grids, tables, resuming, failures."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import sweep as program
from distributed import child_environment, run_apart
from processes import LOG, ROOT
from sweep import (
    DONE,
    build_cells,
    cell_name,
    check_cells,
    last_error,
    locked,
    main,
    parse_grid,
    report,
    time_left,
)
from tiny import project_yaml
from tiny_summary import counts, leave_summary

from lavis_aurora.analysis.results import read_table, series
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.training.run_lock import FolderInUse, RunLock

METRIC = "test.image_to_text_r5"


def sweep(yaml: Path, *arguments: str) -> int:
    """The program's exit code or message."""
    with pytest.raises(SystemExit) as end:
        main(["--cfg-path", str(yaml), "--output", str(yaml.parent / "sweep"), *arguments])
    return end.value.code


def test_a_grid_is_every_combination_in_order(tmp_path):
    grid = parse_grid(["model.gate.form=none,residual", "run.test_splits=[val,test],[test]"])
    assert grid == {"model.gate.form": ["none", "residual"], "run.test_splits": ["[val,test]", "[test]"]}
    cells = build_cells(grid, tmp_path)
    assert [list(cell.settings.values()) for cell in cells] == [
        ["none", "[val,test]"],
        ["none", "[test]"],
        ["residual", "[val,test]"],
        ["residual", "[test]"],
    ]
    assert len({cell.folder for cell in cells}) == 4


@pytest.mark.parametrize("argument", ["run.seed", "run.seed=", "=1", "run.seed=1,1", "run.seed=1,,2"])
def test_a_grid_of_another_form_is_refused(argument):
    with pytest.raises(AuroraError, match="--grid"):
        parse_grid([argument])


def test_cells_whose_folders_would_coincide_are_refused(tmp_path):
    with pytest.raises(AuroraError, match="one name"):
        build_cells({"model.pretrained": ["a/b", "a:b"]}, tmp_path)
    assert cell_name({"run.init_lr": "1e-3", "run.seed": "2"}) == "run.init_lr=1e-3,run.seed=2"


def test_the_error_of_a_failed_run_is_the_line_that_says_why():
    assert last_error("loading\nerror: run.seed: bad\n\nbye\n") == "error: run.seed: bad"
    assert last_error("Traceback ...\n  File x\nValueError: no\n") == "ValueError: no"
    assert last_error("killed") == "killed"
    assert last_error("") == "it printed nothing"


def test_time_left_counts_waiting_and_running_cells():
    assert time_left([], 3, [1.0], 2) is None
    assert time_left([10.0, 20.0], 4, [], 2) == 30.0
    # The running cell has 5 of 15 seconds left, and nothing else waits.
    assert time_left([10.0, 20.0], 0, [10.0], 2) == 5.0


def test_the_progress_line_counts_every_cell_once(tmp_path):
    cells = build_cells({"run.seed": list("123456")}, tmp_path)
    statuses = ("done", "diverged", "failed")
    for cell, status in zip(cells, statuses):
        cell.result = {"status": status, "seconds": 1.0}
    cells[4].elsewhere = True
    cells[3].folder.mkdir()
    cells[3].log.write_text("loading")
    assert report(cells, [cells[3]], 2, 1).splitlines() == [
        "[1/6 done, 1 diverged, 1 failed, 1 running elsewhere]  left: known after the first cell",
        "  run.seed=4: starting",
    ]


def test_a_folder_is_in_use_by_the_name_that_the_user_typed(tmp_path):
    [cell] = build_cells({"run.seed": ["1"]}, tmp_path)
    cell.folder.mkdir()
    (cell.folder / "run.lock").mkdir()
    with pytest.raises(AuroraError, match=f"^--output: cannot write to {cell.folder} "):
        cell.take()
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(AuroraError, match=f"^--output: cannot write to {tmp_path} "), locked(tmp_path):
        pass


# It imports nothing of the package, which takes seconds.
FAKE = """
import shutil
import sys
from pathlib import Path
options = dict(option.split("=", 1) for option in sys.argv[sys.argv.index("--options") + 1:])
run = Path(options["run.output_dir"]) / "run"
run.mkdir(exist_ok=True)
with (run / "attempts").open("a") as file:
    file.write("x")
if options["model.mode_approx.rank"] == "13":
    print("error: run.seed: unlucky")
    sys.exit(1)
shutil.copytree(Path(__file__).with_name("seed" + options["run.seed"]), run, dirs_exist_ok=True)
"""


def test_finished_cells_are_kept_and_failed_ones_start_again(tmp_path, monkeypatch, capsys):
    """The program around a training program that writes what runs write."""
    yaml = project_yaml(tmp_path)
    (tmp_path / "train.py").write_text(FAKE)
    for seed in (1, 3):
        metrics = {"test": {"agg_metrics": 4 + seed}}
        parameters = counts({"gate": 768, "heads": 100}, 9999)
        leave_summary(tmp_path / f"seed{seed}", parameters=parameters, metrics=metrics)
    monkeypatch.setattr("processes.ROOT", tmp_path)
    grid = ["--grid", "model.mode_approx.rank=4,13", "run.seed=1,3", "--jobs", "3"]
    assert sweep(yaml, *grid) == 1
    rows = read_table(tmp_path / "sweep" / "sweep.csv", "test.agg_metrics", "error")
    assert [(row["kind"], row["cells"], row["status"], row["test.agg_metrics"], row["error"]) for row in rows] == [
        ("cell", "1", "done", "5.0", ""),
        ("cell", "1", "done", "7.0", ""),
        ("cell", "1", "failed", "", "error: run.seed: unlucky"),
        ("cell", "1", "failed", "", "error: run.seed: unlucky"),
        ("mean", "2", "done", "6.0", ""),
        ("spread", "2", "done", str(2**0.5), ""),
    ]
    assert (rows[0]["trained"], rows[0]["trained_without_heads"]) == ("868", "768")
    out = capsys.readouterr().out
    assert "failed: model.mode_approx.rank=13,run.seed=1: error: run.seed: unlucky" in out
    assert "[2/4 done, 2 failed]" in out

    assert sweep(yaml, *grid) == 1
    assert "2 of 4 cells are finished and kept" in capsys.readouterr().out
    attempts = [len(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/run/attempts"))]
    assert attempts == [2, 2, 1, 1]
    assert "with other options, none" in sweep(yaml, *grid, "--options", "run.max_epoch=2")
    yaml.write_text(yaml.read_text().replace("k_test: 4", "k_test: 3"))
    assert "another project" in sweep(yaml, *grid)


def sweep_of_three(rank: int, yaml: Path) -> int:
    """The exit code of a sweep over seeds, in a process of its own."""
    processes.ROOT = yaml.parent
    return sweep(yaml, "--grid", "run.seed=1,2,3", "--options", "model.mode_approx.rank=4")


def test_two_sweeps_at_once_share_the_cells(tmp_path):
    (tmp_path / "train.py").write_text(FAKE.replace("import sys", "import sys, time; time.sleep(0.5)"))
    for seed in (1, 2, 3):
        leave_summary(tmp_path / f"seed{seed}", metrics={"test": {"agg_metrics": seed}})
    assert run_apart(2, sweep_of_three, project_yaml(tmp_path)) == [0, 0]
    assert [path.read_text() for path in (tmp_path / "sweep").glob("*/run/attempts")] == ["x"] * 3
    rows = read_table(tmp_path / "sweep" / "sweep.csv", "test.agg_metrics")
    assert [row["test.agg_metrics"] for row in rows] == ["1.0", "2.0", "3.0", "2.0", "1.0"]


def make_alone(rank: int, yaml: Path) -> None:
    """Make the data of a sweep, which nobody else may do at the same time, in a process of its own."""

    def build(*_given: object) -> None:
        (yaml.parent / "unfinished").mkdir()
        time.sleep(0.5)
        (yaml.parent / "unfinished").rmdir()
        with (yaml.parent / "made").open("a") as file:
            file.write("x")

    program.build_checked = build
    cells = build_cells({"run.seed": ["1"]}, yaml.parent / "sweep")
    check_cells(cells, str(yaml), [], yaml.parent / "sweep")


def test_two_commands_at_once_make_the_data_one_after_the_other(tmp_path):
    run_apart(2, make_alone, project_yaml(tmp_path))
    assert (tmp_path / "made").read_text() == "xx"


def test_who_is_waited_for_longer_is_said_once(tmp_path, monkeypatch, capsys):
    answers = iter([FolderInUse("it is in use by process 7"), FolderInUse("it is in use by process 7")])

    def take(_lock: RunLock, _folder: Path) -> None:
        for answer in answers:
            raise answer

    monkeypatch.setattr(RunLock, "take", take)
    monkeypatch.setattr(program, "PATIENCE", 0.0)
    with locked(tmp_path / "new"):
        assert capsys.readouterr().out == "waiting: it is in use by process 7\n"


@pytest.mark.slow
def test_a_sweep_runs_all_cells_keeps_them_and_goes_on(tmp_path, capsys):
    yaml = project_yaml(tmp_path)
    grid = ["--grid", "model.gate.form=none,residual", "run.seed=1,2"]
    assert sweep(yaml, *grid, "--jobs", "2") == 0
    folder = tmp_path / "sweep"
    rows = read_table(folder / "sweep.csv", "model.gate.form", "run.seed", METRIC)
    assert [(row["kind"], row["model.gate.form"], row["run.seed"]) for row in rows] == [
        ("cell", "none", "1"),
        ("cell", "none", "2"),
        ("cell", "residual", "1"),
        ("cell", "residual", "2"),
        ("mean", "none", ""),
        ("mean", "residual", ""),
        ("spread", "none", ""),
        ("spread", "residual", ""),
    ]
    # The figures are those of the result files.
    for row in rows[:4]:
        [path] = folder.glob(
            f"model.gate.form={row['model.gate.form']},run.seed={row['run.seed']}/*/result/test*.json"
        )
        assert float(row[METRIC]) == json.loads(path.read_text())["metrics"]["image_to_text_r5"]
    values = [float(row[METRIC]) for row in rows[:2]]
    assert float(rows[4][METRIC]) == statistics.fmean(values)
    assert float(rows[6][METRIC]) == pytest.approx(statistics.stdev(values))
    # The gate of the tiny model: 2 d a layer.
    assert float(rows[2]["trained"]) - float(rows[0]["trained"]) == 3 * 2 * 128
    assert series(folder / "sweep.csv", "model.gate.form", [METRIC])["none"][METRIC]["cells"] == values
    out = capsys.readouterr().out
    assert "[4/4 done]" in out and "left: about 0:00:00" in out

    # One more value, one cell lost: only what is missing runs.
    lost = folder / "model.gate.form=none,run.seed=2" / DONE
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{DONE}")}
    assert sweep(yaml, *grid) == 0
    assert "3 of 4 cells are finished and kept" in capsys.readouterr().out
    assert lost.is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # It went on in the run that was there, which had nothing left to train.
    assert len(list(lost.parent.glob("*/config.yaml"))) == 1


@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_no_runs_behind_and_goes_on(tmp_path):
    yaml = project_yaml(tmp_path, run={"max_epoch": 30, "checkpoint_every": 1, "num_workers": 1})
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), "--cfg-path", str(yaml), "--jobs", "2"]
    command += ["--output", str(tmp_path / "sweep"), "--grid", "run.seed=1,2"]
    environment = child_environment()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.time() + 600
    while len(list((tmp_path / "sweep").glob("*/*/checkpoint_latest.pth"))) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    listed = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    runs = listed.stdout.split()
    assert len(runs) == 2 and not [pid for pid in runs if Path(f"/proc/{pid}/exe").exists()]
    # Each went on in its own folder, which nobody else wrote into.
    for folder in (tmp_path / "sweep").glob("run.seed=*"):
        [run] = (path.parent for path in folder.glob("*/config.yaml"))
        log = (run / "log.txt").read_text()
        assert log.count('{"train_epoch"') in (30, 31) and log.count('"final_test_epoch"') == 1


@pytest.mark.slow
def test_cells_of_the_frozen_model_are_tested(tmp_path):
    assert sweep(project_yaml(tmp_path), "--grid", "model.tuning=frozen,heads") == 0


@pytest.mark.slow
def test_a_cell_that_diverges_is_reported_and_the_others_run(tmp_path, capsys):
    yaml = project_yaml(tmp_path)
    # A learning rate at which numbers end.
    assert sweep(yaml, "--grid", "run.init_lr=1e30,1e-3", "--options", "run.max_epoch=3") == 1
    rows = read_table(tmp_path / "sweep" / "sweep.csv", METRIC)
    assert [(row["kind"], row["status"]) for row in rows] == [
        ("cell", "diverged"),
        ("cell", "done"),
        ("mean", "done"),
        ("spread", "done"),
    ]
    assert "finite" in rows[0]["error"] and rows[0][METRIC] == ""
    assert rows[1][METRIC] == rows[2][METRIC] != ""
    out = capsys.readouterr().out
    assert "diverged: run.init_lr=1e30: error:" in out and LOG in out


def test_a_key_that_is_none_stops_the_sweep_before_any_cell(tmp_path):
    assert "model.gate.fomr" in sweep(project_yaml(tmp_path), "--grid", "model.gate.fomr=none")
    assert not (tmp_path / "sweep").exists()
