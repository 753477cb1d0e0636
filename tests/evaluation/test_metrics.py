"""Ranks, recalls and chance level: plain loops, LAVIS's own numbers, and inputs that must be refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from lavis.tasks.retrieval import RetrievalTask

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.evaluation.scores import (
    TOP,
    chance_recall,
    lavis_ranks,
    own_targets,
    recall_metrics,
    right_targets,
    target_ranks,
)

UNSCORED = float("-inf")


@st.composite
def retrievals(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """(scores, targets, fallback) with many ties and unscored pairs."""
    queries, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 13))
    values = st.sampled_from([UNSCORED, -1.5, 0.0, 1.0, 2.0])
    row = st.lists(values, min_size=candidates, max_size=candidates)
    scores = draw(st.lists(row, min_size=queries, max_size=queries))
    small = st.lists(st.integers(0, 3), min_size=candidates, max_size=candidates)
    fallback = draw(st.lists(small, min_size=queries, max_size=queries))
    right = st.lists(st.integers(0, candidates - 1), min_size=1, max_size=candidates, unique=True)
    targets = draw(st.lists(right, min_size=queries, max_size=queries))
    return np.array(scores, dtype=np.float32), targets, np.array(fallback, dtype=np.float32)


def _plain_ranks(scores: np.ndarray, targets: list[list[int]], fallback: np.ndarray) -> list[int]:
    """For each query: the wrong candidates that are not strictly worse than the best target."""
    ranks = []
    for row, right, second in zip(scores, targets, fallback):
        order = [(0, b) if a == UNSCORED else (1, a) for a, b in zip(row, second)]
        best = max(order[i] for i in right)
        ranks.append(sum(order[i] >= best for i in range(len(order)) if i not in right))
    return ranks


@settings(deadline=None)
@given(retrievals())
def test_ranks_equal_plain_loops(case: tuple[np.ndarray, list[list[int]], np.ndarray]) -> None:
    assert target_ranks(*case).tolist() == _plain_ranks(*case)


@settings(deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=20))
def test_recalls_equal_plain_loops(ranks: list[int]) -> None:
    metrics = recall_metrics(np.array(ranks))
    for k in TOP:
        assert metrics[f"r{k}"] == pytest.approx(100 * sum(rank < k for rank in ranks) / len(ranks))
    places = sorted(rank + 1 for rank in ranks)
    middle = (places[(len(places) - 1) // 2] + places[len(places) // 2]) / 2
    assert metrics["median_rank"] == middle
    assert set(metrics) == {"r1", "r5", "r10", "median_rank"}


@pytest.fixture
def output_dir(tmp_path: Path) -> Iterator[Path]:
    """LAVIS writes its metrics to the registered output folder."""
    before = registry.mapping["paths"].pop("output_dir", None)
    registry.register_path("output_dir", str(tmp_path))
    yield tmp_path
    registry.mapping["paths"].pop("output_dir")
    if before is not None:
        registry.register_path("output_dir", before)


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_recalls_equal_lavis_without_ties(output_dir: Path, seed: int, captions: int) -> None:
    rng = np.random.default_rng(seed)
    images = 20
    texts = images * captions
    txt2img = {text: text // captions for text in range(texts)}
    img2txt = {image: [text for text in txt2img if txt2img[text] == image] for image in range(images)}
    # A permutation has no ties; the right pairs get a push, so that recalls lie between 0 and 100.
    i2t = rng.permutation(images * texts).reshape(images, texts).astype(np.float64)
    t2i = rng.permutation(images * texts).reshape(texts, images).astype(np.float64)
    for text, image in txt2img.items():
        i2t[image, text] += rng.choice([0, images * texts // 2 + 0.5])
        t2i[text, image] += rng.choice([0, images * texts // 2 + 0.5])
    theirs = RetrievalTask._report_metrics(i2t, t2i, txt2img, img2txt)
    assert (output_dir / "evaluate.txt").is_file()
    ours = {
        "txt": recall_metrics(target_ranks(i2t, [img2txt[i] for i in range(images)], i2t)),
        "img": recall_metrics(target_ranks(t2i, [[txt2img[i]] for i in range(texts)], t2i)),
    }
    for direction, metrics in ours.items():
        assert metrics["r10"] > 0 and metrics["r1"] < 100
        for k in TOP:
            assert metrics[f"r{k}"] == pytest.approx(theirs[f"{direction}_r{k}"])


@pytest.mark.parametrize("seed", range(5))
def test_ranks_as_lavis_counts_equal_lavis_with_ties(output_dir: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    img2txt, txt2img = {i: [2 * i, 2 * i + 1] for i in range(20)}, {i: i // 2 for i in range(40)}
    i2t = rng.integers(-2, 12, (20, 40)).astype(np.float32)
    t2i = rng.integers(-2, 12, (40, 20)).astype(np.float32)
    theirs = RetrievalTask._report_metrics(i2t, t2i, txt2img, img2txt)
    for matrix, targets, direction in zip((i2t, t2i), own_targets(img2txt, txt2img), ("txt", "img")):
        ours = recall_metrics(lavis_ranks(matrix, targets))
        for k in TOP:
            assert ours[f"r{k}"] == pytest.approx(theirs[f"{direction}_r{k}"])


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3), min_size=1, max_size=5))
def test_what_equals_a_right_text_is_right(captions: list[list[str]]) -> None:
    texts = [text for own in captions for text in own]
    owner = [image for image, own in enumerate(captions) for _ in own]
    img2txt = {i: [t for t in range(len(texts)) if owner[t] == i] for i in range(len(captions))}
    txt2img = dict(enumerate(owner))
    i2t, t2i = right_targets(texts, img2txt, txt2img)
    for image, own in enumerate(captions):
        assert sorted(i2t[image]) == [t for t, text in enumerate(texts) if text in own]
    for text, images in zip(texts, t2i):
        assert sorted(images) == [image for image, own in enumerate(captions) if text in own]
    if len({(text, image) for text, image in zip(texts, owner)}) == len(set(texts)):
        assert (i2t, t2i) == own_targets(img2txt, txt2img), "nothing is shared: LAVIS's own"


@pytest.mark.parametrize("value", [0.0, -3.0, UNSCORED])
def test_a_constant_score_is_worth_nothing(value: float) -> None:
    constant = np.full((3, 14), value, dtype=np.float32)
    ranks = target_ranks(constant, [[0], [13], [2, 5, 7]], np.zeros_like(constant))
    assert ranks.tolist() == [13, 13, 11]
    assert recall_metrics(ranks) == {"r1": 0, "r5": 0, "r10": 0, "median_rank": 14}


def test_a_query_with_right_candidates_only_is_found_whatever_the_scores() -> None:
    constant = np.zeros((2, 3))
    assert target_ranks(constant, [[0, 1, 2], [2, 1, 0]], constant).tolist() == [0, 0]


def test_a_tie_with_one_wrong_candidate_counts_against_the_model() -> None:
    assert target_ranks(np.array([[1.0, 1.0, 0.0]]), [[0]], np.array([[9.0, 0.0, 0.0]])).tolist() == [1]


def test_unscored_pairs_come_last_in_the_order_of_the_fallback() -> None:
    scores = np.array([[5.0, UNSCORED, UNSCORED, UNSCORED]] * 5)
    fallback = np.array([[0.0, 3.0, 2.0, 1.0]] * 5)
    assert target_ranks(scores, [[0], [1], [2], [3], [3, 1]], fallback).tolist() == [0, 1, 2, 3, 1]


def test_an_infinite_score_is_the_best_and_not_an_unscored_pair() -> None:
    scores = np.array([[float("inf"), 1.0, UNSCORED]] * 3)
    assert target_ranks(scores, [[0], [1], [2]], np.array([[0.0, 0.0, 1.0]] * 3)).tolist() == [0, 1, 2]


def test_a_query_without_target_is_refused_by_its_number() -> None:
    with pytest.raises(AuroraError, match="query 1 has no target"):
        target_ranks(np.zeros((2, 3)), [[0], []], np.zeros((2, 3)))


@pytest.mark.parametrize("candidates", [1, 3, 5, 7, 10, 12])
def test_chance_equals_enumeration_of_every_ranking(candidates: int) -> None:
    targets = [list(range(size)) for size in (1, 1, 2, 4) if size <= candidates]
    chance = chance_recall(targets, candidates)
    for k in TOP:
        hits = []
        for right in targets:
            seen = list(combinations(range(candidates), min(k, candidates)))
            hits.append(sum(bool({*top} & {*right}) for top in seen) / len(seen))
        assert chance[f"r{k}"] == pytest.approx(100 * sum(hits) / len(hits))


def test_chance_equals_the_mean_of_random_rankings() -> None:
    rng = np.random.default_rng(0)
    targets = [[query % 50, (query + 7) % 50] for query in range(2000)]
    scores = rng.random((2000, 50))
    found = recall_metrics(target_ranks(scores, targets, scores))
    expected = chance_recall(targets, 50)
    for k in TOP:
        assert found[f"r{k}"] == pytest.approx(expected[f"r{k}"], abs=3.5)
