"""Informative context enhancement, ICE (paper 3.3, eq. 5, figure 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.method import CONTEXT_FORMS


class ContextForm(Protocol):
    """A form of the enhancement; the same for positive and negative pairs, else the label would show."""

    def __call__(self, fusion: Tensor, queries: Tensor) -> Tensor:
        """f' (pairs, d) from f (pairs, d) and the text queries t of the batch (batch, d)."""


Form = TypeVar("Form", bound=ContextForm)


def register_context(name: str) -> Callable[[Form], Form]:
    """Decorator of a :class:`ContextForm`, which ``model.context.form: NAME`` then means, in training.

    Raises:
        AuroraError: the name is taken.
    """
    return CONTEXT_FORMS.register(name)


@register_context("attention")
def attention(fusion: Tensor, queries: Tensor) -> Tensor:
    """alpha_ij = softmax_j(f_i . t_j),   f'_i = f_i + sum_j alpha_ij t_j        (eq. 5)."""
    return fusion + (fusion @ queries.t()).softmax(dim=1) @ queries


@register_context("mean")
def mean(fusion: Tensor, queries: Tensor) -> Tensor:
    """Equal weights in the place of alpha."""
    return fusion + queries.mean(dim=0)


@register_context("mean_right")
def mean_right(fusion: Tensor, queries: Tensor) -> Tensor:
    """0.1 times the mean, of right pairs alone, as in the authors' released code: the label shows."""
    return fusion + 0.1 * queries.mean(dim=0)


# The other rows stay as they are.
RIGHT_ONLY = ("mean_right",)


@register_context("random")
def random(fusion: Tensor, queries: Tensor) -> Tensor:
    """Gaussian vectors in the place of t."""
    return attention(fusion, torch.randn_like(queries))


@register_context("none")
def none(fusion: Tensor, queries: Tensor) -> Tensor:
    """No enhancement."""
    return fusion


def enhance_context(fusion: Tensor, queries: Tensor, form: str = "attention", right: int | None = None) -> Tensor:
    """Enrich fusion features by the text queries of the batch; in training only.

    Args:
        fusion: f, features at the [ENC] position, (pairs, d).
        queries: t, text-only [CLS] features of the batch, (batch, d).
        form: attention, mean, mean_right, random, none, or another that is registered.
        right: how many pairs are right, the first ones; mean_right needs it.

    Returns:
        f', (pairs, d).

    Raises:
        AuroraError: it is not said which pairs are right.
    """
    enhanced: Tensor = CONTEXT_FORMS[form](fusion, queries)
    if form not in RIGHT_ONLY:
        return enhanced
    if right is None:
        raise AuroraError(f"context.form: {form} is for right pairs alone; say how many there are (right)")
    return torch.cat([enhanced[:right], fusion[right:]])
