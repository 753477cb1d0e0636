import copy

import pytest
import torch
from torch import nn

from lavis_aurora import AuroraError, ModeApproxConfig, inject_mode_approx, merge_adapter, unmerge_adapter
from lavis_aurora.mode_approx.inject import find_targets
from lavis_aurora.mode_approx.layers import AdaptedLayer, ModeApproxLinear


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
        AuroraError,
        match="targets: 'quary' matches no linear or nn.MultiheadAttention layer; did you mean the layers 'query'",
    ):
        inject_mode_approx(Tower(), ModeApproxConfig(), ["qkv", "quary"])


def test_layers_that_differ_in_numbers_alone_are_named_once():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(4, 12)}) for _ in range(12))})
    model.update({name: nn.Linear(4, 4) for name in "abcdefg"})
    with pytest.raises(AuroraError, match=r"did you mean the layers 'blocks\.\\d\+\.qkv'\?$"):
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
    with pytest.raises(AuroraError, match="targets: 'blip_retrival' .*did you mean the preset 'blip_retrieval'"):
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


class Block(nn.Module):
    """A layer of a transformer with the usual names; its feed-forward width is ``hidden``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.fc1, self.fc2 = nn.Linear(4, hidden), nn.Linear(hidden, 4)
        self.head = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.self_attn["out_proj"](sum(self.self_attn[name](x) for name in ("q_proj", "k_proj", "v_proj")))
        return self.head(self.fc2(torch.tanh(self.fc1(x))))


OUTPUT = {"self_attn.out_proj": (4, 4)}
PROJECTIONS = {f"self_attn.{part}_proj": (4, 4) for part in "qkv"}


@pytest.mark.parametrize("hidden", [4, 8, 12])
def test_feed_forward_layers_are_square_blocks(hidden):
    layer = Block(hidden).double()
    factors = inject_mode_approx(layer, ModeApproxConfig(rank=2, scale=0.1, targets="all_linear")).double()
    count = hidden // 4
    blocks = [f"{name}.block{i}" if count > 1 else name for name in ("fc1", "fc2") for i in range(count)]
    assert factors.slots == {**PROJECTIONS, **OUTPUT, **dict.fromkeys(blocks, (4, 4))}
    assert set(factors.sets["default"].U) == set(factors.sets["default"].V) == {"4"}
    for parameter in factors.parameters():
        nn.init.normal_(parameter)
    up, down = (torch.zeros(*getattr(layer, name).adapted_weight.shape).double() for name in ("fc1", "fc2"))
    for i in range(count):
        one, two = (factors.delta_weight(blocks[i + start]) for start in (0, count))
        # Outputs 4i to 4i + 3 of the first matrix are inputs of the second.
        for row in range(4):
            up[4 * i + row], down[:, 4 * i + row] = one[row], two[:, row]
    x = torch.randn(3, 50, hidden, dtype=torch.float64)
    for part in (x[:1, :1], x):  # beside the layers, and folded
        for linear, delta in ((layer.fc1, up), (layer.fc2, down)):
            few = part[..., : linear.in_features]
            weight = linear.adapted_weight + delta
            torch.testing.assert_close(linear(few), nn.functional.linear(few, weight, linear.bias))


def test_feed_forward_layers_of_another_width_are_one_slot_each():
    factors = inject_mode_approx(Block(10), ModeApproxConfig(rank=2, targets="all_linear"))
    assert factors.slots == {**PROJECTIONS, **OUTPUT, "fc1": (4, 10), "fc2": (10, 4)}


def test_words_add_up_and_regular_expressions_name_one_slot():
    def slots(*targets: str) -> dict[str, tuple[int, int]]:
        return inject_mode_approx(Block(8), ModeApproxConfig(rank=2, targets=list(targets))).slots

    assert slots("attention") == PROJECTIONS
    assert slots("attention", "attention_output") == {**PROJECTIONS, **OUTPUT}
    assert slots("attention", "attention_output", "feed_forward") == slots("all_linear")
    # As they always were, so that adapters of such targets load.
    assert slots("fc[12]") == {"fc1": (4, 8), "fc2": (8, 4)}
    assert slots("attention", "head") == {**PROJECTIONS, "head": (4, 8)}


def test_projections_are_never_in_blocks():
    """Keys of an image that is twice as wide as the text."""
    model = nn.ModuleDict({"key": nn.Linear(8, 4), "fc1": nn.Linear(4, 8)})
    factors = inject_mode_approx(model, ModeApproxConfig(rank=2, targets="all_linear"))
    assert factors.slots == {"key": (8, 4), "fc1.block0": (4, 4), "fc1.block1": (4, 4)}


def test_a_word_for_what_the_model_does_not_have_is_named():
    with pytest.raises(AuroraError, match="mode_approx.targets: 'feed_forward' matches no linear"):
        inject_mode_approx(Tower(), ModeApproxConfig(targets="feed_forward"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_merge_and_unmerge_bit_for_bit(dtype):
    layer = Block(16)
    factors = inject_mode_approx(layer, ModeApproxConfig(rank=2, targets="all_linear"))
    layer.to(dtype).eval()
    for parameter in factors.parameters():
        nn.init.normal_(parameter, std=0.1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(50, 4, dtype=dtype)
    expected = layer(x)
    merge_adapter(layer)
    assert not torch.equal(layer.fc2.adapted_weight, before["fc2.weight"])
    torch.testing.assert_close(layer(x), expected)
    unmerge_adapter(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_torchs_transformer_layers_are_adapted_whole():
    """nn.MultiheadAttention with its output projection, and both feed-forward layers."""
    plain = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True, dropout=0.0).eval()
    layer = copy.deepcopy(plain)
    factors = inject_mode_approx(layer, ModeApproxConfig(rank=2, targets="all_linear"))
    assert [slot for slot in factors.slots if "block" not in slot] == [
        *(f"self_attn.{part}" for part in ("query", "key", "value")),
        "self_attn.out_proj",
    ]
    assert len(factors.slots) == 4 + 4 + 4
    for parameter in factors.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 50, 8)
    with torch.no_grad():
        fast = layer(x)  # torch's fused kernel, which takes the weights as they are
        for name, delta in (
            (f"{path}.{weight}", delta)
            for path, module in layer.named_modules()
            if isinstance(module, AdaptedLayer)
            for weight, delta in module.delta_weights().items()
        ):
            plain.get_parameter(name).add_(delta)
        torch.testing.assert_close(fast, plain(x))
    torch.testing.assert_close(layer(x), fast)
    layer(x).sin().sum().backward()
    assert all(row.abs().max() > 0 for row in factors.sets["default"].P.grad)
