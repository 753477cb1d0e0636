"""What belongs to an adapter besides its factors: gates, and heads that were trained with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lavis_aurora.errors import AuroraError
from lavis_aurora.mode_approx.adapted import adapted_layers
from lavis_aurora.mode_approx.factors import BASE, ModeFactors
from lavis_aurora.mode_approx.trainable import adapter_parameters, head_parameters
from lavis_aurora.precision import SinglePrecision


class Companions(SinglePrecision):
    """Parameters of one group, gates or heads, of all adapters.

    Those of one adapter stand in the model, under their own names; those of the others wait here. Switching moves
    references and copies no number. An adapter that brings no heads uses the backbone's.

    Args:
        model: the model in which they stand.
        names: the parameters' full names there.
        label: what the summary calls them.
        owner: the adapter whose parameters stand in the model now.
        single_precision: keep float32 over a backbone in half precision.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], label: str, owner: str, single_precision: bool
    ) -> None:
        super().__init__()
        self.names = list(names)
        # In lists modules are not registered a second time.
        self.places = _places(model, names)
        self.label = label
        self.owner = owner
        self.single_precision = single_precision
        self.waiting = nn.ModuleDict()

    def __contains__(self, name: str | None) -> bool:
        return name == self.owner or name in self.waiting

    def standing(self) -> list[nn.Parameter]:
        """The parameters that stand in the model now."""
        return [module._parameters[attribute] for (module, attribute), *_ in self.places]

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of ``name`` by their names in the model; none if it has none of its own."""
        if name not in self:
            return {}
        return dict(zip(self.names, self.standing() if name == self.owner else self.waiting[name].parameters()))

    def add(self, name: str, values: dict[str, Tensor]) -> None:
        """Let ``name`` have these values, frozen; where it has parameters already, they take the values."""
        if name not in self:
            shelf = self._shelf(name)
            for i, parameter in enumerate(self.standing()):
                shelf.register_parameter(str(i), nn.Parameter(torch.empty_like(parameter), requires_grad=False))
        for path, parameter in self.parameters_of(name).items():
            parameter.data.copy_(values[path])

    def switch(self, name: str | None) -> None:
        """Put the parameters of ``name`` into the model, or the backbone's if it has none (None: the backbone)."""
        target = name if name in self else BASE
        if target == self.owner or target not in self:
            return
        outgoing, incoming = self._shelf(self.owner), self.waiting[target]
        for i, (places, parameter) in enumerate(zip(self.places, self.standing())):
            outgoing.register_parameter(str(i), parameter)
            for module, attribute in places:
                setattr(module, attribute, getattr(incoming, str(i)))
            incoming.register_parameter(str(i), None)
        self.owner = target

    def _shelf(self, name: str) -> nn.Module:
        """Where the parameters of ``name`` wait, by number; made once."""
        if name not in self.waiting:
            self.waiting[name] = nn.Module()
        return self.waiting[name]

    def remove(self, name: str) -> None:
        """Forget the parameters of ``name``, which must not stand in the model."""
        if name in self.waiting:
            del self.waiting[name]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of what waits here and belongs to an adapter."""
        for name, shelf in self.waiting.items():
            if name != BASE:
                yield from ((self.label, parameter) for parameter in shelf.parameters())


def _places(model: nn.Module, names: Sequence[str]) -> list[list[tuple[nn.Module, str]]]:
    """Module and attribute of every place where each of the parameters stands; tied ones stand in several."""
    parameters = dict(model.named_parameters())
    found: dict[int, list[tuple[nn.Module, str]]] = {id(parameters[name]): [] for name in names}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) in found:
                found[id(parameter)].append((module, attribute))
    return [found[id(parameters[name])] for name in names]


def bind_companions(model: nn.Module, factors: ModeFactors, train_heads: bool) -> None:
    """Let gates and heads switch with the factors; called once, when both stand in the model.

    Gates are what modules of the model name in ``adapter_parameters``, heads what ``model.heads`` lists.

    Args:
        model: the model around the factors.
        factors: its factors.
        train_heads: the heads are trained with the adapter ``default``: the backbone's own are kept beside them.

    Raises:
        AuroraError: a head holds a weight that the adapter updates.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {id(parameter) for parameter in factors.parameters()}
    gates = [names[id(p)] for _, p in adapter_parameters(model) if id(p) not in own]
    heads = list(dict.fromkeys(names[id(p)] for p in head_parameters(model)))
    adapted = {id(weight) for _, layer in adapted_layers(model) for weight in layer.adapted_weights().values()}
    both = [names[id(p)] for p in head_parameters(model) if id(p) in adapted]
    if both:
        raise AuroraError(
            f"{both[0]} has an update by mode_approx and cannot be trained itself too; name modules without adapted "
            f"layers in model.modules_to_save, or other layers in model.mode_approx.targets"
        )
    if gates:
        factors.companions["gate"] = Companions(model, gates, "gate", "default", single_precision=True)
    if heads:
        group = factors.companions["heads"] = Companions(model, heads, "heads", BASE, single_precision=False)
        if train_heads:
            group.owner = "default"
            keep_base_heads(factors)


def keep_base_heads(factors: ModeFactors) -> None:
    """Remember the heads that stand in the model as the backbone's; called when its weights have been loaded."""
    if "heads" not in factors.companions:
        return
    group = factors.companions["heads"]
    if group.owner != BASE:
        group.add(BASE, group.parameters_of(group.owner))


def switch_companions(factors: ModeFactors, name: str | None) -> None:
    """Put the gates and heads of an adapter, or of the backbone, into the model."""
    for part in factors.companions.values():
        part.switch(name)
