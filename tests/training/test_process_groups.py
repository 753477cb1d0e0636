"""Processes of one run find each other, whatever those before them have left in their store, and end together."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import free_port, run_processes
from omegaconf import OmegaConf

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.training.guards import Stopped, StopRequest
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora.training.start import _agree_on_name, join_processes


def start(store: dist.Store, ranks: list[int], seconds: float = 60) -> list[str]:
    """Names that so many of three processes agree on."""
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda rank: _agree_on_name(store, rank, 3, timedelta(seconds=seconds)), ranks))


def test_all_agree_on_a_name_that_none_had_before():
    store, names = dist.HashStore(), []
    store.set_timeout(timedelta(seconds=60))
    for _ in range(5):
        agreed = start(store, [0, 1, 2])
        assert len(set(agreed)) == 1
        names += agreed[:1]
        # Of a start that was killed: it had asked, and nobody answered.
        store.set("ask/1", f"asked in vain after {agreed[0]}")
    assert len(set(names)) == 5


def test_one_that_does_not_start_is_named():
    store = dist.HashStore()
    start(store, [0, 1, 2])
    with pytest.raises(AuroraError, match="run.dist_timeout_minutes: process 1 of 3 did not start in that time"):
        start(store, [0], seconds=0.2)


def test_all_groups_have_the_limit_of_the_yaml():
    url = f"tcp://127.0.0.1:{free_port()}"
    run = {"device": "cpu", "world_size": 1, "dist_url": url, "dist_timeout_minutes": 3.0}
    join_processes(OmegaConf.create(run), 0)
    try:
        with StopRequest():
            groups = list(dist.distributed_c10d._world.pg_map)
        limits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
        assert limits == {timedelta(minutes=3)}
    finally:
        dist.destroy_process_group()


def stopped_at(rank: int) -> tuple[float, float]:
    """When a process has written what it writes, the main one half a second, and when it then stops."""
    time.sleep(0 if rank else 0.5)
    written = time.time()
    with pytest.raises(Stopped):
        AuroraRunner._stop_if_requested(SimpleNamespace(output_dir="run"), signal.SIGTERM)
    return written, time.time()


def test_no_process_stops_before_the_main_one_has_written():
    """An agent, or srun, may end all of them with the first that ends."""
    (written, _), (_, stopped) = run_processes(2, stopped_at)
    assert stopped >= written
