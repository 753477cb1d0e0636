"""LAVIS's attention layers on torch's fused kernel: subclasses with the same weights and keys."""

from __future__ import annotations

from typing import TypeVar

import torch
from lavis.models.med import BertModel, BertSelfAttention
from lavis.models.vit import Attention, Block, VisionTransformer
from timm.models.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavis_aurora.attention import attend, merge_heads, split_heads
from lavis_aurora.mode_approx.linear import ModeApproxLinear, linear_together

Module = TypeVar("Module", bound=nn.Module)


def retyped(cls: type[Module], module: nn.Module) -> Module:
    """A ``cls`` with the very parameters and children of ``module``, whose class it extends by methods alone."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    return new


class FusedVisionAttention(Attention):
    """LAVIS's ViT attention on the fused kernel; LAVIS's own where its attention map is asked for."""

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        """x (batch, tokens, d) to the same shape."""
        if register_hook:
            return super().forward(x, register_hook)
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.attn_drop.p if self.training else 0.0
        return self.proj_drop(self.proj(merge_heads(attend(query, key, value, dropout=dropout))))


class CheckpointedBlock(Block):
    """A ViT block that is computed again in the backward pass instead of being kept.

    LAVIS's own wrapper ties a copied block to the original's weights, so that its momentum encoder is none.
    """

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        """As LAVIS's."""
        if not x.requires_grad and not any(p.requires_grad for p in self.parameters()) or not self.training:
            return super().forward(x, register_hook)
        return checkpoint(super().forward, x, register_hook, use_reentrant=False)


class FusedTextAttention(BertSelfAttention):
    """LAVIS's BERT attention on the fused kernel; LAVIS's own where its attention map is asked for.

    In cross-attention several texts may share one image, see :func:`lavis_aurora.attention.attend`.

    Attributes:
        keys_are_padded: whether the keys of a cross-attention have a mask; pictures' tokens have none.
    """

    keys_are_padded = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
    ) -> tuple:
        """As LAVIS's; ``encoder_hidden_states`` may hold one image for several texts."""
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
            source, mask = encoder_hidden_states, encoder_attention_mask if self.keys_are_padded else None
        if source is hidden_states:
            projected = linear_together(source, self.query, self.key, self.value)
        else:
            projected = (self.query(hidden_states), *linear_together(source, self.key, self.value))
        query, key, value = (split_heads(x, self.num_attention_heads) for x in projected)
        if encoder_hidden_states is None and past_key_value is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past_key_value, (key, value)))
        dropout = self.dropout.p if self.training else 0.0
        return merge_heads(attend(query, key, value, mask, dropout)), (key, value)


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
            cross.keys_are_padded = not attends_to_images


def drops(module: nn.Module) -> bool:
    """Whether anything is dropped at random in training."""
    if any(isinstance(part, nn.Dropout) and part.p or isinstance(part, DropPath) for part in module.modules()):
        return True
    adapted = (part.active_set for part in module.modules() if isinstance(part, ModeApproxLinear))
    return any(active is not None and active.config.dropout for active in adapted)
