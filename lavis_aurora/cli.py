"""What command lines do: run what a configuration says, and end with one line where that cannot be."""

from __future__ import annotations

import errno
import logging
import os
import random
import secrets
import sys
import traceback
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank
from lavis.common.logger import setup_logger
from lavis.common.registry import registry

import lavis_aurora.register  # noqa: F401
from lavis_aurora.errors import AuroraError
from lavis_aurora.project import AuroraConfig
from lavis_aurora.training.checkpointing import run_to_resume
from lavis_aurora.training.lavis_tasks import runnable_task
from lavis_aurora.training.stopping import Stopped

# What the system says of a name or a disk, whoever reads or writes there.
SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENAMETOOLONG)
# Letters of an error: paths may be long, and some errors quote what they could not read.
LONGEST_LINE = 4000
# Long enough for the main process to download or make the data.
INIT_TIMEOUT = timedelta(hours=12)


def _set_up_processes(run) -> None:
    """Choose the device and join the other processes, if there are any."""
    if run.device == "auto":
        run.device = "cuda" if torch.cuda.is_available() else "cpu"
    if run.device == "cuda" and not torch.cuda.is_available():
        raise AuroraError("run.device: cuda, but torch sees no GPU; use auto or cpu")
    run.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not run.distributed:
        # Whatever the YAML says: the run's config.yaml tells what ran.
        run.rank, run.world_size = 0, 1
        return
    run.rank, run.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run.gpu = int(os.environ.get("LOCAL_RANK", 0))
    backend = "gloo"
    if run.device == "cuda":
        backend = "nccl"
        if run.gpu >= torch.cuda.device_count():
            raise AuroraError(
                f"--nproc_per_node: process {run.gpu} has no GPU of its own, of {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(run.gpu)
    dist.init_process_group(backend, init_method=run.dist_url, timeout=INIT_TIMEOUT)


def _set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _job_id(cfg: AuroraConfig) -> str:
    """The name of the run to go on with, or one that no other run has; the same on all processes."""
    run = cfg.run_cfg
    name = [f"{datetime.now():%Y%m%d_%H%M%S}_{secrets.token_hex(3)}"]
    if run.resume == "auto" and not run.evaluate and get_rank() == 0:
        try:
            folder = run_to_resume(Path(run.output_dir).expanduser(), cfg.to_dict())
        except OSError as error:
            raise AuroraError(f"run.output_dir: cannot look there ({error}); name another folder") from error
        if folder is None:
            logging.info("run.resume: no run of this configuration under %s; a new one starts", run.output_dir)
        else:
            name = [folder.name]
    if dist.is_initialized():
        dist.broadcast_object_list(name, src=0)
    return name[0]


def run_config(cfg: AuroraConfig) -> None:
    """Build task, data, model and runner as configured, and run."""
    run = cfg.run_cfg
    _set_up_processes(run)
    setup_logger()
    job_id = _job_id(cfg)
    _set_seeds(run.seed + get_rank())
    task = runnable_task(registry.get_task_class(run.task)).setup_task(cfg=cfg)
    datasets = task.build_datasets(cfg)
    model = task.build_model(cfg)
    runner_cls = registry.get_runner_class(run.runner)
    runner = runner_cls(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
    runner.train()
    if dist.is_initialized():
        dist.destroy_process_group()


def _line(error: Exception) -> str:
    """What an error says, as one line of bounded length."""
    # From a data loader's worker it comes with that process's traceback in front.
    text = " ".join(str(error).rpartition("AuroraError: ")[2].split())
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} [...] {text[-half:]}"


def exit_on_error(action: Callable[[], None]) -> None:
    """Run; an AuroraError becomes one line on stderr and exit code 1, a signal 128 + its number."""
    try:
        action()
    except (Exception, Stopped) as error:
        code = 1
        if isinstance(error, Stopped):
            code = 128 + error.signum
            if get_rank() == 0:
                print(error, file=sys.stderr, flush=True)
        elif isinstance(error, AuroraError) or getattr(error, "errno", None) in SYSTEM_ERRORS:
            line = _line(error)
            rank = f" [process {os.environ['RANK']}]" if "RANK" in os.environ else ""
            print(f"error{rank}: {line}", file=sys.stderr, flush=True)
        elif dist.is_initialized():
            traceback.print_exc()
        else:
            raise
        if dist.is_initialized():
            # The others may wait for this process: an orderly end could wait for them in turn.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
