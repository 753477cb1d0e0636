"""Recall, median rank and chance level of a retrieval in one direction."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from lavis_aurora.errors import AuroraError

TOP = (1, 5, 10)


def target_ranks(scores: np.ndarray, targets: Sequence[Sequence[int]], fallback: np.ndarray) -> np.ndarray:
    """Rank of the best target of each query, 0 is first.

    Wrong candidates that score like the target stand before it: a constant score is worth nothing.

    Args:
        scores: (queries, candidates); -inf for pairs that were not scored, which come after all others.
        targets: the right candidates of each query, at least one.
        fallback: (queries, candidates), orders the pairs that were not scored.

    Returns:
        (queries,) integers.

    Raises:
        AuroraError: a score is NaN, or a query has no target.
    """
    nans = max(int(np.isnan(scores).sum()), int(np.isnan(fallback).sum()))
    if nans:
        raise AuroraError(f"{nans} scores are NaN; nothing is ranked")
    ranks = np.empty(len(scores), dtype=np.int64)
    for query, right in enumerate(targets):
        right = list(right)
        if not right:
            raise AuroraError(f"query {query} has no target")
        row, second = scores[query], fallback[query]
        best = max(right, key=lambda i: (row[i], second[i]))
        scored = row > -np.inf
        before = row >= row[best] if scored[best] else scored | (second >= second[best])
        before[right] = False
        ranks[query] = before.sum()
    return ranks


def recall_metrics(ranks: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 in percent and the median rank, counted from 1."""
    metrics = {f"r{k}": 100.0 * float((ranks < k).mean()) for k in TOP}
    metrics["median_rank"] = float(np.median(ranks)) + 1
    return metrics


def chance_recall(targets: Sequence[Sequence[int]], candidates: int) -> dict[str, float]:
    """R@1, R@5, R@10 in percent of a random ranking."""
    counts = np.bincount([len(right) for right in targets])
    result = {}
    for k in TOP:
        k_seen = min(k, candidates)
        hit = [1 - comb(candidates - m, k_seen) / comb(candidates, k_seen) for m in range(len(counts))]
        result[f"r{k}"] = 100.0 * float(np.dot(hit, counts) / counts.sum())
    return result
