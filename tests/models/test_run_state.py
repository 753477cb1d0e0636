"""What a checkpoint of a run takes from a model."""

from __future__ import annotations

import torch
from tiny import tiny_model


def test_queues_are_copies_that_training_leaves_alone():
    model = tiny_model(queue_size=16)
    kept = model.queue_state()
    before = {name: queue.clone() for name, queue in model.queues().items()}
    assert kept.keys() == before.keys() and kept
    for queue in model.queues().values():
        queue.zero_()
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    assert model.load_queue_state(kept)
    assert all(torch.equal(queue, before[name]) for name, queue in model.queues().items())


def test_queues_of_another_kind_are_not_taken():
    model = tiny_model(queue_size=16)
    kept = model.queue_state()
    for other in (kept["idx_queue"].float(), kept["idx_queue"][:, :8]):
        assert not model.load_queue_state({**kept, "idx_queue": other})
    assert not model.load_queue_state({})
