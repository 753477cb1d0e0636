"""Settings that must be in place before torch, transformers or matplotlib is imported."""

from __future__ import annotations

import gc
import os

# What is imported stays: a collection would walk through all of it, time and again.
gc.disable()

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import lavis_aurora_compat  # noqa: F401

try:
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Let collections look at what tests make, and no more at what was imported for them."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """At its end Python collects what was imported, too: some libraries look for leaks there."""
    gc.enable()  # a process that hands tests to others has collected none
    gc.unfreeze()
