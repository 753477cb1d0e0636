"""Momentum copies inside a model: they follow the adapter by a factor set of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lavis_aurora.mode_approx.adapted import AdaptedLayer
from lavis_aurora.mode_approx.companions import switch_companions
from lavis_aurora.mode_approx.factors import TEACHER_SET, ModeFactors
from lavis_aurora.mode_approx.trainable import momentum_copies, persistent_buffers


def restart_teacher(model: nn.Module, factors: ModeFactors) -> None:
    """Let the momentum copies of ``model`` start as the adapter ``default``, whichever adapter is active."""
    if not momentum_copies(model):
        return
    switch_companions(factors, "default")
    model.copy_params()
    for trained, copy in momentum_copies(model):
        # LAVIS copies parameters alone.
        own = persistent_buffers(trained)
        for name, buffer in persistent_buffers(copy).items():
            buffer.copy_(own[name])
    switch_companions(factors, factors.active)


@contextmanager
def resting_teacher(model: nn.Module) -> Iterator[None]:
    """Inside the block LAVIS's momentum update leaves the copies inside ``model`` as they are."""
    # Without momentum they are the trained modules themselves.
    owners = [part for part in model.modules() if "model_pairs" in vars(part) and vars(part).get("momentum")]
    momenta = [owner.momentum for owner in owners]
    for owner in owners:
        owner.momentum = 1.0
    try:
        yield
    finally:
        for owner, momentum in zip(owners, momenta):
            owner.momentum = momentum


def adapt_copies(model: nn.Module, factors: ModeFactors) -> None:
    """Let the momentum copies of adapted layers read the moving average of the adapter.

    The copies' layers use the slots of the layers that they are copies of, pinned to the set ``momentum``; that set
    joins ``model.model_pairs``, so that LAVIS's own update, which zips parameters pair by pair, averages the factors
    as it averages what else is trained:

        W_m = W0 + dW(U_m, V_m, P_m, lambda_m),   theta_m <- m theta_m + (1 - m) theta  for each factor

    The frozen weights of copy and original are alike, and so is their average. A model without copies stays as it is.
    """
    twins: list[tuple[nn.Module, str, AdaptedLayer]] = []
    for trained, copy in momentum_copies(model):
        for name, layer in trained.named_modules():
            if name and isinstance(layer, AdaptedLayer):
                twins.append((copy, name, layer))
    if not twins:
        return
    for copy, name, layer in twins:
        parent, _, child = name.rpartition(".")
        owner = copy.get_submodule(parent)
        setattr(owner, child, layer.twin(getattr(owner, child), TEACHER_SET))
    default = factors.sets["default"]
    average = factors.add_set(TEACHER_SET, default.config)
    average.load_state_dict(default.state_dict())
    average.requires_grad_(False)
    model.model_pairs.append([default, average])
