"""Several adapters on one backbone."""

import timeit

import pytest
import torch
from torch import nn
from toy import adapted_toy, inputs, randomize

from lavis_aurora import AuroraError, ModeApproxConfig, delete_adapter, disable_adapter, list_adapters, set_adapter
from lavis_aurora.adapters.companions import BASE
from lavis_aurora.adapters.switching import bind_companions


def two_adapters():
    model = adapted_toy(rank=4)
    model.mode_approx.add_set("wide", ModeApproxConfig(rank=9))
    randomize(model, "wide", seed=7)
    return model


def with_heads():
    """A toy whose head is trained with ``default``; ``other`` has one of its own, ``bare`` has none."""
    model = adapted_toy()
    model.heads = [model.head]
    model.head.requires_grad_(True)
    bind_companions(model, model.mode_approx, train_heads=True)
    with torch.no_grad():
        model.head.weight.mul_(2)
    for name in ("other", "bare"):
        model.mode_approx.add_set(name, ModeApproxConfig(rank=2))
        randomize(model, name, seed=5)
    values = {"head.weight": torch.full((3, 6), 0.5), "head.bias": torch.zeros(3)}
    model.mode_approx.companions["heads"].add("other", values)
    return model


def test_adapters_of_different_ranks_stand_side_by_side():
    model = two_adapters()
    x = inputs()
    default = model(x)
    set_adapter(model, "wide")
    wide = model(x)
    assert (wide - default).abs().max() > 0.05
    assert model.mode_approx.sets["wide"].P.shape[1] == 9
    set_adapter(model, "default")
    assert torch.equal(model(x), default)
    assert list_adapters(model) == ["default", "wide"]


def test_disabled_is_the_backbone_and_ends_with_the_block():
    model = two_adapters()
    set_adapter(model, "wide")
    x = inputs()
    wide = model(x)
    plain = adapted_toy(update_seed=3)
    with torch.no_grad():
        plain.mode_approx.sets["default"].P.zero_()
    with pytest.raises(RuntimeError), disable_adapter(model):
        torch.testing.assert_close(model(x), plain(x))
        raise RuntimeError
    assert torch.equal(model(x), wide)


def test_while_disabled_none_is_chosen_or_forgotten():
    """At the end of the block the one before is active again: it must be there, and the choice would be gone."""
    model = with_heads()
    set_adapter(model, "other")
    with disable_adapter(model):
        for act, name in ((delete_adapter, "other"), (set_adapter, "default")):
            with pytest.raises(AuroraError, match="no adapter is active: leave disable_adapter first"):
                act(model, name)
    assert model.mode_approx.active == "other" and "other" in list_adapters(model)


def test_heads_switch_with_the_adapter_and_nothing_is_copied():
    model = with_heads()
    trained, base = model.head.weight, model.head.weight.detach() / 2
    set_adapter(model, "other")
    assert torch.equal(model.head.weight, torch.full((3, 6), 0.5)) and not model.head.weight.requires_grad
    set_adapter(model, "bare")
    assert torch.equal(model.head.weight, base)
    with disable_adapter(model):
        assert torch.equal(model.head.weight, base)
    set_adapter(model, "default")
    assert model.head.weight is trained and trained.requires_grad
    with disable_adapter(model):
        assert torch.equal(model.head.weight, base)
    assert model.head.weight is trained


def test_tied_heads_switch_in_every_place():
    model = adapted_toy()
    model.twin = nn.Linear(6, 3)
    model.twin.weight = model.head.weight  # as the embeddings and the language model's head
    model.heads = [model.head, model.twin]
    for head in model.heads:
        head.requires_grad_(True)
    bind_companions(model, model.mode_approx, train_heads=True)
    assert model.mode_approx.companions["heads"].names == ["head.weight", "head.bias", "twin.bias"]
    base = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.mul_(2)
    with disable_adapter(model):
        assert model.twin.weight is model.head.weight
        assert torch.equal(model.twin.weight, base)
    assert model.twin.weight is model.head.weight
    assert torch.equal(model.twin.weight, 2 * base)


def test_an_adapted_weight_is_no_head():
    model = adapted_toy()
    model.heads = [model.head, model.key]
    with pytest.raises(AuroraError, match=r"^key.weight has an update by mode_approx and cannot be trained itself"):
        bind_companions(model, model.mode_approx, train_heads=True)


def test_the_backbones_heads_follow_its_weights():
    model = with_heads()
    with torch.no_grad():
        model.head.weight.fill_(3)
    model.mode_approx.keep_base_heads()
    set_adapter(model, "bare")
    assert (model.head.weight == 3).all()


def test_state_dicts_hold_each_head_once_and_load_back():
    model = with_heads()
    state = model.state_dict()
    assert sum(key.endswith("head.weight") for key in state) == 1
    inactive = [key for key in state if ".companions.heads." in key]
    assert {key.split(".inactive.")[1].split(".")[0] for key in inactive} == {BASE, "other"}
    other = with_heads()
    with torch.no_grad():
        other.head.weight.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.head.weight, model.head.weight)


def test_delete():
    model = with_heads()
    set_adapter(model, "other")
    with pytest.raises(AuroraError, match="'other' is active; set_adapter another one first"):
        delete_adapter(model, "other")
    set_adapter(model, "default")
    delete_adapter(model, "other")
    assert list_adapters(model) == ["default", "bare"]
    assert not [key for key in model.state_dict() if "other" in key]
    with pytest.raises(AuroraError, match="no adapter 'other'"):
        set_adapter(model, "other")
    with pytest.raises(AuroraError, match="'default' belongs to the model and stays"):
        delete_adapter(model, "default")


def test_names():
    model = two_adapters()
    with pytest.raises(AuroraError, match="no adapter 'wied'; did you mean 'wide'"):
        set_adapter(model, "wied")
    for name in ("a.b", "", "keys", "a b", "base"):
        with pytest.raises(AuroraError, match="an adapter cannot be called"):
            model.mode_approx.add_set(name, ModeApproxConfig())
    with pytest.raises(AuroraError, match="there is an adapter 'wide' already"):
        model.mode_approx.add_set("wide", ModeApproxConfig())


def test_a_set_of_the_training_is_no_adapter():
    model = adapted_toy()
    model.mode_approx.add_set("momentum", ModeApproxConfig(rank=4))
    assert list_adapters(model) == ["default"]
    for act in (set_adapter, delete_adapter):
        with pytest.raises(AuroraError, match="no adapter 'momentum'"):
            act(model, "momentum")


def test_switching_takes_less_than_a_forward():
    """References are exchanged, no tensor is copied: well below a millisecond on an idle machine."""
    model = with_heads()

    def switch_round_trip():
        set_adapter(model, "other")
        set_adapter(model, "default")

    assert min(timeit.repeat(switch_round_trip, number=1, repeat=50)) / 2 < 1e-3
