"""A toy model over plain torch layers: fused and separate projections of two widths, and a head."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavis_aurora import ModeApproxConfig, inject_mode_approx
from lavis_aurora.mode_approx.adapter_read import CONFIG, METADATA, TENSORS, tensors_hash

TARGETS = ["qkv", "query", "key"]


class Toy(nn.Module):
    """x (batch, 8) to (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.query = nn.Linear(24, 6)
        self.key = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.key(torch.tanh(self.query(torch.tanh(self.qkv(x)))))))


def adapted_toy(rank: int = 4, seed: int = 0, update_seed: int = 1, **changes) -> Toy:
    """A toy with an adapter that does something; the same backbone for the same ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Toy()
        inject_mode_approx(model, ModeApproxConfig(rank=rank, **changes), TARGETS)
        randomize(model, "default", update_seed)
    return model.eval()


def randomize(model: nn.Module, name: str, seed: int) -> None:
    """Random values for one set of factors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.mode_approx.sets[name].parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def inputs(count: int = 5) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(2))


def rewrite_adapter(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    """Change keys or tensors of an adapter folder as a stranger would: with checksums that fit."""
    tensors = load_file(folder / TENSORS) if tensors is None else tensors
    data = {**json.loads((folder / CONFIG).read_text()), "tensors_sha256": tensors_hash(tensors), **changes}
    text = json.dumps(data)
    (folder / CONFIG).write_text(text)
    save_file(tensors, folder / TENSORS, {METADATA: text})


def as_format_1(folder: Path, **changes: Any) -> None:
    """Make an adapter folder one of the older version, with ``changes`` of its keys."""
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    data = {**json.loads((folder / CONFIG).read_text()), "format": 1, "tensors_sha256": digest, **changes}
    (folder / CONFIG).write_text(json.dumps(data))
