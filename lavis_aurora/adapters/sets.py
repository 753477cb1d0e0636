"""The protocol of sets of adapter parameters, of whatever kind: which there are, which is active, what they hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_aurora.adapters.companions import BASE, Companions
from lavis_aurora.adapters.updates import LowRank, UpdatedLayer
from lavis_aurora.common.errors import AuroraError, did_you_mean
from lavis_aurora.common.registry import Registry

# The set of the momentum teacher's moving average.
MOMENTUM_SET = "momentum"
# Sets that belong to a model's training and are no adapters.
INTERNAL = (MOMENTUM_SET,)


class AdapterSet(nn.Module):
    """The parameters of one adapter.

    ``named_parameters`` gives them by their names in a file; two sets of the same settings give them in the same
    order, by which LAVIS's moving average pairs them.

    Attributes:
        config: the settings, a dataclass.
    """

    config: Any

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything the set trains; the summary has a row for each group."""
        raise NotImplementedError


class AdapterSets(nn.Module):
    """Named sets over the same places of a model, one of them active at a time.

    A kind of adapter is a subclass, registered by :func:`register_sets`. It says how a set is made and how forwards
    find the active one; switching, files, merging and the momentum teacher are then those of every kind.

    Attributes:
        kind: key of the settings in ``adapter_config.json``; set by :func:`register_sets`.
        tuning: the ``model.tuning`` that gives a model such sets.
        prefix: of the tensors' names in ``adapter_model.safetensors``.
        config_class: dataclass of the settings.
        slots: (d_in, d_out) of each place that is adapted, by name, in order.
        sets: the sets by name.
        companions: what switches with the set: gates and heads, see Companions.
        active: name of the set that forwards use; None for the plain backbone.
        merged: name of the set that is merged into the weights, if one is.
    """

    kind: ClassVar[str]
    tuning: ClassVar[str]
    prefix: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, slots: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.slots = dict(slots)
        self.sets = nn.ModuleDict()
        self.companions = nn.ModuleDict()
        self.active: str | None = "default"
        self.merged: str | None = None

    @classmethod
    def tensor_shapes(cls, slots: Mapping[str, tuple[int, int]], config: Any) -> dict[str, tuple[int, ...]]:
        """The shapes of a set's parameters by name, as slots and settings have them; allocates nothing."""
        raise NotImplementedError

    @classmethod
    def slot_updates(
        cls, slots: Mapping[str, tuple[int, int]], config: Any, tensors: Mapping[str, Tensor]
    ) -> LowRank:
        """The update of each slot from the tensors of a file, by their names in a set; see :data:`LowRank`.

        Raises:
            AuroraError: adapters of this kind are no update of weights.
        """
        raise AuroraError(f"an adapter of {cls.kind} is no update of weights")

    @classmethod
    def add_updates(
        cls, parts: Sequence[tuple[Any, Mapping[str, Tensor]]], weights: Sequence[float]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Settings and tensors of the sum of the updates, each times its weight: exactly that.

        Args:
            parts: settings and tensors, as of :meth:`slot_updates`, over the same slots.
            weights: one for each.

        Raises:
            AuroraError: adapters of this kind are no update of weights, or their settings differ in a way that no
                set has.
        """
        raise AuroraError(f"an adapter of {cls.kind} is no update of weights")

    @classmethod
    def truncated(cls, config: Any, tensors: Mapping[str, Tensor], rank: int) -> tuple[Any, dict[str, Tensor]]:
        """Settings and tensors of an adapter of ``rank``, the first components of the one that is given.

        Args:
            config: its settings.
            tensors: its parameters by name.

        Raises:
            AuroraError: it has no such rank, or components of this kind cannot be told apart.
        """
        raise AuroraError(f"an adapter of {cls.kind} cannot be cut to a lower rank; train one of rank {rank}")

    def make_set(self, name: str, config: Any) -> AdapterSet:
        """A fresh set, which changes nothing yet, on the device of the others; :meth:`add_set` puts it in place."""
        raise NotImplementedError

    def drop_set(self, name: str) -> None:
        """Called when the set ``name`` has been forgotten."""

    def activate(self, name: str | None) -> None:
        """Let forwards use the set ``name``, which has been checked; None is the plain backbone."""
        self.active = name

    def backbone_weights(self, model: nn.Module) -> list[Tensor]:
        """The weights, without any update, by which an adapter's file knows its backbone, in the model's order."""
        # Momentum copies follow the others, and round differently.
        layers = [layer for _, layer in self.updated_layers(model) if layer.pinned is None]
        return [weight for layer in layers for weight in layer.backbone_weights().values()]

    def updated_layers(self, model: nn.Module) -> Iterator[tuple[str, UpdatedLayer]]:
        """Layers whose weights are W0 + dW, by their names in the plain model, in order; other kinds have none."""
        modules = model.named_modules(remove_duplicate=False)
        return ((name, module) for name, module in modules if isinstance(module, UpdatedLayer))

    def plain_state(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """A state dict of the model, under the plain model's names and without what the adapter put there.

        Args:
            state: of the model.
            prefix: of the keys of this module.
        """
        return {key: value for key, value in state.items() if not key.startswith(prefix)}

    def backbone_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A plain model's state dict under the names that its weights have in the adapted one."""
        return state

    def add_set(self, name: str, config: Any) -> AdapterSet:
        """Add a fresh set under ``name``; it is not made active.

        Raises:
            AuroraError: the name is taken or cannot be used.
        """
        if name in self.sets:
            raise AuroraError(f"there is an adapter {name!r} already; delete_adapter it, or choose another name")
        if not re.fullmatch(r"\w[\w-]*", name) or hasattr(nn.ModuleDict(), name) or name == BASE:
            raise AuroraError(f"an adapter cannot be called {name!r}; use another word of letters, digits, _ and -")
        made = self.make_set(name, config)
        self.sets[name] = made
        return made

    def remove_set(self, name: str) -> None:
        """Forget a set, and its gates and heads."""
        del self.sets[name]
        self.drop_set(name)
        for part in self.companion_groups().values():
            part.remove(name)

    def truncate_set(self, name: str, rank: int) -> None:
        """Cut a set to its first ``rank`` components; its parameters stay the same objects, without gradients."""
        one = self[name]
        one.config, cut = self.truncated(one.config, dict(one.named_parameters()), rank)
        for key, parameter in one.named_parameters():
            parameter.data, parameter.grad = cut[key].detach(), None

    def add_teacher(self) -> list[nn.Module]:
        """[the set ``default``, its moving average, which starts equal and frozen]: a pair of LAVIS's model_pairs."""
        default = self["default"]
        average = self.add_set(MOMENTUM_SET, default.config)
        with torch.no_grad():
            for parameter, start in zip(average.parameters(), default.parameters()):
                parameter.copy_(start)
        average.requires_grad_(False)
        return [default, average]

    def __getitem__(self, name: str) -> AdapterSet:
        found = self.sets[name]
        assert isinstance(found, AdapterSet)
        return found

    def set_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all sets."""
        return chain.from_iterable(self[name].parameters() for name in self.sets)

    def companion_groups(self) -> dict[str, Companions]:
        """Gates and heads by the name of their group."""
        return {group: part for group, part in self.companions.items() if isinstance(part, Companions)}

    @property
    def names(self) -> list[str]:
        """The adapters, without sets that a model keeps for its training."""
        return [name for name in self.sets if name not in INTERNAL]

    @property
    def active_set(self) -> Any:
        """The set that forwards must add now; None while disabled, and while merged into the weights.

        Raises:
            AuroraError: the model is trained while an adapter is merged.
        """
        if self.merged is not None:
            if self.training and torch.is_grad_enabled():
                raise AuroraError(
                    f"the adapter {self.merged!r} is merged into the weights and cannot be trained; call "
                    f"unmerge_adapter(model) before training, or model.eval() before scoring"
                )
            return None
        return None if self.active is None else self.sets[self.active]

    def check_trained(self) -> None:
        """Refuse to train while an adapter is active that was loaded beside the trained one, or one is merged.

        Raises:
            AuroraError: gradients are asked for in training mode, and the active adapter has none.
        """
        active = self.active_set
        if self.active in (None, "default", *INTERNAL) or not (self.training and torch.is_grad_enabled()):
            return
        if not any(parameter.requires_grad for parameter in active.parameters()):
            raise AuroraError(
                f"the adapter {self.active!r} is frozen, as one beside 'default' is: load_adapter(model, folder) "
                f"without a name to train it further, or model.eval() to score with it"
            )

    def check_teacher(self) -> None:
        """Refuse a loss with a momentum teacher while none or another adapter is active than the one it follows.

        Raises:
            AuroraError: there is such a teacher, which the loss would compare with and move.
        """
        if MOMENTUM_SET in self.sets and self.active not in ("default", MOMENTUM_SET):
            active = "no adapter is active" if self.active is None else f"the adapter {self.active!r} is active"
            raise AuroraError(
                f"{active}, and the training loss has a momentum teacher, which follows 'default': leave "
                f"disable_adapter, or set_adapter(model, 'default'), before it; scores and features need neither"
            )

    def check_name(self, name: str) -> None:
        """Refuse a name that no adapter has."""
        if name not in self.names:
            raise AuroraError(f"no adapter {name!r}{did_you_mean(name, self.names)}")

    def check_switch(self, name: str | None) -> None:
        """Refuse a set that is not there, or any other than the merged one."""
        if name is not None and name not in INTERNAL:
            self.check_name(name)
        if self.merged is not None and name != self.merged:
            raise AuroraError(f"the adapter {self.merged!r} is merged into the weights; unmerge_adapter(model) first")

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Let forwards inside the block use the set ``name``; None is the plain backbone's weights.

        Of the set alone: gates and heads stay those of the adapter that ``set_adapter`` chose last. The whole adapter
        is switched by ``set_adapter`` and ``disable_adapter`` (:mod:`lavis_aurora.adapters.switching`).

        With gradient checkpointing the backward pass belongs inside the block too: it computes forward again.
        """
        self.check_switch(name)
        before = self.active
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before)

    def disabled(self) -> AbstractContextManager[None]:
        """Context in which every adapted layer is the plain backbone's; gates and heads stay, as in :meth:`use`."""
        return self.use(None)

    def switch_companions(self, name: str | None) -> None:
        """Put the gates and heads of an adapter, or of the backbone, into the model."""
        for part in self.companion_groups().values():
            part.switch(name)

    def keep_base_heads(self) -> None:
        """Remember the model's heads as the backbone's; called when its weights have been loaded."""
        heads = self.companion_groups().get("heads")
        if heads is not None and heads.active != BASE:
            heads.add(BASE, heads.tensors_of(heads.active))


KINDS: Registry[type[AdapterSets]] = Registry("kind of adapter")


def register_sets(kind: str) -> Callable[[type[AdapterSets]], type[AdapterSets]]:
    """Decorator of a subclass of :class:`AdapterSets`: its folders hold the settings under ``kind``."""

    def register(cls: type[AdapterSets]) -> type[AdapterSets]:
        cls.kind = kind
        return KINDS.register(kind)(cls)

    return register
