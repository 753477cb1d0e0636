"""Order and randomness of training samples."""

from __future__ import annotations

import random
from io import BytesIO

import numpy as np
import torch

from lavis_aurora.training.order import ResumableSampler, SeededDataset, random_state, seeded, set_random_state


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Drawing(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return draws()


def test_random_numbers_go_on_as_they_would_have():
    file = BytesIO()
    torch.save(random_state(), file)
    expected = draws()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert draws() == expected


def test_a_seeded_block_leaves_no_trace():
    state = random_state()
    expected = draws()
    set_random_state(state)
    with seeded(1, 2):
        inside = draws()
    assert draws() == expected
    with seeded(1, 2):
        assert draws() == inside
    with seeded(1, 3):
        assert not set(draws()) & set(inside)


def test_samples_differ_by_seed_epoch_and_index_alone():
    datasets = [SeededDataset(Drawing(), seed) for seed in (0, 1)]
    seen = set()
    for dataset in datasets:
        for epoch in (0, 1):
            dataset.epoch = epoch
            first = [dataset[i] for i in range(5)]
            assert first == [dataset[i] for i in range(5)][:5]
            assert dataset[3] == first[3], "in any order"
            seen |= {value for sample in first for value in sample}
    assert len(seen) == 2 * 2 * 5 * 3


def test_an_epoch_goes_on_in_its_midst():
    for rank in (0, 1):
        sampler = ResumableSampler(Drawing(), num_replicas=2, rank=rank, seed=3)
        whole = list(sampler)
        sampler.first = 2
        assert list(sampler) == whole[2:]
        assert len(sampler) == len(whole)
