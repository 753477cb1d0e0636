"""Running statistics: those of a frozen backbone stand still, those of trained modules are part of the adapter."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy import NormedToy, as_format_1, inputs, normed_toy, rewrite_adapter, train_steps

from lavis_aurora import (
    AuroraError,
    ModeApproxConfig,
    delete_adapter,
    disable_adapter,
    inject_mode_approx,
    load_adapter,
    merge_adapter,
    merged_state_dict,
    save_adapter,
    set_adapter,
)
from lavis_aurora.adapters.switching import bind_companions


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers() if "rows" not in name}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# A frozen backbone


def unchanged(model):
    return model


def wrapped(model):
    return nn.ModuleList([model])


@pytest.mark.parametrize("how", [unchanged, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("trains", [unchanged, wrapped, lambda model: model.tower, lambda model: model.tower["norm"]])
def test_norms_of_a_frozen_backbone_stand_still_whoever_calls_train(how, trains):
    torch.manual_seed(0)
    model = NormedToy()
    inject_mode_approx(model, ModeApproxConfig(rank=2))
    model = how(model)
    expected, before = copy.deepcopy(model).eval()(inputs()), statistics(model)
    for _ in range(2):
        assert torch.equal(model(inputs()), expected)
        assert not model.tower["norm"].training
        assert trains(model).train() is trains(model) or trains is wrapped
    model.teach(inputs())
    assert same(statistics(model), before) and model.training


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d(6, track_running_stats=True), nn.SyncBatchNorm(6)])
def test_every_normalisation_with_running_statistics_stands_still(norm):
    model = nn.ModuleDict({"query": nn.Linear(8, 6), "norm": norm})
    inject_mode_approx(model, ModeApproxConfig(rank=2))
    model.train()
    assert model["query"].training and not model["norm"].training
    before = statistics(model)
    model["norm"](model["query"](torch.randn(4, 5, 8)).transpose(1, 2))
    assert same(statistics(model), before)


def test_a_norm_that_is_trained_by_hand_trains():
    model = NormedToy()
    inject_mode_approx(model, ModeApproxConfig(rank=2))
    model.tower["norm"].requires_grad_(True)
    model.train()
    before = statistics(model.tower["norm"])
    model(inputs())
    assert not same(statistics(model.tower["norm"]), before)
    assert model.tower["norm"].training and not model.eval().tower["norm"].training


# Heads


def test_norms_of_heads_and_of_their_momentum_copies_train_with_them():
    model = normed_toy()
    tower, head, copied = (statistics(part) for part in (model.tower, model.head, model.head_m))
    train_steps(model, 0, 2)
    assert same(statistics(model.tower), tower)
    now, now_m = statistics(model.head), statistics(model.head_m)
    assert not any(torch.equal(now[name], value) for name, value in head.items())
    assert not any(torch.equal(now_m[name], value) for name, value in copied.items())
    model.eval()
    model.teach(inputs()), model(inputs())
    assert same(statistics(model.head), now) and same(statistics(model.head_m), now_m)


@pytest.mark.parametrize("name", ["default", "other"])
def test_an_adapter_holds_the_buffers_of_what_is_trained(tmp_path, name):
    tuned = normed_toy()
    train_steps(tuned, 0, 3)
    save_adapter(tuned, tmp_path)
    fresh = normed_toy()
    untouched = statistics(fresh.head)
    load_adapter(fresh, tmp_path, name)
    set_adapter(fresh, name)
    assert torch.equal(fresh.eval()(inputs()), tuned.eval()(inputs()))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["heads.head.1.num_batches_tracked"] == 6 and "heads.head.3.running_var" in tensors
    assert not any("tower" in key or "_m." in key for key in tensors)
    with disable_adapter(fresh):
        assert same(statistics(fresh.head), untouched)
        assert torch.equal(fresh(inputs()), backbone()(inputs()))
    assert same(statistics(fresh.head), statistics(tuned.head))


def backbone() -> NormedToy:
    """That of ``normed_toy``, with its head as it was."""
    plain = NormedToy().eval()
    own = normed_toy().state_dict()
    plain.load_state_dict({key: value for key, value in own.items() if "mode_approx" not in key})
    return plain


def test_adapters_with_statistics_of_their_own_switch_and_are_forgotten(tmp_path):
    model = normed_toy()
    train_steps(model, 0, 2)
    save_adapter(model, tmp_path)
    train_steps(model, 2, 4)
    trained = statistics(model.head)
    load_adapter(model, tmp_path, "before")
    assert same(statistics(model.head), trained)
    set_adapter(model, "before")
    assert not same(statistics(model.head), trained)
    set_adapter(model, "default")
    assert same(statistics(model.head), trained)
    delete_adapter(model, "before")
    assert not any("before" in key for key in model.state_dict())


def test_disabled_in_training_the_backbones_head_stands_still_and_goes_on_after():
    model = normed_toy()
    train_steps(model, 0, 1)
    with disable_adapter(model):
        before = statistics(model.head)
        expected = backbone()(inputs())
        assert torch.equal(model(inputs()), expected)
        model.train()
        model.teach(inputs())
        assert torch.equal(model(inputs()), expected) and same(statistics(model.head), before)
    before = statistics(model.head)
    model(inputs())
    assert not same(statistics(model.head), before)


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_keeps_the_mode_that_it_was_put_in(training):
    model = normed_toy().train(not training)
    model.head[1].train(training)
    with disable_adapter(model):
        assert not model.head[1].training
    assert [model.head[i].training for i in (1, 3)] == [training, not training]
    with disable_adapter(model):
        model.head[1].train(not training)
    assert [model.head[i].training for i in (1, 3)] == [not training] * 2


def test_a_norm_in_two_places_is_one():
    torch.manual_seed(0)
    model = NormedToy()
    model.twin = nn.Sequential(model.head[1], nn.BatchNorm1d(4))
    model.twin[1].running_mean = model.head[1].running_mean
    inject_mode_approx(model, ModeApproxConfig(rank=2))
    model.heads = [model.head.requires_grad_(True), model.twin.requires_grad_(True)]
    bind_companions(model, model.mode_approx, train_heads=True)
    names = model.mode_approx.companions["heads"].names
    assert "head.1.running_mean" in names and "twin.1.running_var" in names
    assert "twin.0.running_mean" not in names and "twin.1.running_mean" not in names
    base = model.head[1].running_mean.clone()
    model(inputs())
    with disable_adapter(model):
        assert model.twin[0] is model.head[1] and model.twin[1].running_mean is model.head[1].running_mean
        assert torch.equal(model.head[1].running_mean, base)
    assert model.twin[1].running_mean is model.head[1].running_mean
    assert not torch.equal(model.head[1].running_mean, base)


def test_buffers_that_no_state_dict_holds_are_nobodys(tmp_path):
    model = NormedToy()
    model.head[0].register_buffer("scratch", torch.zeros(2), persistent=False)
    inject_mode_approx(model, ModeApproxConfig(rank=2))
    model.heads = [model.head.requires_grad_(True)]
    bind_companions(model, model.mode_approx, train_heads=True)
    assert not any("scratch" in name for name in model.mode_approx.companions["heads"].names)


def test_heads_that_are_not_trained_stand_still():
    model = NormedToy()
    inject_mode_approx(model, ModeApproxConfig(rank=2))
    model.heads = [model.head]
    bind_companions(model, model.mode_approx, train_heads=False)
    before = statistics(model)
    model.train()(inputs())
    assert same(statistics(model), before)


def test_a_head_of_buffers_alone_is_refused():
    model = NormedToy()
    inject_mode_approx(model, ModeApproxConfig(rank=2))
    model.heads = [model.head[3]]
    with pytest.raises(AuroraError, match="^head.3 has buffers and no parameter to train; name the module around it"):
        bind_companions(model, model.mode_approx, train_heads=True)


def test_the_merged_state_and_a_state_dict_hold_them():
    model = normed_toy()
    train_steps(model, 0, 3)
    plain = NormedToy().eval()
    plain.load_state_dict(merged_state_dict(model))
    expected = model.eval()(inputs())
    torch.testing.assert_close(plain(inputs()), expected)
    merge_adapter(model)
    torch.testing.assert_close(model(inputs()), expected)
    other = normed_toy(seed=1).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(inputs()), expected)


# Files


@pytest.fixture
def folder(tmp_path):
    model = normed_toy()
    train_steps(model, 0, 3)
    save_adapter(model, tmp_path)
    return tmp_path


def rewrite(folder, **changes) -> None:
    """Other tensors; None for none."""
    tensors = {**load_file(folder / "adapter_model.safetensors"), **changes}
    rewrite_adapter(folder, {key: value for key, value in tensors.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads.head.1.num_batches_tracked": torch.tensor(6.0)}, "is of type float32 there and int64 here"),
        ({"heads.head.1.num_batches_tracked": torch.tensor(6)[None]}, r"is \(1,\) there and \(\) here"),
        ({"heads.head.1.running_var": torch.ones(4).int()}, "is of type int32 there and float32 here"),
        ({"heads.head.1.running_var": torch.full((4,), torch.inf)}, "heads.head.1.running_var is not finite there"),
        ({"heads.head.1.weight": torch.ones(4).long()}, "is of type int64 there and float32 here"),
        ({"factors.P": torch.ones(1, 2).long()}, "factors.P is of type int64, not of floating point"),
        ({"heads.tower.norm.running_var": torch.ones(6)}, "heads.tower.norm.running_var has no place here"),
        ({"heads.head.1.weight": None}, "heads.head.1.weight is missing there"),
    ],
)
def test_buffers_of_another_kind_are_refused_and_nothing_is_changed(folder, change, words):
    rewrite(folder, **change)
    model = normed_toy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AuroraError, match=words):
        load_adapter(model, folder)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["default", "other"])
def test_an_adapter_of_older_versions_gets_the_backbones_buffers_and_the_log_says_so(folder, caplog, name):
    keys = [key for key in load_file(folder / "adapter_model.safetensors") if "running" in key or "batches" in key]
    rewrite(folder, **dict.fromkeys(keys))
    as_format_1(folder)
    model = normed_toy()
    backbone = statistics(model.head)
    train_steps(model, 0, 1)
    load_adapter(model, folder, name)
    set_adapter(model, name)
    assert same(statistics(model.head), backbone)
    message = caplog.text
    assert f"{folder} holds no head.1.running_mean" in message and "results may differ" in message
