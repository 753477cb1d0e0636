"""Informative context enhancement, ICE (paper 3.3, eq. 5, figure 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def enhance_context(fusion: Tensor, queries: Tensor, form: str = "attention") -> Tensor:
    """Enrich fusion features by the text queries of the batch.

        alpha_ij = softmax_j(f_i . t_j),   f'_i = f_i + sum_j alpha_ij t_j        (eq. 5)

    The same for positive and negative pairs, else the label would show; in training only.

    Args:
        fusion: f, features at the [ENC] position, (pairs, d).
        queries: t, text-only [CLS] features of the batch, (batch, d).
        form: attention (eq. 5); mean (equal weights); random (Gaussian vectors in place of t); none.

    Returns:
        f', (pairs, d).
    """
    if form == "none":
        return fusion
    if form == "mean":
        return fusion + queries.mean(dim=0)
    if form == "random":
        queries = torch.randn_like(queries)
    alpha = (fusion @ queries.t()).softmax(dim=1)
    return fusion + alpha @ queries
