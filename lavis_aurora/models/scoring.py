"""What an evaluation asks of a retrieval model, and scoring whatever the mode that a model is in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lavis.models.med import BertModel
from lavis.models.vit import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, BertTokenizer

from lavis_aurora.config.models import RetrievalAuroraConfig
from lavis_aurora.config.run import RetrievalRunConfig
from lavis_aurora.encoders.fusion import encode_with_image
from lavis_aurora.encoders.towers import encode_visual, visual_input
from lavis_aurora.evaluation.rerank import MatchScores, match_scores, retrieval_scores
from lavis_aurora.evaluation.scores import RetrievalScores


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which ``model`` is in eval mode; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # Not by eval(): what a module makes of being asked for a mode (NormMode) stays as it was.
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


class RetrievalScoring:
    """Mixin in front of BLIP's retrieval model: :class:`lavis_aurora.evaluation.encode.RetrievalModel`."""

    settings: RetrievalAuroraConfig
    device: torch.device
    tokenizer: BertTokenizer
    visual_encoder: VisionTransformer
    text_encoder: BertModel
    vision_proj: nn.Linear
    text_proj: nn.Linear
    itm_head: nn.Linear

    @property
    def feature_size(self) -> int:
        """Width of the features that ITC compares."""
        return self.settings.embed_dim

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return self.settings.image_size

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised ITC features of texts, (texts, length): (texts, feature_size), float32."""
        batch = BatchEncoding({"input_ids": ids, "attention_mask": mask}).to(self.device)
        hidden = self.text_encoder.forward_text(batch).last_hidden_state
        return F.normalize(self.text_proj(hidden[:, 0]).float(), dim=-1)

    def image_features(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Tokens of a batch, (batch, tokens, d), and normalised ITC features, (batch, feature_size)."""
        # The precision is that of a model that was cast to half.
        visual = visual_input(samples).to(self.device, next(self.visual_encoder.parameters()).dtype)
        features = encode_visual(self.visual_encoder, visual)
        return features.tokens, F.normalize(self.vision_proj(features.pooled).float(), dim=-1)

    def match_logits(self, ids: Tensor, lengths: Tensor, image: Tensor) -> Tensor:
        """ITM logits of one image, (tokens, d), with texts (texts, length) of rising ``lengths``: (texts, 2)."""
        ids = ids.clone()
        ids[:, 0] = self.tokenizer.enc_token_id
        return self.itm_head(encode_with_image(self.text_encoder, ids, lengths, image)).float()

    def match(self, images: Tensor, texts: str | Sequence[str]) -> MatchScores:
        """Score every picture or video with every text, as an evaluation does: on the model's device, in eval mode.

        Processes of one group share the work: all of them must call it, each with the same pictures and texts.

        Args:
            images: (pictures, 3, height, width), as the processors make them; or videos, (videos, 3, frames, height,
                width).
            texts: a text, or a list of them.

        Returns:
            ``itc``, cosine similarities, and ``itm``, probabilities of a match, both (pictures, texts) and in main
            memory; ``itm_logits``, (pictures, texts, 2), are what these are the softmax of. At the start ``itc`` and
            ``itm_logits`` are what LAVIS's blip_image_text_matching gives.

        Raises:
            AuroraError: there is no picture or no text, or they are of another type or shape.
        """
        with evaluating(self):
            return match_scores(self, images, texts)

    def compute_sim_matrix(
        self, data_loader: DataLoader, task_cfg: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """LAVIS's scores of each image with each text and the reverse, as two numpy arrays; all processes call it."""
        scores = self.retrieval_scores(data_loader, task_cfg)
        return scores.matrix("image_to_text"), scores.matrix("text_to_image")

    def retrieval_scores(self, data_loader: DataLoader, task_cfg: Mapping[str, Any]) -> RetrievalScores:
        """Scores of the best candidates, see :func:`lavis_aurora.evaluation.rerank.retrieval_scores`; in eval mode.

        Processes of one group share the work: all of them must call it.

        Args:
            data_loader: over a split for evaluation.
            task_cfg: holds, among others, the keys of :class:`lavis_aurora.config.RetrievalRunConfig` that differ
                from the defaults.
        """
        names = [one.name for one in fields(RetrievalRunConfig)]
        keys = RetrievalRunConfig(**{name: task_cfg[name] for name in names if name in task_cfg})
        with evaluating(self):
            return retrieval_scores(
                self,
                data_loader,
                k_test=keys.k_test,
                itc_weight=keys.itc_weight,
                token_budget_gb=keys.token_budget_gb,
                token_dtype=getattr(torch, keys.token_dtype),
                bf16=keys.eval_bf16,
            )
