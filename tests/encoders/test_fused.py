"""The fused layers against LAVIS's own, with the same weights."""

import copy

import pytest
import torch
from lavis.models.med import BertSelfAttention
from lavis.models.vit import Attention, VisionTransformer
from tiny import tiny_model

from lavis_aurora.common.modules import retyped
from lavis_aurora.encoders.fused import (
    CheckpointedBlock,
    FusedTextAttention,
    FusedVisionAttention,
    Packing,
    fuse_vision,
)

torch.manual_seed(0)


def test_vision_attention():
    plain = Attention(16, num_heads=4, qkv_bias=True)
    fused = retyped(FusedVisionAttention, copy.deepcopy(plain))
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(fused(x), plain(x))
    assert fused.state_dict().keys() == plain.state_dict().keys()


def test_the_attention_map_of_the_vision_tower_is_kept_when_asked_for():
    fused = retyped(FusedVisionAttention, Attention(16, num_heads=4))
    fused(torch.randn(2, 5, 16), register_hook=True).sum().backward()
    assert fused.get_attention_map().shape == fused.get_attn_gradients().shape == (2, 4, 5, 5)


@pytest.fixture
def layers() -> tuple[BertSelfAttention, BertSelfAttention]:
    """LAVIS's self- and cross-attention of the tiny model."""
    layer = tiny_model(tuning="frozen").text_encoder.encoder.layer[0]
    return tuple(
        retyped(BertSelfAttention, part).eval() for part in (layer.attention.self, layer.crossattention.self)
    )


def test_text_self_attention_with_padding(layers):
    plain = layers[0]
    x, mask = torch.randn(2, 6, 128), torch.zeros(2, 1, 1, 6)
    mask[1, ..., 4:] = -10000.0
    fused = retyped(FusedTextAttention, plain)
    torch.testing.assert_close(fused(x, mask)[0], plain(x, mask)[0])


def test_cached_keys_are_read(layers):
    plain, x = layers[0], torch.randn(2, 3, 128)
    fused = retyped(FusedTextAttention, plain)
    _, past = plain(torch.randn(2, 4, 128))
    for ours, theirs in zip(fused(x, past_key_value=past)[1], plain(x, past_key_value=past)[1]):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(fused(x, past_key_value=past)[0], plain(x, past_key_value=past)[0])


def test_cross_attention_with_padded_keys_and_without(layers):
    plain = layers[1]
    fused = retyped(FusedTextAttention, plain)
    x, image, mask = torch.randn(4, 6, 128), torch.randn(4, 7, 128), torch.zeros(4, 1, 1, 7)
    mask[2, ..., 3:] = -10000.0
    fused.mask_keys = True
    arguments = {"encoder_hidden_states": image, "encoder_attention_mask": mask}
    torch.testing.assert_close(fused(x, **arguments)[0], plain(x, **arguments)[0])
    fused.mask_keys = False
    torch.testing.assert_close(fused(x, **arguments)[0], plain(x, encoder_hidden_states=image)[0])


def test_packed_texts_attend_to_themselves_alone(layers):
    plain = layers[0]
    texts = [torch.randn(1, n, 128) for n in (2, 3, 9)]
    packing = Packing(torch.tensor([2, 3, 9]), texts[0].device)
    packed, _ = retyped(FusedTextAttention, plain)(torch.cat(texts, dim=1), packing)
    torch.testing.assert_close(packed, torch.cat([plain(text)[0] for text in texts], dim=1))


def test_attention_maps_of_words_over_pictures_are_kept_when_asked_for(layers):
    fused = retyped(FusedTextAttention, layers[1])
    fused.save_attention = True
    image = torch.randn(2, 7, 128, requires_grad=True)
    fused(torch.randn(2, 6, 128), encoder_hidden_states=image)[0].sum().backward()
    assert fused.get_attention_map().shape == (2, 4, 6, 7)


def test_checkpointed_blocks_give_the_same_gradients_and_copies_their_own():
    torch.manual_seed(0)
    tower = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2)
    plain = copy.deepcopy(tower)
    fuse_vision(tower, checkpointed=2)
    assert [isinstance(block, CheckpointedBlock) for block in tower.blocks] == [False, True, True]
    # A frozen tower whose attention alone is trained: nothing before it has a gradient.
    for one in (tower, plain):
        one.train().requires_grad_(False)
        for block in one.blocks:
            block.attn.qkv.requires_grad_(True)
    x = torch.randn(2, 3, 16, 16)
    outputs = [one(x) for one in (tower, plain)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(tower.blocks, plain.blocks):
        torch.testing.assert_close(ours.attn.qkv.weight.grad, theirs.attn.qkv.weight.grad)
    twin = copy.deepcopy(tower)
    torch.nn.init.zeros_(twin.blocks[2].attn.proj.weight)
    assert not torch.equal(twin(x), tower(x))


@pytest.mark.parametrize("tuning", ["aurora", "uniadapter", "full"])
@pytest.mark.parametrize("count", [1, 3])
def test_all_layers_asked_for_are_computed_again_the_first_too(tuning, count):
    """Also where nothing before a layer is trained, and what is trained in it is no parameter of its own."""
    tower = tiny_model(tuning=tuning, vit_grad_ckpt=True, vit_ckpt_layer=count).visual_encoder.train()
    passes = []
    for block in tower.blocks:
        block.attn.register_forward_pre_hook(lambda attention, _: passes.append(attention))
    tower.forward_features(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert [passes.count(block.attn) for block in tower.blocks] == [1] * (3 - count) + [2] * count
    with torch.no_grad():
        tower.forward_features(torch.randn(2, 3, 48, 48))
    assert len(passes) == 3 + count + 3
