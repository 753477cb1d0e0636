from typing import Optional

import pytest
from tiny import med_config, tiny_model
from torch import nn

from lavis_aurora import ModeApproxConfig, inject_mode_approx, trainable_parameters_summary
from lavis_aurora.adapters.companions import adapter_parameters, head_parameters
from lavis_aurora.adapters.switching import parameter_groups
from lavis_aurora.analysis.paper import ALL_SLOTS, aurora_count


def formula(layers: int, d: int, rank: int, targets: Optional[str] = None) -> int:
    """Appendix E: L (3 + 6) 2r + 2dr + 2Ld.

    With all linear layers L (12 + 16) 2r + 2dr + 2Ld: 4 of an attention, thrice, and 4 + 4 blocks in each tower.
    """
    slots = 3 * 4 + 2 * (4 + 4) if targets == "all_linear" else 3 * 3
    return layers * slots * 2 * rank + 2 * d * rank + 2 * layers * d


def count(model: nn.Module) -> int:
    return sum(p.numel() for _, p in adapter_parameters(model) if p.requires_grad)


@pytest.mark.parametrize("rank", [1, 7, 64])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("targets", [None, "all_linear"])
def test_count_of_a_retrieval_model(rank, layers, targets, tmp_path):
    model = tiny_model(
        mode_approx={"rank": rank, "targets": targets},
        vit={"patch_size": 16, "embed_dim": 32, "depth": layers, "num_heads": 2},
        med_config_path=med_config(
            tmp_path,
            **{"num_hidden_layers": layers, "hidden_size": 32, "num_attention_heads": 2, "encoder_width": 32},
            intermediate_size=128,
        ),
    )
    assert count(model) == formula(layers, 32, rank, targets)


@pytest.mark.parametrize(("rank", "expected"), [(64, 130_560), (128, 242_688)])
def test_count_of_blip_base_is_the_papers(rank, expected):
    """Figures of the paper's table 1, 0.1M and 0.2M, on BLIP base's own shapes without its memory."""
    model = nn.ModuleDict()
    for i in range(12):
        model[f"vision{i}"] = nn.ModuleDict({"qkv": nn.Linear(768, 3 * 768, device="meta")})
        for block in ("self", "cross"):
            names = ("query", "key", "value")
            model[f"{block}{i}"] = nn.ModuleDict({n: nn.Linear(768, 768, device="meta") for n in names})
    factors = inject_mode_approx(model, ModeApproxConfig(rank=rank), [r".*\.(qkv|query|key|value)"])
    assert len(factors.slots) == 108
    gates = 2 * 12 * 768
    assert sum(p.numel() for p in factors.parameters()) + gates == formula(12, 768, rank) == expected


@pytest.mark.parametrize(("rank", "expected"), [(64, 159_744), (128, 301_056)])
def test_count_of_blip_base_with_all_linear_layers(rank, expected):
    """336 slots, again on BLIP base's own shapes and names without its memory."""

    def layer(*names: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(768, 768, device="meta") for name in names})

    def attention() -> nn.ModuleDict:
        return nn.ModuleDict({"self": layer("query", "key", "value"), "output": layer("dense")})

    up, down = (768, 4 * 768), (4 * 768, 768)
    vision, text = nn.ModuleList(), nn.ModuleList()
    for _ in range(12):
        qkv = nn.Linear(768, 3 * 768, device="meta")
        mlp = nn.ModuleDict({"fc1": nn.Linear(*up, device="meta"), "fc2": nn.Linear(*down, device="meta")})
        vision.append(nn.ModuleDict({"attn": nn.ModuleDict({"qkv": qkv, **layer("proj")}), "mlp": mlp}))
        forward = {
            name: nn.ModuleDict({"dense": nn.Linear(*shape, device="meta")})
            for name, shape in (("intermediate", up), ("output", down))
        }
        text.append(nn.ModuleDict({"attention": attention(), "crossattention": attention(), **forward}))
    model = nn.ModuleDict({"blocks": vision, "layer": text})
    factors = inject_mode_approx(model, ModeApproxConfig(rank=rank, targets="all_linear"))
    assert len(factors.slots) == 336 and set(factors.slots.values()) == {(768, 768)}
    total = sum(p.numel() for p in factors.parameters()) + 2 * 12 * 768
    assert total == formula(12, 768, rank, "all_linear") == aurora_count(rank, slots=ALL_SLOTS) == expected


def test_summary_names_groups_and_ends_with_pefts_line():
    summary = trainable_parameters_summary(tiny_model(mode_approx={"rank": 4}))
    for group in ("factors U, V", "slot factors P", "coefficients lambda", "gate", "heads"):
        assert group in summary
    assert "trainable params: " in summary.splitlines()[-1]
    assert "|| all params: " in summary.splitlines()[-1]


def test_summary_of_full_tuning_and_of_none():
    assert "backbone" in trainable_parameters_summary(tiny_model(tuning="full"))
    assert "trainable params: 0 ||" in trainable_parameters_summary(tiny_model(tuning="frozen"))


def test_groups_are_counted_for_programs_too():
    model = tiny_model(mode_approx={"rank": 4})
    groups = parameter_groups(model)
    frozen = groups.pop("frozen")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(count["tensors"] for count in groups.values()) == len(trained)
    assert sum(count["parameters"] for count in groups.values()) == sum(p.numel() for p in trained)
    assert frozen["parameters"] == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert groups["heads"]["parameters"] == sum(p.numel() for p in head_parameters(model))


def test_what_a_model_of_somebody_elses_calls_heads_need_not_be_any():
    model = nn.ModuleDict({"query": nn.Linear(4, 4)})
    model.heads = 8
    inject_mode_approx(model, ModeApproxConfig(rank=2), ["query"])
    assert "heads" not in parameter_groups(model)
