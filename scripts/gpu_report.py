"""What scripts/check_gpu.py finds: rows of a table, and numbers computed on two devices beside each other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

OK, FAILED, SKIPPED, MEASURED = "ok", "FAILED", "skipped", "measured"
# Of a result and of a gradient, the norm of the difference from single precision on the CPU relative to the norm.
BOUNDS = {"fp32": (1e-5, 1e-4), "fp16": (3e-3, 1.5e-2), "bf16": (2e-2, 6e-2)}
DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
# Gradients in float16 are those of a scaled loss, as in training: of the largest scale at which they are finite.
LOSS_SCALES = tuple(2.0**power for power in range(12, -9, -4))


@dataclass
class Row:
    """One line: what was looked at, what was found, what is allowed."""

    check: str
    status: str
    found: str = ""
    allowed: str = ""
    part: str = ""


@dataclass
class Setting:
    """Where and how large: the device, and ``base`` or ``tiny`` models."""

    device: torch.device
    size: str

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def precisions(self) -> list[str]:
        """Names in :data:`DTYPES` that the device computes in."""
        bf16 = self.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return ["fp32", "fp16", *(["bf16"] if bf16 else [])]


def row(check: str, holds: bool, found: str, allowed: str = "") -> Row:
    """Of something that must hold."""
    return Row(check, OK if holds else FAILED, found, allowed)


class Case(nn.Module):
    """A computation with its inputs: they are its buffers, or its parameters where a gradient is wanted."""

    def forward(self) -> Tensor:
        raise NotImplementedError


def as_computed(x: Tensor) -> Tensor:
    """An input as the layers before it leave it: in the precision of autocast, where that is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def computed(case: Case, device: torch.device, dtype: Optional[torch.dtype]) -> dict[str, Tensor]:
    """The result of a case and its gradients, in float32 on the CPU; ``dtype`` is that of autocast."""
    case = copy.deepcopy(case).to(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        result = case().float()
    found = {"result": result.detach().cpu()}
    trained = {name: p for name, p in case.named_parameters() if p.requires_grad}
    if result.requires_grad:
        # Each number of the result counts differently.
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(device)
        loss = (result * weights).sum()
        for scale in LOSS_SCALES if dtype is torch.float16 else (1.0,):
            inputs = list(trained.values())
            gradients = torch.autograd.grad(scale * loss, inputs, allow_unused=True, retain_graph=True)
            if all(g is None or bool(g.isfinite().all()) for g in gradients):
                break
        found |= {name: g.float().cpu() / scale for name, g in zip(trained, gradients) if g is not None}
    return found


def relative_error(found: Tensor, expected: Tensor, least: float = 1e-12) -> float:
    """Norm of the difference over the norm, or over ``least``; infinite where a number is not finite."""
    if not found.isfinite().all():
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=least))


def relative_errors(
    found: dict[str, Tensor], expected: dict[str, Tensor], result: str = "result"
) -> dict[str, float]:
    """Of a result and of gradients; one that nearly cancels out is measured by a thousandth of the largest."""
    gradients = {name: value for name, value in expected.items() if name != result}
    least = max([float(value.norm()) / 1000 for value in gradients.values()] + [1e-12])
    errors = {name: relative_error(found[name], value, least) for name, value in gradients.items()}
    return {result: relative_error(found[result], expected[result]), **errors}


def compare(name: str, case: Case, setting: Setting, depth: float = 1) -> Iterator[Row]:
    """A case on the device in each precision against single precision on the CPU; ``depth`` times the bounds."""
    expected = computed(case, torch.device("cpu"), None)
    for precision in setting.precisions:
        found = computed(case, setting.device, DTYPES[precision])
        errors = relative_errors(found, expected, "result")
        result = errors.pop("result")
        bounds = [depth * bound for bound in BOUNDS[precision]]
        texts, holds = [f"{result:.1e}"], result <= bounds[0]
        if errors:
            worst = max(errors, key=lambda key: errors[key])
            texts.append(f"{errors[worst]:.1e} ({worst.rpartition('sets.')[2]})")
            holds = holds and errors[worst] <= bounds[1]
        allowed = " / ".join(f"{bound:.1e}" for bound in bounds[: len(texts)])
        yield row(f"{name}, {precision}", holds, " / ".join(texts), allowed)
