"""Token merging against a plain computation of ToMe (arXiv 2210.09461), by loops over the tokens of one picture."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny import activate, tiny_model
from tiny_retrieval import batch, saved_for_backward, train_steps
from torch import Tensor

from lavis_aurora import AuroraError, merged_state_dict
from lavis_aurora.analysis.examples import word_maps
from lavis_aurora.encoders.merging import MergingBlock, merge_tokens, patch_shares, traced
from lavis_aurora.encoders.towers import encode_visual, frozen_tokens
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora

R = 2


def merging(r: int = R, **overrides: Any) -> BlipRetrievalAurora:
    """A tiny model of 10 tokens a picture and three layers, all parts of the method at work."""
    return activate(tiny_model(token_merging=r, queue_size=6, **{"mode_approx": {"rank": 4}, **overrides}))


def plainly_merged(groups: list, x: Tensor, keys: Tensor, r: int) -> tuple[list, Tensor]:
    """ToMe, section 3: split the tokens in turns, an edge from each of A to the most alike of B, merge the r best.

    Args:
        groups: patches of each token.
        x, keys: (tokens, d) and (tokens, width).
    """
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for i in a:
        if 0 in groups[i]:
            continue  # [CLS]
        alike = [float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm())) for j in b]
        best = max(range(len(b)), key=lambda n: alike[n])
        edges.append((alike[best], i, b[best]))
    chosen = sorted(edges, reverse=True)[: min(r, (len(x) - 1) // 2)]
    merged = {i: j for _, i, j in chosen}
    tokens, sets = [], []
    for i in [*[i for i in a if i not in merged], *b]:
        members = [i, *[source for source, target in merged.items() if target == i]]
        weights = [len(groups[n]) for n in members]
        tokens.append(sum(w * x[n] for w, n in zip(weights, members)) / sum(weights))
        sets.append(sorted(patch for n in members for patch in groups[n]))
    return sets, torch.stack(tokens)


def plain_tower(model: BlipRetrievalAurora, picture: Tensor, r: int) -> tuple[list, Tensor]:
    """Patches and features of the tokens of one picture, (3, height, width), with attention written out."""
    tower = model.visual_encoder
    x = torch.cat([tower.cls_token[0], tower.patch_embed(picture[None])[0]]) + tower.pos_embed[0]
    groups = [[i] for i in range(len(x))]
    for block in tower.blocks:
        y = block.norm1(x)
        heads = block.attn.num_heads
        query, key, value = (part.unflatten(1, (heads, -1)) for part in block.attn.qkv(y).chunk(3, dim=1))
        rows = []
        for i in range(len(x)):
            parts = []
            for h in range(heads):
                scores = [
                    float(query[i, h] @ key[j, h]) / math.sqrt(query.shape[2]) + math.log(len(groups[j]))
                    for j in range(len(x))
                ]
                weights = torch.tensor(scores).softmax(0)
                parts.append(sum(weights[j] * value[j, h] for j in range(len(x))))
            rows.append(torch.cat(parts))
        x = x + block.attn.proj(torch.stack(rows))
        groups, x = plainly_merged(groups, x, key.mean(dim=1), r)
        x = x + block.mlp(block.norm2(x))
    return groups, tower.norm(x)


@pytest.mark.parametrize("r", [1, 2, 4])
@torch.no_grad()
def test_the_tower_is_tome_computed_plainly(r: int) -> None:
    model, images = merging(r).eval(), batch()["image"][:3]
    with traced(model.visual_encoder):
        found, pooled = encode_visual(model.visual_encoder, images)
    for one, first, picture in zip(found, pooled, images):
        groups, expected = plain_tower(model, picture, r)
        torch.testing.assert_close(one[:, :128], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first, expected[0], rtol=1e-4, atol=1e-5)
        assert one[:, 128].tolist() == [len(group) for group in groups]
        assert [row.nonzero().flatten().tolist() for row in one[:, 129:]] == groups
    assert groups[0] == [0] and len(groups) == {1: 7, 2: 4, 4: 3}[r]


def test_at_0_nothing_is_changed() -> None:
    model, plain = merging(0), activate(tiny_model(queue_size=6, mode_approx={"rank": 4}))
    assert not any(isinstance(part, MergingBlock) for part in model.modules())
    for one, other in zip(model.visual_encoder.modules(), plain.visual_encoder.modules()):
        assert type(one) is type(other)
    images = batch()["image"]
    features = [encode_visual(each.visual_encoder, images).tokens for each in (model, plain)]
    assert torch.equal(*features)


def alike(model: BlipRetrievalAurora) -> BlipRetrievalAurora:
    """With this one all patches of a picture of one colour are the same token."""
    with torch.no_grad():
        model.visual_encoder.pos_embed[:, 1:] = 0
    return model.eval()


@torch.no_grad()
def test_tokens_that_are_the_same_may_be_merged_at_no_loss() -> None:
    """Attention in the tower, and of texts to it, counts a token as often as it has patches."""
    image = torch.ones(2, 3, 48, 48) * torch.tensor([0.3, -1.0])[:, None, None, None]
    texts = ["a red circle", "a big blue square and a small star", "a bar"]
    merged, plain = alike(merging(3)), alike(merging(0))
    assert encode_visual(merged.visual_encoder, image).tokens.shape == (2, 3, 129)
    ours, theirs = (model.match(image, texts) for model in (merged, plain))
    torch.testing.assert_close(ours.itc, theirs.itc, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.itm_logits, theirs.itm_logits, rtol=1e-4, atol=1e-5)


def test_the_losses_of_such_pictures_are_the_same_too() -> None:
    losses, grads = [], []
    for r in (3, 0):
        model = alike(merging(r)).train()
        samples = {**batch(), "image": torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 48, 48)}
        output = model(samples)
        output.loss.backward()
        losses.append(torch.stack([output.loss_itc, output.loss_itm]).detach())
        grads.append(model.mode_approx["default"].P.grad)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_reranking_is_lavis_own_attention_over_the_merged_tokens() -> None:
    """The texts one by one, attention written out by LAVIS, with log sizes as its mask."""
    model, images = merging().eval(), batch()["image"][:2]
    texts = ["a red circle", "a big blue square and a small star"]
    expected = torch.empty(2, 2, 2)
    for i, image in enumerate(images):
        tokens = encode_visual(model.visual_encoder, image[None]).tokens
        for t, text in enumerate(texts):
            words = model.tokenize([text], pad_to_longest=True)
            words.input_ids[:, 0] = model.tokenizer.enc_token_id
            output = model.text_encoder(
                words.input_ids,
                attention_mask=words.attention_mask,
                encoder_hidden_states=tokens,
                output_attentions=True,
                return_dict=True,
            )
            expected[i, t] = model.itm_head(output.last_hidden_state[:, 0])[0]
    torch.testing.assert_close(model.match(images, texts).itm_logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("video", [False, True])
def test_it_is_trained_and_recomputed_alike(video: bool) -> None:
    grads = []
    for overrides in ({}, {"vit_grad_ckpt": True, "vit_ckpt_layer": 2}):
        model = merging(**overrides).train()
        samples = batch()
        if video:
            samples["video"] = torch.stack([samples.pop("image")] * 2, dim=2)
        model(samples)["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        grads.append(model.mode_approx["default"].P.grad)
    assert torch.equal(*grads)
    train_steps(model, 1)


def test_attention_of_merged_tokens_keeps_no_weights_for_the_backward_pass() -> None:
    """Sizes ask for no gradient, so torch's fused kernels run: in the tower, and in the texts that attend to it."""
    model = merging(mode_approx={"rank": 4, "dropout": 0.0}).train()
    for part in model.modules():  # with dropout the CPU has no fused kernel anyway
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    with saved_for_backward() as tensors:
        model(batch())["loss"].backward()
    kept = {tuple(tensor.shape) for tensor in tensors}
    assert any(shape[-2:] == (8, 128) for shape in kept)  # of the tower after its first layer
    # (batch, heads, queries, keys)
    assert not [
        shape for shape in kept if len(shape) == 4 and shape[1] == 4 and shape[2] > 1 and shape[3] in (4, 6, 8)
    ]


@torch.no_grad()
def test_half_precision_computes_nearly_the_same() -> None:
    model, images = merging().eval(), batch()["image"][:2]
    exact = model.match(images, ["a red circle"]).itm_logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.match(images, ["a red circle"]).itm_logits
    assert (rounded - exact).abs().max() < 0.1
    assert (model.bfloat16().match(images, ["a red circle"]).itm_logits - exact).abs().max() < 0.1


def test_the_frozen_part_merges_too() -> None:
    model = merging(mode_approx={"rank": 4, "layers": {"last": 1}}).train()
    images = batch()["image"]
    frozen = frozen_tokens(model.visual_encoder, images)
    assert frozen.tokens.shape == (5, 6, 129)
    whole = encode_visual(model.visual_encoder, images).tokens
    # As run.cache_features hands them over.
    assert torch.equal(encode_visual(model.visual_encoder, frozen.tokens).tokens, whole)
    assert torch.equal(model.visual_encoder.forward_features(images), whole)


@torch.no_grad()
def test_maps_of_words_are_shared_out_to_the_patches() -> None:
    model, image = merging(3).eval(), batch()["image"][:1]
    words, maps, _ = word_maps(model, image, "a red circle", -1)
    assert maps.shape == (len(words), 3, 3)
    with traced(model.visual_encoder):
        tokens = encode_visual(model.visual_encoder, image).tokens
    shares = patch_shares(tokens, 128)
    torch.testing.assert_close(shares.sum(dim=2), torch.ones(1, 3))
    # Besides [CLS] there are two tokens: as many values has a map.
    assert all(len(set(one.flatten().round(6))) == 2 for one in maps) and (maps > 0).all()
    plain, flat = alike(merging(0)), torch.ones(1, 3, 48, 48)
    torch.testing.assert_close(
        torch.tensor(word_maps(alike(copy.deepcopy(model)), flat, "a red circle", -1)[1]),
        torch.tensor(word_maps(plain, flat, "a red circle", -1)[1]),
        rtol=1e-4,
        atol=1e-5,
    )
    assert not model.visual_encoder.blocks[0].trace


def test_a_tie_and_too_large_an_r_are_no_matter() -> None:
    x, carried = torch.randn(1, 5, 4), torch.ones(1, 5, 1)
    merged, sizes = merge_tokens(x, carried, torch.ones(1, 5, 2), 100)
    assert merged.shape == (1, 3, 4) and sizes.sum() == 5
    torch.testing.assert_close((merged * sizes).sum(dim=1), x.sum(dim=1))
    assert torch.equal(merged[:, 0], x[:, 0])


def test_a_map_of_the_tower_is_refused() -> None:
    model = merging()
    with pytest.raises(AuroraError, match="model.token_merging: no attention map of the vision tower is kept"):
        model.visual_encoder(batch()["image"], register_blk=1)
    with pytest.raises(AuroraError, match=r"0 to half of the patches of a picture \(4\)"):
        merging(5)


@pytest.mark.parametrize("r", [0, R])
def test_a_state_for_plain_models_says_what_they_do_not_do(r, caplog):
    model = merging(r, gate={"form": "none"})
    caplog.clear()
    merged_state_dict(model)
    assert ("a plain model keeps all tokens" in caplog.text) == bool(r)
