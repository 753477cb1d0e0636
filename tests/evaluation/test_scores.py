"""Scores in blocks of queries, against the whole matrices."""

from __future__ import annotations

import numpy as np
import pytest

from lavis_aurora.common.errors import Diverged
from lavis_aurora.evaluation import scores as module
from lavis_aurora.evaluation.scores import NOT_RERANKED, Candidates, RetrievalScores, target_ranks

IMAGES, TEXTS = 5, 7


@pytest.fixture(params=[2, 512])
def scores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RetrievalScores:
    monkeypatch.setattr(module, "QUERY_CHUNK", request.param)
    return _scores(k=3)


def _scores(k: int) -> RetrievalScores:
    rng = np.random.default_rng(0)
    images, texts = (rng.standard_normal((n, 4)).astype(np.float32) for n in (IMAGES, TEXTS))
    sides = []
    for itc in (images @ texts.T, texts @ images.T):
        indices = np.argsort(-itc, axis=1)[:, :k]
        sides.append(Candidates(indices, rng.standard_normal(indices.shape).astype(np.float32)))
    return RetrievalScores(images, texts, *sides)


def _whole(scores: RetrievalScores, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores with -inf where not reranked, and ITC."""
    itc = scores.image_feats @ scores.text_feats.T
    itc, side = (itc, scores.i2t) if direction == "image_to_text" else (itc.T, scores.t2i)
    matrix = np.full(itc.shape, -np.inf, dtype=np.float32)
    for query, (indices, values) in enumerate(zip(side.indices, side.scores)):
        matrix[query, indices] = values
    return matrix, itc


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_ranks_matrix_and_best_are_those_of_the_whole(scores: RetrievalScores, direction: str) -> None:
    matrix, itc = _whole(scores, direction)
    targets = [[query % itc.shape[1]] for query in range(len(itc))]
    reranked, by_itc = scores.ranks(direction, targets)
    np.testing.assert_array_equal(reranked, target_ranks(matrix, targets, fallback=itc))
    np.testing.assert_array_equal(by_itc, target_ranks(itc, targets, fallback=itc))
    np.testing.assert_array_equal(scores.matrix(direction), np.where(np.isinf(matrix), NOT_RERANKED, matrix))
    ids, values = scores.best(direction, 2)
    np.testing.assert_array_equal(ids, np.argsort(-matrix, axis=1)[:, :2])
    np.testing.assert_array_equal(values, -np.sort(-matrix, axis=1)[:, :2])
    assert scores.best(direction, 10)[0].shape == (len(itc), 3)


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_without_reranking_itc_orders(direction: str) -> None:
    scores = _scores(k=0)
    _, itc = _whole(scores, direction)
    np.testing.assert_allclose(scores.matrix(direction), itc, rtol=1e-6)
    ids, values = scores.best(direction, 2)
    np.testing.assert_array_equal(ids, np.argsort(-itc, axis=1)[:, :2])
    np.testing.assert_allclose(values, -np.sort(-itc, axis=1)[:, :2], rtol=1e-6)
    targets = [[0]] * len(itc)
    for ranks in scores.ranks(direction, targets):
        np.testing.assert_array_equal(ranks, target_ranks(itc, targets, fallback=itc))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_before_anything_is_ranked_by_it(number: float) -> None:
    """A target that scores NaN would be first by LAVIS's order; one of -inf, as if it were not reranked."""
    good = _scores(k=3)
    for array in (good.image_feats, good.text_feats, good.i2t.scores, good.t2i.scores):
        before = array.copy()
        array[1, 2] = array[0, 0] = number
        with pytest.raises(Diverged, match="2 features or scores are NaN or infinite"):
            RetrievalScores(good.image_feats, good.text_feats, good.i2t, good.t2i)
        array[:] = before
