"""Trainable things are found by identity: a module says what it trains, no name is searched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from lavis_aurora.mode_approx.norms import Norm, is_trained


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


def head_buffers(model: nn.Module) -> Iterator[Tensor]:
    """The buffers inside ``model.heads`` that a state dict holds, such as running statistics."""
    for head in head_modules(model):
        yield from persistent_buffers(head).values()


def head_modules(model: nn.Module) -> list[nn.Module]:
    """``model.heads`` without single parameters."""
    return [head for head in getattr(model, "heads", ()) if isinstance(head, nn.Module)]


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name; one in several places comes once."""
    held = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in held}


def momentum_copies(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(trained, copy) as LAVIS's MomentumDistilationMixin lists them in ``model.model_pairs``; empty without."""
    return [(trained, copy) for trained, copy in getattr(model, "model_pairs", ())]


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training changes, by name: of trained heads and norms, and of their momentum copies."""
    owners = [*head_modules(model), *(module for module in model.modules() if isinstance(module, Norm))]
    changed = {id(buffer) for owner in owners if is_trained(owner) for buffer in owner.buffers()}
    for trained, copy in momentum_copies(model):
        if isinstance(copy, nn.Module):
            twins = dict(copy.named_buffers())
            changed |= {id(twins.get(name)) for name, buffer in trained.named_buffers() if id(buffer) in changed}
    return {name: buffer for name, buffer in persistent_buffers(model).items() if id(buffer) in changed}


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
