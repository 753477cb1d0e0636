"""Mode approximation (paper 3.2): the method itself. Knows torch, not LAVIS."""

from lavis_aurora.mode_approx.factors import FactorSet, ModeFactors
from lavis_aurora.mode_approx.inject import inject_mode_approx
from lavis_aurora.mode_approx.linear import ModeApproxLinear
from lavis_aurora.mode_approx.multihead import ModeApproxMultiheadAttention
from lavis_aurora.mode_approx.trainable import trainable_parameters_summary

__all__ = [
    "FactorSet",
    "ModeApproxLinear",
    "ModeApproxMultiheadAttention",
    "ModeFactors",
    "inject_mode_approx",
    "trainable_parameters_summary",
]
