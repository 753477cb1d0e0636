"""Open registries: a form of the gate, a form of the context and a way of tuning from outside the package."""

import pytest
import torch
from tiny import BUILT, activate, tiny_model
from tiny_retrieval import batch, train_steps

from lavis_aurora import AuroraError, ContextConfig, GateConfig, load_adapter, save_adapter
from lavis_aurora.alignment.context import register_context
from lavis_aurora.alignment.gate import AffineGate, Gate, register_gate
from lavis_aurora.config.method import CONTEXT_FORMS, GATE_FORMS
from lavis_aurora.config.models import TUNINGS, register_tuning
from lavis_aurora.encoders.fusion import encode_with_image
from lavis_aurora.models.base import tune_aurora

LENGTHS = torch.tensor([1, 3, 3, 6, 9])


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test registers is gone after it, and no model with it is copied later."""
    for registry in (GATE_FORMS, CONTEXT_FORMS, TUNINGS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    BUILT.clear()
    yield
    BUILT.clear()


class MeanGate(Gate):
    """Adds a share of the mean of t over the text: each position depends on all."""

    def __init__(self, dim, config):
        super().__init__(dim, config)
        self.share = torch.nn.Parameter(torch.zeros(dim))

    def forward(self, t, f, keep=None):
        weight = torch.ones(t.shape[:2]) if keep is None else keep.to(t.dtype)
        mean = (t * weight.unsqueeze(-1)).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
        return (f if self.place == "crossattention" else torch.zeros_like(f)) + self.share * mean


def trains(model, parts):
    """A step changes the parameters whose names hold one of ``parts``."""
    own = {name: p for name, p in model.named_parameters() if any(part in name for part in parts)}
    before = {name: p.detach().clone() for name, p in own.items()}
    train_steps(model, steps=2)
    assert own and not any(torch.equal(p, before[name]) for name, p in own.items())


@pytest.mark.parametrize("place", ["crossattention", "layer"])
def test_a_gate_of_ones_own_trains_is_saved_and_scores_packed_texts_as_single_ones(place, tmp_path):
    register_gate("mean")(type("Own", (MeanGate,), {"reads": "text", "place": place}))
    model = tiny_model(gate={"form": "mean"}, queue_size=0)
    trains(model, ["gate.share"])
    activate(model).eval()
    save_adapter(model, tmp_path)
    load_adapter(tiny_model(gate={"form": "mean"}, queue_size=0), tmp_path)
    encoder, generator = model.text_encoder, torch.Generator().manual_seed(0)
    ids = torch.randint(5, 400, (len(LENGTHS), 9), generator=generator)
    image = torch.randn(10, 128, generator=generator)
    with torch.no_grad():
        packed = encode_with_image(encoder, ids, LENGTHS, image)
        for row, length, first in zip(ids, LENGTHS, packed):
            alone = encoder(row[None, :length], encoder_hidden_states=image[None], return_dict=True)
            torch.testing.assert_close(first, alone.last_hidden_state[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "content"), [(MeanGate, {}), (AffineGate, {}), (MeanGate, {"reads": "tokens"})], ids=lambda x: str(x)
)
def test_a_gate_that_does_not_say_what_it_reads_is_refused(base, content):
    """What a form reads is not inherited: the affine form reads positions, what is made of it may read more."""
    with pytest.raises(AuroraError, match="silent must say what it needs: Own.reads = 'positions' or 'text'"):
        register_gate("silent")(type("Own", (base,), content))
    assert "silent" not in GATE_FORMS


def test_a_context_of_ones_own_trains():
    calls = []

    @register_context("largest")
    def largest(fusion, queries):
        calls.append(len(fusion))
        return fusion + queries.amax(0)

    model = tiny_model(context={"form": "largest"}, queue_size=0)
    trains(model, ["itm_head"])
    assert calls == [15, 15]
    model.eval()(batch())
    assert len(calls) == 2


def test_a_way_of_tuning_of_ones_own_trains():
    @register_tuning("biases")
    def biases(model, cfg, places):
        for name, parameter in model.visual_encoder.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))

    model = tiny_model(tuning="biases", queue_size=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {name.split(".")[0] for name in trained}
    assert parts == {"visual_encoder", "vision_proj", "text_proj", "itm_head", "temp"}
    trains(model, ["visual_encoder.norm.bias", "blocks.0.mlp.fc1.bias"])
    with pytest.raises(AuroraError, match="needs model.tuning: aurora or lora or uniadapter, not biases"):
        tiny_model(tuning="biases", adapter="x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GateConfig("residul"), "gate.form: unknown value 'residul'; did you mean 'residual'"),
        (lambda: ContextConfig("attension"), "context.form: unknown value 'attension'; did you mean 'attention'"),
        (lambda: tiny_model(tuning="lorra"), "model.tuning: unknown value 'lorra'; did you mean 'lora'"),
        (lambda: register_tuning("lora")(print), "model.tuning: 'lora' is registered already"),
    ],
)
def test_names_that_are_not_registered_or_taken(make, message):
    with pytest.raises(AuroraError, match=message):
        make()


def test_an_adapter_of_a_tuning_from_outside_keeps_its_settings(tmp_path, monkeypatch):
    """One that names no settings of its own may use any: what its gates mean stands in the folder."""
    monkeypatch.setattr(TUNINGS, "_entries", dict(TUNINGS))
    register_tuning("mine", adapters=True)(tune_aurora)
    save_adapter(tiny_model(tuning="mine", gate={"form": "convex"}, queue_size=0), tmp_path)
    with pytest.raises(AuroraError, match="gate.form is 'convex' there and 'residual' here"):
        load_adapter(tiny_model(tuning="mine", queue_size=0), tmp_path)
