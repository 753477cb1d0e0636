"""The parts of scripts/check_gpu.py that need torch alone: the method's own computations."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence

import torch
from gpu_report import Case, Row, Setting, as_computed, compare, relative_error, row
from torch import Tensor, nn

from lavis_aurora import (
    GateConfig,
    ModeApproxConfig,
    inject_mode_approx,
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)
from lavis_aurora.alignment.context import enhance_context
from lavis_aurora.config.method import GATE_FORMS
from lavis_aurora.mode_approx.factors import FactorSet
from lavis_aurora.mode_approx.layers import ModeApproxLinear, grouped_linear


def randomize(module: nn.Module, std: float) -> None:
    """Random values for all parameters, so that nothing is at its neutral start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


class Linears(Case):
    """Adapted linear layers of one input, (1, tokens, width), which has a gradient too."""

    def __init__(self, layers: dict[str, nn.Linear], tokens: int, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        width = next(iter(layers.values())).in_features
        self.x = nn.Parameter(torch.randn(1, tokens, width, generator=generator))
        self.tower, self.names = nn.ModuleDict(layers), list(layers)
        inject_mode_approx(self.tower, ModeApproxConfig(rank=rank), ["all_linear"])
        randomize(self.factors, 0.3)

    @property
    def factors(self) -> FactorSet:
        """The trained ones."""
        factors: FactorSet = self.tower.mode_approx.sets["default"]
        return factors

    def forward(self) -> Tensor:
        layers = (self.tower[name] for name in self.names)
        return torch.cat(grouped_linear(as_computed(self.x), *layers), dim=-1)


class GateCase(Case):
    """A form of the gate over padded texts, (batch, length, d)."""

    def __init__(self, form: str, length: int, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.t, self.f = (
            nn.Parameter(torch.randn(3, length, dim, generator=generator) / dim**0.25) for _ in range(2)
        )
        self.register_buffer("keep", torch.arange(length) < torch.tensor([[length], [length // 2], [1]]))
        self.gate = GATE_FORMS[form](dim, GateConfig(form=form))
        randomize(self.gate, 0.3)

    def forward(self) -> Tensor:
        result: Tensor = self.gate(as_computed(self.t), as_computed(self.f), self.keep)
        return result


class ContextCase(Case):
    """The context enhancement of ``pairs`` by a third as many texts."""

    def __init__(self, form: str, pairs: int, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.form = form
        self.fusion, self.queries = (
            nn.Parameter(torch.randn(count, dim, generator=generator) / dim**0.25) for count in (pairs, pairs // 3)
        )

    def forward(self) -> Tensor:
        return enhance_context(as_computed(self.fusion), as_computed(self.queries), self.form)


def _linears(names: Sequence[str], d_in: int, d_out: int) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {name: nn.Linear(d_in, d_out) for name in names}


def linear_cases(setting: Setting) -> dict[str, Linears]:
    """Folded into the weight, slots in its rows and columns, several layers as one, and not folded."""
    d, rank = (32, 4) if setting.tiny else (768, 64)
    many, few = (64, 2) if setting.tiny else (2 * 577, 8)
    return {
        "folded linear": Linears(_linears(["query"], d, d), many, rank),
        "folded linear, q, k, v in one weight": Linears(_linears(["qkv"], d, 3 * d), many, rank),
        "folded linear, blocks in columns": Linears(_linears(["fc2"], 4 * d, d), many, rank),
        "folded linear, three layers as one": Linears(_linears(["query", "key", "value"], d, d), many, rank),
        "linear, few tokens": Linears(_linears(["query"], d, d), few, rank),
    }


def check_linears(setting: Setting) -> Iterator[Row]:
    """Adapted linear layers."""
    for name, case in linear_cases(setting).items():
        layers = [layer for layer in case.tower.modules() if isinstance(layer, ModeApproxLinear)]
        folds = all(layer.folds(case.x) for layer in layers)
        if folds != name.startswith("folded") or any(layer.columns for layer in layers) != ("columns" in name):
            yield row(f"{name}: computed as named", False, "another way is taken")
        yield from compare(name, case, setting)


def check_alignment(setting: Setting) -> Iterator[Row]:
    """Gates and the context enhancement."""
    length, dim, pairs = (6, 32, 12) if setting.tiny else (35, 768, 48)
    for form in ("residual", "convex", "affine"):
        yield from compare(f"gate, {form}", GateCase(form, length, dim), setting)
    for form in ("attention", "mean"):
        yield from compare(f"context, {form}", ContextCase(form, pairs, dim), setting)


def check_adapters(setting: Setting) -> Iterator[Row]:
    """An adapter on the device: merged and unmerged, written there and read on the CPU."""
    case = linear_cases(setting)["folded linear, q, k, v in one weight"].to(setting.device)
    with torch.no_grad():
        expected, weights = case(), case.tower["qkv"].adapted_weight.clone()
        merge_adapter(case.tower)
        error = relative_error(case().cpu(), expected.cpu())
        unmerge_adapter(case.tower)
    yield row("merged forward", error <= 1e-5, f"{error:.1e}", "1.0e-05")
    same = torch.equal(case.tower["qkv"].adapted_weight, weights)
    yield row("weights after merging and unmerging", same, "the same" if same else "others", "the same")
    other = linear_cases(setting)["folded linear, q, k, v in one weight"]
    randomize(other.factors, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(case.tower, folder)
        load_adapter(other.tower, folder)
    pairs = zip(case.factors.parameters(), other.factors.parameters())
    same = all(torch.equal(one.cpu(), read) for one, read in pairs)
    yield row("adapter written by the device, read on the CPU", same, "the same" if same else "others", "the same")


PARTS = {"linear layers": check_linears, "gate and context": check_alignment, "adapters": check_adapters}
