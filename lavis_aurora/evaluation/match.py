"""Any pictures or videos with any texts: what an evaluation computes of a split, for use on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lavis_aurora.common.errors import AuroraError, shown
from lavis_aurora.config.run import RetrievalRunConfig
from lavis_aurora.evaluation.encode import TEXTS_PER_PICTURE, ImageTokens, RetrievalModel, encode_texts
from lavis_aurora.evaluation.rerank import score_pairs

# Pictures or frames that are in the vision tower at once.
PICTURES_AT_ONCE = 16


@dataclass(frozen=True)
class MatchScores:
    """How well each picture or video fits each text, in main memory.

    Attributes:
        itc: cosine similarities, (pictures, texts): what LAVIS's BlipITM gives for ``match_head="itc"``.
        itm_logits: of no match and of a match, (pictures, texts, 2): BlipITM's ``match_head="itm"``, for all pairs.
    """

    itc: Tensor
    itm_logits: Tensor

    @property
    def itm(self) -> Tensor:
        """Probabilities of a match, (pictures, texts): the softmax of ``itm_logits``."""
        return self.itm_logits.softmax(dim=-1)[..., 1]


class _Visuals(Dataset):
    """Pictures or videos as :class:`ImageTokens` reads those of a split."""

    def __init__(self, visuals: Tensor) -> None:
        self.visuals, self.key = visuals, "image" if visuals.dim() == 4 else "video"

    def __len__(self) -> int:
        return len(self.visuals)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {self.key: self.visuals[index]}


@torch.no_grad()
def match_scores(model: RetrievalModel, images: Tensor, texts: str | Sequence[str]) -> MatchScores:
    """Score every picture with every text; several processes share the work, and each must ask for the same.

    Args:
        model: e.g. blip_retrieval_aurora, in eval mode.
        images: (pictures, 3, height, width), or videos (videos, 3, frames, height, width).
        texts: a text, or a list of them.

    Raises:
        AuroraError: there is no picture or no text, or they are of another type or shape.
    """
    texts = _checked_texts(texts)
    _check_images(model, images)
    frames = images.shape[2] if images.dim() == 5 else 1
    loader = DataLoader(_Visuals(images), batch_size=max(1, PICTURES_AT_ONCE // frames))
    encoded = encode_texts(model, texts, TEXTS_PER_PICTURE * PICTURES_AT_ONCE)
    tokens = ImageTokens(model, loader, RetrievalRunConfig.token_budget_gb, torch.float32)
    logits = score_pairs(model, tokens, encoded, torch.arange(len(images) * len(texts)))
    return MatchScores(tokens.feats @ encoded.feats.t(), logits.unflatten(0, (len(images), len(texts))))


def _checked_texts(texts: str | Sequence[str]) -> list[str]:
    if not isinstance(texts, (str, list, tuple)):
        raise AuroraError(f"texts: {type(texts).__name__} cannot be used; it must be a text or a list of texts")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise AuroraError("texts: there is none; name at least one")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise AuroraError(f"texts: text {i} is {shown(text)}; it must have words")
    return texts


def _check_images(model: RetrievalModel, images: Tensor) -> None:
    side = model.image_size
    advice = f"the eval processor makes (3, {side}, {side}) of a picture, and torch.stack a batch of several"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise AuroraError(f"images: {kind} cannot be used; {advice}")
    if images.dim() not in (4, 5) or images.shape[1] != 3 or images.shape[-2:] != (side, side):
        raise AuroraError(
            f"images: shape {tuple(images.shape)} cannot be used; it must be (pictures, 3, {side}, {side}) or "
            f"(videos, 3, frames, {side}, {side}); {advice}"
        )
    if 0 in images.shape:
        raise AuroraError(f"images: there is none in shape {tuple(images.shape)}; {advice}")
