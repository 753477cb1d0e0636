"""Normalisation with running statistics: over a frozen backbone it stands still."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase as Norm


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


def freeze_norms(model: nn.Module, copies: list[tuple[nn.Module, nn.Module]]) -> None:
    """Let each norm of ``model`` train with its own parameters, one in a momentum copy with what it is a copy of."""
    sources = {}
    for trained, copy in copies:
        named = dict(trained.named_modules())
        sources.update((id(norm), named[name]) for name, norm in copy.named_modules() if name in named)
    for norm in model.modules():
        if isinstance(norm, Norm):
            norm.train = NormMode(norm, sources.get(id(norm), norm))


def norms_of(model: nn.Module, head: nn.Module) -> list[NormMode]:
    """The norms inside ``head``, and in its momentum copies in ``model``, which from now on train with it."""
    inside = {id(module) for module in head.modules()}
    modes = [vars(module).get("train") for module in model.modules()]
    found = [mode for mode in modes if isinstance(mode, NormMode) and id(mode.source) in inside]
    for mode in found:
        mode.source = head
        mode(mode.asked)
    return found
