"""Law 3: merged = unmerged forward, and unmerging restores every bit."""

import copy

import pytest
import torch
from torch import nn
from toy import Toy, adapted_toy, inputs

from lavis_aurora import (
    AuroraError,
    ModeApproxConfig,
    disable_adapter,
    inject_mode_approx,
    merge_adapter,
    merged_state_dict,
    set_adapter,
    unmerge_adapter,
)
from lavis_aurora.adapters.merging import merged_where_exact
from lavis_aurora.common.errors import Diverged


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("mode_approx")}


def explicit_update(model: nn.Module, slot: str) -> torch.Tensor:
    """The CP sum of one slot, term by term (eq. 2-4), in nn.Linear's layout."""
    factors = model.mode_approx.sets["default"]
    d_in, d_out = model.mode_approx.slots[slot]
    k = list(model.mode_approx.slots).index(slot)
    u, v = factors.U[str(d_in)], factors.V[str(d_out)]
    total = torch.zeros(d_out, d_in)
    for r in range(u.shape[1]):
        total += factors.scale(d_in) * factors.coefficients[k, r] * factors.P[k, r] * torch.outer(v[:, r], u[:, r])
    return total.detach()


def test_merged_weights_are_backbone_plus_explicit_update():
    model = adapted_toy()
    before = weights(model)
    merge_adapter(model)
    rows = [explicit_update(model, f"qkv.{part}") for part in ("query", "key", "value")]
    torch.testing.assert_close(model.qkv.weight, before["qkv.weight"] + torch.cat(rows))
    torch.testing.assert_close(model.key.weight, before["key.weight"] + explicit_update(model, "key"))
    assert torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("count", [1, 200])
def test_merged_forward_is_the_unmerged_one_and_adds_the_update_once(count):
    model = adapted_toy()
    plain = Toy()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = inputs(count)
    expected = model(x)
    assert (expected - plain(x)).abs().max() > 0.05
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected)
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unmerging_restores_every_bit(dtype):
    model = adapted_toy().to(dtype)
    before = weights(model)
    for _ in range(3):
        merge_adapter(model)
        assert not torch.equal(model.query.weight, before["query.weight"])
        assert model.query.weight.dtype == dtype
        unmerge_adapter(model)
        unmerge_adapter(model)
    after = weights(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.mode_approx.merged is None


def test_what_is_not_finite_is_refused_and_nothing_changes():
    model = adapted_toy()
    with torch.no_grad():
        model.mode_approx.sets["default"].P[-1, 0] = float("inf")
    before = weights(model)
    with pytest.raises(Diverged, match="key.weight: not finite once the adapter 'default' is merged; .* lower"):
        merge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert model.mode_approx.merged is None
    with pytest.raises(AuroraError, match="not finite"):
        merged_state_dict(model)


def test_a_weight_that_a_layer_without_the_update_has_too_is_not_merged():
    """An output projection is often the embedding: merged, the embedding would be another."""
    model = nn.ModuleDict({"words": nn.Embedding(7, 8), "query": nn.Linear(8, 8), "output": nn.Linear(8, 7)})
    model["output"].weight = model["words"].weight
    inject_mode_approx(model, ModeApproxConfig(rank=2), ["query", "output"])
    before = weights(model)
    for act in (merge_adapter, merged_state_dict):
        with pytest.raises(AuroraError, match=r"output\.weight has an update and is words\.weight, too"):
            act(model)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert model.mode_approx.merged is None


def test_merged_for_a_block_and_as_before_behind_it():
    model = adapted_toy()
    before, x = weights(model), inputs(1)
    expected = model(x)
    with pytest.raises(KeyError), merged_where_exact(model):
        assert model.mode_approx.merged == "default"
        torch.testing.assert_close(model(x), expected)
        raise KeyError
    assert model.mode_approx.merged is None
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    merge_adapter(model)
    with merged_where_exact(model):
        pass
    assert model.mode_approx.merged == "default"
    with pytest.raises(AuroraError, match=r"'default' is merged .* unmerge_adapter"), model.mode_approx.first(2):
        pass  # all of its components are in the weights


def test_merging_that_is_interrupted_leaves_no_half(monkeypatch):
    model = adapted_toy()
    before, original = weights(model), type(model.query).merge

    def interrupted(layer, values):
        if layer is model.key:
            raise KeyboardInterrupt
        original(layer, values)

    monkeypatch.setattr(type(model.query), "merge", interrupted)
    with pytest.raises(KeyboardInterrupt), merged_where_exact(model):
        pass
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert not any(layer.originals for _, layer in model.mode_approx.updated_layers(model))


def test_what_merging_would_change_stays_beside_the_weights():
    rounded, plain, disabled = adapted_toy().half(), Toy(), adapted_toy()
    tied = nn.ModuleDict({"words": nn.Embedding(7, 8), "output": nn.Linear(8, 7)})
    tied["output"].weight = tied["words"].weight
    inject_mode_approx(tied, ModeApproxConfig(rank=2), ["output"])
    for model in (rounded, plain, tied):
        before = weights(model)
        with merged_where_exact(model):
            assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    with disable_adapter(disabled), merged_where_exact(disabled):
        assert disabled.mode_approx.merged is None


def test_training_while_merged_is_refused():
    model = adapted_toy().train()
    merge_adapter(model)
    with pytest.raises(AuroraError, match="is merged into the weights and cannot be trained; call unmerge_adapter"):
        model(inputs())
    with torch.no_grad():
        model(inputs())
    unmerge_adapter(model)
    model(inputs()).sum().backward()
    assert model.mode_approx.sets["default"].P.grad.abs().sum() > 0


def test_switching_while_merged_is_refused():
    model = adapted_toy()
    model.mode_approx.add_set("other", model.mode_approx.sets["default"].config)
    merge_adapter(model)
    set_adapter(model, "default")
    for switch in (lambda: set_adapter(model, "other"), lambda: disable_adapter(model).__enter__()):
        with pytest.raises(AuroraError, match="'default' is merged into the weights; unmerge_adapter"):
            switch()
    unmerge_adapter(model)
    set_adapter(model, "other")


def test_state_dicts_hold_the_backbone_while_merged_and_cannot_be_loaded():
    model = adapted_toy()
    before = copy.deepcopy(model.state_dict())
    merge_adapter(model)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    with pytest.raises(AuroraError, match="an adapter is merged; unmerge_adapter"):
        model.load_state_dict(before)
    unmerge_adapter(model)
    model.load_state_dict(before)


def test_a_merged_model_may_be_copied_and_cast():
    model = adapted_toy()
    x = inputs()
    expected, before = model(x), weights(model)
    merge_adapter(model)
    other = copy.deepcopy(model).double()
    torch.testing.assert_close(other(x.double()), expected.double())
    unmerge_adapter(other)
    assert torch.equal(other.query.adapted_weight, before["query.weight"].double())
    assert model.mode_approx.merged == "default"


def test_merged_state_dict_loads_strictly_into_the_plain_model_and_changes_nothing():
    model = adapted_toy()
    x, before = inputs(), weights(model)
    expected = model(x)
    state = merged_state_dict(model)
    plain = Toy()
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    merge_adapter(model)
    again = merged_state_dict(model)
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_without_an_active_adapter_there_is_nothing_to_merge():
    model = adapted_toy()
    with disable_adapter(model), pytest.raises(AuroraError, match="no adapter is active"):
        merge_adapter(model)
    with pytest.raises(AuroraError, match="Toy has no adapter: build it with model.tuning: aurora"):
        merge_adapter(Toy())
