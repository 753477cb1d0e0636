"""scripts/slurm.sh with a cluster of stand-ins: what it starts, and what it does when time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/slurm.sh"


@pytest.fixture
def cluster(tmp_path):
    """srun and scontrol that note how they are called; srun ends at once, or with its tasks, to which scancel sends a
    signal; at one of its own it kills them, as Slurm's does."""
    programs = {
        "srun": 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > patience\necho "srun $*" >> calls\n'
        '[ -e hold ] || exit "${ENDS:-0}"\n'
        'trap "echo killed >> calls; exit 1" TERM\n'
        "for i in $(seq 200); do sleep 0.1; if [ -e signal ]; then echo saved >> calls; exit 143; fi; done",
        "scancel": 'echo "scancel $*" >> calls\n[ ! -e refused ] || exit 1\ntouch signal',
        "scontrol": 'if [ "$1" = show ]; then echo node7; seq -f n%g 8 20000; else echo "scontrol $*" >> calls; fi',
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "a.yaml").touch()
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    return tmp_path, {**os.environ, **slurm, "SLURM_GPUS_ON_NODE": "4", "PATH": path, "PYTHON": "py"}


def test_it_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_it_starts_one_agent_a_node_and_resumes(cluster):
    folder, environment = cluster
    command = ["bash", str(SCRIPT), "a.yaml", "run.max_epoch=2", "model.mode_approx.layers={last: 6}"]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=60)
    [call] = (folder / "calls").read_text().splitlines()
    assert call.startswith("srun --kill-on-bad-exit=1 py -m torch.distributed.run --nnodes=2 --nproc_per_node=4 ")
    assert "--rdzv_endpoint=node7:24711 train.py --cfg-path a.yaml --options run.resume=auto" in call
    assert call.endswith("run.max_epoch=2 model.mode_approx.layers={last: 6}")
    assert (folder / "patience").read_text() == "540\n"  # of the 600 seconds that are left


def test_processors_given_to_sbatch_reach_srun(cluster):
    folder, environment = cluster
    environment = {**environment, "SLURM_CPUS_PER_TASK": "48"}
    subprocess.run(["bash", str(SCRIPT), "a.yaml"], cwd=folder, env=environment, check=True, timeout=60)
    assert (folder / "calls").read_text().startswith("srun --kill-on-bad-exit=1 --cpus-per-task=48 py -m torch")


def test_a_failed_run_fails_the_job(cluster):
    folder, environment = cluster
    done = subprocess.run(["bash", str(SCRIPT), "a.yaml"], cwd=folder, env={**environment, "ENDS": "3"}, timeout=60)
    assert done.returncode == 3 and "scontrol" not in (folder / "calls").read_text()


def test_without_a_project_it_says_how(cluster):
    done = subprocess.run(["bash", str(SCRIPT)], cwd=cluster[0], env=cluster[1], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr


def test_help_is_no_project(cluster):
    command = ["bash", str(SCRIPT), "--help"]
    done = subprocess.run(command, cwd=cluster[0], env=cluster[1], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: sbatch" in done.stdout and not (cluster[0] / "calls").exists()


def test_a_project_that_is_not_there_starts_nothing(cluster):
    command = ["bash", str(SCRIPT), "b.yaml"]
    done = subprocess.run(command, cwd=cluster[0], env=cluster[1], capture_output=True, text=True)
    assert done.returncode == 2 and "no file b.yaml in" in done.stderr and not (cluster[0] / "calls").exists()


def test_without_slurm_it_says_so(cluster):
    folder, environment = cluster
    for name in ("srun", "scontrol", "scancel"):
        (folder / name).unlink()
    command = ["bash", str(SCRIPT), "a.yaml"]
    environment = {**environment, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "this is for a Slurm cluster" in done.stderr


@pytest.mark.parametrize("refused", [False, True])
def test_when_time_is_up_the_run_saves_and_the_job_is_queued_again(cluster, refused):
    """Queued again too where scancel fails, and nothing is saved but what was."""
    folder, environment = cluster
    if refused:
        (folder / "refused").touch()
    (folder / "hold").touch()
    with subprocess.Popen(["bash", str(SCRIPT), "a.yaml"], cwd=folder, env=environment) as job:
        for _ in range(300):
            if (folder / "calls").is_file():
                break
            time.sleep(0.1)
        time.sleep(0.5)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 0
    calls = (folder / "calls").read_text().splitlines()
    assert calls[1:] == ["scancel --signal=TERM 4711", "killed" if refused else "saved", "scontrol requeue 4711"]
