"""The order and the randomness of training samples: the same wherever a run is resumed, however it is shared out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's global generators (and of this process's GPU), as plain values."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
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


class SeededDataset(Dataset):
    """Random crops and frames of a sample follow from seed, epoch and sample alone, not from worker or process.

    Attributes:
        epoch: to be set before each epoch, before workers start.
    """

    def __init__(self, inner: Dataset, seed: int) -> None:
        self.inner, self.seed = inner, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict:
        with seeded(self.seed, self.epoch, index):
            return self.inner[index]


class ResumableSampler(DistributedSampler):
    """DistributedSampler that can start an epoch in its midst.

    Attributes:
        first: samples of this process that are left out at the epoch's start.
    """

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)
