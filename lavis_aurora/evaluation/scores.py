"""What an evaluation finds: scores of the best candidates of each query, never of all pairs at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb

import numpy as np

from lavis_aurora.common.errors import AuroraError, Diverged

TOP = (1, 5, 10)
Targets = Sequence[Sequence[int]]


def own_targets(img2txt: Mapping[int, Sequence[int]], txt2img: Mapping[int, int]) -> tuple[Targets, Targets]:
    """The right texts of each image and the right image of each text as LAVIS's dataset names them."""
    return [img2txt[i] for i in range(len(img2txt))], [[txt2img[i]] for i in range(len(txt2img))]


def right_targets(
    texts: Sequence[str], img2txt: Mapping[int, Sequence[int]], txt2img: Mapping[int, int]
) -> tuple[Targets, Targets]:
    """The right candidates of each image and of each text, where a text that equals a right one is right.

    Args:
        texts: as the model reads them, after the text processor.
        img2txt, txt2img: of LAVIS's dataset, which knows a text as right for the image of its own entry alone.

    Returns:
        texts of each image, and images of each text. Without texts that several images share they are those of
        :func:`own_targets`.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        alike[text].append(i)
    images = {text: list(dict.fromkeys(txt2img[i] for i in same)) for text, same in alike.items()}
    shared = {text for text, own in images.items() if len(own) > 1}
    i2t, t2i = map(list, own_targets(img2txt, txt2img))
    for image in {image for text in shared for image in images[text]}:
        equal = (alike[text] for text in dict.fromkeys(texts[i] for i in img2txt[image]))
        i2t[image] = sorted({i for same in equal for i in same})
    for text in shared:
        for i in alike[text]:
            t2i[i] = images[text]
    return i2t, t2i


def target_ranks(scores: np.ndarray, targets: Targets, fallback: np.ndarray) -> np.ndarray:
    """Rank of the best target of each query, 0 is first.

    Wrong candidates that score like the target stand before it: a constant score is worth nothing.

    Args:
        scores: (queries, candidates), no NaN; -inf for pairs that were not scored, which come after all others.
        targets: the right candidates of each query, at least one.
        fallback: (queries, candidates), orders the pairs that were not scored.

    Returns:
        (queries,) integers.

    Raises:
        AuroraError: a query has no target.
    """
    ranks = np.empty(len(scores), dtype=np.int64)
    for query, right in enumerate(targets):
        if not len(right):
            raise AuroraError(f"query {query} has no target")
        row, second, right = scores[query], fallback[query], np.asarray(right)
        best = right[np.lexsort((second[right], row[right]))[-1]]
        scored = row > -np.inf
        before = row >= row[best] if scored[best] else scored | (second >= second[best])
        before[right] = False
        ranks[query] = before.sum()
    return ranks


def lavis_ranks(matrix: np.ndarray, targets: Targets) -> np.ndarray:
    """Ranks as LAVIS's RetrievalTask counts them: what scores like the target is in the order of numpy's sort.

    Args:
        matrix: LAVIS's scores, (queries, candidates).
        targets: the right candidates of each query.
    """
    ranks = np.empty(len(matrix), dtype=np.int64)
    for query, (row, right) in enumerate(zip(matrix, targets)):
        best = row[np.asarray(right)].max()
        alone = int((row == best).sum()) == 1
        # Sorting takes long, and is needed for ties alone.
        ranks[query] = (row > best).sum() if alone else np.isin(np.argsort(row)[::-1], right).argmax()
    return ranks


def recall_metrics(ranks: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 in percent and the median rank, counted from 1."""
    metrics = {f"r{k}": 100.0 * float((ranks < k).mean()) for k in TOP}
    metrics["median_rank"] = float(np.median(ranks)) + 1
    return metrics


def chance_recall(targets: Targets, candidates: int) -> dict[str, float]:
    """R@1, R@5, R@10 in percent of a random ranking."""
    counts = np.bincount([len(right) for right in targets])
    result = {}
    for k in TOP:
        k_seen = min(k, candidates)
        hit = [1 - comb(candidates - m, k_seen) / comb(candidates, k_seen) for m in range(len(counts))]
        result[f"r{k}"] = 100.0 * float(np.dot(hit, counts) / counts.sum())
    return result


# What LAVIS writes for a pair that was not reranked.
NOT_RERANKED = -100.0
# Queries that are compared with all candidates at once; bounds the memory of their scores.
QUERY_CHUNK = 512


@dataclass
class Candidates:
    """The reranked candidates of each query, by falling ITC.

    Attributes:
        indices: which candidates, (queries, k) integers.
        scores: ITM + weight * ITC, (queries, k).
    """

    indices: np.ndarray
    scores: np.ndarray


def refuse_nonfinite(*arrays: np.ndarray) -> None:
    """Raise :class:`Diverged`, with their number, where features or scores are NaN or infinite."""
    wrong = sum(int((~np.isfinite(numbers)).sum()) for numbers in arrays)
    if wrong:
        raise Diverged(f"{wrong} features or scores are NaN or infinite; nothing is ranked")


@dataclass
class RetrievalScores:
    """Scores of a split. All images with all texts would be gigabytes: they are given in blocks of queries.

    Attributes:
        image_feats, text_feats: normalised ITC features, (images, d) and (texts, d).
        i2t: reranked texts of each image.
        t2i: reranked images of each text.
        pairs: pairs that met the fusion encoder; one in both directions counts once.
        seconds: what the stages took.

    Raises:
        Diverged: one of these numbers is NaN, which some sorts put first, or infinite, which means not reranked.
    """

    image_feats: np.ndarray
    text_feats: np.ndarray
    i2t: Candidates
    t2i: Candidates
    pairs: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_nonfinite(self.image_feats, self.text_feats, self.i2t.scores, self.t2i.scores)

    def _sides(self, direction: str) -> tuple[np.ndarray, np.ndarray, Candidates]:
        """Features of queries and candidates, and the reranked."""
        if direction.endswith("_to_text"):
            return self.image_feats, self.text_feats, self.i2t
        return self.text_feats, self.image_feats, self.t2i

    def blocks(self, direction: str) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Queries, their scores with all candidates (-inf where not reranked), and their ITC.

        Args:
            direction: image_to_text or text_to_image; video_to_text and text_to_video are the same.
        """
        queries, others, reranked = self._sides(direction)
        for start in range(0, len(queries), QUERY_CHUNK):
            rows = slice(start, start + QUERY_CHUNK)
            itc = queries[rows] @ others.T
            scores = np.full_like(itc, -np.inf)
            np.put_along_axis(scores, reranked.indices[rows], reranked.scores[rows], axis=1)
            yield rows, scores, itc

    def ranks(self, direction: str, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
        """Ranks of the best target of each query, reranked and by ITC alone; see :func:`target_ranks`."""
        parts = [
            (target_ranks(scores, targets[rows], fallback=itc), target_ranks(itc, targets[rows], fallback=itc))
            for rows, scores, itc in self.blocks(direction)
        ]
        reranked, itc = zip(*parts)
        return np.concatenate(reranked), np.concatenate(itc)

    def best(self, direction: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first ``count`` candidates of each query and their scores, best first, (queries, up to count).

        Those that were not reranked are left out, unless none was: then ITC orders them.
        """
        reranked = self._sides(direction)[2]
        if reranked.indices.shape[1]:
            order = np.argsort(-reranked.scores, axis=1, kind="stable")[:, :count]
            return tuple(np.take_along_axis(x, order, axis=1) for x in (reranked.indices, reranked.scores))
        found = []
        for _, _, itc in self.blocks(direction):
            order = np.argsort(-itc, axis=1, kind="stable")[:, :count]
            found.append((order, np.take_along_axis(itc, order, axis=1)))
        return tuple(np.concatenate(parts) for parts in zip(*found))

    def lavis_ranks(self, direction: str, targets: Targets) -> np.ndarray:
        """Ranks of the first target of each query by LAVIS's matrix; see :func:`lavis_ranks`."""
        blocks = self.blocks(direction)
        return np.concatenate([lavis_ranks(self._lavis(direction, *block), targets[rows]) for rows, *block in blocks])

    def matrix(self, direction: str) -> np.ndarray:
        """LAVIS's score matrix, (queries, candidates): -100 where not reranked; ITC if nothing was."""
        return np.concatenate([self._lavis(direction, *block) for _, *block in self.blocks(direction)])

    def _lavis(self, direction: str, scores: np.ndarray, itc: np.ndarray) -> np.ndarray:
        reranked = self._sides(direction)[2].indices.shape[1] > 0
        return np.where(np.isneginf(scores), np.float32(NOT_RERANKED), scores) if reranked else itc
