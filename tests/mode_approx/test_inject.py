import pytest
import torch
from torch import nn

from lavis_aurora import AuroraError, ModeApproxConfig, inject_mode_approx, merge_adapter
from lavis_aurora.mode_approx.inject import find_targets
from lavis_aurora.mode_approx.layers import ModeApproxLinear


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
    with pytest.raises(
        AuroraError, match="'quary' matches no linear or nn.MultiheadAttention layer; did you mean the layers 'query'"
    ):
        inject_mode_approx(Tower(), ModeApproxConfig(), ["qkv", "quary"])


def test_layers_that_differ_in_numbers_alone_are_named_once():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(4, 12)}) for _ in range(12))})
    model.update({name: nn.Linear(4, 4) for name in "abcdefg"})
    with pytest.raises(AuroraError, match=r"did you mean the layers 'blocks\.\\\\d\+\.qkv'\?$"):
        find_targets(model, [r"blocks.\d+.qkw"])
    with pytest.raises(AuroraError, match=r"layers are 'blocks.*qkv', 'a', 'b', 'c', 'd' and 3 more$"):
        find_targets(model, ["zzz.zzz.zzz"])


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


def test_targets_of_the_configuration_win():
    model = Tower()
    factors = inject_mode_approx(model, ModeApproxConfig(targets=["key"]), ["qkv", "query"])
    assert list(factors.slots) == ["key"]
    assert ModeApproxConfig(targets="key").targets == ["key"]


def test_the_default_targets_are_attention_projections_of_either_kind():
    model = nn.ModuleDict({"a": Tower(), "self_attn": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    factors = inject_mode_approx(model, ModeApproxConfig(rank=2))
    parts = ("query", "key", "value")
    own = [f"a.qkv.{part}" for part in parts] + ["a.query", "a.key"] + [f"self_attn.{part}" for part in parts]
    assert list(factors.slots) == own


def test_a_target_of_another_kind_is_named():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1)})
    with pytest.raises(AuroraError, match="'conv' matches no linear .* layer, but conv, a Conv1d"):
        inject_mode_approx(model, ModeApproxConfig(), ["conv"])


def test_an_unknown_preset_gets_the_nearest_ones():
    with pytest.raises(AuroraError, match="target 'blip_retrival' .*did you mean the preset 'blip_retrieval'"):
        inject_mode_approx(Tower(), ModeApproxConfig(targets="blip_retrival"))


@pytest.mark.parametrize("kind", ["class", "instance"])
def test_a_linear_layer_with_a_forward_of_its_own_is_refused(kind):
    class Quantized(nn.Linear):
        def forward(self, x):
            return super().forward(x).round()

    layer = Quantized(4, 4)
    if kind == "instance":
        layer = nn.Linear(4, 4)
        layer.forward = lambda x: x
    with pytest.raises(AuroraError, match=f"target query is a {type(layer).__name__} with a forward of its own"):
        inject_mode_approx(nn.ModuleDict({"query": layer}), ModeApproxConfig(), ["query"])


def test_a_parametrized_layer_is_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(AuroraError, match="target query: its weight is computed from others"):
        inject_mode_approx(nn.ModuleDict({"query": layer}), ModeApproxConfig(), ["query"])


def test_layers_that_share_a_weight_share_its_slot():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    factors = inject_mode_approx(model, ModeApproxConfig(rank=2), ["a", "b", "c"])
    assert list(factors.slots) == ["a", "c"]
    assert [model[name].slots for name in "abc"] == [(0,), (0,), (1,)]


def test_a_layer_that_stands_in_two_places_is_adapted_in_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.ModuleDict({"query": shared}), "b": nn.ModuleDict({"query": shared})})
    factors = inject_mode_approx(model, ModeApproxConfig(rank=2), [r"a\.query"])
    assert model["a"]["query"] is model["b"]["query"]
    assert isinstance(model["a"]["query"], ModeApproxLinear) and list(factors.slots) == ["a.query"]


def test_hooks_and_mode_of_a_layer_stay():
    model = nn.ModuleDict({"query": nn.Linear(4, 4)}).eval()
    seen = []
    model["query"].register_forward_hook(lambda *args: seen.append(args))
    inject_mode_approx(model, ModeApproxConfig(rank=2), ["query"])
    model["query"](torch.ones(1, 4))
    assert len(seen) == 1 and not model["query"].training


def test_whoever_reads_the_weight_itself_gets_the_update():
    model = Tower().double()
    factors = inject_mode_approx(model, ModeApproxConfig(rank=2), ["qkv", "query"]).double()
    plain = model.query.adapted_weight
    assert torch.equal(model.query.weight, plain)
    for parameter in factors.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8, dtype=torch.float64)
    ours = nn.functional.linear(x, model.qkv.weight, model.qkv.bias)
    torch.testing.assert_close(ours, model.qkv(x))
    one, two = (torch.autograd.grad(y.sin().sum(), factors.sets["default"].P)[0] for y in (ours, model.qkv(x)))
    torch.testing.assert_close(one, two)
    with factors.disabled():
        assert model.query.weight is plain


@pytest.mark.parametrize("training", [True, False])
def test_every_module_has_the_models_mode(training):
    model = nn.ModuleDict({"a": Tower(), "self_attn": nn.MultiheadAttention(4, 2)}).train(training)
    factors = inject_mode_approx(model, ModeApproxConfig(rank=2))
    factors.add_set("other", ModeApproxConfig(rank=2))
    assert {module.training for module in model.modules()} == {training}


def test_a_model_that_was_in_eval_mode_scores_with_a_merged_adapter():
    model = Tower().eval()
    inject_mode_approx(model, ModeApproxConfig(rank=2))
    merge_adapter(model)
    model(torch.ones(1, 8), torch.ones(1, 6))
