"""The processes of one run find each other."""

from __future__ import annotations

import secrets
import time
from datetime import timedelta

import torch.distributed as dist
from omegaconf import DictConfig

from lavis_aurora.errors import AuroraError


def join_processes(run: DictConfig) -> None:
    """Join the other processes of this run, for tensors on the CPU and on its device; one time limit holds for both.

    Args:
        run: the ``run:`` part of the YAML, with rank and world_size.
    """
    limit = timedelta(minutes=run.dist_timeout_minutes)
    store, rank, world = next(dist.rendezvous(run.dist_url, run.rank, run.world_size, timeout=limit))
    store.set_timeout(limit)
    store = dist.PrefixStore(_start(store, rank, world, limit), store)
    backend = "cpu:gloo,cuda:nccl" if run.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def _start(store: dist.Store, rank: int, world: int, limit: timedelta) -> str:
    """A name of this start of the processes, the same on all of them.

    Where torch.distributed.run starts processes again, they find the same store, with what those before have left in
    it. It tells each of them a count of restarts, but agents on several machines may count differently.
    So the main process makes up a name and hands it to all who ask, each under a key that nobody has used before; it
    may answer some who are gone, and is done once all who live have thanked for this very name.
    """
    name = secrets.token_hex(8)
    if rank:
        store.set(f"ask/{rank}", name)
        name = store.get(f"answer/{name}").decode()
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
