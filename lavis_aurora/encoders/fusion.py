"""The gate (paper 3.3) in LAVIS's BERT: subclasses of its layers that keep their keys."""

from __future__ import annotations

from lavis.models.med import BertAttention, BertLayer, BertModel
from torch import Tensor

from lavis_aurora.alignment import AffineGate, QueryGate
from lavis_aurora.attention import Packing
from lavis_aurora.config import GateConfig
from lavis_aurora.encoders.fused import retyped
from lavis_aurora.mode_approx import ModeFactors


class GatedCrossAttention(BertAttention):
    """Cross-attention whose output f is combined with its input t by a :class:`QueryGate`."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | Packing | None = None, *args, **kwargs
    ) -> tuple:
        """As LAVIS's; ``attention_mask`` is the text's additive mask, (batch, 1, 1, length), or its packing."""
        f, *rest = super().forward(hidden_states, attention_mask, *args, **kwargs)
        if self.factors.active is None:
            return (f, *rest)
        if isinstance(attention_mask, Packing):
            parts = (self.gate(t, f) for t, f in attention_mask.unpacked(hidden_states, f))
            return (attention_mask.packed(parts), *rest)
        keep = None if attention_mask is None else attention_mask[:, 0, 0, :] == 0
        return (self.gate(hidden_states, f, keep), *rest)


class RememberedCrossAttention(BertAttention):
    """Cross-attention that keeps its input t for the :class:`RememberingLayer` around it."""

    query: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple:
        """As LAVIS's."""
        self.query = hidden_states
        return super().forward(hidden_states, *args, **kwargs)


class RememberingLayer(BertLayer):
    """A layer that adds something made of t and f to the output of its feed-forward block."""

    def forward(self, *args, **kwargs) -> tuple:
        """As LAVIS's."""
        self.crossattention.query = None
        return super().forward(*args, **kwargs)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """The feed-forward block; its input is f, or t itself in a text-only pass."""
        output = super().feed_forward_chunk(attention_output)
        query, self.crossattention.query = self.crossattention.query, None
        more = self.beside(query, attention_output)
        return output if more is None else output + more

    def beside(self, query: Tensor | None, attention_output: Tensor) -> Tensor | None:
        """What is added: of t, which is None in a text-only pass, and of the block's input. None for nothing."""
        return None


def remember_query(layer: BertLayer, cls: type[RememberingLayer]) -> RememberingLayer:
    """``layer`` as a ``cls``, with its parameters under their names."""
    new = retyped(cls, layer)
    new.crossattention = retyped(RememberedCrossAttention, new.crossattention)
    return new


class AffineLayer(RememberingLayer):
    """A layer whose output is corrected by an :class:`AffineGate` of t and f, when it attends to an image."""

    def beside(self, query: Tensor | None, attention_output: Tensor) -> Tensor | None:
        """The gate's correction."""
        if query is None or self.factors.active is None:
            return None
        return self.gate(query, attention_output)


def add_gates(encoder: BertModel, config: GateConfig, factors: ModeFactors) -> None:
    """Put a gate into every cross-attention layer of ``encoder``, in place. No key of the backbone changes.

    While ``factors`` are disabled, the gates are too.
    """
    if config.form == "none":
        return
    layers = encoder.encoder.layer
    dim = encoder.config.hidden_size
    for i, layer in enumerate(layers):
        if config.form == "affine":
            gated = layers[i] = remember_query(layer, AffineLayer)
            gated.gate = AffineGate(dim, config)
        else:
            gated = layer.crossattention = retyped(GatedCrossAttention, layer.crossattention)
            gated.gate = QueryGate(dim, config)
        # Not a submodule: the factors are registered once, at the model.
        gated.__dict__["factors"] = factors
