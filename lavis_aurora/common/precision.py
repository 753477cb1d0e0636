"""Adapter parameters keep single precision when the backbone around them is cast to half."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self


class SinglePrecision(nn.Module):
    """A module whose float32 parameters stay float32 under ``model.half()`` and ``model.to(torch.bfloat16)``.

    Steps of training are often smaller than half precision can add to a number. Devices change as usual.
    """

    single_precision = True

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            rounded = tensor.dtype == torch.float32 and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if rounded else moved

        super()._apply(keep if self.single_precision else fn, recurse)  # type: ignore[no-untyped-call]
        return self
