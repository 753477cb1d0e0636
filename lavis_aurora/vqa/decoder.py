"""LAVIS's answer decoder, decoding with its cache."""

from __future__ import annotations

from lavis.models.med import XBertLMHeadDecoder
from torch import Tensor


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
