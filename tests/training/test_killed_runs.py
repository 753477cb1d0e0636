"""Law 8 for runs in processes of their own: killed, stopped or hung anywhere, they go on to the same end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from distributed import ROOT, child_environment, free_port
from resumable import damage_in_data, image_project
from runs import assert_same, final, only_run

from lavis_aurora.training.checkpoints import BEST, LATEST, read_checkpoint, write_checkpoint
from lavis_aurora.training.guards import Stopped, StopRequest
from lavis_aurora_cli import train

EPOCHS_IN_TWO = 30
PATIENCE = 600  # seconds that a run may take on a busy machine


def command(yaml: Path, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), "--cfg-path", str(yaml)]


def start(yaml: Path, processes: int = 1) -> subprocess.Popen:
    environment = child_environment()
    return subprocess.Popen(
        command(yaml, processes), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_second_signal_and_one_outside_of_steps_stop_at_once():
    with StopRequest() as stop:
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        stop.stepping = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum() == signal.SIGTERM
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


@pytest.mark.slow
def test_killed_a_dozen_times_a_run_ends_as_an_undisturbed_one(tmp_path):
    run = {"max_epoch": 60}  # on a quick machine an epoch takes a tenth of a second
    train(["--cfg-path", str(image_project(tmp_path / "whole", **run))])
    yaml, draw, folder = image_project(tmp_path / "killed", **run), random.Random(0), tmp_path / "killed"
    for _ in range(12):
        before, process, begin = saved_at(folder), start(yaml), time.time()
        # Once it goes on, at a random moment: within a step, a checkpoint or an evaluation.
        while saved_at(folder) in ([], before) and process.poll() is None and time.time() < begin + PATIENCE:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        assert process.poll() is None, f"it ended before it was killed: {process.communicate()[0]}"
        process.kill()
        process.communicate()
        for path in folder.glob("output/*/*.pth"):
            read_checkpoint(path)
    process = start(yaml)
    log, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, log
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))


@pytest.mark.slow
def test_two_processes_stop_together_and_resume(tmp_path):
    for name in ("whole", "stopped"):
        yaml = image_project(tmp_path / name)
        if name == "stopped":
            process = start(yaml, processes=2)
            deadline = time.time() + PATIENCE
            while not saved_at(tmp_path / name) and time.time() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode != 0 and "stopped by SIGTERM" in output, output
        process = start(yaml, processes=2)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    assert_same(final(tmp_path / "whole"), final(tmp_path / "stopped"))


@pytest.mark.slow
def test_two_processes_go_on_without_the_best_and_the_latest(tmp_path):
    yaml = image_project(tmp_path, max_epoch=2)
    for damage in (None, "best", "latest and best"):
        if damage == "best":
            run = only_run(tmp_path)
            whole = read_checkpoint(run / LATEST)
            # An earlier epoch was the best: the last one is validated again.
            write_checkpoint({**whole, "best_epoch": 0, "best_metric": 1e9}, run / LATEST)
        for name in {"best": [BEST], "latest and best": [LATEST, BEST]}.get(damage, []):
            damage_in_data(run / name)
        process = start(yaml, processes=2)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        assert ("is lost" in output or "is written anew" in output) == (damage is not None), output
    assert_same(whole["model"], read_checkpoint(run / LATEST)["model"])
    assert read_checkpoint(run / BEST)["epoch"] == 1


def saved_at(folder: Path) -> list[int]:
    """Times of the newest checkpoint, in nanoseconds; empty before the first."""
    with suppress(FileNotFoundError):  # while a new one takes its place
        return [path.stat().st_mtime_ns for path in (folder / "output").glob("*/checkpoint_latest.pth")]
    return []


def wait_for_progress(folder: Path, *processes: subprocess.Popen) -> None:
    """Until a checkpoint is written."""
    before, deadline = saved_at(folder), time.time() + PATIENCE
    while saved_at(folder) in ([], before):
        assert time.time() < deadline
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    done = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def ended(pid: int) -> bool:
    """Whether a process, which may be another's child, has ended."""
    deadline = time.time() + 60
    while time.time() < deadline:
        status = Path(f"/proc/{pid}/stat")
        with suppress(FileNotFoundError, ProcessLookupError):
            if status.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


def start_agent(yaml: Path, *launcher: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
    """``torch.distributed.run`` with these arguments."""
    parts = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "train.py")]
    parts += ["--cfg-path", str(yaml), *(["--options", *options] if options else [])]
    environment = child_environment()
    log = (yaml.parent / f"agent_{time.time_ns()}.log").open("w+")
    return subprocess.Popen(parts, env=environment, stdout=log, stderr=log, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """What a run of two processes leaves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(image_project(folder, max_epoch=EPOCHS_IN_TWO), processes=2)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return final(folder)


@pytest.mark.slow
def test_two_kills_in_a_row_under_max_restarts(tmp_path, undisturbed):
    yaml = image_project(tmp_path / "killed", max_epoch=EPOCHS_IN_TWO)
    agent = start_agent(yaml, "--standalone", "--nproc_per_node=2", "--max-restarts=3")
    for victim in (1, 0):
        wait_for_progress(tmp_path / "killed", agent)
        pids = children(agent.pid)
        os.kill(pids[victim], signal.SIGKILL)
        assert all(map(ended, pids))
    assert agent.wait(timeout=PATIENCE) == 0
    assert_same(undisturbed, final(tmp_path / "killed"))


def start_one_of_two(yaml: Path, port: int, host: bool, *more: str) -> subprocess.Popen:
    """An agent of a run on two machines; the host serves the store by which the agents meet."""
    where = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1")
    return start_agent(yaml, "--nnodes=2", "--nproc_per_node=1", *where, f"--rdzv-conf=is_host={int(host)}", *more)


def start_both(yaml: Path, port: int, *more: str) -> list[subprocess.Popen]:
    return [start_one_of_two(yaml, port, host, *more) for host in (True, False)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_an_agent_that_is_killed_takes_the_other_down_and_both_resume(tmp_path, undisturbed, victim):
    yaml = image_project(tmp_path / "killed", max_epoch=EPOCHS_IN_TWO)
    agents = start_both(yaml, free_port())
    wait_for_progress(tmp_path / "killed", *agents)
    workers = [pid for agent in agents for pid in children(agent.pid)]
    assert len(workers) == 2
    agents[victim].kill()
    assert agents[1 - victim].wait(timeout=120) != 0
    assert all(map(ended, workers)), "none goes on without its agent"
    agents = start_both(yaml, free_port())
    assert [agent.wait(timeout=PATIENCE) for agent in agents] == [0, 0]
    assert_same(undisturbed, final(tmp_path / "killed"))


@pytest.mark.slow
def test_agents_that_count_restarts_differently_find_each_other(tmp_path, undisturbed, monkeypatch):
    """One agent is new, the other has started its processes again."""
    # Without it torch's agent waits for a new one in vain.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    yaml, port = image_project(tmp_path / "killed", max_epoch=EPOCHS_IN_TWO), free_port()
    host, guest = start_both(yaml, port, "--max-restarts=3")
    wait_for_progress(tmp_path / "killed", host, guest)
    guest.kill()
    guest.wait()
    guest = start_one_of_two(yaml, port, False, "--max-restarts=3")
    assert [agent.wait(timeout=PATIENCE) for agent in (host, guest)] == [0, 0]
    assert_same(undisturbed, final(tmp_path / "killed"))


@pytest.mark.slow
def test_a_process_that_hangs_takes_the_others_down_within_the_time_limit(tmp_path):
    yaml = image_project(tmp_path, max_epoch=1000)
    agent = start_agent(yaml, "--standalone", "--nproc_per_node=2", options=("run.dist_timeout_minutes=0.2",))
    wait_for_progress(tmp_path, agent)
    hangs = children(agent.pid)[1]
    os.kill(hangs, signal.SIGSTOP)
    stopped = time.time()
    assert agent.wait(timeout=PATIENCE) != 0
    assert time.time() - stopped < 120, "12 seconds, the agent's 30 until it kills, and a busy machine"
    assert ended(hangs)
    [log] = tmp_path.glob("agent_*.log")
    assert "error: another process did not answer within run.dist_timeout_minutes" in log.read_text()
