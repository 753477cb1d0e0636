"""The order and the randomness of training samples: the same wherever a run is resumed, however it is shared out."""

from __future__ import annotations

import random
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from lavis.common.config import Config
from lavis.common.dist_utils import get_rank, get_world_size
from lavis.datasets.datasets.dataloader_utils import PrefetchLoader
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lavis_aurora.common.errors import AuroraError, did_you_mean, shown
from lavis_aurora.config.dataset_keys import named_splits


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's global generators (and of this process's GPU), as plain values."""
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def is_random_state(state: dict[str, Any]) -> bool:
    """Whether generators take it; errors, of many kinds, are another no."""
    _put_back(state, random.Random(), np.random.RandomState(), torch.Generator())
    return "cuda" not in state or state["cuda"].dtype is torch.uint8


def _put_back(state: dict[str, Any], python: Any, numpy: Any, generator: torch.Generator) -> None:
    version, values, gauss = state["python"]
    python.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    generator.set_state(state["torch"])


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` gave."""
    _put_back(state, random, np.random, torch.default_generator)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Inside the block the global generators start from ``seed``; afterwards they go on as if nothing had been."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Few words tell nearby seeds well apart.
    words = np.random.SeedSequence(seed).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # torch.manual_seed would also touch the GPU's generator.
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


class SeededDataset(Dataset[Any]):
    """Random crops and frames of a sample follow from seed, epoch and sample alone, not from worker or process.

    Attributes:
        epoch: to be set before each epoch, before workers start.
    """

    def __init__(self, inner: Dataset[Any], seed: int) -> None:
        self.inner, self.seed = inner, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(cast(Sized, self.inner))

    def __getitem__(self, index: int) -> Any:
        with seeded(self.seed, self.epoch, index):
            return self.inner[index]


class ResumableSampler(DistributedSampler[Any]):
    """DistributedSampler that can start an epoch in its midst.

    Attributes:
        first: samples of this process that are left out at the epoch's start.
    """

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)


def start_epoch(loader: Iterable[Any], epoch: int, batches: int) -> None:
    """Let a loader of :func:`build_loader` begin an epoch, from 0, after so many batches; LAVIS's streams go on."""
    if isinstance(loader, PrefetchLoader):
        loader = loader.loader
    if isinstance(loader, DataLoader):
        dataset, sampler = cast(SeededDataset, loader.dataset), cast(ResumableSampler, loader.sampler)
        dataset.epoch = epoch
        sampler.set_epoch(epoch)
        sampler.first = batches * cast(int, loader.batch_size)


# What torch says of a loader's processes, wherever in the main process it learns of it.
LOST = re.compile(r"DataLoader worker \(pid.*?\) (is killed|exited).*|.*shared memory.*|.*</torch_\d.*")


@contextmanager
def loader_errors() -> Iterator[None]:
    """Around what reads from loaders: processes that cannot be started, or are lost, in one line.

    Raises:
        AuroraError: that happened.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        lost = LOST.search(str(error))
        places = traceback.extract_tb(error.__traceback__)
        if lost is None and not (isinstance(error, OSError) and any("multiprocessing" in p.filename for p in places)):
            raise
        raise AuroraError(
            f"run.num_workers: a process that reads the data was lost ({lost[0] if lost else error}); if main memory "
            f"or /dev/shm ran out, set fewer, or run.num_workers=0, which needs no /dev/shm (docker run --shm-size "
            f"makes it larger)"
        ) from error


def build_loader(
    dataset: Dataset[Any],
    batch_size: int,
    collate: Callable[[list[Any]], Any],
    seed: int,
    num_workers: int,
    is_train: bool,
    shared: bool,
    pin_memory: bool,
) -> DataLoader[Any]:
    """A loader over a dataset; ``shared`` gives each process its part of the samples.

    Raises:
        AuroraError: not one batch can be trained on.
    """
    if is_train:
        dataset = SeededDataset(dataset, seed)
    sampler = None
    if shared:
        sampler = ResumableSampler(
            dataset, get_world_size(), get_rank(), shuffle=is_train, seed=seed, drop_last=is_train
        )
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        sampler=sampler,
        collate_fn=collate,
        drop_last=is_train,
        # Of its own, so that iterating draws nothing from the global one.
        generator=torch.Generator(),
    )
    if is_train:
        check_batch(batch_size, len(cast(Sized, dataset)))
    return loader


def check_batch(batch_size: int, samples: int) -> None:
    """Refuse a train split that is smaller than a batch over all processes."""
    processes = get_world_size()
    if samples < batch_size * processes:
        raise AuroraError(
            f"run.batch_size_train: {batch_size} on {processes} processes is more than the {samples} samples of the "
            f"train split; lower it"
        )


def check_splits(cfg: Config, datasets: Mapping[str, Mapping[str, Any]], shard_evaluation: bool) -> None:
    """Refuse splits that are not there, or with which LAVIS could not train or rank.

    Args:
        cfg: LAVIS's configuration, with ``run_cfg`` and ``datasets_cfg``.
        datasets: by name and split, those that the run needs.
        shard_evaluation: see :class:`lavis_aurora.training.tasks.base.AuroraTaskBase`.
    """
    for split in ("val", "test"):
        names = [name for name, splits in datasets.items() if split in splits]
        if len(names) > 1:
            raise AuroraError(f"datasets: {' and '.join(names)} have a {split} split each; name one of them")
    run: DictConfig = cfg.run_cfg
    known = {split for splits in datasets.values() for split in splits}
    known |= {split for dataset in cfg.datasets_cfg.values() for split in named_splits(dataset)}
    for key in ("test_splits",) if run.evaluate else ("train_splits", "valid_splits", "test_splits"):
        for split in run[key]:
            if split not in known:
                raise AuroraError(
                    f"run.{key}: no split {shown(split)} in the datasets{did_you_mean(split, known)}; [] for none"
                )
    if not run.evaluate and run.train_dataset_ratios is not None:
        # LAVIS draws by them from streamed datasets alone, and says nothing of others.
        raise AuroraError(
            "run.train_dataset_ratios: has no effect on datasets with annotation files, all of whose samples make an "
            "epoch; leave it out, and to weigh a set name its file several times under its annotations' storage"
        )
    if not run.evaluate and "train" not in run.train_splits:
        raise AuroraError("run.train_splits: training takes the split train; name it, or use evaluate.py")
    for key in ("valid_splits", "test_splits"):
        if "train" in run[key] and not shard_evaluation:
            raise AuroraError(f"run.{key}: the split train holds pairs and cannot be ranked; name val or test")
