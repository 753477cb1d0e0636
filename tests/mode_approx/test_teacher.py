"""Momentum copies: a second set of factors that follows the first."""

import copy

import pytest
import torch
from lavis.models.base_model import MomentumDistilationMixin
from torch import nn

from lavis_aurora import AuroraError, ModeApproxConfig, inject_mode_approx
from lavis_aurora.adapters.companions import frozen_teacher
from lavis_aurora.adapters.sets import MOMENTUM_SET

MOMENTUM = 0.9


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.query = nn.Linear(4, 4)
        self.attn = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = self.query(self.norm(x))
        return self.attn(x, x, x)[0]


class Model(nn.Module, MomentumDistilationMixin):
    """A model with a momentum copy as LAVIS's have them."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = Tower(), nn.Linear(4, 2)
        self.tower_m, self.head_m = copy.deepcopy(self.tower), copy.deepcopy(self.head)
        self.model_pairs = [[self.tower, self.tower_m], [self.head, self.head_m]]
        self.momentum = MOMENTUM
        self.copy_params()


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model().double()
    inject_mode_approx(model, ModeApproxConfig(rank=2)).double()
    return model


def factors_of(model: Model, name: str) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.mode_approx.sets[name].parameters()]


def test_copies_are_no_targets(model):
    assert list(model.mode_approx.slots) == ["tower.query", *(f"tower.attn.{p}" for p in ("query", "key", "value"))]
    with pytest.raises(AuroraError, match="matches no linear"):
        inject_mode_approx(Model(), ModeApproxConfig(), [r"tower_m\.query"])


def test_pairs_stay_aligned(model):
    assert len(model.model_pairs) == 3
    for trained, teacher in model.model_pairs:
        ours, theirs = dict(trained.named_parameters()), dict(teacher.named_parameters())
        assert list(ours) == list(theirs)
        assert all(ours[name].shape == theirs[name].shape for name in ours)
        assert not any(id(p) in {id(q) for q in theirs.values()} for p in ours.values())


def test_the_teacher_starts_as_the_student_and_is_not_trained(model):
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    assert torch.equal(model.tower(x), model.tower_m(x))
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_the_update_is_the_moving_average_of_the_factors(model):
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    frozen = copy.deepcopy({k: v for k, v in model.state_dict().items() if not k.startswith("mode_approx")})
    average = factors_of(model, MOMENTUM_SET)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.mode_approx.sets["default"].parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        before = model.tower_m(x)
        model._momentum_update()
        average = [MOMENTUM * a + (1 - MOMENTUM) * p for a, p in zip(average, factors_of(model, "default"))]
        for ours, expected in zip(factors_of(model, MOMENTUM_SET), average):
            torch.testing.assert_close(ours, expected)
        assert not torch.allclose(model.tower_m(x), before)
    # The student, told to read the teacher's factors, is the teacher.
    with model.mode_approx.use(MOMENTUM_SET):
        torch.testing.assert_close(model.tower(x), model.tower_m(x))
    assert not torch.allclose(model.tower(x), model.tower_m(x))
    for key, value in frozen.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_a_pair_by_itself_has_a_teacher_too():
    """LAVIS pairs its projections so: vision_proj with vision_proj_m."""
    model = Model()
    inject_mode_approx(model, ModeApproxConfig(rank=2), ["head", r"tower\.query"])
    nn.init.normal_(model.mode_approx.sets[MOMENTUM_SET].V["2"])
    update = model.mode_approx.delta_weight("head", MOMENTUM_SET)
    torch.testing.assert_close(model.head_m.weight, model.head_m.adapted_weight + update)
    assert model.model_pairs[1][0] is model.head and model.model_pairs[1][1] is model.head_m


def test_a_resting_teacher_stays_as_it_is(model):
    nn.init.normal_(model.mode_approx.sets["default"].V["4"])
    before = factors_of(model, MOMENTUM_SET)
    with pytest.raises(KeyError), frozen_teacher(nn.ModuleList([model])):
        model._momentum_update()
        assert all(map(torch.equal, factors_of(model, MOMENTUM_SET), before))
        raise KeyError
    assert model.momentum == MOMENTUM
    model._momentum_update()
    assert not all(map(torch.equal, factors_of(model, MOMENTUM_SET), before))


def test_the_teacher_reads_its_own_factors_whichever_are_active(model):
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    nn.init.normal_(model.mode_approx.sets[MOMENTUM_SET].V["4"])
    teacher, student = model.tower_m(x), model.tower(x)
    model.mode_approx.add_set("other", ModeApproxConfig(rank=1)).double()
    with model.mode_approx.use("other"):
        assert torch.equal(model.tower_m(x), teacher)
    with model.mode_approx.disabled():
        torch.testing.assert_close(model.tower_m(x), student)


def test_copies_of_the_model_keep_their_own_teacher(model):
    twin = copy.deepcopy(model)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    nn.init.normal_(twin.mode_approx.sets["default"].V["4"])
    twin._momentum_update()
    assert not torch.allclose(twin.tower_m(x), twin.tower(x))
    assert torch.equal(model.tower_m(x), model.tower(x))
    assert not torch.allclose(twin.tower_m(x), model.tower_m(x))


def test_blocks_and_output_projections_have_a_teacher_too():
    class Whole(Model):
        def __init__(self) -> None:
            super().__init__()
            for tower in (self.tower, self.tower_m):
                tower.mlp = nn.ModuleDict({"c_fc": nn.Linear(4, 8), "c_proj": nn.Linear(8, 4)})
            self.copy_params()

    torch.manual_seed(0)
    model = Whole().double()
    inject_mode_approx(model, ModeApproxConfig(rank=2, targets="all_linear")).double()
    with torch.no_grad():
        for parameter in model.mode_approx.sets["default"].parameters():
            parameter.normal_()
    expected = [
        MOMENTUM * teacher + (1 - MOMENTUM) * student
        for student, teacher in zip(*(factors_of(model, name) for name in ("default", MOMENTUM_SET)))
    ]
    model._momentum_update()
    for teacher, value in zip(factors_of(model, MOMENTUM_SET), expected):
        torch.testing.assert_close(teacher, value)
    x = torch.randn(50, 8, dtype=torch.float64)
    for name in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
        twin = model.tower_m.get_submodule(name)
        weight = twin.adapted_weight + twin.delta_weight()
        part = x[:, : twin.in_features]
        torch.testing.assert_close(twin(part), nn.functional.linear(part, weight, twin.bias))
        assert not torch.equal(twin.delta_weight(), model.tower.get_submodule(name).delta_weight())
