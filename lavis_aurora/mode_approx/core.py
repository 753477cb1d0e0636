"""The update of the authors' released code: a dense R x R x R core between the shared factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_aurora.config.method import APPROX_FORMS, ModeApproxConfig
from lavis_aurora.mode_approx.factors import FactorSet, slot_rows


@APPROX_FORMS.register("core")
class CoreFactorSet(FactorSet):
    """One adapter of ``form: core``: U, V and the core C for all slots, and a vector P_k of R for each.

        dW_k = s V M_k^T U^T,   M_k[i, j] = sum_c C[i, j, c] P[k, c],   s = scale

    V starts at zero, so that dW = 0 at step 0, and the others as in the released code: U uniform within
    1 / sqrt(d_in), C and P by Xavier's rule, where P is of the matrix (R, slots of a module) that holds it there.

    With N slots of width d it has 2dR + R^3 + NR parameters.

    Args:
        slots, config: as of :class:`FactorSet`; ``config.dropout`` drops what M_k gives, not what U reads.
    """

    separable: ClassVar[bool] = False

    def __init__(self, slots: Mapping[str, tuple[int, int]], config: ModeApproxConfig) -> None:
        super().__init__(slots, config)
        rank = config.rank
        del self.coefficients
        for u in self.U.parameters():
            _uniform(u, u.shape[0] ** -0.5)
        self.core = nn.Parameter(torch.empty(rank, rank, rank))
        nn.init.xavier_uniform_(self.core)
        for row, slot in zip(self.P.detach(), slots):
            _uniform(row, (6 / (rank + _together(slot))) ** 0.5)

    def scale(self, d_in: int) -> float:
        """s of the equation above, whatever the width."""
        return self.config.scale

    def slot_weights(self, slots: Sequence[int] | Tensor, d_in: int) -> Tensor:
        """s M_k of the slots, shape (len(slots), rank, rank)."""
        rows = slot_rows(self.P, slots)
        # Where mixed precision computes the layer, the factors stay in their own.
        with torch.autocast(rows.device.type, enabled=False):
            return self.scale(d_in) * torch.einsum("ijc,kc->kij", self.core, rows)

    def low_rank(
        self, slots: Sequence[int] | Tensor, d_in: int, d_out: int, tower: str | None = None, columns: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As of :class:`FactorSet`: U and s V M_k^T one below the other, or in ``columns`` V and s U M_k."""
        u, v, m = self.parts(slots, d_in, d_out, tower)
        with torch.autocast(u.device.type, enabled=False):
            return (v, (u @ m).flatten(0, 1)) if columns else (u, (v @ m.mT).flatten(0, 1))

    def apply_update(
        self,
        x: Tensor,
        slots: Sequence[int] | Tensor,
        shape: tuple[int, int],
        tower: str | None,
        columns: bool,
        dropout: float,
    ) -> Tensor:
        """As of :class:`FactorSet`, but ``dropout`` is of the R numbers that M_k gives."""
        u, v, m = (part.to(x.dtype) for part in self.parts(slots, *shape, tower))
        if columns:
            read = torch.unflatten(x, -1, (len(m), -1)) @ u
            return F.dropout(torch.einsum("...kr,krs->...s", read, m), dropout) @ v.t()
        mixed = torch.einsum("...r,krs->...ks", x @ u, m)
        return (F.dropout(mixed, dropout) @ v.t()).flatten(-2)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """U, V and the core."""
        yield from (*super().shared_parameters(), self.core)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything this module trains."""
        for parameter in (*self.U.parameters(), *self.V.parameters()):
            yield "factors U, V", parameter
        yield "core", self.core
        yield "slot factors P", self.P


def _uniform(tensor: Tensor, bound: float) -> None:
    nn.init.uniform_(tensor, -bound, bound)


def _together(slot: str) -> int:
    """How many slots' vectors are one matrix in the released code, by which Xavier's rule has their bound.

    Four of the vision tower's attention, eight of its feed-forward block, and each of a text tower's alone.
    """
    if ".mlp." in slot:
        return 8
    return 4 if ".attn." in slot else 1
