"""Factors and gates in float32 over a backbone in half precision."""

import pytest
import torch
from tiny import activate, tiny_model
from toy import adapted_toy, inputs

from lavis_aurora import load_adapter, merge_adapter, save_adapter, set_adapter, unmerge_adapter
from lavis_aurora.adapters.companions import adapter_parameters

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_factors_stay_as_they_are_and_the_output_follows(dtype):
    model = adapted_toy()
    before = {name: p.detach().clone() for name, p in model.mode_approx.named_parameters()}
    expected = model(inputs())
    model.to(dtype)
    assert model.query.weight.dtype == dtype
    assert all(torch.equal(p, before[name]) for name, p in model.mode_approx.named_parameters())
    output = model(inputs().to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)
    model.float()
    assert model.query.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 200])
def test_gradients_arrive_in_single_precision(dtype, count):
    """Few rows and many: the update beside the layer and, over float32, folded into it."""
    single, half = adapted_toy().train(), adapted_toy().train().to(dtype)
    for model, x in ((single, inputs(count)), (half, inputs(count).to(dtype))):
        model(x).float().square().mean().backward()
    for (name, a), b in zip(single.mode_approx.named_parameters(), half.mode_approx.parameters()):
        assert b.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 0.05 * a.grad.norm(), name


def test_steps_too_small_for_half_precision_are_kept():
    model = adapted_toy().train().to(torch.bfloat16)
    factors = model.mode_approx.sets["default"]
    start = factors.P.detach().clone()
    optimizer = torch.optim.SGD([factors.P], lr=1.0)
    for _ in range(10):
        factors.P.grad = torch.full_like(factors.P, 1e-5)
        optimizer.step()
    torch.testing.assert_close(factors.P.detach(), start - 1e-4, atol=1e-6, rtol=0)
    assert torch.equal((start.bfloat16() - 1e-5), start.bfloat16())


def test_double_precision_is_taken_on():
    model = adapted_toy().double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("form", ["residual", "convex", "affine", "none"])
def test_a_whole_model_in_bfloat16_scores_trains_and_merges(form, tmp_path):
    model = activate(tiny_model(gate={"form": form}, alpha=0.4)).to(torch.bfloat16)
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.float32}
    samples = {
        "image": torch.randn(3, 3, 48, 48).bfloat16(),
        "text_input": ["a red circle", "a star", "a big blue square"],
        "image_id": torch.arange(3),
        "epoch": 0,
        "iters": 0,
        "num_iters_per_epoch": 10,
    }
    loss = model.train()(samples)["loss"]
    loss.backward()
    trained = [p for _, p in adapter_parameters(model) if p.requires_grad]
    assert loss.isfinite() and all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trained)
    model.eval()
    with torch.no_grad():
        expected = model.visual_encoder.forward_features(samples["image"])
        merge_adapter(model)
        merged = model.visual_encoder.forward_features(samples["image"])
        unmerge_adapter(model)
    assert merged.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(merged, expected, atol=0.15, rtol=0.1)


def test_adapters_beside_a_half_precision_backbone_are_saved_in_single(tmp_path):
    model = activate(tiny_model()).half()
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "again")
    set_adapter(model, "again")
    again = model.mode_approx.sets["again"]
    assert torch.equal(again.P, model.mode_approx.sets["default"].P) and again.P.dtype == torch.float32
    gate = model.text_encoder.encoder.layer[0].crossattention.gate
    assert gate.gamma.dtype == torch.float32 and model.vision_proj.weight.dtype == torch.float16
