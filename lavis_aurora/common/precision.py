"""Adapter parameters keep single precision when the backbone around them is cast to half."""

from __future__ import annotations

import torch
from torch import nn


class SinglePrecision(nn.Module):
    """A module whose float32 parameters stay float32 under ``model.half()`` and ``model.to(torch.bfloat16)``.

    Steps of training are often smaller than half precision can add to a number. Devices change as usual.
    """

    single_precision = True

    def _apply(self, fn, recurse: bool = True):
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            rounded = tensor.dtype == torch.float32 and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if rounded else moved

        return super()._apply(keep if self.single_precision else fn, recurse)
