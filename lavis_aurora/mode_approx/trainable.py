"""Trainable things are found by identity: a module says what it trains, no name is searched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class AdapterModule(Protocol):
    """A module that owns adapter parameters."""

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything the module trains."""


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(group, parameter) of all adapter modules in ``model``, each parameter once."""
    seen: set[int] = set()
    for module in model.modules():
        if module is not model and isinstance(module, AdapterModule):
            for group, parameter in module.adapter_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield group, parameter


def trainable_parameters_summary(model: nn.Module) -> str:
    """What is trained: a line for each group, then PEFT's one line. Counts are numbers of scalars."""
    group_of = {id(p): group for group, p in adapter_parameters(model)}
    for head in getattr(model, "heads", ()):
        group_of.update((id(p), "heads") for p in ([head] if isinstance(head, nn.Parameter) else head.parameters()))
    groups: dict[str, int] = defaultdict(int)
    total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            groups[group_of.get(id(parameter), "backbone")] += parameter.numel()
    trained = sum(groups.values())
    lines = [f"  {group:<22}{count:>12,}" for group, count in groups.items()]
    share = 100 * trained / total if total else 0.0
    lines.append(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")
    return "\n".join(lines)
