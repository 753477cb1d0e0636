"""A batch computed in parts, of which one's activations at a time are kept; losses are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from lavis.models.med import XBertEncoder
from lavis.models.vit import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding

from lavis_aurora.encoders.towers import FrozenTokens, VisualFeatures, encode_visual, frozen_tokens


def compute_in_parts(
    compute: Callable[..., Iterable[Tensor]], size: int | None, *batch: Tensor, whole: tuple[Tensor, ...] = ()
) -> list[Tensor]:
    """What ``compute`` gives for a batch, of which one part's activations at a time are kept.

    In the backward pass each part is computed again, with the same draws of dropout: gradients are those of the whole
    batch, at the cost of a second forward pass (gradient caching, Gao et al., 2021, which losses over pairs need in
    place of accumulated gradients).

    Args:
        compute: from parts of the batch, and ``whole``, to tensors with a row for each sample.
        size: samples of a part; None: all of them at once.
        batch: tensors with a row for each sample.
        whole: further arguments.

    Returns:
        The tensors of all parts, one after the other.
    """
    if size is None or size >= len(batch[0]):
        return list(compute(*batch, *whole))
    parts = zip(*(torch.split(tensor, size) for tensor in batch))
    if torch.is_grad_enabled():
        computed = [checkpoint(compute, *part, *whole, use_reentrant=False) for part in parts]
    else:
        computed = [compute(*part, *whole) for part in parts]
    return [torch.cat(tensors) for tensors in zip(*computed)]


def frozen_tokens_in_parts(encoder: VisionTransformer, size: int | None, visual: Tensor) -> FrozenTokens | None:
    """:func:`lavis_aurora.encoders.towers.frozen_tokens` of a batch, ``size`` samples at a time."""
    first, *rest = (frozen_tokens(encoder, part) for part in torch.split(visual, size or len(visual)))
    if first is None or not rest:
        return first
    return first._replace(tokens=torch.cat([first.tokens, *(part.tokens for part in rest if part is not None)]))


def encode_visual_in_parts(
    encoder: VisionTransformer, size: int | None, visual: Tensor, frozen: FrozenTokens | None
) -> VisualFeatures:
    """:func:`lavis_aurora.encoders.towers.encode_visual` of a batch, ``size`` samples at a time."""

    def encode(visual: Tensor, *tokens: Tensor) -> VisualFeatures:
        known = None if frozen is None else frozen._replace(tokens=tokens[0].flatten(0, 1))
        return encode_visual(encoder, visual, known)

    # A video has the tokens of all its frames.
    given = () if frozen is None else (frozen.tokens.unflatten(0, (len(visual), -1)),)
    return VisualFeatures(*compute_in_parts(encode, size, visual, *given))


def encode_text_in_parts(encoder: XBertEncoder, size: int | None, text: BatchEncoding) -> Tensor:
    """Tokens of texts alone, (batch, length, d), ``size`` texts at a time."""

    def encode(ids: Tensor, mask: Tensor) -> list[Tensor]:
        return [encoder.forward_text(BatchEncoding({"input_ids": ids, "attention_mask": mask})).last_hidden_state]

    [tokens] = compute_in_parts(encode, size, text.input_ids, text.attention_mask)
    return tokens
