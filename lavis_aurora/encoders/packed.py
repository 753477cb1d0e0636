"""Many texts with one image through LAVIS's BERT: no padding, the image's keys and values computed once."""

from __future__ import annotations

import torch
from lavis.models.med import BertLayer, BertModel
from torch import Tensor

from lavis_aurora.attention import Packing
from lavis_aurora.encoders.fusion import GatedCrossAttention


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
