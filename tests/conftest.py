"""Settings that must be in place before torch, transformers or matplotlib is imported."""

from __future__ import annotations

import os

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
