"""torch's nn.MultiheadAttention over the shared factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lavis_aurora.mode_approx.adapted import AdaptedLayer
from lavis_aurora.mode_approx.factors import ModeFactors

# Input weights of nn.MultiheadAttention with the projections in their rows: one for all, or three where the widths
# of keys or values differ from that of the queries.
IN_WEIGHTS = {
    "in_proj_weight": ("query", "key", "value"),
    "q_proj_weight": ("query",),
    "k_proj_weight": ("key",),
    "v_proj_weight": ("value",),
}


class ModeApproxMultiheadAttention(AdaptedLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with dW_k (paper eq. 4) folded into its input projections, with the same keys.

    torch computes with the weights as they are, by several ways (its fused kernels read them from the encoder layer
    around); each of them reads W0 + dW here.

    Args:
        attention: the module to replace; its parameters are taken over, not copied.
        factors: the shared factors.
        slots: rows of P and lambda for each of ``IN_WEIGHTS`` that the module has.
    """

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        factors: ModeFactors,
        slots: Mapping[str, Sequence[int]],
    ) -> None:
        self.take_over(attention, factors, slots)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """Query, key and value, stacked: (3 embed_dim, embed_dim)."""
        return self.effective_weight("in_proj_weight")

    @property
    def q_proj_weight(self) -> Tensor | None:
        """(embed_dim, embed_dim)."""
        return self.effective_weight("q_proj_weight")

    @property
    def k_proj_weight(self) -> Tensor | None:
        """(embed_dim, kdim)."""
        return self.effective_weight("k_proj_weight")

    @property
    def v_proj_weight(self) -> Tensor | None:
        """(embed_dim, vdim)."""
        return self.effective_weight("v_proj_weight")
