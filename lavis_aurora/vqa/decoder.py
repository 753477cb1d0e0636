"""LAVIS's answer decoder, decoding with its cache."""

from __future__ import annotations

from lavis.models.med import XBertLMHeadDecoder
from torch import Tensor
from transformers import LogitsProcessor

from lavis_aurora.errors import AuroraError


def refuse_nan(scores: Tensor) -> None:
    """Raises AuroraError if a score is NaN: the largest of such is any."""
    nans = int(scores.isnan().sum())
    if nans:
        raise AuroraError(f"{nans} scores of answers are NaN; none is chosen")


class NoNan(LogitsProcessor):
    """Lets a generation stop at the first token whose scores are no numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        refuse_nan(scores)
        return scores


class CachedDecoder(XBertLMHeadDecoder):
    """XBertLMHeadDecoder that decodes one new token a step.

    LAVIS reads the keys and values of earlier tokens from an argument ``past``, which transformers 4.26 renamed, so
    that there every step would compute all tokens anew.
    """

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past: tuple | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: tuple | None = None,
        **kwargs,
    ) -> dict:
        """As LAVIS's, with the cache under either name."""
        past = past if past_key_values is None else past_key_values
        return super().prepare_inputs_for_generation(input_ids, past=past, attention_mask=attention_mask, **kwargs)
