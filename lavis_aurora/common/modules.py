"""What modules of torch are made to do: keep single precision, and become another class."""

from __future__ import annotations

from typing import Callable, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class KeepFloat32(nn.Module):
    """A module whose float32 parameters stay float32 under ``model.half()`` and ``model.to(torch.bfloat16)``.

    Steps of training are often smaller than half precision can add to a number. Devices change as usual.
    """

    single_precision = True

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            rounded = tensor.dtype == torch.float32 and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if rounded else moved

        return super()._apply(keep if self.single_precision else fn, recurse)  # type: ignore[no-any-return,no-untyped-call]


def adopt(new: Module, module: nn.Module) -> Module:
    """Let ``new``, of which no constructor has run, be ``module``: its very parameters, children, hooks, settings.

    The two then hold them in registers of their own: what is put into one does not appear in the other.
    """
    for name, value in module.__dict__.items():
        new.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
    return new


def retyped(cls: type[Module], module: nn.Module) -> Module:
    """``module`` as a ``cls``, which extends its class; see :func:`adopt`."""
    return adopt(cls.__new__(cls), module)
