"""Run a function, or a program of this project, in processes of their own; in several, over gloo."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import redirect_stdout
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


def _forkserver() -> Any:
    """Processes by a fork of one that has imported the package, instead of each importing it again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_apart(function: Callable, *args: Any) -> Any:
    """A process that runs ``function(*args)``, forked from one that has imported the package."""
    process = _forkserver().Process(target=function, args=args)
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join(rank: int, world: int, function: Callable, *args: Any) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        return function(rank, *args)
    finally:
        dist.destroy_process_group()


def _as_program(rank: int, world: int, function: Callable, argv: list[str]) -> str:
    """What a program prints that is told of the others as torch.distributed.run tells it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    with redirect_stdout(io.StringIO()) as out:
        function(argv)
    return out.getvalue()


def become_program(environment: dict[str, str]) -> None:
    """Make a process that was forked from one with the package like a program that starts with this environment."""
    torch.set_num_threads(1)
    # As in a program on Linux: a data process started as this one was would import the package anew.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()  # it is that of the process that was forked
    os.environ.update(environment)


def _start(rank: int, environment: dict[str, str], function: Callable, args: tuple, results: Any) -> None:
    become_program(environment)
    results[rank] = function(rank, *args)


def run_processes(world: int, function: Callable, *args: Any) -> list:
    """``function(rank, *args)`` of each process; it must be defined at the top of a module."""
    return _run(world, _join, world, function, *args)


def run_apart(world: int, function: Callable, *args: Any) -> list:
    """``function(rank, *args)`` of processes that know nothing of each other."""
    return _run(world, function, *args)


def run_programs(world: int, function: Callable, argv: list[str]) -> list[str]:
    """What ``function(argv)`` prints in each process of a run, e.g. of the program ``train``."""
    return _run(world, _as_program, world, function, argv)


def _run(world: int, function: Callable, *args: Any) -> list:
    _forkserver()
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (environment, function, args, results)
        mp.start_processes(_start, arguments, nprocs=world, start_method="forkserver")
        return [results[rank] for rank in range(world)]
