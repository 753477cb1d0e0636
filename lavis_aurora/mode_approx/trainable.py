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


def head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of ``model.heads``, a list of modules and parameters; none without that attribute."""
    for head in getattr(model, "heads", ()):
        yield from [head] if isinstance(head, nn.Parameter) else head.parameters()


def trainable_parameters_summary(model: nn.Module) -> str:
    """What is trained: a row for each group, then PEFT's one line. Counts are numbers of scalars."""
    group_of = {id(p): group for group, p in adapter_parameters(model)}
    group_of.update((id(p), "heads") for p in head_parameters(model))
    groups: dict[str, list[int]] = defaultdict(list)
    frozen: list[int] = []
    for parameter in model.parameters():
        group = groups[group_of.get(id(parameter), "backbone")] if parameter.requires_grad else frozen
        group.append(parameter.numel())
    trained = sum(map(sum, groups.values()))
    total = trained + sum(frozen)
    rows = [*groups.items(), ("frozen", frozen)]
    lines = [f"{'group':<22}{'tensors':>9}{'parameters':>14}{'%':>10}"]
    lines += [f"{group:<22}{len(n):>9,}{sum(n):>14,}{_percent(sum(n), total):>10.4f}" for group, n in rows]
    share = _percent(trained, total)
    lines.append(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")
    return "\n".join(lines)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
