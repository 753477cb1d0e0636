"""Scores of a split's images and texts: ITC for all, ITM for the best candidates of each query.

LAVIS's compute_sim_matrix repeats an image's tokens for each of its texts, pads all texts alike, and does so for both
directions. Here each pair is scored once, image by image, and an image's keys and values serve all its texts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lavis_aurora.common.errors import AuroraError, shown
from lavis_aurora.config.run import RetrievalRunConfig
from lavis_aurora.evaluation.encode import (
    TEXTS_PER_PICTURE,
    ImageTokens,
    RetrievalModel,
    Texts,
    all_gather_rows,
    broadcast,
    encode_texts,
    progress,
)
from lavis_aurora.evaluation.scores import QUERY_CHUNK, Candidates, RetrievalScores, refuse_nonfinite

# Text tokens that are in the fusion encoder at once; bounds its memory.
TOKEN_CHUNK = 4096


@torch.no_grad()
def retrieval_scores(
    model: RetrievalModel,
    data_loader: DataLoader,
    k_test: int,
    itc_weight: float = RetrievalRunConfig.itc_weight,
    token_budget_gb: float = RetrievalRunConfig.token_budget_gb,
    token_dtype: torch.dtype = torch.float32,
    bf16: bool = False,
) -> RetrievalScores:
    """Score a split: ITM + itc_weight * ITC for the k_test best candidates of each query by ITC.

    Several processes share images and texts; each returns all scores.

    Args:
        model: e.g. blip_retrieval_aurora, in eval mode.
        data_loader: over LAVIS's RetrievalEvalDataset or VideoRetrievalEvalDataset (``text`` and ``image`` lists);
            not sharded. As many pictures or videos as it gives in a batch are in the vision tower at once, and
            16 times as many texts in theirs.
        k_test: candidates per query; cut to the number of candidates; 0 scores by ITC alone.
        itc_weight: weight of ITC in the sum.
        token_budget_gb: 10^9 bytes of main memory in which this process may keep images' tokens; images beyond it go
            through the vision tower a second time.
        token_dtype: of the images' tokens on their way to the fusion encoder.
        bf16: compute in bfloat16 where autocast does so; tokens are bfloat16 then.

    Raises:
        Diverged: a score or a feature is NaN or infinite.
    """
    start = time.time()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        texts = encode_texts(model, data_loader.dataset.text, TEXTS_PER_PICTURE * data_loader.batch_size)
        images = ImageTokens(
            model, data_loader, token_budget_gb if k_test else 0, torch.bfloat16 if bf16 else token_dtype
        )
        refuse_nonfinite(images.feats.numpy(), texts.feats.numpy())  # before what may take hours
        i2t, t2i = broadcast((_top_k(images.feats, texts.feats, k_test), _top_k(texts.feats, images.feats, k_test)))
        own = _pair_ids(i2t.indices, len(texts.feats)), _pair_ids(t2i.indices, len(texts.feats), by_text=True)
        keys = torch.cat([one.flatten() for one in own]).unique()
        encoded = time.time()
        _log_start(images, texts, k_test, len(keys), encoded - start)
        itm = score_pairs(model, images, texts, keys)[:, 1] if k_test else torch.empty(0)
    candidates = (
        Candidates(found.indices.numpy(), (itm[torch.searchsorted(keys, one)] + itc_weight * found.values).numpy())
        for found, one in zip((i2t, t2i), own)
    )
    seconds = {"encoding": encoded - start, "reranking": time.time() - encoded}
    return RetrievalScores(images.feats.numpy(), texts.feats.numpy(), *candidates, len(keys), seconds)


def _log_start(images: ImageTokens, texts: Texts, k_test: int, pairs: int, seconds: float) -> None:
    """Say what was done and what will be left out."""
    counts = len(images.feats), len(texts.feats)
    logging.info("encoded %d images or videos and %d texts in %s", *counts, timedelta(seconds=round(seconds)))
    if not k_test:
        logging.info("run.k_test is 0: nothing is reranked")
        return
    share = 100 * pairs / (counts[0] * counts[1])
    logging.info("reranking %d pairs, %.1f%% of all; each counts for both directions", pairs, share)
    if k_test > min(counts):
        logging.info("run.k_test: %d is cut to the number of candidates where there are fewer", k_test)


class _TopK(NamedTuple):
    """ITC and index of the best candidates of each query, (queries, k), best first."""

    values: Tensor
    indices: Tensor


def _top_k(queries: Tensor, candidates: Tensor, k: int) -> _TopK:
    k = min(k, len(candidates))
    with torch.autocast("cpu", enabled=False):
        found = [(block @ candidates.t()).topk(k, dim=1) for block in queries.split(QUERY_CHUNK)]
    return _TopK(*(torch.cat(parts) for parts in zip(*found)))


def _pair_ids(found: Tensor, texts: int, by_text: bool = False) -> Tensor:
    """image * texts + text of each query's candidates, (queries, k); the queries are images, or texts."""
    query = torch.arange(len(found)).unsqueeze(1)
    image, text = (found, query) if by_text else (query, found)
    return image * texts + text


def score_pairs(model: RetrievalModel, images: ImageTokens, texts: Texts, keys: Tensor) -> Tensor:
    """ITM logits (no match, match) of pairs, (pairs, 2), in main memory; each process scores those of its images.

    Args:
        model: as in :func:`retrieval_scores`.
        images, texts: the split.
        keys: image * texts + text of each pair, rising; the same on all processes.
    """
    count = len(texts.feats)
    starts = torch.searchsorted(keys, torch.arange(len(images.feats) + 1) * count).tolist()
    wanted = [image for image in images.local_indices if starts[image] < starts[image + 1]]
    places, logits = [torch.empty(0, dtype=torch.long)], [torch.empty(0, 2)]
    with progress(sum(starts[i + 1] - starts[i] for i in wanted), "reranking", "pair") as bar:
        for image, tokens in images.iter_tokens(wanted):
            chosen = keys[starts[image] : starts[image + 1]] - image * count
            order = texts.lengths[chosen].argsort()
            places.append(starts[image] + order)
            logits.append(_match(model, tokens.to(model.device), texts, chosen[order]))
            bar.update(len(chosen))
    return all_gather_rows(torch.cat(places), torch.cat(logits), len(keys))


def _match(model: RetrievalModel, image: Tensor, texts: Texts, chosen: Tensor) -> Tensor:
    """ITM logits of one image with the chosen texts, which are of rising length: (chosen, 2)."""
    parts = -(-int(texts.lengths[chosen].sum()) // TOKEN_CHUNK)
    logits = [model.match_logits(texts.ids[part], texts.lengths[part], image) for part in chosen.chunk(parts)]
    return torch.cat(logits).cpu()


# Pictures or frames that are in the vision tower at once.
IMAGE_CHUNK = 16


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

    def __repr__(self) -> str:
        return f"MatchScores(itc={self.itc}, itm={self.itm}, itm_logits={self.itm_logits})"


class _InMemoryDataset(Dataset):
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
    loader = DataLoader(_InMemoryDataset(images), batch_size=max(1, IMAGE_CHUNK // frames))
    encoded = encode_texts(model, texts, TEXTS_PER_PICTURE * IMAGE_CHUNK)
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
