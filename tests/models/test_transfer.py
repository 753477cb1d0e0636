"""Tokens reach the device as they are, and on a GPU without waiting for it."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchEncoding

from lavis_aurora.models.matching import to_device

ROWS = [[1, 5, 2], [1, 2, 0]]


def tokens() -> BatchEncoding:
    ids = torch.tensor(ROWS)
    return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_in_main_memory_they_are_what_they_were(device):
    moved = to_device(tokens(), device)
    assert moved.input_ids.tolist() == ROWS and moved["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert not moved.input_ids.is_pinned()


def test_a_gpu_gets_each_of_them_from_pinned_memory_without_waiting(monkeypatch):
    """What torch is asked for, on machines without a GPU too."""
    asked = []

    def pin_memory(ids):
        asked.append("pinned")
        return ids

    def to(ids, device, non_blocking=False):
        asked.append((str(device), non_blocking))
        return ids

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = to_device(tokens(), "cuda:1")
    assert asked == ["pinned", ("cuda:1", True)] * 2
    assert sorted(moved) == ["attention_mask", "input_ids"] and moved.input_ids.tolist() == ROWS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_is_waited_for():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = to_device(tokens(), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert moved.input_ids.is_cuda and moved.input_ids.tolist() == ROWS
