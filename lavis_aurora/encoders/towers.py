"""LAVIS's encoders and tokenizer, built from a checked configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from lavis.common.utils import get_abs_path
from lavis.models.med import BertLayer, XBertEncoder
from lavis.models.vit import Block, VisionTransformer, VisionTransformerEncoder
from torch import Tensor, nn
from transformers import BertConfig, BertTokenizer

from lavis_aurora.adapters.updates import UpdatedLayer
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import regular
from lavis_aurora.common.modules import retyped
from lavis_aurora.config.models import BlipAuroraConfig
from lavis_aurora.encoders.fused import drops, fuse_text, fuse_vision
from lavis_aurora.encoders.merging import MergingBlock, merge_in_tower

# Keys that LAVIS's BERT reads and of which the towers here know one way: its value (the first; those after it compute
# the same), and why.
ONE_WAY = {
    "position_embedding_type": (("absolute",), "LAVIS has no relative positions between texts and images"),
    "add_cross_attention": ((True,), "texts attend to images"),
    "fusion_layer": ((None,), "it is of ALBEF; in BLIP every layer attends to images"),
    "pruned_heads": (({},), "BLIP's checkpoints hold all heads"),
    "chunk_size_feed_forward": ((0, 1), "texts are of any length, which chunks would have to divide"),
}
# What transformers reads in the folder of a tokenizer.
TOKENIZER_FILES = (
    *("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
)


def plain_vision_encoder(cfg: BlipAuroraConfig) -> VisionTransformerEncoder:
    """LAVIS's ViT as it is, of LAVIS's two sizes or of the size in ``model.vit``. Random weights."""
    if cfg.vit is None:
        return VisionTransformerEncoder.from_config(vars(cfg))
    eps = cfg.vit_layer_norm_epsilon
    encoder = VisionTransformerEncoder(
        img_size=cfg.image_size,
        patch_size=cfg.vit.patch_size,
        embed_dim=cfg.vit.embed_dim,
        depth=cfg.vit.depth,
        num_heads=cfg.vit.num_heads,
        drop_path_rate=cfg.vit_drop_path_rate,
        norm_layer=None if eps == -1 else partial(nn.LayerNorm, eps=eps),
    )
    encoder.vision_width = cfg.vit.embed_dim
    return encoder


def build_vision_encoder(cfg: BlipAuroraConfig) -> VisionTransformerEncoder:
    """:func:`plain_vision_encoder` with fused attention."""
    # Checkpointing is ours, see CheckpointedBlock.
    encoder = plain_vision_encoder(replace(cfg, vit_grad_ckpt=False))
    fuse_vision(encoder, checkpointed=cfg.vit_ckpt_layer if cfg.vit_grad_ckpt else 0)
    merge_in_tower(encoder, cfg.token_merging)
    return encoder


def build_text_encoder(cfg: BlipAuroraConfig, vision_width: int) -> XBertEncoder:
    """LAVIS's BERT with cross-attention, of the size in ``model.med_config_path``. Random weights.

    Raises:
        AuroraError: the file is no configuration, asks for what these towers do not compute, or does not fit.
    """
    try:
        path = regular(get_abs_path(cfg.med_config_path))
        _check_computed(cfg.med_config_path, BertConfig.from_json_file(path))
        encoder = XBertEncoder.from_config(vars(cfg))
    except AuroraError:
        raise
    except FileNotFoundError as error:
        raise AuroraError(
            f"model.med_config_path: no such file: {cfg.med_config_path}; name it where it is"
        ) from error
    except Exception as error:  # of json, transformers and torch, whatever a value breaks
        raise AuroraError(
            f"model.med_config_path: {cfg.med_config_path} is not a readable BERT configuration of BLIP "
            f"({type(error).__name__}: {error})"
        ) from error
    if encoder.config.encoder_width != vision_width:
        raise AuroraError(
            f"model.med_config_path: {cfg.med_config_path} has encoder_width {encoder.config.encoder_width}, but "
            f"the vision encoder is {vision_width} wide; name a file with encoder_width {vision_width}"
        )
    if encoder.config.max_position_embeddings < cfg.max_txt_len:
        raise AuroraError(
            f"model.max_txt_len: {cfg.max_txt_len} tokens do not fit the "
            f"{encoder.config.max_position_embeddings} positions of {cfg.med_config_path}"
        )
    fuse_text(encoder, attends_to_images=True)
    return encoder


def _check_computed(path: str, config: BertConfig) -> None:
    """Refuse a configuration with a key whose value these towers would not heed."""
    for key, (values, reason) in ONE_WAY.items():
        value = getattr(config, key, None)
        if value not in values:
            remedy = "leave it out" if values[0] is None else f"it must be {json.dumps(values[0])}"
            raise AuroraError(
                f"model.med_config_path: {path} has {key} {json.dumps(value)}, which cannot be computed ({reason}); "
                f"{remedy}"
            )


def build_tokenizer(source: str) -> BertTokenizer:
    """BLIP's tokenizer: BERT's with [DEC] and [ENC] added.

    Args:
        source: hub name, or a folder with vocab.txt.
    """
    try:
        for path in (source, *(os.path.join(source, name) for name in TOKENIZER_FILES)):
            if os.path.exists(path) and not os.path.isdir(path):
                regular(path)
    except OSError as error:
        raise AuroraError(f"model.tokenizer: {path} cannot be read ({error})") from error
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "vocab.txt")):
        raise AuroraError(f"model.tokenizer: the folder {source} holds no vocab.txt")
    try:
        tokenizer = BertTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AuroraError(
            f"model.tokenizer: cannot load {source!r}; without access to the hub, name a folder that holds the "
            f"vocab.txt of bert-base-uncased ({str(error).splitlines()[0]})"
        ) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
    return tokenizer


def check_vocabulary(tokenizer: BertTokenizer, vocab_size: int, cfg: BlipAuroraConfig) -> None:
    """Refuse a vocabulary with more tokens than the model has embeddings."""
    if len(tokenizer) > vocab_size:
        raise AuroraError(
            f"model.tokenizer: {cfg.tokenizer} has {len(tokenizer)} tokens with [DEC] and [ENC], but "
            f"{cfg.med_config_path} has vocab_size {vocab_size}; name the vocabulary of the checkpoint"
        )


class VisualFeatures(NamedTuple):
    """What the vision encoder makes of pictures or videos of ``frames`` frames.

    Attributes:
        tokens: of all frames, one after the other, for cross-attention: (batch, frames * tokens, d); of merged ones
            (``model.token_merging``) a last column holds how many patches each stands for.
        pooled: mean of the frames' [CLS], for ITC: (batch, d).
    """

    tokens: Tensor
    pooled: Tensor


def visual_input(samples: Mapping[str, Any]) -> Tensor:
    """``image`` (batch, 3, height, width) or ``video`` (batch, 3, frames, height, width) of a batch.

    Or ``tokens`` (batch, tokens, d), of pictures where the frozen part of the tower ends (``run.cache_features``).

    Raises:
        AuroraError: there is neither, or its shape is another.
    """
    if "tokens" in samples:
        kept: Tensor = samples["tokens"]
        return kept
    for key, dimensions, shape in (
        ("image", 4, "batch, 3, height, width"),
        ("video", 5, "batch, 3, frames, height, width"),
    ):
        if key in samples:
            visual: Tensor = samples[key]
            if visual.dim() != dimensions or visual.shape[1] != 3:
                raise AuroraError(f"samples: {key} has shape {tuple(visual.shape)}; it must be ({shape})")
            return visual
    raise AuroraError(f"samples: there is neither image nor video, only {', '.join(sorted(samples))}")


class FrozenTokens(NamedTuple):
    """Tokens of pictures or frames where the part of a vision tower ends that no tuning reaches.

    Attributes:
        tokens: (pictures or frames, tokens, d), without a gradient.
        depth: blocks that they have passed; the embedding of patches and positions comes before these.
        drawn: something was dropped at random in them, so that another pass gives others.
    """

    tokens: Tensor
    depth: int
    drawn: bool


def frozen_depth(encoder: nn.Module) -> int | None:
    """How many of the first blocks compute the same whichever adapter is active and whatever is trained.

    None where the embedding of patches and positions is trained already, or the tower is none of LAVIS's ViTs.
    """
    if not isinstance(encoder, VisionTransformer):
        return None
    embedding = (encoder.cls_token, encoder.pos_embed, *encoder.patch_embed.parameters())
    if any(parameter.requires_grad for parameter in embedding):
        return None
    tuned = (i for i, block in enumerate(encoder.blocks) if _is_tuned(block))
    return next(tuned, len(encoder.blocks))


def _is_tuned(block: nn.Module) -> bool:
    """Whether anything in a block is trained, or of an adapter, trained or not."""
    adapted = (isinstance(part, UpdatedLayer) or "adapters" in vars(part) for part in block.modules())
    return any(adapted) or any(parameter.requires_grad for parameter in block.parameters())


def frozen_part(encoder: VisionTransformer) -> tuple[VisionTransformer, int] | None:
    """The tower up to where tuning begins, of the encoder's own modules, and how many blocks it has; None if there
    is none."""
    depth = frozen_depth(encoder)
    if depth is None:
        return None
    # LAVIS's own forward then ends there.
    first = retyped(type(encoder), encoder)
    first.blocks, first.norm = encoder.blocks[:depth], nn.Identity()
    return first, depth


@torch.no_grad()
def frozen_tokens(encoder: VisionTransformer, visual: Tensor) -> FrozenTokens | None:
    """What does not depend on any tuning: nothing is kept of it for the backward pass. None if nothing is such.

    Nothing is, too, where the pictures themselves ask for a gradient.

    Args:
        encoder: LAVIS's ViT.
        visual: as :func:`visual_input` gives it.

    Raises:
        AuroraError: tokens that are not of this tower.
    """
    found = frozen_part(encoder)
    if found is None or visual.requires_grad:
        return None
    first, depth = found
    if visual.dim() == 3:
        width = encoder.embed_dim + (depth > 0 and isinstance(encoder.blocks[0], MergingBlock))
        if visual.shape[2] != width:
            shape = tuple(visual.shape)
            raise AuroraError(f"samples: tokens have shape {shape}; it must be (batch, tokens, {width})")
        return FrozenTokens(visual.to(encoder.pos_embed.dtype), depth, drawn=False)
    frames = visual if visual.dim() == 4 else visual.transpose(1, 2).flatten(0, 1)
    return FrozenTokens(VisionTransformer.forward(first, frames), depth, encoder.training and drops(first))


def encode_visual(encoder: VisionTransformer, visual: Tensor, frozen: FrozenTokens | None = None) -> VisualFeatures:
    """Encode pictures, or videos frame by frame (paper D.3); a video of one frame is a picture.

    Args:
        encoder: LAVIS's ViT.
        visual: as :func:`visual_input` gives it.
        frozen: what :func:`frozen_tokens` gave for it, if that was called already.
    """
    frozen = frozen_tokens(encoder, visual) if frozen is None else frozen
    if frozen is None:
        if visual.dim() == 3:
            raise AuroraError("samples: tokens are given where all of the vision tower is tuned; give image instead")
        frames = visual if visual.dim() == 4 else visual.transpose(1, 2).flatten(0, 1)
        tokens = encoder.forward_features(frames)
    else:
        tokens = frozen.tokens
        for block in encoder.blocks[frozen.depth :]:
            tokens = block(tokens)
        tokens = encoder.norm(tokens)
    if visual.dim() < 5:
        return VisualFeatures(tokens, tokens[:, 0, : encoder.embed_dim])
    frames = tokens.unflatten(0, (visual.shape[0], -1))
    return VisualFeatures(frames.flatten(1, 2), frames[:, :, 0, : encoder.embed_dim].mean(dim=1))


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile the layers of LAVIS's ViT and BERT in a model; layers of one kind share what is compiled.

    Args:
        model: changed in place; its state dict stays as it is.
        options: of ``torch.compile``.

    Raises:
        AuroraError: the model's towers are others.
    """
    layers = [module for module in model.modules() if isinstance(module, (Block, BertLayer))]
    if not layers:
        raise AuroraError(
            "run.compile: only layers of the ViT and BERT that BLIP and ALBEF have are compiled, and this model has "
            "none; set run.compile: false"
        )
    # Text alone or with images, trained or by the teacher, the first layer or a later one: each is compiled once.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for layer in layers:
        layer.compile(**options)
