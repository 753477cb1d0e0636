"""One process at a time writes into a run's folder."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import child_environment, start_apart
from tiny import project_yaml

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.training import run_lock
from lavis_aurora.training.run_lock import LOCK, RunLock
from lavis_aurora_cli import train

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds that a run may take on a busy machine


def hold(folder: Path, held: Any) -> None:
    """Hold a lock, with a child that outlives this process, as workers of data loaders do."""
    os.setsid()
    with RunLock() as lock:
        lock.take(folder)
        if os.fork():
            held.set()
        time.sleep(PATIENCE)


@contextmanager
def owner_of(folder: Path) -> Iterator[Any]:
    """A process that holds the lock of a folder."""
    folder.mkdir(exist_ok=True)
    held = multiprocessing.get_context("forkserver").Event()
    process = start_apart(hold, folder, held)
    try:
        assert held.wait(PATIENCE)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


def launch(*command: object) -> subprocess.Popen:
    environment = child_environment()
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_behind(folder: Path, **changes: str) -> Path:
    """A lock file of a process that was killed."""
    with RunLock() as lock:
        lock.take(folder)
        owner = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps({**owner, "process": 123456, **changes}))
    return folder / LOCK


def test_the_file_says_who_holds_it_and_is_gone_at_the_end(tmp_path):
    with RunLock() as lock:
        lock.take(tmp_path)
        lock.take(tmp_path / "another")  # holds one already
        owner = json.loads((tmp_path / LOCK).read_text())
        assert owner["process"] == os.getpid() and owner["host"] and owner["since"]
    assert not list(tmp_path.iterdir())


def test_a_living_owner_is_named_and_a_killed_one_is_no_obstacle(tmp_path, caplog):
    caplog.set_level("INFO")
    with owner_of(tmp_path) as process:
        with RunLock() as lock:
            with pytest.raises(AuroraError, match=f"{tmp_path} is in use by process {process.pid} on .* since "):
                lock.take(tmp_path)
        assert (tmp_path / LOCK).is_file(), "that one's"
        process.kill()
        process.join()
        with RunLock() as lock:
            lock.take(tmp_path)
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        assert f"was left behind by process {process.pid} on " in caplog.text


def test_an_owner_on_another_host_is_not_taken_for_dead(tmp_path):
    path = left_behind(tmp_path, host="elsewhere", boot="another")
    with RunLock() as lock, pytest.raises(AuroraError, match="in use by process 123456 on elsewhere") as refused:
        lock.take(tmp_path)
    assert str(refused.value).endswith(f"if it does not run any more, remove {path}")
    path.unlink()
    with RunLock() as lock:
        lock.take(tmp_path)


def test_one_on_another_host_that_no_longer_touches_it_is(tmp_path, caplog):
    caplog.set_level("INFO")
    path = left_behind(tmp_path, host="elsewhere", boot="another")
    os.utime(path, (time.time() - 3600,) * 2)
    with RunLock() as lock:
        lock.take(tmp_path)
    assert "by process 123456 on elsewhere" in caplog.text and "not touched it for 60 minutes" in caplog.text
    path = left_behind(tmp_path, host="elsewhere", boot="another", touched="by no older version")
    os.utime(path, (time.time() - 3600,) * 2)
    with RunLock() as lock, pytest.raises(AuroraError, match="in use by process 123456 on elsewhere"):
        lock.take(tmp_path)


def test_an_owner_touches_its_file_until_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TOUCH", 0.01)
    with RunLock() as lock:
        lock.take(tmp_path)
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.time() + PATIENCE
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.time() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / LOCK).stat().st_mtime < PATIENCE


@pytest.mark.parametrize(("arguments", "start"), [([], "run.output_dir: "), (["--output"], "--output: ")])
def test_messages_name_what_the_user_typed(tmp_path, arguments, start):
    with RunLock(*arguments) as lock:
        with pytest.raises(AuroraError, match=f"^{start}cannot write to {tmp_path}/none"):
            lock.take(tmp_path / "none")
        left_behind(tmp_path, host="elsewhere", boot="another")
        with pytest.raises(AuroraError, match=f"^{start}{tmp_path} is in use by process 123456 on elsewhere"):
            lock.take(tmp_path)
    with owner_of(tmp_path / "held"), RunLock(*arguments) as lock:
        with pytest.raises(AuroraError, match=f"^{start}{tmp_path}/held is in use by process "):
            lock.take(tmp_path / "held")


def test_a_full_disk_is_said_of_the_lock(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with RunLock() as lock, pytest.raises(AuroraError, match="run.lock .No space left on device"):
        lock.take(tmp_path)


@pytest.mark.parametrize("changes", [{"host": "another container"}, {"boot": "before the machine started again"}])
def test_an_owner_on_this_machine_is(tmp_path, changes):
    left_behind(tmp_path, **changes)
    with RunLock() as lock:
        lock.take(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}"])
def test_a_file_that_names_nobody_is_no_obstacle(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with RunLock() as lock:
        lock.take(tmp_path)


def test_without_locks_the_log_says_so_and_nobody_is_taken_for_dead(tmp_path, monkeypatch, caplog):
    def none(*_args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", none)
    with RunLock() as lock:
        lock.take(tmp_path)
        with RunLock() as other, pytest.raises(AuroraError, match="cannot be seen from here"):
            other.take(tmp_path)
    assert "the file system has no locks (" in caplog.text and not list(tmp_path.iterdir())


def test_a_run_leaves_no_lock_behind_and_meets_that_of_another_in_one_line(tmp_path, capsys):
    yaml = project_yaml(tmp_path, run={"valid_splits": [], "test_splits": [], "resume": "auto"})
    train(["--cfg-path", str(yaml)])
    [run] = (tmp_path / "output").iterdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert run / LOCK not in before
    with owner_of(run) as process:
        with pytest.raises(SystemExit):
            train(["--cfg-path", str(yaml)])
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: run.output_dir: {run} is in use by process {process.pid} on ")
        (run / LOCK).unlink()
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_of_two_starts_at_once_one_goes_on(tmp_path, processes):
    run = {"max_epoch": 30, "checkpoint_every": 1, "resume": "auto", "num_workers": 1, "batch_size_train": 2}
    yaml = project_yaml(tmp_path, run=run)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes > 1 else []
    command = [*launcher, ROOT / "train.py", "--cfg-path", yaml]
    first, deadline = launch(*command), time.time() + PATIENCE
    while not list((tmp_path / "output").glob("*/checkpoint_latest.pth")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    both = [launch(*command) for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], outputs
    refused = outputs[codes.index(1)]
    [line] = [line for line in refused.splitlines() if line.startswith("error")]
    assert " is in use by process " in line
    assert processes > 1 or "Traceback" not in refused
    [folder] = (tmp_path / "output").iterdir()
    epochs = [
        json.loads(text)["train_epoch"]
        for text in (folder / "log.txt").read_text().splitlines()
        if text.startswith('{"train_epoch')
    ]
    # The first may have been killed once its epoch was logged and not yet saved.
    assert sorted({*epochs}) == list(range(30)) and len(epochs) <= 31
    assert not (folder / LOCK).exists()
