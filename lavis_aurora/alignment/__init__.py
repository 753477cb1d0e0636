"""Modality alignment (paper 3.3): the gated query transformation and the context enhancement. Torch only.

Forms of both are registered by decorator, here or elsewhere: :func:`register_gate`, :func:`register_context`.
"""

from lavis_aurora.alignment.context import ContextForm, enhance_context, register_context
from lavis_aurora.alignment.gate import AffineGate, Gate, QueryGate, register_gate

__all__ = [
    "AffineGate",
    "ContextForm",
    "Gate",
    "QueryGate",
    "enhance_context",
    "register_context",
    "register_gate",
]
