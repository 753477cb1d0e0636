"""Run a function, or a program of this project, in processes of their own; functions in several, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lavis_aurora_compat  # noqa: F401

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["lavis_aurora_compat", "lavis_aurora", "torch.distributed"]


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment, for a program of this project; it finds the LAVIS that this process has."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join(
    rank: int, world: int, environment: dict[str, str], function: Callable, args: tuple, results: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()  # it is that of the process that was forked
    os.environ.update(environment)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        results[rank] = function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_processes(world: int, function: Callable, *args: Any) -> list:
    """``function(rank, *args)`` of each process; it must be defined at the top of a module."""
    # A process that has imported the package is forked, instead of each importing it again.
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (world, environment, function, args, results)
        mp.start_processes(_join, arguments, nprocs=world, start_method="forkserver")
        return [results[rank] for rank in range(world)]
