"""Activations that are computed again: the same losses and gradients, and less kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tiny import activate
from tiny_retrieval import kept_bytes, model_and_batch, saved_for_backward
from tiny_vqa import vqa_batch, vqa_model
from torch import Tensor, nn

from lavis_aurora.models import parts
from lavis_aurora.models.parts import recomputed_activations

ALL = slice(0, 4)


@pytest.fixture(autouse=True)
def nothing_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_WIDE", 1)


@contextmanager
def everything_kept(_: nn.Module) -> Iterator[None]:
    """torch's own way."""
    yield


def step(tuning: str, dtype: torch.dtype = torch.float32, **overrides) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and bytes kept for the backward pass."""
    if tuning == "vqa":
        model, samples = activate(vqa_model(**overrides)).train(), vqa_batch()
        torch.manual_seed(0)
    else:
        model, samples = model_and_batch(tuning, ALL, **overrides)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), saved_for_backward() as tensors:
        loss = model(samples)["loss"]
    kept = kept_bytes(tensors, model)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


FORMS: dict[str, dict] = {
    "aurora": {"mode_approx": {"targets": "all_linear"}},
    "merged": {"mode_approx": {"targets": "all_linear"}, "token_merging": 1},
    "checkpointed": {"vit_grad_ckpt": True, "vit_ckpt_layer": 2, "mode_approx": {"targets": "all_linear"}},
}


@pytest.mark.parametrize(
    ("form", "dtype", "share"),
    [
        ("aurora", torch.float32, 0.85),
        *((form, torch.float32, 1) for form in ("merged", "checkpointed", "full", "lora", "uniadapter", "vqa")),
        *((form, torch.bfloat16, 1) for form in ("aurora", "full")),
    ],
)
def test_gradients_are_the_same_bits_and_less_is_kept(
    form: str, dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning, overrides = ("aurora", FORMS[form]) if form in FORMS else (form, {})
    loss, grads, less = step(tuning, dtype, **overrides)
    monkeypatch.setattr(parts, "recomputed_activations", everything_kept)
    plain, expected, kept = step(tuning, dtype, **overrides)
    assert torch.equal(loss, plain) and grads.keys() == expected.keys() and grads
    assert [name for name, grad in grads.items() if not torch.equal(grad, expected[name])] == []
    assert less < share * kept, less / kept


class Layers(nn.Module):
    """Products between what is computed again."""

    def __init__(self, **norm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second = nn.LayerNorm(8, **norm), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.change(F.gelu(self.first(self.norm(x)), approximate="tanh")))

    def change(self, x: Tensor) -> Tensor:
        return x


class Clamped(Layers):
    """In place, which the graph is not told."""

    def change(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.clamp_(min=0)


class Rounded(Layers):
    """Through a lower precision."""

    def change(self, x: Tensor) -> Tensor:
        return x.bfloat16().float()


class Tied(Layers):
    """One weight of two normalisations."""

    def __init__(self) -> None:
        super().__init__(eps=0.5)
        self.other = nn.LayerNorm(8)
        self.other.weight, self.other.bias = self.norm.weight, self.norm.bias


class Stacked(Layers):
    """A normalisation of what is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.LayerNorm(32)

    def change(self, x: Tensor) -> Tensor:
        return self.last(x)


@pytest.mark.parametrize(
    ("layers", "norm"),
    [
        (Layers, {"eps": 0.3}),
        (Layers, {"elementwise_affine": False}),
        (Clamped, {}),
        (Rounded, {}),
        (Tied, {}),
        (Stacked, {}),
    ],
)
def test_of_any_layers(layers: type[Layers], norm: dict) -> None:
    grads, kept = [], []
    for context in (everything_kept, recomputed_activations):
        model, x = layers(**norm), torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
        with saved_for_backward() as tensors, context(model):
            y = model(x * 2)
        kept.append(kept_bytes(tensors, model))
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(*pair) for pair in zip(*grads)) and kept[1] <= kept[0]


def test_narrow_results_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 rows those of the normalisation have 8 features and 96 bytes, those of GELU 32 and 384."""

    def kept(context, wide: int) -> int:
        monkeypatch.setattr(parts, "_WIDE", wide)
        model, x = Layers(), torch.ones(3, 8, requires_grad=True)
        with saved_for_backward() as tensors, context(model):
            model(x * 2)
        return kept_bytes(tensors, model)

    every = kept(everything_kept, 1)
    assert [every - kept(recomputed_activations, wide) for wide in (8, 9, 32, 33)] == [480, 384, 384, 0]


def test_what_is_changed_in_place_is_still_refused() -> None:
    model = Layers()
    x = torch.ones(3, 8, requires_grad=True) * 2
    with recomputed_activations(model):
        y = model(x)
    x.zero_()
    with pytest.raises(RuntimeError, match=r"shape \(3, 8\) that the backward pass needs was changed in place"):
        y.sum().backward()


class Held:
    """Something that a node of the graph holds."""


def test_nothing_outlives_a_step() -> None:
    """An operation that saves its own result would hold itself."""
    gc.disable()
    try:
        x = torch.ones(3, requires_grad=True)
        with recomputed_activations(nn.Identity()):
            y = x.exp()
        node = y.grad_fn
        node.metadata["held"] = held = Held()
        alive = weakref.ref(held)
        del y, node, held
        assert alive() is None
    finally:
        gc.enable()
