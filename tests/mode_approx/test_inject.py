import pytest
import torch
from torch import nn

from lavis_aurora import AuroraError, ModeApproxConfig, inject_mode_approx
from lavis_aurora.mode_approx import ModeApproxLinear
from lavis_aurora.mode_approx.inject import find_targets


class Tower(nn.Module):
    """A fused and a separate attention, as in ViT and BERT, and a layer that is no target."""

    def __init__(self, vision: int = 8, text: int = 6) -> None:
        super().__init__()
        self.qkv = nn.Linear(vision, 3 * vision)
        self.query = nn.Linear(text, text)
        self.key = nn.Linear(vision, text)
        self.output = nn.Linear(text, text)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.output(self.query(text) + self.key(self.qkv(image)[..., : image.shape[-1]]))


def test_step_0_equals_the_plain_model():
    torch.manual_seed(0)
    model = Tower()
    image, text = torch.randn(3, 8), torch.randn(3, 6)
    before = model(image, text)
    keys = set(model.state_dict())
    factors = inject_mode_approx(model, ModeApproxConfig(rank=4), ["qkv", "query", "key"])
    torch.testing.assert_close(model(image, text), before)
    assert list(factors.slots) == ["qkv.query", "qkv.key", "qkv.value", "query", "key"]
    assert factors.slots["key"] == (8, 6)
    assert isinstance(model.qkv, ModeApproxLinear)
    assert not isinstance(model.output, ModeApproxLinear)
    new = set(model.state_dict()) - keys
    assert all(key.startswith("mode_approx.") for key in new)
    assert keys <= set(model.state_dict())


def test_layers_may_share_a_slot():
    model = nn.ModuleDict({"encoder": Tower(), "decoder": Tower()})
    factors = inject_mode_approx(
        model,
        ModeApproxConfig(rank=2),
        [r".*\.(query|key)"],
        slot_name=lambda name: name.replace("decoder", "encoder"),
    )
    assert list(factors.slots) == ["encoder.query", "encoder.key"]
    assert model["encoder"].query.slots == model["decoder"].query.slots == (0,)


def test_shared_slots_must_have_one_shape():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 5)})
    with pytest.raises(AuroraError, match=r"b: cannot share slot 's' of shape \(4, 4\) with \(4, 5\)"):
        inject_mode_approx(model, ModeApproxConfig(), ["a", "b"], slot_name=lambda _: "s")


def test_a_target_that_matches_nothing_names_near_ones():
    with pytest.raises(AuroraError, match="'quary' matches no linear layer; did you mean 'query'"):
        inject_mode_approx(Tower(), ModeApproxConfig(), ["qkv", "quary"])


def test_find_targets_keeps_the_order_of_the_model():
    assert find_targets(Tower(), ["key", "qkv", ".*y"]) == ["qkv", "query", "key"]


def test_injecting_twice_is_refused():
    model = Tower()
    inject_mode_approx(model, ModeApproxConfig(), ["query"])
    with pytest.raises(AuroraError, match="already"):
        inject_mode_approx(model, ModeApproxConfig(), ["key"])


def test_a_fused_layer_must_divide():
    with pytest.raises(AuroraError, match="10 rows do not divide"):
        inject_mode_approx(nn.ModuleDict({"qkv": nn.Linear(4, 10)}), ModeApproxConfig(), ["qkv"])
