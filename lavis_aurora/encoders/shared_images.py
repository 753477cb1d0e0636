"""Image-text matching over keys and values that are there once for each image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lavis.models.med import BertModel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from lavis_aurora.common.modules import retyped
from lavis_aurora.encoders.fused import FusedTextAttention, merge_heads, split_heads
from lavis_aurora.mode_approx.layers import linear_together


def attend_in_matching(
    query: Tensor, key: Tensor, value: Tensor, wrong_image: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Attention of the three passes of image-text matching.

    Args:
        query: (3 * batch, heads, length, width): the pairs, the texts that get a wrong image, the texts that are
            wrong for the images.
        key, value: of the batch's images, (batch, heads, keys, width), followed by those of the wrong images if
            ``wrong_image`` is None, (2 * batch, heads, keys, width).
        wrong_image: which image of the batch each text gets in the second pass, (batch,).
        dropout: probability of dropping an attention weight.

    Returns:
        (3 * batch, heads, length, width).
    """
    right, image_is_wrong, text_is_wrong = query.chunk(3)
    if wrong_image is None:
        (key, other_key), (value, other_value) = key.chunk(2), value.chunk(2)
        other = scaled_dot_product_attention(image_is_wrong, other_key, other_value, dropout_p=dropout)
    elif torch.is_grad_enabled():
        # The copies of keys and values are made again in the backward pass rather than kept.
        other = checkpoint(_attend_to, image_is_wrong, key, value, wrong_image, dropout, use_reentrant=False)
    else:
        other = _attend_to(image_is_wrong, key, value, wrong_image, dropout)
    # An image's right and wrong text are one long query.
    both = torch.cat([right, text_is_wrong], dim=2)
    right, text_is_wrong = scaled_dot_product_attention(both, key, value, dropout_p=dropout).chunk(2, dim=2)
    return torch.cat([right, other, text_is_wrong])


def _attend_to(query: Tensor, key: Tensor, value: Tensor, index: Tensor, dropout: float) -> Tensor:
    """Query i over the keys ``index[i]``."""
    key, value = key.index_select(0, index), value.index_select(0, index)
    return scaled_dot_product_attention(query, key, value, dropout_p=dropout)


class MatchingAttention(FusedTextAttention):
    """Cross-attention that can be told to compute the three passes, see :func:`matching_passes`."""

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
        projected = (self.query(hidden_states), *linear_together(encoder_hidden_states, self.key, self.value))
        query, key, value = (split_heads(x, self.num_attention_heads) for x in projected)
        dropout = self.dropout.p if self.training else 0.0
        return merge_heads(attend_in_matching(query, key, value, self.wrong_image, dropout)), (key, value)


def share_images(model: BertModel) -> None:
    """Let the cross-attention of ``model`` compute matching's passes; no key changes."""
    for layer in model.encoder.layer:
        layer.crossattention.self = retyped(MatchingAttention, layer.crossattention.self)


@contextmanager
def matching_passes(model: BertModel, wrong_image: Tensor | None) -> Iterator[None]:
    """Inside the block the texts are matching's three passes; arguments as of :func:`attend_in_matching`."""
    attentions = [layer.crossattention.self for layer in model.encoder.layer]
    for attention in attentions:
        attention.in_matching, attention.wrong_image = True, wrong_image
    try:
        yield
    finally:
        for attention in attentions:
            attention.in_matching, attention.wrong_image = False, None
