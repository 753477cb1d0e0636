"""Models of transformers and OpenCLIP: built small, adapted, trained a step, saved, loaded, merged and exported.

The laws of ``tests/models/test_lavis_models.py``. Nothing here needs LAVIS, so that any transformers can be tested.
"""

from __future__ import annotations

import copy
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from outside_models import MODELS, build, output
from safetensors.torch import load_file
from torch import nn

from lavis_aurora import (
    AuroraError,
    ModeApproxConfig,
    disable_adapter,
    inject_mode_approx,
    load_adapter,
    merge_adapter,
    merged_state_dict,
    save_adapter,
    trainable_parameters_summary,
    unmerge_adapter,
)
from lavis_aurora.adapters.export import export_lora
from lavis_aurora.mode_approx.inject import find_targets
from lavis_aurora.mode_approx.presets import OTHERS

every_model = pytest.mark.parametrize("name", MODELS)
every_word = pytest.mark.parametrize("word", ["attention", "all_linear"])
# The layers of attention are among all linear ones; alone where nn.MultiheadAttention computes otherwise with them.
ATTENTION = [name for name in MODELS if name.startswith("open_clip")]
every_model_adapted = pytest.mark.parametrize(
    ("name", "word"), [*((name, "all_linear") for name in MODELS), *((name, "attention") for name in ATTENTION)]
)
# What stands around the layers of the towers.
AROUND = (
    r"(text_model\.|bert\.)?pooler\.dense|(text|visual)_projection|(text|vision)_proj|itm_head|classifier"
    r"|text_decoder\.cls\..*|text_model\.head"
)


@cache
def plain(name: str) -> nn.Module:
    """The library's model; tests leave it as it is. Frozen, since that alone changes the last digit in torch."""
    return build(name).requires_grad_(False)


def adapted(name: str, word: str = "attention", random: bool = False) -> nn.Module:
    """A copy with an adapter, whose factors are ``random`` or as they start."""
    torch.manual_seed(3)
    model = copy.deepcopy(plain(name)).requires_grad_(True)
    factors = inject_mode_approx(model, ModeApproxConfig(rank=4, targets=f"{name.partition('/')[0]}/{word}"))
    if random:
        for parameter in factors.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def values(name: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return output(name, model)


def slope(name: str, model: nn.Module, seed: int = 0) -> float:
    """The gradient of a loss that has no symmetry; the loss."""
    out = output(name, model, seed)
    loss = (out * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).sin().mean()
    loss.backward()
    return loss.item()


def test_every_preset_is_tried_here():
    assert {name.partition("/")[0] for name in MODELS} == set(OTHERS)


@every_word
@every_model
def test_the_preset_of_a_model_names_what_the_word_alone_names(name, word):
    model, preset = plain(name), name.partition("/")[0]
    assert find_targets(model, [f"{preset}/{word}"]) == find_targets(model, [word])
    assert find_targets(model, [preset]) == find_targets(model, ["attention"])


@every_model
def test_all_linear_is_every_linear_layer_of_the_towers(name):
    model = plain(name)
    layers = [key for key, module in model.named_modules() if isinstance(module, (nn.Linear, nn.MultiheadAttention))]
    named = find_targets(model, [f"{name.partition('/')[0]}/all_linear"])
    assert named == [key for key in layers if not re.fullmatch(AROUND, key)]


@every_model_adapted
def test_step_0_is_the_plain_model(name, word):
    torch.testing.assert_close(values(name, adapted(name, word)), values(name, plain(name)), rtol=1e-5, atol=1e-6)


@every_model_adapted
def test_every_slot_takes_part(name, word):
    """A layer whose weight is read past the update would have no gradient in its row."""
    model = adapted(name, word, random=True)
    slope(name, model)
    factors = model.mode_approx
    assert not [slot for slot, row in zip(factors.slots, factors.sets["default"].P.grad) if row.abs().max() == 0]


@every_model_adapted
def test_a_step_changes_the_adapter_alone(name, word):
    model = adapted(name, word).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in (7, 8):
        optimizer.zero_grad()
        assert torch.isfinite(torch.tensor(slope(name, model, seed)))
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith("mode_approx.sets.default.")}
    assert "backbone" not in trainable_parameters_summary(model)
    assert not torch.equal(values(name, model.eval()), values(name, plain(name)))


@every_model_adapted
def test_saved_loaded_and_merged_it_computes_the_same(name, word, tmp_path: Path):
    model = adapted(name, word, random=True)
    expected, close = values(name, model), {"rtol": 1e-4, "atol": 1e-5}
    assert not torch.allclose(expected, values(name, plain(name)), atol=1e-4)
    with disable_adapter(model):
        torch.testing.assert_close(values(name, model), values(name, plain(name)), rtol=0, atol=0)

    save_adapter(model, tmp_path)
    other = adapted(name, word)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(values(name, other), expected, rtol=0, atol=0)

    merged = copy.deepcopy(plain(name))
    merged.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(values(name, merged), expected, **close)

    before = copy.deepcopy(model.state_dict())
    merge_adapter(model)
    torch.testing.assert_close(values(name, model), expected, **close)
    unmerge_adapter(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(values(name, model), expected, rtol=0, atol=0)


@every_model
def test_whether_gradients_are_wanted_changes_nothing(name):
    """torch's fused kernels, which take the weights of attentions as they are, run where no gradient is wanted."""
    model = adapted(name, random=True)
    torch.testing.assert_close(values(name, model), output(name, model).detach(), rtol=1e-5, atol=1e-5)


# What peft does not adapt, or not as it is adapted here; of all_linear, output projections of nn.MultiheadAttention.
NOT_FOR_PEFT = {
    (
        "open_clip/coca",
        "attention",
    ): r"attn_pool\.attn is a MultiheadAttention of several input weights \(q_proj_weight,",
    ("open_clip/resnet", "attention"): "AttentionPool2d reads its weight and does not call it",
    ("open_clip/resnet", "all_linear"): "AttentionPool2d reads its weight and does not call it",
}
OUTPUT = "peft adapts the output projection of a MultiheadAttention only with its other weights"


@every_word
@every_model
def test_as_lora_it_is_the_same_update(name, word, tmp_path: Path):
    """Every B A is what merging adds, and peft computes the same with them."""
    model = adapted(name, word, random=True)
    attentions = [key for key, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    words = NOT_FOR_PEFT.get((name, word), OUTPUT if attentions and word == "all_linear" else None)
    if words is not None:
        with pytest.raises(AuroraError, match=words):
            export_lora(model, tmp_path / "lora")
        assert not list(tmp_path.iterdir())
        return
    written = export_lora(model, tmp_path / "lora")
    assert written.attentions == attentions
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    merged, before = merged_state_dict(model), plain(name).state_dict()
    for path in written.layers:
        a, b = (tensors.pop(f"base_model.model.{path}.lora_{kind}.weight") for kind in "AB")
        key = f"{path}.in_proj_weight" if path in attentions else f"{path}.weight"
        torch.testing.assert_close(b @ a, merged[key] - before[key], rtol=1e-4, atol=1e-6)
    assert len(tensors) == 2 * len(attentions) and not any(tensor.any() for tensor in tensors.values())

    peft = pytest.importorskip("peft")
    if attentions and not hasattr(peft.tuners.lora.layer, "MultiheadAttention"):
        with pytest.raises(ValueError, match="MultiheadAttention"):
            peft.PeftModel.from_pretrained(copy.deepcopy(plain(name)), str(tmp_path / "lora"))
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        tuned = peft.PeftModel.from_pretrained(copy.deepcopy(plain(name)), str(tmp_path / "lora")).eval()
    inside = tuned.base_model.model
    torch.testing.assert_close(values(name, inside), values(name, model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values(name, tuned.merge_and_unload()), values(name, model), rtol=1e-4, atol=1e-5)


def test_a_tower_without_such_layers_is_named():
    text = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    model = nn.ModuleDict({"visual": nn.Linear(4, 4), "transformer": text})
    with pytest.raises(AuroraError, match=r"'open_clip' matches no .* in \(visual\); attention alone names"):
        inject_mode_approx(model, ModeApproxConfig(targets="open_clip"))
