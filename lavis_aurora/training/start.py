"""Start a run: its device and processes, its folder, its seeds; then task, data, model and runner as configured."""

from __future__ import annotations

import logging
import os
import random
import secrets
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lavis.common.config import Config
from lavis.common.dist_utils import get_rank
from lavis.common.logger import setup_logger
from lavis.common.registry import registry
from omegaconf import DictConfig
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from lavis_aurora.adapters.switching import find_adapters
from lavis_aurora.common.errors import AuroraError, printable
from lavis_aurora.common.summary import read_summary
from lavis_aurora.data.fetch import use_data_root
from lavis_aurora.data.report import LOOK_SECONDS
from lavis_aurora.evaluation.encode import broadcast
from lavis_aurora.project import load_run_config
from lavis_aurora.training.checkpoints import BEST, LATEST, find_resumable_run, newest_run_differs
from lavis_aurora.training.data import log, read_data
from lavis_aurora.training.loggers import check_loggers
from lavis_aurora.training.nested import choose_rank
from lavis_aurora.training.order import loader_errors
from lavis_aurora.training.resuming import load_weights
from lavis_aurora.training.run_lock import RunLock


def join_processes(run: DictConfig, rank: int) -> None:
    """Join the other processes of this run, for tensors on the CPU and on its device; one time limit holds for both.

    Args:
        run: the ``run:`` part of the YAML, with world_size.
        rank: of this process.
    """
    limit = timedelta(minutes=run.dist_timeout_minutes)
    store, rank, world = next(rendezvous(run.dist_url, rank, run.world_size, timeout=limit))
    store.set_timeout(limit)
    store = PrefixStore(_agree_on_name(store, rank, world, limit), store)
    backend = "cpu:gloo,cuda:nccl" if run.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def _agree_on_name(store: Any, rank: int, world: int, limit: timedelta) -> str:
    """A name of this start of the processes, the same on all of them.

    Where torch.distributed.run starts processes again, they find the same store, with what those before have left in
    it. It tells each of them a count of restarts, but agents on several machines may count differently.
    So the main process makes up a name and hands it to all who ask, each under a key that nobody has used before; it
    may answer some who are gone, and is done once all who live have thanked for this very name.
    """
    name = secrets.token_hex(8)
    if rank:
        store.set(f"ask/{rank}", name)
        name = str(store.get(f"answer/{name}").decode())
        store.set(f"thanks/{name}/{rank}", "")
        return name
    deadline, waiting = time.monotonic() + limit.total_seconds(), list(range(1, world))
    while waiting:
        for other in waiting:
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", name)
        waiting = [other for other in waiting if not store.check([f"thanks/{name}/{other}"])]
        if waiting and time.monotonic() > deadline:
            raise AuroraError(f"run.dist_timeout_minutes: process {waiting[0]} of {world} did not start in that time")
        time.sleep(0.02 * bool(waiting))
    return name


def _set_up_processes(run: DictConfig) -> None:
    """Choose the device and join the other processes, if there are any."""
    if run.device == "auto":
        run.device = "cuda" if torch.cuda.is_available() else "cpu"
    if run.device == "cuda" and not torch.cuda.is_available():
        raise AuroraError("run.device: cuda, but torch sees no GPU; use auto or cpu")
    run.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not run.distributed:
        # Whatever the YAML says: the run's config.yaml tells what ran.
        run.world_size = 1
        return
    run.world_size = int(os.environ["WORLD_SIZE"])
    run.gpu = int(os.environ.get("LOCAL_RANK", 0))
    if run.device == "cuda":
        if run.gpu >= torch.cuda.device_count():
            raise AuroraError(
                f"--nproc_per_node: process {run.gpu} has no GPU of its own, of {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(run.gpu)
    join_processes(run, int(os.environ["RANK"]))


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
        folder = find_resumable_run(Path(run.output_dir).expanduser(), cfg.to_dict(), run.evaluate)
    except OSError as error:
        raise AuroraError(f"run.output_dir: cannot look there ({error}); name another folder") from error
    if run.evaluate:
        if folder is None:
            raise AuroraError(
                f"run.resume: no run of this configuration under {run.output_dir} to evaluate"
                f"{newest_run_differs(Path(run.output_dir).expanduser(), cfg.to_dict())}; give its options, name its "
                f"checkpoint by run.resume_ckpt_path=FILE, or set run.resume=none to evaluate the model as it is "
                f"before training"
            )
        tested = folder / (BEST if run.valid_splits else LATEST)
        if not tested.is_file():
            raise AuroraError(
                f"run.resume: {folder} has no {tested.name}; name a checkpoint by run.resume_ckpt_path=FILE"
            )
        logging.info("run.resume: evaluating %s", tested)
        return name, str(tested)
    if folder is None:
        logging.info("run.resume: no run of this configuration under %s; a new one starts", run.output_dir)
        return name, None
    lock.take(folder)
    return folder.name, None


def _agree_on_run(cfg: Config, lock: RunLock, folder: Path | None) -> str:
    """The run's name, of ``folder`` if it is named; it and the checkpoint are the main process's choice."""
    choice: tuple[str, str | None] | None = None
    try:
        if get_rank() == 0 and folder is not None:
            lock.take(folder)
            choice = folder.name, None
        elif get_rank() == 0:
            choice = _choose_run(cfg, lock)
    finally:
        choice = broadcast(choice)
    if choice is None:
        sys.exit(1)  # the main process says why
    name, cfg.run_cfg.resume_ckpt_path = choice
    if cfg.run_cfg.evaluate:
        cfg.run_cfg.resume = "none"  # config.yaml names the checkpoint itself
    return name


def _printable_record(record: logging.LogRecord) -> bool:
    """Let names from files show in the log, and not act on the terminal."""
    record.msg, record.args = printable(record.getMessage(), keep="\n\t"), ()
    return True


def run_config(cfg: Config, finished: Path | None = None) -> Path:
    """Build task, data, model and runner as configured, and run; the folder of the run.

    Args:
        cfg: LAVIS's configuration.
        finished: the folder of a run of it; its best epoch's rank is then chosen, and nothing else is done.
    """
    run = cfg.run_cfg
    use_data_root()
    check_loggers(run.loggers)
    _set_up_processes(run)
    setup_logger()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_printable_record)
    with RunLock() if finished is None else RunLock("RUN") as lock:
        job_id = _agree_on_run(cfg, lock, finished)
        _set_seeds(run.seed + get_rank())
        task, datasets = read_data(cfg, LOOK_SECONDS, log)
        model = task.build_model(cfg)
        tuned = not run.evaluate or run.resume_ckpt_path or cfg.model_cfg.get("adapter")
        if not tuned and find_adapters(model) is not None:
            logging.warning("no model.adapter, no run.resume_ckpt_path: the model is evaluated as before training")
        runner_cls = registry.get_runner_class(run.runner)
        runner = runner_cls(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
        if get_rank() == 0:
            lock.take(runner.output_dir)
            task.data_report.write(runner.output_dir)
        if finished is None:
            runner.train()
        else:
            with loader_errors():
                load_weights(model, finished / BEST)
                choose_rank(runner)
    if dist.is_initialized():
        dist.destroy_process_group()
    return Path(runner.output_dir)


def find_rank(run: str, options: Sequence[str] | None = None) -> Path:
    """Choose the rank of a finished run, see ``run.rank``; its folder.

    Args:
        run: that folder.
        options: ``key=value`` over its configuration, e.g. other paths of the data.

    Raises:
        AuroraError: it is no folder of a finished run with a best epoch, or its training was not nested.
    """
    folder = Path(run).expanduser().absolute()
    if not (folder / BEST).is_file() or read_summary(folder)["status"] != "finished":
        raise AuroraError(f"{run}: no folder of a finished run with a {BEST}; let it end by run.resume=auto first")
    cfg = load_run_config(folder, ["run.rank=auto", *(options or [])])
    cfg.run_cfg.output_dir = str(folder.parent)
    return run_config(cfg, folder)
