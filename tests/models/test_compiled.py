"""Compiled layers against the same ones as they are."""

import copy

import pytest
import torch
from models.test_blip_retrieval_aurora import batch
from tiny import activate, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["aurora", "lora"])
def test_losses_and_gradients(tuning):
    """Also with a recomputed layer, a teacher pass and matching's passes; nothing falls back to Python."""
    model = activate(tiny_model(tuning=tuning, queue_size=20, vit_grad_ckpt=True, vit_ckpt_layer=1)).train()
    compiled = copy.deepcopy(model)
    compiled.compile_layers()
    torch._dynamo.utils.counters.clear()
    for step in range(2):
        for one in (model, compiled):
            one.zero_grad()
            one(batch(step=step))["loss"].backward()
        gradients = {name: p.grad for name, p in compiled.named_parameters() if p.grad is not None}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                scale = parameter.grad.abs().max().clamp(min=1e-3)
                assert (gradients[name] - parameter.grad).abs().max() < 1e-3 * scale, name
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled.state_dict().keys() == model.state_dict().keys()
