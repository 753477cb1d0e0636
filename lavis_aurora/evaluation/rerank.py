"""Scores of a split's images and texts: ITC for all, ITM for the best candidates of each query.

LAVIS's compute_sim_matrix repeats an image's tokens for each of its texts, pads all texts alike, and does so for both
directions. Here each pair is scored once, image by image, and an image's keys and values serve all its texts.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lavis_aurora.evaluation.encode import (
    TEXTS_PER_PICTURE,
    ImageTokens,
    RetrievalModel,
    Texts,
    broadcast,
    encode_texts,
    gather_rows,
    progress,
)
from lavis_aurora.evaluation.scores import Candidates, RetrievalScores

# Text tokens that are in the fusion encoder at once; bounds its memory.
TOKENS_AT_ONCE = 4096
QUERIES_AT_ONCE = 512


@torch.no_grad()
def retrieval_scores(
    model: RetrievalModel,
    data_loader: DataLoader,
    k_test: int,
    itc_weight: float = 1.0,
    token_budget_gb: float = 4.0,
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
    """
    start = time.time()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        texts = encode_texts(model, data_loader.dataset.text, TEXTS_PER_PICTURE * data_loader.batch_size)
        images = ImageTokens(
            model, data_loader, token_budget_gb if k_test else 0, torch.bfloat16 if bf16 else token_dtype
        )
        i2t, t2i = broadcast(
            (_nearest(images.feats, texts.feats, k_test), _nearest(texts.feats, images.feats, k_test))
        )
        own = _pair_keys(i2t.indices, len(texts.feats)), _pair_keys(t2i.indices, len(texts.feats), by_text=True)
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


class _Nearest(NamedTuple):
    """ITC and index of the best candidates of each query, (queries, k), best first."""

    values: Tensor
    indices: Tensor


def _nearest(queries: Tensor, candidates: Tensor, k: int) -> _Nearest:
    k = min(k, len(candidates))
    with torch.autocast("cpu", enabled=False):
        found = [(block @ candidates.t()).topk(k, dim=1) for block in queries.split(QUERIES_AT_ONCE)]
    return _Nearest(*(torch.cat(parts) for parts in zip(*found)))


def _pair_keys(found: Tensor, texts: int, by_text: bool = False) -> Tensor:
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
    wanted = [image for image in images.share if starts[image] < starts[image + 1]]
    places, logits = [torch.empty(0, dtype=torch.long)], [torch.empty(0, 2)]
    with progress(sum(starts[i + 1] - starts[i] for i in wanted), "reranking", "pair") as bar:
        for image, tokens in images.of(wanted):
            chosen = keys[starts[image] : starts[image + 1]] - image * count
            order = texts.lengths[chosen].argsort()
            places.append(starts[image] + order)
            logits.append(_match(model, tokens.to(model.device), texts, chosen[order]))
            bar.update(len(chosen))
    return gather_rows(torch.cat(places), torch.cat(logits), len(keys))


def _match(model: RetrievalModel, image: Tensor, texts: Texts, chosen: Tensor) -> Tensor:
    """ITM logits of one image with the chosen texts, which are of rising length: (chosen, 2)."""
    parts = -(-int(texts.lengths[chosen].sum()) // TOKENS_AT_ONCE)
    logits = [model.match_logits(texts.ids[part], texts.lengths[part], image) for part in chosen.chunk(parts)]
    return torch.cat(logits).cpu()
