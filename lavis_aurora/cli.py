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
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank
from lavis.common.logger import setup_logger
from lavis.common.registry import registry

import lavis_aurora.register  # noqa: F401
from lavis_aurora.errors import AuroraError, printable
from lavis_aurora.project import AuroraConfig
from lavis_aurora.training.checkpointing import BEST, run_to_resume
from lavis_aurora.training.lavis_tasks import runnable_task
from lavis_aurora.training.process_groups import join_processes
from lavis_aurora.training.run_lock import RunLock
from lavis_aurora.training.stopping import Stopped

# What the system says of a name or a disk, whoever reads or writes there.
SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENAMETOOLONG)
# Letters of an error: paths may be long, and some errors quote what they could not read.
LONGEST_LINE = 4000


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
    if run.device == "cuda":
        if run.gpu >= torch.cuda.device_count():
            raise AuroraError(
                f"--nproc_per_node: process {run.gpu} has no GPU of its own, of {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(run.gpu)
    join_processes(run)


def _set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _choose_run(cfg: AuroraConfig, lock: RunLock) -> tuple[str, str | None]:
    """The name of the run to go on with, whose folder is then locked, or one that no other run has; and the
    checkpoint to evaluate, or to go on from."""
    run = cfg.run_cfg
    name = f"{datetime.now():%Y%m%d_%H%M%S}_{secrets.token_hex(3)}"
    if run.resume != "auto":
        return name, run.resume_ckpt_path
    try:
        folder = run_to_resume(Path(run.output_dir).expanduser(), cfg.to_dict(), run.evaluate)
    except OSError as error:
        raise AuroraError(f"run.output_dir: cannot look there ({error}); name another folder") from error
    if run.evaluate:
        if folder is None:
            raise AuroraError(
                f"run.resume: no run of this configuration under {run.output_dir} to evaluate; name its checkpoint "
                f"by run.resume_ckpt_path=FILE, or set run.resume=none to evaluate the model as it is before training"
            )
        if not (folder / BEST).is_file():
            raise AuroraError(f"run.resume: {folder} has no {BEST}; name a checkpoint by run.resume_ckpt_path=FILE")
        logging.info("run.resume: evaluating %s", folder / BEST)
        return name, str(folder / BEST)
    if folder is None:
        logging.info("run.resume: no run of this configuration under %s; a new one starts", run.output_dir)
        return name, None
    lock.take(folder)
    return folder.name, None


def _agree_on_run(cfg: AuroraConfig, lock: RunLock) -> str:
    """The run's name; it and the checkpoint are the main process's choice."""
    choice: list = [None]
    try:
        if get_rank() == 0:
            choice = [_choose_run(cfg, lock)]
    finally:
        if dist.is_initialized():
            dist.broadcast_object_list(choice, src=0)
    if choice[0] is None:
        sys.exit(1)  # the main process says why
    name, cfg.run_cfg.resume_ckpt_path = choice[0]
    if cfg.run_cfg.evaluate:
        cfg.run_cfg.resume = "none"  # config.yaml names the checkpoint itself
    return name


def _printable_record(record: logging.LogRecord) -> bool:
    """Let names from files show in the log, and not act on the terminal."""
    record.msg, record.args = printable(record.getMessage(), keep="\n\t"), ()
    return True


def run_config(cfg: AuroraConfig) -> None:
    """Build task, data, model and runner as configured, and run."""
    run = cfg.run_cfg
    _set_up_processes(run)
    setup_logger()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_printable_record)
    with RunLock() as lock:
        job_id = _agree_on_run(cfg, lock)
        _set_seeds(run.seed + get_rank())
        task = runnable_task(registry.get_task_class(run.task)).setup_task(cfg=cfg)
        datasets = task.build_datasets(cfg)
        model = task.build_model(cfg)
        runner_cls = registry.get_runner_class(run.runner)
        runner = runner_cls(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
        if get_rank() == 0:
            lock.take(runner.output_dir)
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
            if "timed out" in str(error).lower():
                print("error: another process did not answer within run.dist_timeout_minutes", file=sys.stderr)
        else:
            raise
        if dist.is_initialized():
            # The others may wait for this process: an orderly end could wait for them in turn.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
