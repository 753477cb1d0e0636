"""Token merging (ToMe, arXiv 2210.09461) in LAVIS's ViT: after the attention of each layer the r most alike tokens
are merged into others, and what follows weighs a token by the number of patches that it stands for.

Tokens carry that number with them, in a column behind their features, (batch, tokens, d + 1): into the next layer, to
the texts that attend to them, and to whatever keeps them. While a tower is traced further columns say which patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from lavis.models.vit import Block, VisionTransformer
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.modules import retyped
from lavis_aurora.encoders.fused import (
    CheckpointedBlock,
    FusedVisionAttention,
    attention_bias,
    merge_heads,
    split_heads,
)


def merge_tokens(x: Tensor, carried: Tensor, keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: of the tokens at even places the r that are most alike one at an odd place join it.

    Alike are tokens whose keys have a large cosine. The first token, [CLS], joins none and stays the first.

    Args:
        x: features, (batch, tokens, d): merged ones are their mean, each weighed by its number of patches.
        carried: that number, and more columns that add up, (batch, tokens, 1 or more).
        keys: of the attention before, the mean over heads, (batch, tokens, width).
        r: at most; of fewer than 2r + 1 tokens, as many as there are pairs.

    Returns:
        x and carried of r tokens less: those left at even places in their order, then those at odd places.
    """
    r = min(r, (x.shape[1] - 1) // 2)
    if r == 0:
        return x, carried
    with torch.no_grad():
        keys = F.normalize(keys.float(), dim=-1)
        cosines = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
        cosines[:, 0] = float("-inf")
        best, partner = cosines.max(dim=2)
        order = best.argsort(dim=1, descending=True)
        joining, left = order[:, :r], order[:, r:].sort(dim=1).values
        partner = partner.gather(1, joining)

    def summed(y: Tensor) -> Tensor:
        even, odd = y[:, ::2], y[:, 1::2]
        joined, stay, places = (index.unsqueeze(2).expand(-1, -1, y.shape[2]) for index in (joining, left, partner))
        return torch.cat([even.gather(1, stay), odd.scatter_add(1, places, even.gather(1, joined))], dim=1)

    x, carried = summed(x * carried[..., :1]), summed(carried)
    return x / carried[..., :1], carried


class MergingAttention(FusedVisionAttention):
    """Attention that weighs tokens by their number of patches (proportional attention), and tells its keys."""

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (batch, tokens, d) to the same shape, and the mean of the heads' keys, (batch, tokens, d / heads).

        Args:
            sizes: patches of each token, (batch, tokens); None where each is one.
        """
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.attn_drop.p if self.training else 0.0
        bias = None if sizes is None else attention_bias(sizes, query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.proj_drop(self.proj(merge_heads(attended))), key.detach().mean(dim=1)


class MergingBlock(Block):
    """A layer of the ViT that merges r tokens between its attention and its feed-forward block.

    Attributes:
        r: tokens that it merges.
        trace: as the first layer, let tokens carry which patches they stand for.
    """

    r = 0
    trace = False

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        """x (batch, tokens, d), or with what tokens carry (batch, tokens, d + 1 or more), to the latter."""
        if register_hook:
            raise AuroraError("model.token_merging: no attention map of the vision tower is kept; set 0 for one")
        width = self.norm1.normalized_shape[0]
        # Numbers of patches depend on no parameter; a bias that asks for a gradient has no fused kernel.
        x, carried = x[..., :width], x[..., width:].detach()
        sizes = carried[..., 0] if carried.shape[-1] else None
        if sizes is None:
            carried = x.new_ones(*x.shape[:2], 1)
            if self.trace:
                patches = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
                carried = torch.cat([carried, patches], dim=2)
        attended, keys = self.attn(self.norm1(x), sizes)
        x, carried = merge_tokens(x + self.drop_path(attended), carried, keys, self.r)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return torch.cat([x, carried.to(x.dtype)], dim=2)


class CheckpointedMergingBlock(CheckpointedBlock, MergingBlock):
    """One that is computed again in the backward pass."""


class MergingNorm(nn.LayerNorm):
    """The last normalisation, which hands on what tokens carry."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, d + ...) to the same shape."""
        width = self.normalized_shape[0]
        return torch.cat([super().forward(x[..., :width]), x[..., width:]], dim=-1)


def merge_in_tower(encoder: VisionTransformer, r: int) -> None:
    """Let each layer of a tower with fused attention merge r tokens, in place; at 0 nothing is changed."""
    if not r:
        return
    for i, block in enumerate(encoder.blocks):
        checkpointed = isinstance(block, CheckpointedBlock)
        block = encoder.blocks[i] = retyped(CheckpointedMergingBlock if checkpointed else MergingBlock, block)
        block.attn, block.r = retyped(MergingAttention, block.attn), r
    encoder.norm = retyped(MergingNorm, encoder.norm)


@contextmanager
def traced(encoder: VisionTransformer) -> Iterator[None]:
    """Inside the block tokens carry which patches they stand for; read it by :func:`patch_shares`."""
    first = encoder.blocks[0]
    merges = isinstance(first, MergingBlock)
    if merges:
        first.trace = True
    try:
        yield
    finally:
        if merges:
            first.trace = False


def patch_shares(tokens: Tensor, width: int) -> Tensor:
    """How a token's part in something is shared out to its patches, evenly: (batch, tokens, patches).

    Args:
        tokens: of a :func:`traced` tower, (batch, tokens, d + 1 + patches); of one that merges nothing,
            (batch, tokens, d).
        width: d.

    Returns:
        Rows add up to 1; [CLS] is the first patch.
    """
    if tokens.shape[2] == width:
        return torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1, -1)
    return tokens[..., width + 1 :] / tokens[..., width : width + 1]
