"""Find the attention projections of a model and put them over shared factors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from lavis_aurora.config import ModeApproxConfig
from lavis_aurora.errors import AuroraError, near_names
from lavis_aurora.mode_approx.factors import ModeFactors
from lavis_aurora.mode_approx.linear import ModeApproxLinear

# The attention projections of LAVIS's encoders.
ATTENTION = (r"(.*\.)?(query|key|value|qkv)",)
# Weights that hold query, key and value stacked in their rows, by the last part of their name.
FUSED = {"qkv": ("query", "key", "value")}


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that match, in the model's order.

    Args:
        model: any module.
        targets: regular expressions that must match a layer's whole name.

    Raises:
        AuroraError: a pattern matches no linear layer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: set[str] = set()
    for pattern in targets:
        matches = {name for name in names if re.fullmatch(pattern, name)}
        if not matches:
            raise AuroraError(f"target {pattern!r} matches no linear layer{near_names(pattern, names)}")
        found |= matches
    return [name for name in names if name in found]


def inject_mode_approx(
    model: nn.Module,
    config: ModeApproxConfig,
    targets: Sequence[str] = ATTENTION,
    slot_name: Callable[[str], str] = lambda name: name,
) -> ModeFactors:
    """Replace the targets by :class:`ModeApproxLinear` over one :class:`ModeFactors`, ``model.mode_approx``.

    Everything else is frozen: the factors alone are trainable afterwards.

    Args:
        model: any module; changed in place.
        config: rank and scale.
        targets: regular expressions over layer names, see :func:`find_targets`; by default query, key, value and qkv.
        slot_name: the slot that a layer uses, by the layer's name. Layers of the same slot share it.

    Returns:
        The factors, also at ``model.mode_approx``.

    Raises:
        AuroraError: the model has factors already, a target matches nothing, or a fused layer does not divide.
    """
    if isinstance(getattr(model, "mode_approx", None), ModeFactors):
        raise AuroraError("the model has mode_approx factors already; inject them once")
    slots: dict[str, tuple[int, int]] = {}
    layers: dict[str, list[str]] = {}
    for name in find_targets(model, targets):
        linear = model.get_submodule(name)
        parts = FUSED.get(name.rpartition(".")[2])
        if parts and linear.out_features % len(parts):
            raise AuroraError(f"{name}: {linear.out_features} rows do not divide into {', '.join(parts)}")
        owned = [f"{slot_name(name)}.{part}" for part in parts] if parts else [slot_name(name)]
        layers[name] = owned
        for slot in owned:
            shape = (linear.in_features, linear.out_features // len(owned))
            if slots.setdefault(slot, shape) != shape:
                raise AuroraError(f"{name}: cannot share slot {slot!r} of shape {slots[slot]} with {shape}")
    factors = ModeFactors(slots, config)
    index = {slot: i for i, slot in enumerate(slots)}
    for name, owned in layers.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, ModeApproxLinear(linear, factors, [index[s] for s in owned]))
    model.requires_grad_(False)
    model.mode_approx = factors.to(linear.weight.device)
    return factors
