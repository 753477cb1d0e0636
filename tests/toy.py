"""A toy model over plain torch layers: fused and separate projections of two widths, and a head."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from lavis.models.base_model import MomentumDistilationMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavis_aurora import ModeApproxConfig, inject_mode_approx
from lavis_aurora.adapters.config import CONFIG, METADATA, TENSORS, tensors_hash
from lavis_aurora.adapters.switching import bind_companions

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


class NormedToy(nn.Module, MomentumDistilationMixin):
    """A toy with batch normalisation in its backbone and in its head, and momentum copies of both, as LAVIS's."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleDict({"query": nn.Linear(8, 6), "norm": nn.BatchNorm1d(6)})
        norm = nn.BatchNorm1d(3, affine=False)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), norm)
        self.tower_m, self.head_m = copy.deepcopy(self.tower), copy.deepcopy(self.head)
        self.model_pairs = [[self.tower, self.tower_m], [self.head, self.head_m]]
        self.momentum = 0.5  # frozen weights average to themselves, bit for bit
        self.copy_params()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tower["norm"](self.tower["query"](x)))

    def teach(self, x: Tensor) -> Tensor:
        """What the momentum copies make of x."""
        with torch.no_grad():
            return self.head_m(self.tower_m["norm"](self.tower_m["query"](x)))


def normed_toy(seed: int = 0) -> NormedToy:
    """One whose head is trained with an adapter that does something, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NormedToy()
        for norm in (*model.tower.values(), *model.head):
            if isinstance(norm, nn.BatchNorm1d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        inject_mode_approx(model, ModeApproxConfig(rank=2), [r"tower\.query"])
    model.heads = [model.head.requires_grad_(True)]
    bind_companions(model, model.mode_approx, train_heads=True)
    randomize(model, "default", seed=1)
    return model


def train_steps(model: nn.Module, first: int, last: int) -> None:
    """Some steps of plain gradient descent, teacher included; step i has the same inputs wherever it begins."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for i in range(first, last):
        x = 3 + 2 * torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
        loss = (model(x) - model.teach(x)).square().mean() + model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model._momentum_update()


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
