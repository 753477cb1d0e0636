"""Runs of several processes through the real command: what one of them meets, all of them learn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import become_program, child_environment, free_port, start_apart
from tiny import project_yaml

from lavis_aurora.training.checkpoints import read_checkpoint
from lavis_aurora_cli import train

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds that a run may take on a busy machine


def start(yaml: Path, processes: int, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += [str(ROOT / "train.py"), "--cfg-path", str(yaml), *(["--options", *options] if options else [])]
    environment = child_environment()
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(pid: int) -> list[int]:
    done = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def take_part(rank: int, environment: dict[str, str], yaml: Path, said: Path) -> None:
    """One of two processes of a run, as torch.distributed.run starts them; what it prints goes to a file."""
    become_program({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    sys.stdout = sys.stderr = said.open("w")
    train(["--cfg-path", str(yaml)])


def test_who_cannot_read_a_picture_ends_at_once_and_so_does_the_other(tmp_path):
    """Without waiting for each other, though nobody ends them; in processes forked from one that has LAVIS."""
    yaml = project_yaml(tmp_path, count=6, run={"batch_size_train": 1})
    (tmp_path / "data" / "images" / "train" / "002.jpg").write_bytes(b"")
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    said = [tmp_path / "0.txt", tmp_path / "1.txt"]
    processes = [start_apart(take_part, rank, environment, yaml, path) for rank, path in enumerate(said)]
    try:
        for process in processes:
            process.join(PATIENCE / 2)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [1, 1]
    output = "".join(path.read_text() for path in said)
    [line] = [line for line in output.splitlines() if line.startswith("error [process ")]
    assert "cannot read" in line and "002.jpg" in line


@pytest.mark.slow
def test_a_picture_that_one_process_cannot_read_ends_them_all(tmp_path):
    yaml = project_yaml(tmp_path, count=6, run={"batch_size_train": 1})
    (tmp_path / "data" / "images" / "train" / "002.jpg").write_bytes(b"")
    process = start(yaml, 2)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    [line] = [line for line in output.splitlines() if line.startswith("error [process ")]
    assert "cannot read" in line and "002.jpg" in line


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down(tmp_path):
    yaml = project_yaml(tmp_path, run={"max_epoch": 1000, "batch_size_train": 2})
    process = start(yaml, 2)
    deadline = time.time() + PATIENCE
    while not list((tmp_path / "output").glob("*/checkpoint_latest.pth")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    victim = children(process.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    killed = time.time()
    output, _ = process.communicate(timeout=120)
    assert time.time() - killed < 60
    assert process.returncode != 0
    assert f"pid: {victim}" in output.replace("(pid", "pid") and "SIGKILL" in output
    [run] = (tmp_path / "output").iterdir()
    read_checkpoint(run / "checkpoint_latest.pth")


@pytest.mark.slow
def test_three_processes_test_as_one(tmp_path):
    """7 pictures and 14 captions: no share is like another."""
    results = []
    for processes, batch in ((1, 6), (3, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        yaml = project_yaml(folder, count=7, captions_each=2, run={"batch_size_train": batch})
        process = start(yaml, processes)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        [file] = folder.glob("output/*/result/test_epoch_best.json")
        result = json.loads(file.read_text())
        [log] = folder.glob("output/*/log.txt")
        [stats] = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"train_epoch')]
        results.append((result["images"], result["texts"], stats))
    (*counts, one), (*others, three) = results
    assert counts == others == [7, 14]
    for key, value in one.items():
        assert three[key] == pytest.approx(value, abs=2e-3), key
