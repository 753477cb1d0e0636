"""Scoring whatever the mode: a model in training answers as in an evaluation, and is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which ``model`` is in eval mode; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # Not by eval(): what a module makes of being asked for a mode (NormMode) stays as it was.
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
