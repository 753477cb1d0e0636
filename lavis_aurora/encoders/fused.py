"""LAVIS's attention layers on torch's fused kernel: subclasses with the same weights and keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from lavis.models.med import BertModel, BertSelfAttention
from lavis.models.vit import Attention, Block, VisionTransformer
from timm.models.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from lavis_aurora.common.modules import retyped
from lavis_aurora.mode_approx.layers import ModeApproxLinear, grouped_linear


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * width) to (batch, heads, length, width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, length, width) to (batch, length, heads * width)."""
    return x.transpose(1, 2).flatten(2)


def attention_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """log n, by which a token of n patches counts as n in a softmax: (batch, 1, 1, tokens), of (batch, tokens).

    ToMe's proportional attention, see :mod:`lavis_aurora.encoders.merging`. It passes no gradient on: sizes depend on
    no parameter, and with a bias that asks for one torch writes attention out instead of its fused kernel.
    """
    return sizes.detach().log().to(dtype)[:, None, None]


def split_sizes(tokens: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The features of image tokens that ``layer`` reads, and the :func:`attention_bias` of merged ones, or None."""
    width = layer.in_features
    if tokens.shape[-1] == width:
        return tokens, None
    return tokens[..., :width], attention_bias(tokens[..., width], tokens.dtype)


class Packing:
    """Several texts that follow one another without padding: a batch of one, (1, tokens, d).

    All of them then attend to one image as one long query. Where a text is looked at as a whole, those of the same
    length are a batch.

    Args:
        lengths: tokens of each text, (texts,), rising, from 1.
        device: of the texts.

    Attributes:
        first: place of each text's first token, (texts,).
    """

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        self.first = (lengths.cumsum(0) - lengths).to(device)
        self._sizes = [pair.tolist() for pair in lengths.unique_consecutive(return_counts=True)]
        self._tokens = [length * texts for length, texts in zip(*self._sizes)]

    def unpacked(self, *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Views of the texts of each length, (texts, length, d), for each input."""
        parts = zip(*(x[0].split(self._tokens) for x in packed))
        return (tuple(x.unflatten(0, (-1, length)) for x in group) for length, group in zip(self._sizes[0], parts))

    def packed(self, groups: Iterable[Tensor]) -> Tensor:
        """(1, tokens, d) of results for each length, (texts, length, d)."""
        return torch.cat([x.flatten(0, 1) for x in groups]).unsqueeze(0)


class FusedVisionAttention(Attention):
    """LAVIS's ViT attention on the fused kernel; LAVIS's own where its attention map is asked for."""

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        """x (batch, tokens, d) to the same shape."""
        if register_hook:
            return super().forward(x, register_hook)
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.attn_drop.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.proj_drop(self.proj(merge_heads(attended)))


class CheckpointedBlock(Block):
    """A ViT block that is computed again in the backward pass instead of being kept.

    LAVIS's own wrapper ties a copied block to the original's weights, so that its momentum encoder is none.
    """

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        """As LAVIS's."""
        # What is trained need not be a parameter of the block, nor have anything before it: factors are shared.
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x, register_hook)
        return checkpoint(super().forward, x, register_hook, use_reentrant=False)


class FusedTextAttention(BertSelfAttention):
    """LAVIS's BERT attention on the fused kernel; LAVIS's own where its attention map is asked for.

    Texts may be packed: ``attention_mask`` is then their :class:`Packing`.

    Attributes:
        mask_keys: whether the keys of a cross-attention have a mask; pictures' tokens have none.
    """

    mask_keys = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
    ) -> tuple:
        """As LAVIS's; with packed texts, ``hidden_states`` is (1, tokens, d)."""
        if encoder_hidden_states is not None and not self.mask_keys:
            encoder_hidden_states, encoder_attention_mask = split_sizes(encoder_hidden_states, self.key)
        if output_attentions or head_mask is not None or self.save_attention:
            return super().forward(
                hidden_states,
                attention_mask,
                head_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_value,
                output_attentions,
            )
        source, mask = hidden_states, attention_mask
        if encoder_hidden_states is not None:
            source, mask = encoder_hidden_states, encoder_attention_mask
        if source is hidden_states:
            query, key, value = grouped_linear(source, self.query, self.key, self.value)
        else:
            query, (key, value) = self.query(hidden_states), grouped_linear(source, self.key, self.value)
        if isinstance(mask, Packing):
            parts = (self._attend(*texts)[0] for texts in mask.unpacked(query, key, value))
            return mask.packed(parts), (key, value)
        past = past_key_value if encoder_hidden_states is None else None
        return self._attend(query, key, value, mask, past)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """From projections (batch, length, d) to the same shape, and the keys and values by head."""
        query, key, value = (split_heads(x, self.num_attention_heads) for x in (query, key, value))
        if past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value)))
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return merge_heads(attended), (key, value)


def fuse_vision(encoder: VisionTransformer, checkpointed: int) -> None:
    """Use the fused kernel in all blocks; the last ``checkpointed`` are computed again in the backward pass."""
    depth = len(encoder.blocks)
    for i, block in enumerate(encoder.blocks):
        block.attn = retyped(FusedVisionAttention, block.attn)
        if i >= depth - checkpointed:
            encoder.blocks[i] = retyped(CheckpointedBlock, block)


def fuse_text(model: BertModel, attends_to_images: bool) -> None:
    """Use the fused kernel in all layers; with ``attends_to_images`` the cross-attention needs no mask."""
    for layer in model.encoder.layer:
        layer.attention.self = retyped(FusedTextAttention, layer.attention.self)
        if hasattr(layer, "crossattention"):
            cross = layer.crossattention.self = retyped(FusedTextAttention, layer.crossattention.self)
            cross.mask_keys = not attends_to_images


def drops(module: nn.Module) -> bool:
    """Whether anything is dropped at random in training."""
    if any(isinstance(part, nn.Dropout) and part.p or isinstance(part, DropPath) for part in module.modules()):
        return True
    adapted = (part.active_set for part in module.modules() if isinstance(part, ModeApproxLinear))
    return any(active is not None and active.config.dropout for active in adapted)


def attend_in_matching(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    wrong_image: Tensor | None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of the three passes of image-text matching.

    Args:
        query: (3 * batch, heads, length, width): the pairs, the texts that get a wrong image, the texts that are
            wrong for the images.
        key, value: of the batch's images, (batch, heads, keys, width), followed by those of the wrong images if
            ``wrong_image`` is None, (2 * batch, heads, keys, width).
        wrong_image: which image of the batch each text gets in the second pass, (batch,).
        dropout: probability of dropping an attention weight.
        bias: of the keys, :func:`attention_bias`; None where none are merged.

    Returns:
        (3 * batch, heads, length, width).
    """
    if dropout:  # a CPU then has no fused kernel, and torch would keep a copy of its own beside these
        key, value = key.contiguous(), value.contiguous()
    right, image_is_wrong, text_is_wrong = query.chunk(3)
    if wrong_image is None:
        (key, other_key), (value, other_value) = key.chunk(2), value.chunk(2)
        bias, other_bias = (None, None) if bias is None else bias.chunk(2)
        other = scaled_dot_product_attention(image_is_wrong, other_key, other_value, other_bias, dropout)
    elif torch.is_grad_enabled():
        # The copies of keys and values are made again in the backward pass rather than kept.
        other = checkpoint(_attend_to, image_is_wrong, key, value, wrong_image, dropout, bias, use_reentrant=False)
    else:
        other = _attend_to(image_is_wrong, key, value, wrong_image, dropout, bias)
    # An image's right and wrong text are one long query.
    both = torch.cat([right, text_is_wrong], dim=2)
    right, text_is_wrong = scaled_dot_product_attention(both, key, value, bias, dropout).chunk(2, dim=2)
    return torch.cat([right, other, text_is_wrong])


def _attend_to(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, dropout: float, bias: Tensor | None
) -> Tensor:
    """Query i over the keys ``index[i]``."""
    key, value = key.index_select(0, index), value.index_select(0, index)
    bias = None if bias is None else bias.index_select(0, index)
    return scaled_dot_product_attention(query, key, value, bias, dropout)


class MatchingAttention(FusedTextAttention):
    """Cross-attention that can be told to compute the three passes, see :func:`itm_context`."""

    in_matching = False
    wrong_image: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *args,
        **kwargs,
    ) -> tuple:
        """As LAVIS's; within the passes ``encoder_hidden_states`` has fewer rows than ``hidden_states``."""
        if not self.in_matching:
            return super().forward(hidden_states, attention_mask, head_mask, encoder_hidden_states, *args, **kwargs)
        tokens, bias = split_sizes(encoder_hidden_states, self.key)
        projected = (self.query(hidden_states), *grouped_linear(tokens, self.key, self.value))
        query, key, value = (split_heads(x, self.num_attention_heads) for x in projected)
        dropout = self.dropout.p if self.training else 0.0
        attended = attend_in_matching(query, key, value, self.wrong_image, dropout, bias)
        return merge_heads(attended), (key, value)


def share_image_kv(model: BertModel) -> None:
    """Let the cross-attention of ``model`` compute matching's passes; no key changes."""
    for layer in model.encoder.layer:
        layer.crossattention.self = retyped(MatchingAttention, layer.crossattention.self)


@contextmanager
def itm_context(model: BertModel, wrong_image: Tensor | None) -> Iterator[None]:
    """Inside the block the texts are matching's three passes; arguments as of :func:`attend_in_matching`."""
    attentions = [layer.crossattention.self for layer in model.encoder.layer]
    for attention in attentions:
        attention.in_matching, attention.wrong_image = True, wrong_image
    try:
        yield
    finally:
        for attention in attentions:
            attention.in_matching, attention.wrong_image = False, None
