"""What is trained of a model, by group: counts and PEFT's one line."""

from __future__ import annotations

from torch import nn

from lavis_aurora.adapters.companions import adapter_parameters, head_parameters
from lavis_aurora.common.summary import GroupCount


def trained_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What is trained, by group: adapters' own, ``heads``, ``backbone``."""
    group_of = {id(p): group for group, p in adapter_parameters(model)}
    group_of.update((id(p), "heads") for p in head_parameters(model))
    groups: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of.get(id(parameter), "backbone"), []).append(parameter)
    return groups


def parameter_groups(model: nn.Module) -> dict[str, GroupCount]:
    """Tensors and scalars of what is trained, by group of :func:`trained_groups`, then of what is ``frozen``."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return {
        group: GroupCount(tensors=len(parameters), parameters=sum(parameter.numel() for parameter in parameters))
        for group, parameters in {**trained_groups(model), "frozen": frozen}.items()
    }


def trainable_parameters_summary(model: nn.Module) -> str:
    """What is trained: a row for each group, then PEFT's one line. Counts are numbers of scalars."""
    groups = parameter_groups(model)
    total = sum(count["parameters"] for count in groups.values())
    trained = total - groups["frozen"]["parameters"]
    lines = [f"{'group':<22}{'tensors':>9}{'parameters':>14}{'%':>10}"]
    for group, count in groups.items():
        share = _percent(count["parameters"], total)
        lines.append(f"{group:<22}{count['tensors']:>9,}{count['parameters']:>14,}{share:>10.4f}")
    share = _percent(trained, total)
    lines.append(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")
    return "\n".join(lines)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
