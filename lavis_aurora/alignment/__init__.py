"""Modality alignment (paper 3.3): the gated query transformation and the context enhancement. Torch only."""

from lavis_aurora.alignment.context import enhance_context
from lavis_aurora.alignment.gate import AffineGate, QueryGate

__all__ = ["AffineGate", "QueryGate", "enhance_context"]
