"""Mode approximation (paper 3.2), the method itself: factors, the layers over them, and their injection into a model.

Knows torch, not LAVIS.
"""

from lavis_aurora.adapters.files import load_adapter, save_adapter
from lavis_aurora.adapters.merging import merge_adapter, merged_state_dict, unmerge_adapter
from lavis_aurora.adapters.switching import (
    bind_companions,
    delete_adapter,
    disable_adapter,
    list_adapters,
    set_adapter,
    trainable_parameters_summary,
    truncate_adapter,
)
from lavis_aurora.mode_approx.core import CoreFactorSet
from lavis_aurora.mode_approx.factors import FactorSet, ModeFactors
from lavis_aurora.mode_approx.inject import inject_mode_approx
from lavis_aurora.mode_approx.layers import AdaptedLayer, ModeApproxLinear, ModeApproxMultiheadAttention

__all__ = [
    "AdaptedLayer",
    "CoreFactorSet",
    "FactorSet",
    "ModeApproxLinear",
    "ModeApproxMultiheadAttention",
    "ModeFactors",
    "bind_companions",
    "delete_adapter",
    "disable_adapter",
    "inject_mode_approx",
    "list_adapters",
    "load_adapter",
    "merge_adapter",
    "merged_state_dict",
    "save_adapter",
    "set_adapter",
    "trainable_parameters_summary",
    "truncate_adapter",
    "unmerge_adapter",
]
