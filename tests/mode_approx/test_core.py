"""The R x R x R core of the authors' released code: the laws of the method hold for it too."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from toy import TARGETS, Toy, adapted_toy, inputs, randomize

from lavis_aurora import (
    AuroraError,
    ModeApproxConfig,
    inject_mode_approx,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    truncate_adapter,
    unmerge_adapter,
)
from lavis_aurora.mode_approx.core import CoreFactorSet
from lavis_aurora.mode_approx.factors import ModeFactors
from lavis_aurora.mode_approx.layers import ModeApproxLinear

D_IN, D_OUT, RANK = 5, 4, 3
CORE = {"form": "core", "scale": 1.7}
layouts = pytest.mark.parametrize(("slots", "columns"), [(1, False), (3, False), (3, True)])


def layer(slots: int, columns: bool = False, dtype: torch.dtype = torch.float64) -> ModeApproxLinear:
    """A layer over ``slots`` slots in its rows or columns; every number is random."""
    torch.manual_seed(0)
    factors = ModeFactors({f"s{i}": (D_IN, D_OUT) for i in range(slots)}, ModeApproxConfig(rank=RANK, **CORE))
    for parameter in factors.to(dtype).parameters():
        nn.init.normal_(parameter)
    wide = (slots * D_IN, D_OUT) if columns else (D_IN, slots * D_OUT)
    return ModeApproxLinear(nn.Linear(*wide).to(dtype).requires_grad_(False), factors, range(slots))


def core_sum(factors: ModeFactors, k: int) -> torch.Tensor:
    """The update of slot k entry by entry, in nn.Linear's layout: sums over i, j and c, one after the other."""
    one = factors["default"]
    u, v = one.U[str(D_IN)], one.V[str(D_OUT)]
    delta = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for i in range(RANK):
        for j in range(RANK):
            for c in range(RANK):
                delta = delta + one.core[i, j, c] * one.P[k, c] * torch.outer(v[:, j], u[:, i])
    return 1.7 * delta


def whole_update(module: ModeApproxLinear) -> torch.Tensor:
    parts = [core_sum(module.factors, k) for k in module.slots]
    return torch.cat(parts, dim=1 if module.columns else 0)


@layouts
@pytest.mark.parametrize("tokens", [1, 200], ids=["beside the layer", "folded"])
@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["", "dropout"])
def test_update_output_and_gradients_are_those_of_the_plain_sum(slots, columns, tokens, dropout):
    module = layer(slots, columns)
    module.factors["default"].config.dropout = dropout  # the way beside the layer, with nothing dropped
    torch.testing.assert_close(module.delta_weight(), whole_update(module))
    x = torch.randn(2, tokens, module.in_features, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, tokens, module.out_features, dtype=torch.float64)
    assert module.folds(x) == (tokens == 200 and not dropout)
    leaves = [x, *module.factors.parameters()]
    ours = torch.autograd.grad(((y := module(x)) * target).sum(), leaves)
    explicit = nn.functional.linear(x, module.adapted_weight + whole_update(module), module.bias)
    torch.testing.assert_close(y, explicit)
    for a, b in zip(ours, torch.autograd.grad((explicit * target).sum(), leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("columns", [False, True])
def test_dropout_falls_on_what_the_core_gives(columns):
    """With one component in U and V, a token's update is dropped as a whole, or doubled."""
    module = layer(1, columns)
    module.factors["default"].config.dropout = 0.5
    x = torch.randn(400, D_IN, dtype=torch.float64)
    with torch.no_grad():
        module.factors["default"].V[str(D_OUT)][:, 1:] = 0
        update = x @ module.delta_weight().t()
        found = module(x) - nn.functional.linear(x, module.adapted_weight, module.bias)
    kept = found.abs().sum(dim=1) > 1e-9
    torch.testing.assert_close(found[kept], 2 * update[kept])
    assert 120 < kept.sum() < 280
    torch.testing.assert_close(module.eval()(x) - nn.functional.linear(x, module.adapted_weight, module.bias), update)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_factors_and_core_in_single_precision(dtype):
    module = layer(3, dtype=torch.float32)
    x = torch.randn(200, D_IN, requires_grad=True)
    leaves = [x, *module.factors.parameters()]
    reference, target = module(x), torch.randn(200, module.out_features)
    expected = torch.autograd.grad((reference * target).sum(), leaves)
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
        assert all(part.dtype == torch.float32 for part in module.factors["default"].low_rank([0], D_IN, D_OUT))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), reference, atol=0.2, rtol=0.05)
    for ours, theirs in zip(torch.autograd.grad((y.float() * target).sum(), leaves), expected):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("rank", [8, 16])
def test_it_starts_as_the_released_code_does(rank):
    """U as torch's linear layers, the core and each module's vectors by Xavier's rule, V at zero."""
    torch.manual_seed(0)
    slots = {f"visual_encoder.blocks.{i}.attn.qkv.{part}": (64, 64) for i in range(100) for part in ("query", "key")}
    slots.update({f"visual_encoder.blocks.{i}.mlp.fc1.block0": (64, 64) for i in range(200)})
    slots.update({f"text_encoder.encoder.layer.{i}.attention.self.query": (64, 64) for i in range(200)})
    one = ModeFactors(slots, ModeApproxConfig(rank=rank, form="core"))["default"]
    assert isinstance(one, CoreFactorSet) and not one.V["64"].any()
    # The largest that each rule draws, by torch itself.
    rules = {
        "U": nn.Linear(64, 1000, bias=False).weight.abs().max(),
        "core": nn.init.xavier_uniform_(torch.empty(rank, rank, rank)).abs().max(),
        "attn": torch.stack([nn.init.xavier_uniform_(torch.empty(rank, 4)) for _ in range(200)]).abs().max(),
        "mlp": torch.stack([nn.init.xavier_uniform_(torch.empty(rank, 8)) for _ in range(200)]).abs().max(),
        "text": torch.stack([nn.init.xavier_uniform_(torch.empty(rank, 1)) for _ in range(200)]).abs().max(),
    }
    found = {"U": one.U["64"], "core": one.core, "attn": one.P[:200], "mlp": one.P[200:400], "text": one.P[400:]}
    for name, largest in rules.items():
        assert float(found[name].detach().abs().max()) == pytest.approx(float(largest.detach()), rel=0.05), name
        assert found[name].mean().abs() < 0.1 * largest


def test_step_0_changes_nothing_and_v_has_a_gradient():
    torch.manual_seed(0)
    model, x = Toy(), inputs()
    before = model(x)
    factors = inject_mode_approx(model, ModeApproxConfig(rank=4, form="core"), TARGETS)
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    gradients = {name: p.grad.abs().max() for name, p in factors["default"].named_parameters()}
    assert all((value > 0) == name.startswith("V.") for name, value in gradients.items())


def test_saved_loaded_merged_and_switched(tmp_path):
    model = adapted_toy(**CORE)
    x = inputs(200)
    expected = model(x)
    save_adapter(model, tmp_path / "a")
    fresh = adapted_toy(update_seed=5, **CORE)
    load_adapter(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh(x), expected)
    beside = adapted_toy(update_seed=7)  # of form cp: sets of either form stand beside each other
    own = beside(x)
    load_adapter(beside, tmp_path / "a", "released")
    set_adapter(beside, "released")
    torch.testing.assert_close(beside(x), expected)
    set_adapter(beside, "default")
    assert torch.equal(beside(x), own)
    before = {name: p.clone() for name, p in model.named_parameters()}
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected)
    unmerge_adapter(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_set_of_the_other_form_is_refused(tmp_path):
    save_adapter(adapted_toy(**CORE), tmp_path)
    model = adapted_toy()
    before = model(inputs())
    with pytest.raises(AuroraError, match=r"mode_approx\.form is core there and cp here"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(inputs()), before)


def test_as_lora_it_is_exact_and_of_rank_r():
    model = adapted_toy(**CORE)
    for name in ("qkv", "query"):
        one = model.get_submodule(name)
        a, b = one.low_rank_updates()["weight"]
        assert len(a) == 4 == b.shape[1]
        torch.testing.assert_close(b @ a, one.delta_weight())
    tensors = dict(model.mode_approx["default"].named_parameters())
    config = model.mode_approx["default"].config
    for slot, (a, b) in ModeFactors.slot_updates(model.mode_approx.slots, config, tensors).items():
        torch.testing.assert_close(b @ a, model.mode_approx.delta_weight(slot))


def test_a_moving_average_follows_core_and_vectors():
    model = adapted_toy(**CORE)
    default, average = model.mode_approx.add_teacher()
    own, averaged = dict(default.named_parameters()), dict(average.named_parameters())
    assert list(own) == list(averaged) and all(torch.equal(own[name], averaged[name]) for name in own)


def test_what_needs_components_refuses_it(tmp_path):
    with pytest.raises(AuroraError, match=r"mode_approx.nested: needs mode_approx.form: cp"):
        ModeApproxConfig(form="core", nested=True)
    with pytest.raises(AuroraError, match=r"mode_approx.form.*did you mean 'core'"):
        ModeApproxConfig(form="cores")
    with pytest.raises(AuroraError, match=r"mode_approx.rank.*at most 512"):
        ModeApproxConfig(form="core", rank=1024)
    model = adapted_toy(**CORE)
    randomize(model, "default", 3)
    before = model(inputs())
    with pytest.raises(AuroraError, match="cannot be cut to a lower rank.*export this one to peft"):
        truncate_adapter(model, 2)
    with pytest.raises(AuroraError, match="no first components"), model.mode_approx.first(2):
        pass
    one = model.mode_approx["default"]
    part = (one.config, dict(one.named_parameters()))
    with pytest.raises(AuroraError, match="cannot be added"):
        ModeFactors.add_updates([part, part], [0.5, 0.5])
    assert torch.equal(model(inputs()), before)


# BLIP base's shapes.
L, D = 12, 768


def released_slots(decoder: bool) -> dict[str, tuple[int, int]]:
    """By hand: a layer of vision has q, k, v, projection and twice four blocks, one of a text tower twice q, k, v."""
    vision = [f"visual_encoder.blocks.{i}.{part}" for i in range(L) for part in range(12)]
    texts = ["text_encoder", "text_decoder"][: 1 + decoder]
    asked = [f"{one}.encoder.layer.{i}.{part}" for one in texts for i in range(L) for part in range(6)]
    return dict.fromkeys([*vision, *asked], (D, D))


@pytest.mark.parametrize(("rank", "count"), [(64, 411_136), (32, 125_696)])
def test_as_many_parameters_as_the_released_code_trains(rank, count):
    """2dR + R^3 + 18L R in U, V, core and vectors, and 4Ld in the affine gate."""
    config = ModeApproxConfig(rank=rank, form="core")
    shapes = ModeFactors.tensor_shapes(released_slots(decoder=False), config)
    found = sum(math.prod(shape) for shape in shapes.values())
    assert found == 2 * D * rank + rank**3 + 18 * L * rank
    assert found + 4 * L * D == count
    with_decoder = ModeFactors.tensor_shapes(released_slots(decoder=True), config)
    assert sum(math.prod(shape) for shape in with_decoder.values()) == found + 6 * L * rank
    assert asdict(config)["form"] == "core"
