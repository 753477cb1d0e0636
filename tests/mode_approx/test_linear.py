import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavis_aurora.config import ModeApproxConfig
from lavis_aurora.mode_approx import ModeApproxLinear, ModeFactors

D_IN, D_OUT, RANK = 5, 4, 3


def layer(slots: int, dtype: torch.dtype = torch.float64) -> ModeApproxLinear:
    """A layer over ``slots`` stacked slots in which every number is random."""
    torch.manual_seed(0)
    factors = ModeFactors({f"s{i}": (D_IN, D_OUT) for i in range(slots)}, ModeApproxConfig(rank=RANK, scale=0.1)).to(
        dtype
    )
    for parameter in factors.parameters():
        nn.init.normal_(parameter)
    linear = nn.Linear(D_IN, slots * D_OUT).to(dtype).requires_grad_(False)
    return ModeApproxLinear(linear, factors, range(slots))


@pytest.fixture(params=["folded", "beside"], autouse=True)
def path(request, monkeypatch) -> str:
    """Every test runs on both ways of computing the update, whatever the number of tokens."""
    if request.node.get_closest_marker("own_choice") is None:
        monkeypatch.setattr(
            ModeApproxLinear, "_folds", lambda self, x: request.param == "folded" and _one_dtype(self, x)
        )
    return request.param


def _one_dtype(module: ModeApproxLinear, x: torch.Tensor) -> bool:
    return x.dtype == module.adapted_weight.dtype == module.factors.active_set.P.dtype


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("shape", [(7,), (2, 7)])
def test_forward_is_the_linear_layer_with_the_updated_weight(slots, shape):
    module = layer(slots)
    x = torch.randn(*shape, D_IN, dtype=torch.float64)
    delta = torch.cat([module.factors.delta_weight(f"s{i}") for i in range(slots)])
    torch.testing.assert_close(module(x), F.linear(x, module.adapted_weight + delta, module.bias))
    torch.testing.assert_close(module.delta_weight(), delta)


@pytest.mark.parametrize("slots", [1, 3])
def test_gradients_are_those_of_the_explicit_weight(slots):
    module = layer(slots)
    parameters = list(module.factors.parameters())
    x = torch.randn(6, D_IN, dtype=torch.float64, requires_grad=True)
    target = torch.randn(6, slots * D_OUT, dtype=torch.float64)
    ours = torch.autograd.grad((module(x) * target).sum(), [x, *parameters])
    explicit = F.linear(x, module.adapted_weight + module.delta_weight(), module.bias)
    theirs = torch.autograd.grad((explicit * target).sum(), [x, *parameters])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    module = layer(3)
    one = module.factors.sets["default"]
    inputs = [one.U[str(D_IN)], one.V[str(D_OUT)], one.P, one.coefficients]
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *inputs))


def test_gradients_of_the_folded_and_the_plain_path_are_the_same_for_many_tokens(monkeypatch):
    module = layer(3)
    parameters = list(module.factors.parameters())
    x = torch.randn(4, 9, D_IN, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 9, 3 * D_OUT, dtype=torch.float64)
    results = []
    for folds in (True, False):
        monkeypatch.setattr(ModeApproxLinear, "_folds", lambda self, x, folds=folds: folds)
        results.append(torch.autograd.grad((module(x) * target).sum(), [x, *parameters]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.own_choice
def test_the_path_is_chosen_by_tokens_and_only_where_it_is_exact():
    module = layer(1)
    few, many = torch.randn(1, D_IN, dtype=torch.float64), torch.randn(50, D_IN, dtype=torch.float64)
    assert [module._folds(x) for x in (few, many)] == [False, True]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not module._folds(many)
    assert not module._folds(many.float())
    module.adapted_weight.requires_grad_(True)
    assert not module._folds(many)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_factors_over_a_half_precision_layer(dtype):
    module = layer(3, torch.float32)
    reference = module(x := torch.randn(6, D_IN))
    half = ModeApproxLinear(copy.deepcopy(nn.Linear(D_IN, 3 * D_OUT)), module.factors, range(3))
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
