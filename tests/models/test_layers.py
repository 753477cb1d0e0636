"""Tuning of chosen layers: what is trained, and that what lies before them is computed once, alike, and not kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import activate, tiny_model
from tiny_retrieval import batch, kept_bytes, saved_for_backward, train_steps
from tiny_vqa import vqa_config
from torch import Tensor, nn

from lavis_aurora import AuroraError, load_adapter, load_model_and_preprocess, merge_adapter, save_adapter
from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.encoders.towers import encode_visual, frozen_depth, frozen_tokens
from lavis_aurora.mode_approx.layers import AdaptedLayer
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora
from lavis_aurora.models.mode_approx_model import ModeApproxModel

R, D = 4, 128
LAST = {"last": 1}


def aurora(layers: Any, **overrides: Any) -> BlipRetrievalAurora:
    """A tiny model, three layers a tower, with an adapter that does something."""
    method = {"rank": R, "layers": layers}
    return activate(tiny_model(mode_approx=method, queue_size=6, alpha=0.4, **overrides))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for _, parameter in adapter_parameters(model) if parameter.requires_grad)


@pytest.mark.parametrize(
    ("layers", "vision", "text"),
    [
        (None, [0, 1, 2], [0, 1, 2]),
        ({"last": 2}, [1, 2], [1, 2]),
        ([0, 2], [0, 2], [0, 2]),
        ({"visual_encoder": {"last": 1}}, [2], [0, 1, 2]),
        ({"visual_encoder": [], "text_encoder": [1]}, [], [1]),
    ],
)
def test_the_count_is_that_of_the_formula_over_the_chosen_layers(layers: Any, vision: list, text: list) -> None:
    """(3 Lv + 6 Lt) 2r + 2dr + 2 Lt d, which is 9L 2r + 2dr + 2Ld where all are adapted."""
    model = aurora(layers)
    adapted = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    assert [i for i in range(3) if any(f"blocks.{i}." in name for name in adapted)] == vision
    assert [i for i in range(3) if any(f"layer.{i}." in name for name in adapted)] == text
    assert count(model) == (3 * len(vision) + 6 * len(text)) * 2 * R + 2 * D * R + 2 * len(text) * D


def test_the_answer_decoder_shares_the_slots_of_the_chosen_layers() -> None:
    model = BlipVqaAurora.from_config(vqa_config(mode_approx={"rank": R, "layers": LAST}))
    assert count(model) == 9 * 2 * R + 2 * D * R + 2 * D
    assert model.text_decoder.bert.encoder.layer[2].attention.self.query.slots
    assert not isinstance(model.text_decoder.bert.encoder.layer[1].attention.self.query, AdaptedLayer)


@pytest.mark.parametrize("overrides", [{}, {"vit_grad_ckpt": True, "vit_ckpt_layer": 2}])
def test_losses_and_gradients_are_those_of_all_layers_whose_other_slots_do_nothing(overrides: dict) -> None:
    """The same factors over all layers, with lambda and the gate at zero in those that are left out."""
    chosen, whole = aurora({"last": 2}, **overrides).train(), aurora(None, **overrides).train()
    few, all_ = chosen.mode_approx["default"], whole.mode_approx["default"]
    rows = [list(whole.mode_approx.slots).index(slot) for slot in chosen.mode_approx.slots]
    with torch.no_grad():
        for gate in (layer.crossattention.gate for layer in whole.text_encoder.encoder.layer[:1]):
            gate.gamma.zero_()
            gate.beta.zero_()
        for one, other in ((few.U, all_.U), (few.V, all_.V)):
            other[str(D)].copy_(one[str(D)])
        all_.coefficients.zero_()[rows] = few.coefficients
        all_.P[rows] = few.P
        own = dict(chosen.named_parameters())
        for name, parameter in whole.named_parameters():
            if name in own and "mode_approx" not in name:
                parameter.copy_(own[name])
    for model in (chosen, whole):
        model.copy_params()
    outputs = [model(batch()) for model in (chosen, whole)]
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(few.U[str(D)].grad, all_.U[str(D)].grad)
    torch.testing.assert_close(few.V[str(D)].grad, all_.V[str(D)].grad)
    torch.testing.assert_close(few.P.grad, all_.P.grad[rows])
    torch.testing.assert_close(few.coefficients.grad, all_.coefficients.grad[rows])
    gates = [model.text_encoder.encoder.layer[1].crossattention.gate for model in (chosen, whole)]
    torch.testing.assert_close(gates[0].gamma.grad, gates[1].gamma.grad)


def without_sharing(model: BlipRetrievalAurora, image: Tensor) -> Tensor:
    """LAVIS's own forward of the tower, gradients and all."""
    return model.visual_encoder.forward_features(image)


def kept(run: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    with saved_for_backward() as tensors:
        run()
    return kept_bytes(tensors)


def test_what_lies_before_the_chosen_layers_is_lavis_and_keeps_nothing() -> None:
    model, image = aurora({"last": 1}).train(), batch()["image"]
    before = frozen_tokens(model.visual_encoder, image)
    assert (before.depth, before.drawn, before.tokens.requires_grad) == (2, False, False)
    features = encode_visual(model.visual_encoder, image, before)
    assert torch.equal(features.tokens, without_sharing(model, image)) and features.tokens.requires_grad
    tower = aurora({"visual_encoder": []}).train().visual_encoder
    assert kept(lambda: encode_visual(tower, image)) == 0
    less = kept(lambda: encode_visual(model.visual_encoder, image))
    assert 0 < less < kept(lambda: encode_visual(aurora(None).train().visual_encoder, image)) / 2


def test_pictures_may_ask_for_a_gradient() -> None:
    model, image = aurora({"last": 1}).eval(), batch()["image"]
    grads = []
    for encode in (lambda x: encode_visual(model.visual_encoder, x).tokens, lambda x: without_sharing(model, x)):
        pixels = image.clone().requires_grad_()
        encode(pixels).square().sum().backward()
        grads.append(pixels.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_tokens_of_another_tower_are_refused() -> None:
    model = aurora({"last": 1})
    with pytest.raises(AuroraError, match=r"tokens have shape \(2, 10, 64\); it must be \(batch, tokens, 128\)"):
        encode_visual(model.visual_encoder, torch.randn(2, 10, 64))
    model.visual_encoder.cls_token.requires_grad_(True)
    with pytest.raises(AuroraError, match="tokens are given where all of the vision tower is tuned"):
        encode_visual(model.visual_encoder, torch.randn(2, 10, 128))


@pytest.mark.parametrize("video", [False, True])
def test_the_teacher_shares_it_and_is_what_it_was(video: bool) -> None:
    model = aurora({"last": 1}).train()
    samples = batch()
    if video:
        samples["video"] = torch.stack([samples.pop("image")] * 2, dim=2)
    train_steps(model, 1)
    passes = []
    model.visual_encoder.blocks[0].register_forward_hook(lambda *_: passes.append(0))
    model.visual_encoder.blocks[2].register_forward_hook(lambda *_: passes.append(2))
    output = model(samples).intermediate_output
    assert passes == [0, 2, 2]
    pictures = samples["video"].transpose(1, 2).flatten(0, 1) if video else samples["image"]
    with torch.no_grad(), model.mode_approx.use("momentum"):
        expected = without_sharing(model, pictures)
    assert torch.equal(output.image_embeds_m, expected.unflatten(0, (5, -1)).flatten(1, 2))
    assert not torch.equal(output.image_embeds_m, output.image_embeds)


def test_a_teacher_that_drops_at_random_draws_by_itself() -> None:
    """As LAVIS's: model and teacher pass the tower with different draws."""
    model = aurora({"last": 1}, vit_drop_path_rate=0.5).train()
    passes = []
    model.visual_encoder.blocks[0].register_forward_hook(lambda *_: passes.append(0))
    assert frozen_tokens(model.visual_encoder, batch()["image"]).drawn
    model(batch())
    assert passes == [0, 0, 0]


@pytest.mark.parametrize("tuning", ["lora", "uniadapter"])
def test_baselines_take_the_same_key(tuning: str, tmp_path: Path) -> None:
    if tuning == "lora":
        pytest.importorskip("peft")
    model = tiny_model(tuning=tuning, queue_size=6, **{tuning: {"rank": R, "layers": LAST}})
    whole = tiny_model(tuning=tuning, queue_size=6, **{tuning: {"rank": R}})
    assert 3 * count(model) == count(whole)
    assert (frozen_depth(model.visual_encoder), frozen_depth(whole.visual_encoder)) == (2, 0)
    activate(model)
    image = batch()["image"]
    assert torch.equal(encode_visual(model.visual_encoder, image).tokens, without_sharing(model, image))
    train_steps(model, 1)
    save_adapter(model, tmp_path)
    again = tiny_model(tuning=tuning, queue_size=6, **{tuning: {"rank": R, "layers": LAST}}).eval()
    load_adapter(again, tmp_path)
    model.eval()
    assert torch.equal(
        encode_visual(again.visual_encoder, image).tokens, encode_visual(model.visual_encoder, image).tokens
    )
    with pytest.raises(AuroraError, match="3 here|missing there"):
        load_adapter(whole, tmp_path)


def test_an_adapter_comes_back_with_its_layers_and_merges(tmp_path: Path) -> None:
    weights = "${aurora.package:configs/models/tiny/model.safetensors}"
    model = aurora({"visual_encoder": {"last": 1}, "text_encoder": [0, 2]}, pretrained=weights).eval()
    save_adapter(model, tmp_path)
    with pytest.raises(AuroraError, match="slot .*blocks.0.attn.qkv.query is missing there"):
        load_adapter(aurora(None), tmp_path)
    again, _, _ = load_model_and_preprocess("blip_retrieval_aurora", adapter=tmp_path, is_eval=True)
    assert again.settings.mode_approx.layers == {"visual_encoder": {"last": 1}, "text_encoder": [0, 2]}
    image, texts = batch()["image"], ["a red circle", "a bar"]
    plain = model.match(image, texts).itm_logits
    assert torch.equal(again.match(image, texts).itm_logits, plain)
    state = copy.deepcopy(model.state_dict())
    merge_adapter(model)
    torch.testing.assert_close(model.match(image, texts).itm_logits, plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_any_model_takes_the_layers() -> None:
    base = {"arch": "blip_retrieval_aurora", "model_type": "tiny", "pretrained": None, "queue_size": 6}
    model = ModeApproxModel.from_config(
        {"arch": "mode_approx", "base": base, "mode_approx": {"rank": R, "layers": {"last": 1}}}
    )
    adapted = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    assert adapted and all(".2." in name for name in adapted)
    assert any("visual_encoder_m" in name for name in adapted)
    train_steps(model, 1)


@pytest.mark.parametrize(
    ("layers", "targets", "message"),
    [
        ({"last": 4}, None, "mode_approx.layers: {'last': 4} cannot be used; visual_encoder has 3 layers, 0 to 2"),
        ([3], None, "visual_encoder has 3 layers, 0 to 2"),
        ({"vision": [1]}, None, "mode_approx.layers.vision: no tower with targets; known: text_encoder,"),
        ({"text_encoder": [], "visual_encoder": {"last": 0}}, None, "mode_approx.layers: no layer is left to adapt"),
        ([0], ["itm_head"], "the target itm_head is in no numbered layer"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(layers: Any, targets: Any, message: str) -> None:
    with pytest.raises(AuroraError) as caught:
        tiny_model(mode_approx={"rank": R, "layers": layers, "targets": targets})
    assert message in str(caught.value)
