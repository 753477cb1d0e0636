"""The gate (paper 3.3) and UniAdapter's bottlenecks in LAVIS's towers: their layers' subclasses, with their keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from lavis.models.med import BertAttention, BertLayer, BertModel
from lavis.models.vit import Mlp, VisionTransformer
from torch import Tensor, nn

from lavis_aurora.adapters.sets import AdapterSets
from lavis_aurora.alignment.gate import Gate
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.modules import retyped
from lavis_aurora.config.method import GATE_FORMS, GateConfig
from lavis_aurora.encoders.fused import Packing


def apply_gate(gate: Gate, t: Tensor, f: Tensor, mask: Tensor | Packing | None) -> Tensor:
    """``gate`` of t and f, (batch, length, d), given what it reads.

    Args:
        mask: the text's additive mask, (batch, 1, 1, length), or its packing; a form that reads whole texts gets
            those of each length as a batch without padding.
    """
    if isinstance(mask, Packing):
        if gate.reads == "positions":
            return gate(t, f)
        return mask.packed(gate(*texts) for texts in mask.unpacked(t, f))
    return gate(t, f, None if mask is None else mask[:, 0, 0, :] == 0)


class GatedCrossAttention(BertAttention):
    """Cross-attention whose output f is combined with its input t by a :class:`Gate`."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | Packing | None = None, *args: Any, **kwargs: Any
    ) -> tuple:
        """LAVIS's arguments; ``attention_mask`` is the text's, as of :func:`apply_gate`."""
        f, *rest = super().forward(hidden_states, attention_mask, *args, **kwargs)
        if self.adapters.active is None:
            return (f, *rest)
        return (apply_gate(self.gate, hidden_states, f, attention_mask), *rest)


class QueryCachingCrossAttention(BertAttention):
    """Cross-attention that keeps its input t, and the text's mask, for the :class:`ParallelLayer` around it."""

    query: Tensor | None = None
    mask: Tensor | Packing | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | Packing | None = None, *args: Any, **kwargs: Any
    ) -> tuple:
        """LAVIS's arguments."""
        self.query, self.mask = hidden_states, attention_mask
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


class ParallelLayer(BertLayer):
    """A layer that adds something made of t and f to the output of its feed-forward block."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple:
        """LAVIS's arguments."""
        self.crossattention.query = self.crossattention.mask = None
        return super().forward(*args, **kwargs)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """The feed-forward block; its input is f, or t itself in a text-only pass."""
        output = super().feed_forward_chunk(attention_output)
        cross = self.crossattention
        query, mask, cross.query, cross.mask = cross.query, cross.mask, None, None
        residual = self.parallel_residual(query, attention_output, mask)
        return output if residual is None else output + residual

    def parallel_residual(
        self, query: Tensor | None, attention_output: Tensor, mask: Tensor | Packing | None
    ) -> Tensor | None:
        """What to add, (batch, length, d), for t (None in a text-only pass) and f; None for nothing."""
        raise NotImplementedError


Parallel = TypeVar("Parallel", bound=ParallelLayer)


def make_parallel_layer(layer: BertLayer, cls: type[Parallel]) -> Parallel:
    """``layer`` as a ``cls``, with its parameters under their names."""
    new = retyped(cls, layer)
    new.crossattention = retyped(QueryCachingCrossAttention, new.crossattention)
    return new


class GatedLayer(ParallelLayer):
    """A layer whose output is corrected by a :class:`Gate` of t and f, when it attends to an image."""

    def parallel_residual(
        self, query: Tensor | None, attention_output: Tensor, mask: Tensor | Packing | None
    ) -> Tensor | None:
        """The gate's correction, (batch, length, d)."""
        if query is None or self.adapters.active is None:
            return None
        return apply_gate(self.gate, query, attention_output, mask)


def add_gates(encoder: BertModel, config: GateConfig, adapters: AdapterSets, chosen: Iterable[int]) -> None:
    """Put a gate into the cross-attention of the ``chosen`` layers, in place. No key of the backbone changes.

    While ``adapters`` are disabled, the gates are too.
    """
    form = GATE_FORMS[config.form]
    if form is None:
        return
    layers = encoder.encoder.layer
    for i in sorted(chosen):
        layer = layers[i]
        if form.place == "layer":
            gated = layers[i] = make_parallel_layer(layer, GatedLayer)
        else:
            gated = layer.crossattention = retyped(GatedCrossAttention, layer.crossattention)
        gated.gate = form(encoder.config.hidden_size, config)
        # Not a submodule: the sets are registered once, at the model.
        gated.__dict__["adapters"] = adapters


class Bottlenecks(Protocol):
    """One set of bottlenecks, by the number of a tower's layer; x, t and f are (batch, length, d)."""

    def vision(self, i: int, x: Tensor) -> Tensor:
        """Parallel to the feed-forward block of layer ``i`` of the vision tower."""

    def text(self, i: int, t: Tensor) -> Tensor:
        """Parallel to that of a text tower, for a text alone."""

    def fusion(self, i: int, t: Tensor, f: Tensor) -> Tensor:
        """Parallel to that of a text tower, for a text that attends to an image."""


class BottleneckSets(Protocol):
    """Sets of bottlenecks.

    Attributes:
        layers: of a tower, those with a bottleneck; the sets number their bottlenecks in this order.
    """

    layers: list[int]

    @property
    def active_set(self) -> Bottlenecks | None:
        """The set that forwards use now; None for the plain backbone."""

    def add_block(self, block: nn.Module) -> None:
        """Called with each feed-forward block that bottlenecks are parallel to."""


class VisionBottleneck(Mlp):
    """Feed-forward block of the ViT with a bottleneck parallel to it."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, d) to the same shape."""
        active = self.adapters.active_set
        return super().forward(x) if active is None else super().forward(x) + active.vision(self.index, x)


class TextBottleneck(ParallelLayer):
    """Layer of BERT with a bottleneck parallel to its feed-forward block."""

    def parallel_residual(
        self, query: Tensor | None, attention_output: Tensor, mask: Tensor | Packing | None
    ) -> Tensor | None:
        """The bottleneck's output for f, or for t itself where no image is attended to; position by position."""
        active = self.adapters.active_set
        if active is None:
            return None
        if query is None:
            return active.text(self.index, attention_output)
        return active.fusion(self.index, query, attention_output)


Sets = TypeVar("Sets", bound=BottleneckSets)


def add_bottlenecks(vision: VisionTransformer, texts: Sequence[BertModel], make: Callable[[int, int], Sets]) -> Sets:
    """Put bottlenecks into the towers, in place; text towers share them layer by layer.

    Args:
        vision: LAVIS's ViT.
        texts: LAVIS's BERTs.
        make: from depth and width of the towers to the sets.

    Raises:
        AuroraError: the towers are not of one depth and width, so that no down-projection can be shared.
    """
    shapes = [(len(vision.blocks), vision.embed_dim)]
    shapes += [(len(text.encoder.layer), text.config.hidden_size) for text in texts]
    if len(set(shapes)) > 1:
        raise AuroraError(
            f"model.tuning: uniadapter shares projections between towers of one depth and width, but these have "
            f"{', '.join(f'{depth} layers of width {dim}' for depth, dim in shapes)}; use aurora or lora"
        )
    sets = make(*shapes[0])

    def attach(module: nn.Module, index: int, *blocks: nn.Module) -> nn.Module:
        # Not a submodule: the sets are registered once, at the model.
        module.__dict__.update(adapters=sets, index=index)
        for block in blocks:
            sets.add_block(block)
        return module

    for i, number in enumerate(sets.layers):
        block = vision.blocks[number]
        block.mlp = attach(retyped(VisionBottleneck, block.mlp), i, block.mlp.fc1, block.mlp.fc2)
    for text in texts:
        for i, number in enumerate(sets.layers):
            new = text.encoder.layer[number] = make_parallel_layer(text.encoder.layer[number], TextBottleneck)
            attach(new, i, new.intermediate.dense, new.output.dense)
    return sets


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
    gate = getattr(layer, "gate", None)
    if gate is not None and gate.reads != "positions":
        return layer.forward(hidden, attention_mask=texts, encoder_hidden_states=image, mode="multimodal")[0][
            0, texts.first
        ]
    gate = getattr(layer.crossattention, "gate", None)
    if gate is not None and gate.reads != "positions":
        t = layer.attention(hidden, texts)[0]
        f = layer.crossattention(t, texts, encoder_hidden_states=image)[0][:, texts.first]
    else:
        # The first token attends to its text as it does to an image: keys and values are of other tokens.
        t = [layer.attention(x[:, :1], encoder_hidden_states=x)[0] for (x,) in texts.unpacked(hidden)]
        f = layer.crossattention(torch.cat(t).transpose(0, 1), encoder_hidden_states=image)[0]
    return layer.feed_forward_chunk(f)[0]
