"""What the page shows: adapters by name, with what each has."""

from __future__ import annotations

import pytest
from tiny import activate, tiny_model

from lavis_aurora import AuroraError
from lavis_aurora.common.paths import package_file
from lavis_aurora.search.views import named_adapters, share_weights, view


def test_adapters_have_names():
    assert named_adapters(["A=x/y", "z/adapter_best"]) == {"A": "x/y", "adapter_best": "z/adapter_best"}
    for given in (["A=x", "A=y"], ["frozen=x"]):
        with pytest.raises(AuroraError, match="is the name of another one"):
            named_adapters(given)


def test_models_of_one_backbone_hold_it_once():
    a, b = tiny_model(), activate(tiny_model())
    share_weights(a, b)
    shared = {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}
    assert len(shared) > 100
    assert b.visual_encoder.norm.weight.data_ptr() in shared


def test_parameters_are_the_trained_ones():
    """As in the table of README.md; the temperature, which is kept, is fixed."""
    found = view("tuned", package_file("configs/models/tiny/adapter"))
    assert found.parameters == 37_378 and found.label == "tuned (37,378 parameters, 0.15 MB)"
    assert view("frozen", None).label == "frozen (no adapter)"
