"""The gate (paper 3.3) in LAVIS's BERT: subclasses of its layers that keep their keys."""

from __future__ import annotations

import torch
from lavis.models.med import BertAttention, BertLayer, BertModel
from torch import Tensor

from lavis_aurora.alignment.gate import AffineGate, QueryGate
from lavis_aurora.config.method import GateConfig
from lavis_aurora.encoders.fused import Packing, retyped
from lavis_aurora.mode_approx.factors import ModeFactors


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


def encode_with_image(encoder: BertModel, ids: Tensor, lengths: Tensor, image: Tensor) -> Tensor:
    """What LAVIS's ``encoder`` gives at the first position of each text, computed for all texts at once.

    The image's keys and values are shared by the texts, and the last layer computes no more than the first position
    needs. LAVIS's own forward gives the same for repeated images and padded texts.

    Args:
        encoder: in evaluation, after :func:`lavis_aurora.encoders.fused.fuse_text`.
        ids: padded token ids, (texts, longest), in main memory.
        lengths: tokens of each text, (texts,), rising, in main memory.
        image: tokens of the image, (tokens, d).

    Returns:
        (texts, d).
    """
    places, image = torch.arange(ids.shape[1]).expand_as(ids), image.unsqueeze(0)
    keep = places < lengths.unsqueeze(1)
    texts = Packing(lengths, image.device)
    ids, places = (x[keep].unsqueeze(0).to(image.device) for x in (ids, places))
    hidden = encoder.embeddings(ids, position_ids=places)
    *layers, last = encoder.encoder.layer
    for layer in layers:
        # Past torch.compile (run.compile): each image has texts of other lengths, and would have a graph of its own.
        hidden = layer.forward(hidden, attention_mask=texts, encoder_hidden_states=image, mode="multimodal")[0]
    return _last_layer(last, hidden, texts, image)


def _last_layer(layer: BertLayer, hidden: Tensor, texts: Packing, image: Tensor) -> Tensor:
    """The last layer for the first token of each text, (texts, d)."""
    if isinstance(layer.crossattention, GatedCrossAttention):
        # The gate's softmax runs over the whole text.
        t = layer.attention(hidden, texts)[0]
        f = layer.crossattention(t, texts, encoder_hidden_states=image)[0][:, texts.first]
    else:
        # The first token attends to its text as it does to an image: keys and values are of other tokens.
        t = [layer.attention(x[:, :1], encoder_hidden_states=x)[0] for (x,) in texts.unpacked(hidden)]
        f = layer.crossattention(torch.cat(t).transpose(0, 1), encoder_hidden_states=image)[0]
    return layer.feed_forward_chunk(f)[0]
