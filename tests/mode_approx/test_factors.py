import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_aurora import AuroraError, ModeApproxConfig
from lavis_aurora.mode_approx.factors import ModeFactors, tower_of

SLOTS = {"vision.q": (4, 6), "vision.k": (4, 6), "text.q": (5, 6), "text.v": (5, 3)}
RANK = 3


@pytest.fixture
def factors() -> ModeFactors:
    """Factors in which every number is random, V and lambda too."""
    torch.manual_seed(0)
    factors = ModeFactors(SLOTS, ModeApproxConfig(rank=RANK, scale=1.7)).double()
    for parameter in factors.parameters():
        torch.nn.init.normal_(parameter)
    return factors


def cp_sum(factors: ModeFactors, slot: str) -> torch.Tensor:
    """Equation 3 entry by entry, transposed into nn.Linear's layout."""
    k = list(factors.slots).index(slot)
    d_in, d_out = factors.slots[slot]
    one = factors.sets["default"]
    rank, scale = one.config.rank, one.config.scale
    delta = torch.zeros(d_out, d_in, dtype=torch.float64)
    for i in range(d_in):
        for j in range(d_out):
            for r in range(rank):
                u, v = one.U[str(d_in)][i, r], one.V[str(d_out)][j, r]
                delta[j, i] += one.coefficients[k, r] * u * v * one.P[k, r]
    return delta * scale / (0.1 * (d_in * rank) ** 0.5)


@pytest.mark.parametrize("slot", SLOTS)
def test_delta_weight_is_the_cp_sum(factors, slot):
    torch.testing.assert_close(factors.delta_weight(slot), cp_sum(factors, slot))


def test_global_factors_are_shared_and_widths_have_their_own(factors):
    one = factors.sets["default"]
    assert {key: tuple(u.shape) for key, u in one.U.items()} == {"4": (4, 3), "5": (5, 3)}
    assert {key: tuple(v.shape) for key, v in one.V.items()} == {"6": (6, 3), "3": (3, 3)}
    assert one.P.shape == one.coefficients.shape == (4, 3)


def test_update_is_zero_at_the_start_but_v_has_a_gradient():
    factors = ModeFactors(SLOTS, ModeApproxConfig(rank=RANK))
    for slot in SLOTS:
        assert factors.delta_weight(slot).abs().max() == 0
    factors.delta_weight("vision.q").sum().backward()
    assert factors.sets["default"].V["6"].grad.abs().max() > 0


@pytest.mark.parametrize("width", [16, 256])
@pytest.mark.parametrize("rank", [4, 64])
def test_size_of_the_update_does_not_depend_on_width_and_rank(width, rank):
    torch.manual_seed(1)
    factors = ModeFactors({"a": (width, width)}, ModeApproxConfig(rank=rank, scale=1.0))
    torch.nn.init.normal_(factors.sets["default"].V[str(width)])
    y = torch.randn(512, width) @ factors.delta_weight("a").t()
    assert 0.6 < y.std() < 1.6


def test_use_switches_sets_and_disabled_means_none(factors):
    factors.add_set("other", ModeApproxConfig(rank=2))
    with factors.use("other"):
        assert factors.active_set.P.shape == (4, 2)
        with factors.disabled():
            assert factors.active_set is None
        assert factors.active == "other"
    assert factors.active == "default"
    with pytest.raises(RuntimeError), factors.use("other"):
        raise RuntimeError
    assert factors.active == "default"


def test_unknown_names_are_answered_with_near_ones(factors):
    with pytest.raises(AuroraError, match="did you mean 'default'"), factors.use("defualt"):
        pass
    with pytest.raises(AuroraError, match="did you mean 'vision.q'"):
        factors.delta_weight("vision.qq")


TOWERS = {
    "visual_encoder.blocks.0.attn.qkv.query": (4, 6),
    "visual_encoder.blocks.1.attn.qkv.query": (4, 6),
    "text_encoder.encoder.layer.0.attention.self.query": (4, 6),
    "text_encoder.encoder.layer.0.crossattention.self.query": (4, 6),
}


def test_towers_may_have_factors_of_their_own():
    torch.manual_seed(0)
    factors = ModeFactors(TOWERS, ModeApproxConfig(rank=RANK, sharing="tower")).double()
    for parameter in factors.parameters():
        torch.nn.init.normal_(parameter)
    one = factors.sets["default"]
    assert len(one.U) == len(one.V) == 3
    for k, slot in enumerate(TOWERS):
        owner = tower_of(slot)
        u, v = one.U[f"{owner}_4"], one.V[f"{owner}_6"]
        plain = sum(one.coefficients[k, r] * one.P[k, r] * torch.outer(v[:, r], u[:, r]) for r in range(RANK))
        torch.testing.assert_close(factors.delta_weight(slot), plain * 8 / (0.1 * (4 * RANK) ** 0.5))
    # A change of one tower's U reaches all of its layers, and no other tower.
    before = [factors.delta_weight(slot) for slot in TOWERS]
    with torch.no_grad():
        one.U[f"{tower_of(next(iter(TOWERS)))}_4"].add_(1)
    changed = [not torch.equal(factors.delta_weight(slot), old) for slot, old in zip(TOWERS, before)]
    assert changed == [True, True, False, False]


def test_an_unknown_sharing_is_refused():
    with pytest.raises(AuroraError, match="sharing.*did you mean 'tower'"):
        ModeApproxConfig(sharing="towers")


WIDTHS = st.sampled_from([2, 3, 5])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(WIDTHS, WIDTHS), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 99))
def test_counts_and_updates_for_any_slots_and_rank(shapes, rank, seed):
    slots = {f"layer.{i}": shape for i, shape in enumerate(shapes)}
    factors = ModeFactors(slots, ModeApproxConfig(rank=rank)).double()
    d_in, d_out = {a for a, _ in shapes}, {b for _, b in shapes}
    assert sum(p.numel() for p in factors.parameters()) == rank * (sum(d_in) + sum(d_out) + 2 * len(slots))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    for slot in slots:
        torch.testing.assert_close(factors.delta_weight(slot), cp_sum(factors, slot))
