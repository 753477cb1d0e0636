"""The first components alone: what they compute, what they cost, and an adapter that is cut to them."""

from __future__ import annotations

import logging
from dataclasses import asdict

import pytest
import torch
from tiny import activate, tiny_model
from torch import nn
from toy import adapted_toy, inputs

from lavis_aurora import (
    AuroraError,
    ModeApproxConfig,
    inject_mode_approx,
    list_adapters,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    truncate_adapter,
    unmerge_adapter,
)
from lavis_aurora.adapters.config import read_adapter, read_adapter_config
from lavis_aurora.mode_approx.factors import FactorSet

NESTED = {"nested": True, "nested_ranks": [1, 2, 4]}


def first_components(model: nn.Module, x: torch.Tensor, rank: int) -> torch.Tensor:
    """The toy with explicit sums over the first components, and s of the whole rank."""
    one, names = model.mode_approx["default"], list(model.mode_approx.slots)
    s_rank, scale = one.config.rank, one.config.scale

    def updated(weight: torch.Tensor, slots: list[str]) -> torch.Tensor:
        parts = []
        for slot in slots:
            k, (d_in, d_out) = names.index(slot), model.mode_approx.slots[slot]
            delta = torch.zeros(d_out, d_in)
            for r in range(rank):
                u, v = one.U[str(d_in)][:, r], one.V[str(d_out)][:, r]
                delta += one.coefficients[k, r] * one.P[k, r] * torch.outer(v, u)
            parts.append(delta * scale / (0.1 * (d_in * s_rank) ** 0.5))
        return weight + torch.cat(parts)

    for layer in (model.qkv, model.query, model.key):
        weight = updated(layer.adapted_weight, [names[i] for i in layer.slots])
        x = x @ weight.t() + layer.bias
        x = torch.tanh(x)
    return model.head(x)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("count", [2, 200], ids=["beside the layer", "folded"])
def test_the_first_components_are_a_sum_of_so_many_terms(rank, count):
    model = adapted_toy(rank=6, **NESTED)
    x = inputs(count)
    with model.mode_approx.first(rank):
        found = model(x)
        weight = model.qkv.weight
    torch.testing.assert_close(found, first_components(model, x, rank))
    assert model.mode_approx["default"].components is None
    assert torch.equal(weight, model.qkv.weight) == (rank == 6)


def test_gradients_are_those_of_a_model_of_that_rank():
    model = adapted_toy(rank=6, **NESTED)
    other = adapted_toy(rank=6, **NESTED)
    truncate_adapter(other, 2)
    x = inputs(200)
    with model.mode_approx.first(2):
        model(x).square().mean().backward()
    other(x).square().mean().backward()
    for one, cut in zip(model.mode_approx["default"].parameters(), other.mode_approx["default"].parameters()):
        assert one.grad.shape == one.shape and not one.grad[:, 2:].any()
        torch.testing.assert_close(one.grad[:, :2], cut.grad)


def test_factors_are_cut_before_anything_is_computed_with_them(monkeypatch):
    """So that fewer components cost less."""
    model, widths = adapted_toy(rank=6, **NESTED), set()
    parts = FactorSet.parts
    monkeypatch.setattr(FactorSet, "parts", lambda *a, **k: [widths.add(x.shape[1]) or x for x in parts(*a, **k)])
    with model.mode_approx.first(2):
        model(inputs())
    assert widths == {2}


def test_while_all_are_in_use_nothing_is_cut():
    one = adapted_toy(rank=4).mode_approx["default"]
    u, v, _ = one.parts([0], 8, 8)
    assert u is one.U["8"] and v is one.V["8"]


@pytest.mark.parametrize("targets", [None, "all_linear"])
def test_the_teacher_has_the_same_rank_and_recomputed_layers_too(targets):
    """Of a model whose teacher moves: gradient checkpointing changes nothing, and the average is cut too."""
    method = {"mode_approx": {"rank": 8, "nested": True, "nested_ranks": [2], "targets": targets}}
    found = []
    for more in ({}, {"vit_grad_ckpt": True, "vit_ckpt_layer": 3}):
        model = activate(tiny_model(**method, queue_size=8, alpha=0.4, **more), std=0.1).train()
        image = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        texts = ["a red circle", "a ring", "a bar", "a heart"]
        place = {"epoch": 1, "iters": 3, "num_iters_per_epoch": 10}
        batch = {"image": image, "text_input": texts, "image_id": torch.arange(4), **place}
        with model.mode_approx.first(2):
            teacher = model.mode_approx["momentum"].parts([0], *next(iter(model.mode_approx.slots.values())))
            loss = model(batch)["loss"]
            loss.backward()
        assert {x.shape[1] for x in teacher} == {2}
        found.append([loss.detach(), *(p.grad for p in model.mode_approx["default"].parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Truncation


def test_a_truncated_adapter_has_the_factors_and_the_scale_that_it_had(tmp_path):
    model = adapted_toy(rank=6, **NESTED)
    x = inputs()
    with model.mode_approx.first(2):
        expected = model(x)
    before = [p.detach().clone() for p in model.mode_approx["default"].parameters()]
    s = model.mode_approx["default"].scale(8)
    truncate_adapter(model, 2)
    one = model.mode_approx["default"]
    assert all(torch.equal(p, old[:, :2]) for p, old in zip(one.parameters(), before))
    assert one.scale(8) == pytest.approx(s, rel=1e-15) and one.config.rank == 2
    torch.testing.assert_close(model(x), expected)
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected)
    unmerge_adapter(model)
    save_adapter(model, tmp_path)
    fresh = adapted_toy(update_seed=5, **asdict(one.config))
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), expected)
    # Trained further, the rest stays what it is.
    fresh(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in fresh.mode_approx["default"].parameters())


def test_one_folder_serves_several_ranks(tmp_path):
    model = adapted_toy(rank=6, **NESTED)
    save_adapter(model, tmp_path, metrics={"test": {"agg_metrics": 50.0}})
    x, tensors = inputs(), read_adapter(tmp_path)[1]
    for rank in (1, 4, 6):
        load_adapter(model, tmp_path, f"rank{rank}", rank=rank)
    for rank in (1, 4, 6):
        with model.mode_approx.first(rank):
            expected = model(x)
        set_adapter(model, f"rank{rank}")
        torch.testing.assert_close(model(x), expected)
        for key, parameter in model.mode_approx[f"rank{rank}"].named_parameters():
            assert torch.equal(parameter, tensors[f"factors.{key}"][:, :rank])
        save_adapter(model, tmp_path / str(rank))
        assert read_adapter_config(tmp_path / str(rank)).settings.rank == rank
        set_adapter(model, "default")
    assert list_adapters(model) == ["default", "rank1", "rank4", "rank6"]


def test_the_teacher_is_cut_with_the_adapter():
    model = activate(tiny_model(mode_approx={"rank": 8, "nested": True}, queue_size=8), std=0.1)
    truncate_adapter(model, 4)
    assert {p.shape[1] for p in model.mode_approx["momentum"].parameters()} == {4}
    model.train()._momentum_update()


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_the_adapter_does_not_have_is_refused(tmp_path, rank):
    model = adapted_toy(rank=6, **NESTED)
    with pytest.raises(AuroraError, match=f"rank: {rank} cannot be used; it must be 1 to 6"):
        truncate_adapter(model, rank)
    save_adapter(model, tmp_path)
    with pytest.raises(AuroraError, match=f"{tmp_path.name}: rank: {rank} cannot be used"):
        load_adapter(model, tmp_path, "other", rank=rank)
    assert model.mode_approx["default"].config.rank == 6 and list_adapters(model) == ["default"]


def test_a_merged_adapter_is_not_cut():
    model = adapted_toy(rank=6, **NESTED)
    merge_adapter(model)
    with pytest.raises(AuroraError, match="unmerge_adapter"):
        truncate_adapter(model, 2)


def test_components_without_an_order_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        truncate_adapter(adapted_toy(rank=6, **NESTED), 2)
        truncate_adapter(adapted_toy(rank=6), 6)
    assert not caplog.records
    truncate_adapter(adapted_toy(rank=6), 2)
    assert "not trained with mode_approx.nested" in caplog.text and "first 2 of 6" in caplog.text


def test_other_kinds_cannot_be_cut():
    model = tiny_model(tuning="uniadapter", uniadapter={"rank": 4}, context={"form": "none"})
    with pytest.raises(AuroraError, match="uniadapter cannot be cut to a lower rank; train one of rank 2"):
        truncate_adapter(model, 2)


# Settings


@pytest.mark.parametrize("ranks", [[4, 2], [0, 4], [2, 2]])
def test_ranks_that_do_not_rise_are_refused(ranks):
    with pytest.raises(AuroraError, match="nested_ranks: .* rising numbers of 1 or more"):
        ModeApproxConfig(nested_ranks=ranks)


def test_a_rank_below_all_of_them_is_refused():
    with pytest.raises(AuroraError, match=r"nested_ranks: none of \[4, 8, 16, 32\] is below mode_approx.rank, 4"):
        ModeApproxConfig(rank=4, nested=True)
    assert ModeApproxConfig(rank=16, nested=True).smaller_ranks == [4, 8]


def test_training_nested_or_not_is_no_difference_between_adapters(tmp_path):
    """How it was trained does not change what it computes."""
    save_adapter(adapted_toy(rank=6, **NESTED), tmp_path)
    model = adapted_toy(rank=6, update_seed=3)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(inputs()), adapted_toy(rank=6)(inputs()))
    assert not model.mode_approx["default"].config.nested


def test_a_projection_inside_attention_uses_the_first_components_too():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    inject_mode_approx(model, ModeApproxConfig(rank=4, **NESTED), ["attn"])
    for parameter in model.mode_approx["default"].parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 1, 8)
    with model.mode_approx.first(1):
        found = model["attn"](x, x, x)[0]
    truncate_adapter(model, 1)
    torch.testing.assert_close(model["attn"](x, x, x)[0], found)


def test_what_was_not_trained_nested_is_named_where_a_nested_adapter_takes_it(tmp_path, caplog):
    save_adapter(adapted_toy(rank=6), tmp_path / "plain")
    save_adapter(adapted_toy(rank=6, **NESTED), tmp_path / "nested")
    model = adapted_toy(rank=6, **NESTED)
    with caplog.at_level(logging.WARNING):
        load_adapter(model, tmp_path / "nested")
        load_adapter(model, tmp_path / "plain", "beside")
        assert not caplog.records
        load_adapter(model, tmp_path / "plain")
    assert "plain was not trained with mode_approx.nested, as 'default' is here" in caplog.text
