"""Compiled layers against the same ones as they are."""

import copy

import pytest
import torch
from lavis_models import build, hub_folder, samples
from tiny import activate, tiny_model
from tiny_retrieval import batch

from lavis_aurora import AuroraError, ModeApproxConfig
from lavis_aurora.encoders.towers import compile_layers
from lavis_aurora.models.mode_approx_model import ModeApproxModel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuning", "method"),
    [
        ("aurora", {}),
        ("aurora", {"targets": "all_linear"}),
        ("aurora", {"targets": "released", "form": "core", "scale": 1.0}),
        ("lora", {}),
    ],
    ids=["aurora", "all_linear", "core", "lora"],
)
def test_losses_and_gradients(tuning, method):
    """Also with a recomputed layer, a teacher pass and matching's passes; nothing falls back to Python."""
    model = tiny_model(tuning=tuning, mode_approx=method, queue_size=20, vit_grad_ckpt=True, vit_ckpt_layer=1)
    activate(model, std=0.1 if method else 0.2).train()
    compiled = copy.deepcopy(model)
    compile_layers(compiled)
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


@pytest.mark.slow
def test_a_plain_model_of_lavis_is_compiled_too(tmp_path, monkeypatch):
    monkeypatch.chdir(hub_folder(tmp_path))
    model = activate(ModeApproxModel(build("blip_caption"), ModeApproxConfig(rank=4, targets="blip_caption"))).train()
    compiled = copy.deepcopy(model)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_layers(compiled, backend=count)
    gradients = []
    for one in (model, compiled):
        one(samples("blip_caption"))["loss"].backward()
        gradients.append(one.mode_approx.sets["default"].P.grad)
    assert graphs
    torch.testing.assert_close(*gradients)


def test_towers_that_are_not_compiled_are_refused():
    with pytest.raises(AuroraError, match="set run.compile: false"):
        compile_layers(torch.nn.Linear(2, 2))
