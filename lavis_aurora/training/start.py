"""Start a run: its device and processes, its folder, its seeds; then task, data, model and runner as configured."""

from __future__ import annotations

import logging
import os
import random
import secrets
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from lavis.common.config import Config
from lavis.common.dist_utils import get_rank
from lavis.common.logger import setup_logger
from lavis.common.registry import registry
from omegaconf import DictConfig

from lavis_aurora.common.errors import AuroraError, printable
from lavis_aurora.data.fetch import use_data_root
from lavis_aurora.training.checkpoints import BEST, run_to_resume
from lavis_aurora.training.processes import RunLock, join_processes
from lavis_aurora.training.tasks.base import runnable_task


def _set_up_processes(run: DictConfig) -> None:
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


def _choose_run(cfg: Config, lock: RunLock) -> tuple[str, str | None]:
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


def _agree_on_run(cfg: Config, lock: RunLock) -> str:
    """The run's name; it and the checkpoint are the main process's choice."""
    choice: list[tuple[str, str | None] | None] = [None]
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


def run_config(cfg: Config) -> None:
    """Build task, data, model and runner as configured, and run."""
    run = cfg.run_cfg
    use_data_root()
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
