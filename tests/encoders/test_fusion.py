import pytest
import torch
from tiny import tiny_model
from torch import nn

from lavis_aurora.encoders.fusion import GatedCrossAttention


def outputs(model: nn.Module, mode: str) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(5, 40, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    image = torch.randn(2, 5, model.text_encoder.config.encoder_width)
    if mode == "text":
        return model.text_encoder(ids, attention_mask=mask, return_dict=True, mode="text").last_hidden_state
    return model.text_encoder(
        ids, attention_mask=mask, encoder_hidden_states=image, return_dict=True
    ).last_hidden_state


def gated(form: str, init: str = "zeros") -> nn.Module:
    torch.manual_seed(0)
    return tiny_model(gate={"form": form, "init": init}).eval()


def test_keys_of_the_backbone_do_not_change():
    plain = set(gated("none").state_dict())
    for form, added in (("residual", ("gamma", "beta")), ("affine", ("gamma_t", "beta_t", "gamma_f", "beta_f"))):
        keys = set(gated(form).state_dict())
        assert plain < keys
        assert {key.rpartition(".")[2] for key in keys - plain} == set(added)


@pytest.mark.parametrize("form", ["residual", "affine"])
def test_zero_gates_are_the_backbone_and_trained_ones_are_not(form):
    plain, model = gated("none"), gated(form)
    model.load_state_dict(plain.state_dict(), strict=False)
    for mode in ("multimodal", "text"):
        torch.testing.assert_close(outputs(model, mode), outputs(plain, mode))
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            nn.init.normal_(parameter)
    assert (outputs(model, "multimodal") - outputs(plain, "multimodal")).abs().max() > 0.1
    # A text-only pass has no fusion features: the gate has no say in it.
    torch.testing.assert_close(outputs(model, "text"), outputs(plain, "text"))


def test_convex_form_is_not_the_backbone_at_the_start():
    plain, model = gated("none"), gated("convex")
    model.load_state_dict(plain.state_dict(), strict=False)
    assert (outputs(model, "multimodal") - outputs(plain, "multimodal")).abs().max() > 0.1


def test_affine_form_is_added_after_the_feed_forward_block():
    """One layer computed by hand from LAVIS's own sub-modules."""
    model = gated("affine")
    layer = model.text_encoder.encoder.layer[0]
    for parameter in layer.gate.parameters():
        nn.init.normal_(parameter)
    hidden, image = torch.randn(2, 4, 128), torch.randn(2, 5, 128)
    t = layer.attention(hidden)[0]
    f = layer.crossattention(t, encoder_hidden_states=image)[0]
    expected = layer.output(layer.intermediate(f), f) + layer.gate(t, f)
    got = layer(hidden, encoder_hidden_states=image, mode="multimodal")[0]
    torch.testing.assert_close(got, expected)


def test_padding_takes_no_part_in_the_gate():
    model = gated("residual", init="ones")
    torch.manual_seed(0)
    ids, image = torch.randint(5, 40, (1, 6)), torch.randn(1, 5, 128)
    short = torch.tensor([[1, 1, 1, 1, 0, 0]])
    padded = model.text_encoder(ids, attention_mask=short, encoder_hidden_states=image, return_dict=True)
    cut = model.text_encoder(ids[:, :4], attention_mask=short[:, :4], encoder_hidden_states=image, return_dict=True)
    torch.testing.assert_close(padded.last_hidden_state[:, :4], cut.last_hidden_state)
    assert isinstance(model.text_encoder.encoder.layer[0].crossattention, GatedCrossAttention)
