import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavis_aurora.config.method import ModeApproxConfig
from lavis_aurora.mode_approx.factors import ModeFactors
from lavis_aurora.mode_approx.layers import ModeApproxLinear, _through_the_weight, grouped_linear

D_IN, D_OUT, RANK = 5, 4, 3


def layer(slots: int, dtype: torch.dtype = torch.float64, columns: bool = False) -> ModeApproxLinear:
    """A layer over ``slots`` slots, stacked in its rows or side by side in its columns; every number is random."""
    torch.manual_seed(0)
    factors = ModeFactors({f"s{i}": (D_IN, D_OUT) for i in range(slots)}, ModeApproxConfig(rank=RANK, scale=0.1)).to(
        dtype
    )
    for parameter in factors.parameters():
        nn.init.normal_(parameter)
    wide = (slots * D_IN, D_OUT) if columns else (D_IN, slots * D_OUT)
    linear = nn.Linear(*wide).to(dtype).requires_grad_(False)
    return ModeApproxLinear(linear, factors, range(slots))


def cp_loops(module: ModeApproxLinear) -> torch.Tensor:
    """The whole update entry by entry (eq. 3), in nn.Linear's layout."""
    one, config = module.factors.sets["default"], module.factors.sets["default"].config
    delta = torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
    for j in range(module.out_features):
        for i in range(module.in_features):
            # The slot that the entry belongs to, and its place there.
            k = i // D_IN if module.columns else j // D_OUT
            for r in range(RANK):
                u, v = one.U[str(D_IN)][i % D_IN, r], one.V[str(D_OUT)][j % D_OUT, r]
                delta[j, i] += one.coefficients[k, r] * one.P[k, r] * u * v
    return delta * config.scale / (0.1 * (D_IN * RANK) ** 0.5)


layouts = pytest.mark.parametrize(("slots", "columns"), [(1, False), (3, False), (3, True)])


@pytest.fixture(params=["folded", "beside"], autouse=True)
def path(request, monkeypatch) -> str:
    """Every test runs on both ways of computing the update, whatever the number of tokens."""
    if request.node.get_closest_marker("own_choice") is None:
        choose(monkeypatch, request.param == "folded")
    return request.param


def choose(monkeypatch, folded: bool) -> None:
    monkeypatch.setattr(ModeApproxLinear, "folds", lambda self, x: folded and self.factors.active_set is not None)


@layouts
def test_factors_in_single_precision_leave_a_backbone_in_double_as_it_is(slots, columns):
    module = layer(slots, columns=columns)
    nn.init.normal_(module.adapted_weight)
    module.factors.float()
    nn.init.zeros_(module.factors["default"].V[str(D_OUT)])
    x = torch.randn(7, module.in_features, dtype=torch.float64)
    assert torch.equal(module(x), F.linear(x, module.adapted_weight, module.bias))
    assert torch.equal(module.merged_weights("default")["weight"], module.adapted_weight)


@layouts
@pytest.mark.parametrize("shape", [(7,), (2, 7)])
def test_forward_is_the_linear_layer_with_the_updated_weight(slots, columns, shape):
    module = layer(slots, columns=columns)
    x = torch.randn(*shape, module.in_features, dtype=torch.float64)
    parts = [module.factors.delta_weight(f"s{i}") for i in range(slots)]
    delta = torch.cat(parts, dim=1 if columns else 0)
    torch.testing.assert_close(module(x), F.linear(x, module.adapted_weight + delta, module.bias))
    torch.testing.assert_close(module.delta_weight(), delta)
    torch.testing.assert_close(delta, cp_loops(module))


@layouts
@pytest.mark.parametrize("tokens", [2, 60])  # of the folded path the products of width rank, and the whole gradient
def test_gradients_are_those_of_the_explicit_weight(slots, columns, tokens):
    module = layer(slots, columns=columns)
    parameters = list(module.factors.parameters())
    x = torch.randn(tokens, module.in_features, dtype=torch.float64, requires_grad=True)
    target = torch.randn(tokens, module.out_features, dtype=torch.float64)
    assert _through_the_weight(tokens, module.in_features, module.out_features, RANK) == (tokens == 60)
    ours = torch.autograd.grad((module(x) * target).sum(), [x, *parameters])
    explicit = F.linear(x, module.adapted_weight + cp_loops(module), module.bias)
    theirs = torch.autograd.grad((explicit * target).sum(), [x, *parameters])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("columns", [False, True])
def test_gradcheck(columns):
    module = layer(3, columns=columns)
    one = module.factors.sets["default"]
    inputs = [one.U[str(D_IN)], one.V[str(D_OUT)], one.P, one.coefficients]
    x = torch.randn(3, module.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *inputs))


@pytest.mark.parametrize("columns", [False, True])
def test_gradients_of_the_folded_and_the_plain_path_are_the_same_for_many_tokens(monkeypatch, columns):
    module = layer(3, columns=columns)
    parameters = list(module.factors.parameters())
    x = torch.randn(4, 9, module.in_features, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 9, module.out_features, dtype=torch.float64)
    results = []
    for folds in (True, False):
        choose(monkeypatch, folds)
        results.append(torch.autograd.grad((module(x) * target).sum(), [x, *parameters]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.own_choice
def test_the_path_is_chosen_by_tokens_and_only_over_a_frozen_layer():
    module = layer(1)
    few, many = torch.randn(1, D_IN, dtype=torch.float64), torch.randn(50, D_IN, dtype=torch.float64)
    assert [module.folds(x) for x in (few, many)] == [False, True]
    with module.factors.disabled():
        assert not module.folds(many)
    module.factors.sets["default"].config.dropout = 0.1
    assert not module.folds(many)
    assert module.eval().folds(many)
    module.adapted_weight.requires_grad_(True)
    assert not module.folds(many)


@pytest.mark.own_choice
def test_dropout_falls_on_the_update_alone_and_in_training_alone():
    module = layer(1)
    module.factors.sets["default"].config.dropout = 0.999
    x = torch.randn(50, D_IN, dtype=torch.float64)
    torch.testing.assert_close(module(x)[:3], F.linear(x, module.adapted_weight, module.bias)[:3])
    torch.testing.assert_close(
        module.eval()(x), F.linear(x, module.adapted_weight + module.delta_weight(), module.bias)
    )


def three_layers(dtype: torch.dtype = torch.float64, bias: bool = True) -> list[ModeApproxLinear]:
    """Layers over slots 2, 0 and 1, of one, one and one slot."""
    factors = layer(3, dtype).factors
    return [
        ModeApproxLinear(nn.Linear(D_IN, D_OUT, bias).to(dtype).requires_grad_(False), factors, [slot])
        for slot in (2, 0, 1)
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_input_together_are_the_layers_alone(bias):
    layers = three_layers(bias=bias)
    parameters = list(layers[0].factors.parameters())
    x = torch.randn(2, 9, D_IN, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 2, 9, D_OUT, dtype=torch.float64)
    alone, together = [one(x) for one in layers], grouped_linear(x, *layers)
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b)
    results = [
        torch.autograd.grad((torch.stack(list(ys)) * target).sum(), [x, *parameters]) for ys in (together, alone)
    ]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_layers_that_cannot_be_one_product_are_computed_alone():
    layers = three_layers()
    x = torch.randn(9, D_IN, dtype=torch.float64)
    plain = nn.Linear(D_IN, 2).double()
    other = layer(1)  # over other factors
    mixed = [layers[0], plain, other]
    for one, y in zip(mixed, grouped_linear(x, *mixed)):
        torch.testing.assert_close(y, one(x))
    factors = layers[0].factors
    wide = [
        ModeApproxLinear(nn.Linear(2 * D_IN, D_OUT).double().requires_grad_(False), factors, slots)
        for slots in ([0, 1], [1, 2])
    ]
    z = torch.randn(9, 2 * D_IN, dtype=torch.float64)
    for one, y in zip(wide, grouped_linear(z, *wide)):
        assert one.columns
        torch.testing.assert_close(y, one(z))
    with layers[0].factors.disabled():
        for one, y in zip(layers, grouped_linear(x, *layers)):
            assert torch.equal(y, F.linear(x, one.weight, one.bias))


def test_hooks_of_layers_that_could_be_computed_together_are_called():
    layers, seen = three_layers(torch.float64), []
    x = torch.randn(9, D_IN, dtype=torch.float64)
    expected = grouped_linear(x, *layers)
    layers[1].register_forward_hook(lambda module, args, y: seen.append(args[0]) or y + 1)
    _, changed, _ = grouped_linear(x, *layers)
    assert len(seen) == 1 and torch.equal(seen[0], x)
    torch.testing.assert_close(changed, expected[1] + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_factors_in_single_precision(dtype, path):
    layers = three_layers(torch.float32)
    parameters = list(layers[0].factors.parameters())
    x = torch.randn(30, D_IN, requires_grad=True)
    reference = torch.stack([one(x) for one in layers])
    expected = torch.autograd.grad(reference.sin().sum(), [x, *parameters])
    with torch.autocast("cpu", dtype=dtype):
        ys = torch.stack(grouped_linear(x, *layers))
    assert ys.dtype == dtype
    torch.testing.assert_close(ys.float(), reference, atol=0.05, rtol=0.03)
    grads = torch.autograd.grad(ys.float().sin().sum(), [x, *parameters])
    for ours, theirs in zip(grads, expected):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_disabled_is_the_plain_layer_bit_for_bit():
    module = layer(2)
    x = torch.randn(3, D_IN, dtype=torch.float64)
    with module.factors.disabled():
        assert torch.equal(module(x), F.linear(x, module.adapted_weight, module.bias))
    assert not torch.equal(module(x), F.linear(x, module.adapted_weight, module.bias))


def test_keys_and_parameters_are_those_of_the_layer_it_replaces():
    linear = nn.Linear(D_IN, D_OUT)
    module = ModeApproxLinear(linear, ModeFactors({"a": (D_IN, D_OUT)}, ModeApproxConfig(rank=2)), [0])
    assert list(module.state_dict()) == ["weight", "bias"]
    assert module.adapted_weight is linear.weight
    assert module.bias is linear.bias


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_factors_over_a_half_precision_layer(dtype, columns):
    module = layer(3, torch.float32, columns)
    reference = module(x := torch.randn(6, module.in_features))
    half = ModeApproxLinear(nn.Linear(module.in_features, module.out_features), module.factors, range(3))
    half.weight, half.bias = (nn.Parameter(p.to(dtype)) for p in (module.adapted_weight, module.bias))
    y = half(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), reference, atol=0.1, rtol=0.05)
    y.float().sum().backward()
    assert module.factors.sets["default"].V[str(D_OUT)].grad.dtype == torch.float32


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_read_their_own_factors(clone):
    model = nn.ModuleDict({"layer": (module := layer(1)), "mode_approx": module.factors})
    x = torch.randn(3, D_IN, dtype=torch.float64)
    before = model["layer"](x)
    twin = clone(model)
    assert twin["layer"].factors is twin["mode_approx"]
    assert twin["mode_approx"] is not model["mode_approx"]
    nn.init.zeros_(twin["mode_approx"].sets["default"].V[str(D_OUT)])
    torch.testing.assert_close(model["layer"](x), before)
    assert not torch.equal(twin["layer"](x), before)
