"""Gated query transformation, GQT (paper 3.3, figure 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.modules import KeepFloat32
from lavis_aurora.config.method import GATE_FORMS, GateConfig


class Gate(KeepFloat32):
    """A form of the gate: a module in each cross-attention layer, made of that layer's t and f.

    t is the output of the self-attention block, f that of the cross-attention block. Evaluation packs texts without
    padding, and the last layer is computed for the first position alone where that is enough; so a form says what it
    reads, and is given that.

    Args:
        dim: width d of t and f.
        config: form and init.

    Attributes:
        reads: ``text``: a result may depend on the whole text of its position; forwards get texts whole, with
            ``keep`` where they are padded. ``positions``: on t and f at that position alone; then texts may be cut up
            and run together.
        place: ``crossattention``: the result takes the place of f. ``layer``: it is added to the output of the whole
            layer, after the feed-forward block.
    """

    reads: ClassVar[str]
    place: ClassVar[str] = "crossattention"

    def __init__(self, dim: int, config: GateConfig) -> None:
        super().__init__()

    def forward(self, t: Tensor, f: Tensor, keep: Tensor | None = None) -> Tensor:
        """Combine the two.

        Args:
            t, f: (batch, length, d).
            keep: True where a position is text, False where padding, (batch, length); None if all are text.

        Returns:
            (batch, length, d).
        """
        raise NotImplementedError

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything this module trains."""
        return (("gate", parameter) for parameter in self.parameters())


GateClass = TypeVar("GateClass", bound=type[Gate])
ATTRIBUTES = {"reads": ("positions", "text"), "place": ("crossattention", "layer")}


def register_gate(name: str) -> Callable[[GateClass], GateClass]:
    """Decorator of a :class:`Gate`, which ``model.gate.form: NAME`` then puts into each cross-attention layer.

    Raises:
        AuroraError: the name is taken, or the class does not say what it reads.
    """

    def register(cls: GateClass) -> GateClass:
        for attribute, known in ATTRIBUTES.items():
            # What a form reads is not inherited: a subclass may read more.
            value = vars(cls).get(attribute) if attribute == "reads" else getattr(cls, attribute)
            if value not in known:
                raise AuroraError(
                    f"gate.form: {name} must say what it needs: {cls.__name__}.{attribute} = "
                    f"{' or '.join(map(repr, known))}, in the class itself, so that packed texts are scored as "
                    f"single ones are"
                )
        added: GateClass = GATE_FORMS.register(name)(cls)
        return added

    return register


# No gate at all.
GATE_FORMS.register("none")(None)


def _start(dim: int, init: str) -> nn.Parameter:
    return nn.Parameter(torch.ones(dim) if init == "ones" else torch.zeros(dim))


@register_gate("convex")
@register_gate("residual")
class QueryGate(Gate):
    """Feeds the text query t back into the fusion features f of a cross-attention layer.

        t' = tanh(gamma * t) + beta,   g = softmax_i(sum_j <f_i, t'_j>)
        residual: f + (1 - g) * t'      convex: g * f + (1 - g) * t'

    With gamma = beta = 0, ``residual`` is exactly f. Padding takes no part in sum and softmax.

    Args:
        dim: width d of t and f; gamma and beta have 2d numbers.
        config: form (residual or convex) and init.
    """

    reads: ClassVar[str] = "text"

    def __init__(self, dim: int, config: GateConfig) -> None:
        super().__init__(dim, config)
        self.form = config.form
        self.gamma = _start(dim, config.init)
        self.beta = _start(dim, config.init)

    def forward(self, t: Tensor, f: Tensor, keep: Tensor | None = None) -> Tensor:
        """As of :class:`Gate`."""
        transformed = torch.tanh(self.gamma * t) + self.beta
        summed = transformed if keep is None else transformed * keep.unsqueeze(-1).to(transformed.dtype)
        similarity = (f * summed.sum(dim=1, keepdim=True)).sum(dim=-1)
        if keep is not None:
            similarity = similarity.masked_fill(~keep, float("-inf"))
        g = similarity.softmax(dim=1).unsqueeze(-1)
        base = g * f if self.form == "convex" else f
        return (base + (1 - g) * transformed).to(f.dtype)


@register_gate("affine")
class AffineGate(Gate):
    """The form in the authors' released code: 0.1 (gamma * x + beta) for x in (t, f), 4d numbers.

    It is added to the output of the whole layer, after the feed-forward block.
    """

    reads: ClassVar[str] = "positions"
    place: ClassVar[str] = "layer"

    def __init__(self, dim: int, config: GateConfig) -> None:
        super().__init__(dim, config)
        self.gamma_t, self.beta_t = _start(dim, config.init), _start(dim, config.init)
        self.gamma_f, self.beta_f = _start(dim, config.init), _start(dim, config.init)

    def forward(self, t: Tensor, f: Tensor, keep: Tensor | None = None) -> Tensor:
        """What to add, (batch, length, d), for t and f as in :class:`QueryGate`."""
        return (0.1 * (self.gamma_t * t + self.beta_t + self.gamma_f * f + self.beta_f)).to(f.dtype)
