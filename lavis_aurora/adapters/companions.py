"""What belongs to an adapter besides its own set: gates, heads that were trained with it, momentum copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as Norm

from lavis_aurora.common.modules import KeepFloat32

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# Whose the heads of the backbone itself are, see Companions.
BASE = "base"

Head = Union[nn.Module, nn.Parameter]


class AdapterModule(Protocol):
    """A module that owns adapter parameters."""

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything the module trains."""


class HeadOwner(Protocol):
    """A model that lists what may be trained with an adapter, and then switches with it."""

    @property
    def heads(self) -> Sequence[Head]:
        """Modules and parameters of the model."""


class MomentumModel(Protocol):
    """A model with momentum copies, as LAVIS's MomentumDistilationMixin keeps them; see :func:`has_momentum`."""

    model_pairs: list[list[nn.Module]]

    def copy_params(self) -> None:
        """Let every copy have the parameters of what it is a copy of."""


def has_momentum(model: object) -> TypeIs[MomentumModel]:
    """Whether it is a :class:`MomentumModel`, or a wrapper that hands on the attributes of one.

    Of such an attribute isinstance knows nothing: since Python 3.12 it does not ask a model's ``__getattr__``.
    """
    return hasattr(model, "model_pairs") and hasattr(model, "copy_params")


def _is_adapter_module(module: object) -> TypeIs[AdapterModule]:
    """Whether its class says so: a wrapper hands on the methods of another module, and isinstance is slow here."""
    return hasattr(type(module), "adapter_parameters")


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(group, parameter) of all adapter modules in ``model``, each parameter once."""
    seen: set[int] = set()
    for module in model.modules():
        if module is not model and _is_adapter_module(module):
            for group, parameter in module.adapter_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield group, parameter


def _heads(model: nn.Module) -> Sequence[Head]:
    """A model of somebody else's may call anything heads, such as their number."""
    heads = getattr(model, "heads", ())
    return heads if isinstance(heads, (list, tuple)) else ()


def head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a :class:`HeadOwner`'s heads; of any other model there are none."""
    for head in _heads(model):
        yield from [head] if isinstance(head, nn.Parameter) else head.parameters()


def head_modules(model: nn.Module) -> list[nn.Module]:
    """The heads without single parameters."""
    return [head for head in _heads(model) if isinstance(head, nn.Module)]


def head_buffers(model: nn.Module) -> Iterator[Tensor]:
    """The buffers inside the heads that a state dict holds, such as running statistics."""
    for head in head_modules(model):
        yield from persistent_buffers(head).values()


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name; one in several places comes once."""
    held = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in held}


def momentum_copies(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(trained, copy) of a :class:`MomentumModel`; of any other model there are none."""
    return [(trained, copy) for trained, copy in model.model_pairs] if has_momentum(model) else []


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training changes, by name: of trained heads and norms, and of their momentum copies."""
    owners = [*head_modules(model), *(module for module in model.modules() if isinstance(module, Norm))]
    changed = {id(buffer) for owner in owners if is_trained(owner) for buffer in owner.buffers()}
    for trained, copy in momentum_copies(model):
        twins = dict(copy.named_buffers())
        changed |= {id(twins.get(name)) for name, buffer in trained.named_buffers() if id(buffer) in changed}
    return {name: buffer for name, buffer in persistent_buffers(model).items() if id(buffer) in changed}


@contextmanager
def frozen_teacher(model: nn.Module) -> Iterator[None]:
    """Inside the block LAVIS's momentum update leaves the copies inside ``model`` as they are."""
    # Without momentum they are the trained modules themselves.
    parts: list[Any] = [part for part in model.modules() if "model_pairs" in vars(part)]
    owners = [part for part in parts if vars(part).get("momentum")]
    momenta = [owner.momentum for owner in owners]
    for owner in owners:
        owner.momentum = 1.0
    try:
        yield
    finally:
        for owner, momentum in zip(owners, momenta):
            owner.momentum = momentum


class NormMode:
    """``norm.train`` of a normalisation: in training mode only while what it belongs to is trained.

    Otherwise it stays in eval mode, whoever calls ``train()`` on whatever is around it: it computes with its running
    statistics and leaves them alone.

    Attributes:
        norm: the module.
        source: the module whose parameters tell whether it is trained: itself, the head that it is in, or what it is
            a momentum copy of.
        asked: the mode that was last asked for.
    """

    def __init__(self, norm: nn.Module, source: nn.Module) -> None:
        self.norm, self.source = norm, source
        self(norm.training)

    def __call__(self, mode: bool = True) -> nn.Module:
        self.asked = mode
        return type(self.norm).train(self.norm, mode and self.trains)

    @property
    def trains(self) -> bool:
        """Whether the norm is part of what is trained now."""
        return is_trained(self.source)


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def freeze_norms(model: nn.Module, copies: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Let each norm of ``model`` train with its own parameters, one in a momentum copy with what it is a copy of."""
    sources: dict[int, nn.Module] = {}
    for trained, copy in copies:
        named = dict(trained.named_modules())
        sources.update((id(norm), named[name]) for name, norm in copy.named_modules() if name in named)
    for norm in model.modules():
        if isinstance(norm, Norm):
            norm.train = NormMode(norm, sources.get(id(norm), norm))  # type: ignore[method-assign,assignment]


def norms_of(model: nn.Module, head: nn.Module) -> list[NormMode]:
    """The norms inside ``head``, and in its momentum copies in ``model``, which from now on train with it."""
    inside = {id(module) for module in head.modules()}
    modes = [vars(module).get("train") for module in model.modules()]
    found = [mode for mode in modes if isinstance(mode, NormMode) and id(mode.source) in inside]
    for mode in found:
        mode.source = head
        mode(mode.asked)
    return found


class Companions(KeepFloat32):
    """Parameters of one group, gates or heads, of all adapters, and the buffers of their modules.

    The active adapter's are the model's own, under their names; those of inactive adapters are kept here. Switching
    exchanges references and copies no tensor. An adapter that brings no heads uses the backbone's.

    Args:
        model: the model that has them.
        tensors: they themselves, by their full names there.
        label: what the summary calls them.
        active: the adapter whose tensors the model has now.
        single_precision: keep float32 over a backbone in half precision.
        norms: those among the modules, which train as long as the model's tensors do.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: dict[str, Tensor],
        label: str,
        active: str,
        single_precision: bool,
        norms: Sequence[NormMode] = (),
    ) -> None:
        super().__init__()
        self.names = list(tensors)
        # In lists modules are not registered a second time.
        self.locations = _find_locations(model, tensors.values())
        self.label = label
        self.active = active
        self.single_precision = single_precision
        self.norms = list(norms)
        self.inactive = nn.ModuleDict()

    def __contains__(self, name: object) -> bool:
        return name == self.active or (isinstance(name, str) and name in self.inactive)

    def active_tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers that the model has now, by their names there."""
        return {name: getattr(*locations[0]) for name, locations in zip(self.names, self.locations)}

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """The parameters and buffers of ``name`` by their names in the model; none if it has none of its own."""
        if name not in self:
            return {}
        if name == self.active:
            return self.active_tensors()
        return {path: getattr(self.inactive[name], str(i)) for i, path in enumerate(self.names)}

    @torch.no_grad()
    def add(self, name: str, values: dict[str, Tensor]) -> None:
        """Let ``name`` have these values, frozen; where it has tensors already, they take the values."""
        if name not in self:
            inactive = self._inactive_module(name)
            for i, tensor in enumerate(self.active_tensors().values()):
                _put(inactive, str(i), _like(tensor))
        for path, tensor in self.tensors_of(name).items():
            tensor.copy_(values[path])

    def switch(self, name: str | None) -> None:
        """Put the tensors of ``name`` into the model, or the backbone's if it has none (None: the backbone)."""
        target = name if name is not None and name in self else BASE
        if target == self.active or target not in self:
            return
        asked = [mode.norm.training if mode.trains else mode.asked for mode in self.norms]
        outgoing, incoming = self._inactive_module(self.active), self.inactive[target]
        for i, (locations, tensor) in enumerate(zip(self.locations, self.active_tensors().values())):
            _put(outgoing, str(i), tensor)
            for module, attribute in locations:
                setattr(module, attribute, getattr(incoming, str(i)))
            setattr(incoming, str(i), None)
        self.active = target
        for mode, one in zip(self.norms, asked):
            mode(one)

    def _inactive_module(self, name: str) -> nn.Module:
        """Holds the tensors of the inactive adapter ``name`` by their index; made once."""
        if name not in self.inactive:
            self.inactive[name] = nn.Module().train(self.training)
        return self.inactive[name]

    def remove(self, name: str) -> None:
        """Forget the tensors of ``name``, which must not be active."""
        if name in self.inactive:
            del self.inactive[name]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of the inactive adapters."""
        for name, module in self.inactive.items():
            if name != BASE:
                yield from ((self.label, parameter) for parameter in module.parameters())


def _like(tensor: Tensor) -> Tensor:
    """An empty parameter, frozen, or buffer."""
    empty = torch.empty_like(tensor)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Register a parameter or a buffer."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(key, tensor)
    else:
        module.register_buffer(key, tensor)


def _find_locations(model: nn.Module, tensors: Iterable[Tensor]) -> list[list[tuple[nn.Module, str]]]:
    """Module and attribute of each of the tensors; tied ones have several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {id(tensor): [] for tensor in tensors}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in found:
                found[id(tensor)].append((module, attribute))
    return list(found.values())
