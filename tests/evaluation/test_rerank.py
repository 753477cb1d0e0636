"""Reranking in one pass: LAVIS's own two passes, plain loops over pairs, and two processes give the same."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from distributed import run_processes
from lavis.models.albef_models import compute_sim_matrix
from tiny import COLORS, SHAPES, SIZES, activate
from tiny_retrieval import distinct_model, plain_scores
from torch.utils.data import DataLoader, Dataset

from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.adapters.merging import merge_adapter, unmerge_adapter
from lavis_aurora.common.errors import Diverged
from lavis_aurora.evaluation import encode, rerank
from lavis_aurora.evaluation.encode import ImageTokens, all_gather_rows, broadcast, rank_indices
from lavis_aurora.evaluation.rerank import retrieval_scores
from lavis_aurora.evaluation.scores import NOT_RERANKED, RetrievalScores
from lavis_aurora.models import scoring
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora

SIDE = 48
TOKENS = 10  # of a picture of the tiny model
SAME = {"rtol": 0, "atol": 1e-4}


class Pictures(Dataset):
    """What retrieval reads of LAVIS's RetrievalEvalDataset; captions of 1 to 60 words.

    Args:
        images: how many.
        captions_each: captions of each.
        frames: of each video; 0 for pictures.
        twins: every second image, and its captions, is the one before.
    """

    def __init__(self, images: int, captions_each: int = 1, frames: int = 0, twins: bool = False, seed: int = 0):
        rng = np.random.default_rng(seed)
        shape = (images, 3, frames, SIDE, SIDE) if frames else (images, 3, SIDE, SIDE)
        self.pixels = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        self.key = "video" if frames else "image"
        self.image = [f"{i}.jpg" for i in range(images)]
        self.text: list[str] = []
        lengths = (1, 60, 3, 17, 7, 33, 34, 2)
        for i in range(images * captions_each):
            words = rng.choice(COLORS + SHAPES + SIZES, lengths[i % len(lengths)])
            self.text.append(" ".join([COLORS[i % len(COLORS)], SHAPES[i // len(COLORS) % len(SHAPES)], *words]))
        if twins:
            self.pixels[1::2] = self.pixels[: images - 1 : 2]
            self.text = [self.text[i - i // captions_each % 2 * captions_each] for i in range(len(self.text))]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict:
        return {self.key: self.pixels[index], "index": index}


def _loader(*args, **kwargs) -> DataLoader:
    return DataLoader(Pictures(*args, **kwargs), batch_size=3)


def _model(**changes) -> BlipRetrievalAurora:
    """Everything active, and scores that differ by much more than the tolerance."""
    return activate(distinct_model(**changes), std=0.25).eval()


def _matrices(scores: RetrievalScores) -> tuple[np.ndarray, np.ndarray]:
    return scores.matrix("image_to_text"), scores.matrix("text_to_image")


def _itc(scores: RetrievalScores) -> np.ndarray:
    return scores.image_feats @ scores.text_feats.T


def _k(scores: RetrievalScores) -> tuple[int, int]:
    return scores.i2t.indices.shape[1], scores.t2i.indices.shape[1]


@pytest.fixture(scope="module")
def model() -> BlipRetrievalAurora:
    return _model()


def _plain(model: BlipRetrievalAurora, dataset: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """(ITC, ITM) of every image with every text, a pair at a time."""
    pairs = [[plain_scores(model, image, text) for text in dataset.text] for image in dataset.pixels]
    both = torch.tensor([[(itc, logits[1]) for itc, logits in row] for row in pairs]).numpy()
    return both[..., 0], both[..., 1]


def test_the_model_of_these_tests_is_wholly_active(model: BlipRetrievalAurora) -> None:
    """Every part of the adapter changes the scores by much more than the tolerance."""
    loader = _loader(4)
    scores = retrieval_scores(model, loader, k_test=4).matrix("image_to_text")
    assert scores.std() > 0.1
    groups = {group for group, _ in adapter_parameters(model)}
    assert groups == {"factors U, V", "slot factors P", "coefficients lambda", "gate"}
    for group in groups:
        parameters = [p for name, p in adapter_parameters(model) if name == group]
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.5)
        changed = retrieval_scores(model, loader, k_test=4).matrix("image_to_text")
        with torch.no_grad():
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)
        assert np.abs(changed - scores).max() > 100 * SAME["atol"], group


def _random_set(seed: int) -> tuple[int, int, int]:
    """Images, captions of each, and a k_test that LAVIS can do."""
    rng = np.random.default_rng(seed)
    images, captions_each = int(rng.integers(2, 9)), int(rng.integers(1, 4))
    return images, captions_each, int(rng.integers(1, images + 1))


@pytest.mark.parametrize("seed", range(8))
def test_scores_equal_lavis(model: BlipRetrievalAurora, seed: int) -> None:
    images, captions_each, k_test = _random_set(seed)
    loader = _loader(images, captions_each, seed=seed)
    with torch.no_grad():
        theirs = compute_sim_matrix(model, loader, k_test=k_test)
    scores = retrieval_scores(model, loader, k_test=k_test)
    assert _k(scores) == (k_test, k_test)
    for ours, lavis in zip(_matrices(scores), theirs):
        assert ((ours != NOT_RERANKED).sum(1) == k_test).all()
        np.testing.assert_allclose(ours, lavis, **SAME)


@pytest.mark.parametrize("form", ["none", "convex", "affine"])
def test_scores_equal_lavis_with_other_gates(form: str) -> None:
    model, loader = _model(gate={"form": form}), _loader(4, 2)
    with torch.no_grad():
        theirs = compute_sim_matrix(model, loader, k_test=3)
    for ours, lavis in zip(_matrices(retrieval_scores(model, loader, k_test=3)), theirs):
        np.testing.assert_allclose(ours, lavis, **SAME)


def test_ties_may_choose_other_candidates_but_no_other_scores(model: BlipRetrievalAurora) -> None:
    loader = _loader(6, 2, twins=True)
    with torch.no_grad():
        theirs = compute_sim_matrix(model, loader, k_test=3)
    for ours, lavis in zip(_matrices(retrieval_scores(model, loader, k_test=3)), theirs):
        both = (ours != NOT_RERANKED) & (lavis != NOT_RERANKED)
        np.testing.assert_allclose(ours[both], lavis[both], **SAME)
        # Candidates that tie are alike, so that the sorted scores of a query are the same.
        np.testing.assert_allclose(np.sort(ours, axis=1), np.sort(lavis, axis=1), **SAME)


class _AsLavisSeesVideos:
    """The model for LAVIS's function, which knows pictures alone: one with the tokens of all frames is a video."""

    def __init__(self, model: BlipRetrievalAurora) -> None:
        self.model = model
        self.visual_encoder = self

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def forward_features(self, video: torch.Tensor) -> torch.Tensor:
        frames = [self.model.visual_encoder.forward_features(video[:, :, t]) for t in range(video.shape[2])]
        self.pooled = torch.stack([frame[:, 0] for frame in frames]).mean(dim=0)
        return torch.cat(frames, dim=1)

    def vision_proj(self, _first_token: torch.Tensor) -> torch.Tensor:
        return self.model.vision_proj(self.pooled)


def test_videos_score_as_lavis_scores_the_tokens_of_all_frames(model: BlipRetrievalAurora) -> None:
    loader = _loader(5, 2, frames=3)
    ours = _matrices(retrieval_scores(model, loader, k_test=3))
    loader.dataset.key = "image"
    with torch.no_grad():
        theirs = compute_sim_matrix(_AsLavisSeesVideos(model), loader, k_test=3)
    for one, lavis in zip(ours, theirs):
        np.testing.assert_allclose(one, lavis, **SAME)


def test_the_models_own_methods_give_these_scores(model: BlipRetrievalAurora) -> None:
    loader = _loader(4, 2)
    scores = retrieval_scores(model, loader, k_test=2, itc_weight=0.5)
    ours = model.compute_sim_matrix(loader, task_cfg={"k_test": 2, "itc_weight": 0.5})
    for one, other in zip(ours, _matrices(scores)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("images", "captions_each"), [(3, 2), (1, 1), (1, 3)])
def test_k_test_beyond_the_set_scores_every_pair(
    model: BlipRetrievalAurora, images: int, captions_each: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = _loader(images, captions_each)
    itc, itm = _plain(model, loader.dataset)
    with caplog.at_level(logging.INFO):
        scores = retrieval_scores(model, loader, k_test=1000)
    assert "run.k_test: 1000 is cut" in caplog.text
    assert _k(scores) == (images * captions_each, images)
    np.testing.assert_allclose(_itc(scores), itc, **SAME)
    for ours, expected in zip(_matrices(scores), (itm + itc, (itm + itc).T)):
        np.testing.assert_allclose(ours, expected, **SAME)


def test_unequal_k_in_the_two_directions(model: BlipRetrievalAurora) -> None:
    loader = _loader(2, 4)
    itc, itm = _plain(model, loader.dataset)
    scores = retrieval_scores(model, loader, k_test=5)
    assert _k(scores) == (5, 2)
    i2t, t2i = _matrices(scores)
    wanted = itc >= np.sort(itc, axis=1)[:, -5, None]
    np.testing.assert_array_equal(i2t != NOT_RERANKED, wanted)
    np.testing.assert_allclose(i2t[wanted], (itm + itc)[wanted], **SAME)
    np.testing.assert_allclose(t2i, (itm + itc).T, **SAME)


def test_itc_weight_scales_itc_and_zero_leaves_itm_alone(model: BlipRetrievalAurora) -> None:
    loader = _loader(3, 2)
    itc, itm = _plain(model, loader.dataset)
    for weight in (0.0, 2.5):
        i2t, t2i = _matrices(retrieval_scores(model, loader, k_test=6, itc_weight=weight))
        np.testing.assert_allclose(i2t, itm + weight * itc, **SAME)
        np.testing.assert_allclose(t2i, (itm + weight * itc).T, **SAME)


def test_k_test_zero_ranks_by_itc_without_the_fusion_encoder(
    model: BlipRetrievalAurora, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = _loader(4, 2)
    expected = _itc(retrieval_scores(model, loader, k_test=4))
    monkeypatch.setattr(rerank, "_match", None)
    scores = retrieval_scores(model, loader, k_test=0)
    assert _k(scores) == (0, 0) and scores.pairs == 0
    for matrix in (_itc(scores), scores.matrix("image_to_text"), scores.matrix("text_to_image").T):
        # T I^T and (I T^T)^T are different products: on some processors they differ in the last bit.
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-6)


def test_each_pair_meets_the_fusion_encoder_once(model: BlipRetrievalAurora, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    match = rerank._match

    def counted(model, image, texts, chosen):
        seen.append(len(chosen))
        return match(model, image, texts, chosen)

    monkeypatch.setattr(rerank, "_match", counted)
    scores = retrieval_scores(model, _loader(6), k_test=2)
    i2t, t2i = _matrices(scores)
    assert sum(seen) == scores.pairs == ((i2t != NOT_RERANKED) | (t2i.T != NOT_RERANKED)).sum() < 36


def test_parts_do_not_change_scores(model: BlipRetrievalAurora, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Pictures(3, 3, frames=2)
    whole = retrieval_scores(model, DataLoader(data, batch_size=3), k_test=9)
    loader = DataLoader(data, batch_size=1)
    monkeypatch.setattr(rerank, "TEXTS_PER_PICTURE", 2)
    monkeypatch.setattr(rerank, "TOKEN_CHUNK", 20)
    monkeypatch.setattr(rerank, "QUERY_CHUNK", 2)
    for parts, one in zip(_matrices(retrieval_scores(model, loader, k_test=9)), _matrices(whole)):
        np.testing.assert_allclose(parts, one, **SAME)


@pytest.mark.parametrize("frames", [0, 2])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_the_batch_of_an_evaluation_is_that_of_the_towers(
    model: BlipRetrievalAurora, monkeypatch: pytest.MonkeyPatch, size: int, frames: int
) -> None:
    """``run.batch_size_eval`` pictures or videos, and 16 times as many texts; the scores are the same."""
    data = Pictures(20, frames=frames)
    expected = retrieval_scores(model, DataLoader(data, batch_size=4), k_test=3)
    pictures, texts = [], []
    encode_texts = model.text_encoder.forward_text
    monkeypatch.setattr(
        model.text_encoder, "forward_text", lambda x: texts.append(len(x.input_ids)) or encode_texts(x)
    )
    hook = model.visual_encoder.norm.register_forward_hook(lambda _module, x, _y: pictures.append(len(x[0])))
    scores = retrieval_scores(model, DataLoader(data, batch_size=size), k_test=3)
    hook.remove()
    each = max(1, frames)
    assert pictures == [len(part) * each for part in torch.arange(20).split(size)]
    assert texts == [len(part) for part in torch.arange(20).split(16 * size)]
    for ours, theirs in zip(_matrices(scores), _matrices(expected)):
        np.testing.assert_allclose(ours, theirs, **SAME)


def _gigabytes(images: float, frames: int = 1, size: int = 4) -> float:
    """Memory for the tokens of so many pictures."""
    return images * frames * TOKENS * 128 * size / 1e9


@pytest.mark.parametrize("frames", [0, 2])
def test_tokens_beyond_the_budget_are_encoded_again(
    model: BlipRetrievalAurora,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
    frames: int,
) -> None:
    """The budget holds 2 of 5: the other 3 meet the vision tower twice, and no score changes."""
    loader, encoded = _loader(5, 2, frames=frames), []
    plenty = retrieval_scores(model, loader, k_test=3)
    original = scoring.encode_visual

    def counted(encoder, visual):
        encoded.append(len(visual))
        return original(encoder, visual)

    monkeypatch.setattr(scoring, "encode_visual", counted)
    monkeypatch.setattr(encode, "PROGRESS_DELAY_SECONDS", 0)
    with caplog.at_level(logging.INFO):
        tight = retrieval_scores(model, loader, k_test=3, token_budget_gb=_gigabytes(2.5, max(1, frames)))
    assert sum(encoded) == 5 + 3
    assert "the tokens of 3 of 5 images or videos are beyond run.token_budget_gb" in caplog.text
    unit, bars = "video" if frames else "image", capsys.readouterr().err
    assert re.search(rf"encoding again: 100%.*({unit}/s|s/{unit})\]", bars), bars
    for ours, expected in zip(_matrices(tight), _matrices(plenty)):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, 2), (torch.bfloat16, 4)])
def test_no_more_memory_is_held_than_the_budget(model: BlipRetrievalAurora, dtype: torch.dtype, kept: int) -> None:
    budget = _gigabytes(2.25)
    with torch.no_grad():
        images = ImageTokens(model, _loader(5), budget, dtype)
        held = {tokens.untyped_storage().data_ptr(): tokens.untyped_storage() for tokens in images._cache.values()}
        assert len(held) == kept
        assert sum(storage.nbytes() for storage in held.values()) <= budget * 1e9
        tokens = dict(images.iter_tokens([4, 0, 2]))
        assert set(tokens) == {0, 2, 4}
        assert all(torch.equal(x, x.to(dtype).float()) for x in tokens.values())
        # Given up once used.
        assert len(images._cache) == kept - sum(i < kept for i in tokens)


def test_tokens_in_bfloat16_score_closely_and_alike_kept_or_not(model: BlipRetrievalAurora) -> None:
    loader = _loader(5, 2)
    exact = retrieval_scores(model, loader, k_test=3)
    kept, again = (
        retrieval_scores(model, loader, k_test=3, token_dtype=torch.bfloat16, token_budget_gb=budget)
        for budget in (1, 0)
    )
    for direction in ("i2t", "t2i"):
        one, other, full = (getattr(scores, direction).scores for scores in (kept, again, exact))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        assert 0 < np.abs(one - full).max() < 0.02 * full.std() + 0.02


def test_evaluation_in_bfloat16(model: BlipRetrievalAurora) -> None:
    loader = _loader(5, 2)
    exact, half = (retrieval_scores(model, loader, k_test=10, bf16=bf16) for bf16 in (False, True))
    for ours, full in zip(_matrices(half), _matrices(exact)):
        assert ours.dtype == np.float32
        assert np.corrcoef(ours.ravel(), full.ravel())[0, 1] > 0.98
        assert not np.array_equal(ours, full)


def test_a_merged_adapter_scores_alike() -> None:
    model, loader = _model(), _loader(4, 2)
    apart = retrieval_scores(model, loader, k_test=3)
    merge_adapter(model)
    for ours, expected in zip(_matrices(retrieval_scores(model, loader, k_test=3)), _matrices(apart)):
        np.testing.assert_allclose(ours, expected, **SAME)
    unmerge_adapter(model)
    for ours, expected in zip(_matrices(retrieval_scores(model, loader, k_test=3)), _matrices(apart)):
        np.testing.assert_array_equal(ours, expected)


def test_scores_that_are_no_numbers_are_refused() -> None:
    model = _model()
    torch.nn.init.constant_(model.itm_head.bias, float("nan"))
    with pytest.raises(Diverged, match="12 features or scores are NaN"):
        retrieval_scores(model, _loader(3), k_test=2)


def test_features_that_are_no_numbers_are_refused_before_pairs_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    torch.nn.init.constant_(model.text_proj.bias, float("inf"))
    monkeypatch.setattr(rerank, "score_pairs", lambda *_: pytest.fail("hours"))
    with pytest.raises(Diverged, match="features or scores are NaN"):
        retrieval_scores(model, _loader(3), k_test=2)


# (images, captions of each, k_test, budget in pictures): an odd number of images, again with some encoded twice,
# fewer images than processes, no reranking.
SHARED = [(5, 2, 3, 100), (5, 1, 2, 1.5), (1, 2, 2, 100), (3, 1, 0, 100)]


def _of_two_processes(rank: int) -> tuple[list[RetrievalScores], list[torch.Tensor], int]:
    model = _model()
    scores = [
        retrieval_scores(model, _loader(*sizes), k_test=k, token_budget_gb=_gigabytes(b)) for *sizes, k, b in SHARED
    ]
    gathered = []
    for total in (5, 1, 0):
        share = torch.tensor(rank_indices(total), dtype=torch.long)
        gathered.append(all_gather_rows(share, 2.0 * share.unsqueeze(1), total))
    gathered.append(all_gather_rows(torch.tensor([rank]), torch.ones(1), 3))
    return scores, gathered, broadcast(rank)


@pytest.fixture(scope="module")
def two_processes() -> list[tuple]:
    """What :func:`_of_two_processes` gives, by rank."""
    return run_processes(2, _of_two_processes)


@pytest.mark.parametrize("rank", [0, 1])
def test_uneven_shares_are_gathered_in_order(two_processes: list[tuple], rank: int) -> None:
    _, (five, one, none, incomplete), main = two_processes[rank]
    assert five.tolist() == [[0.0], [2.0], [4.0], [6.0], [8.0]]
    assert one.tolist() == [[0.0]] and none.shape == (0, 1)
    assert incomplete.isnan().tolist() == [False, False, True]
    assert main == 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", range(len(SHARED)), ids=str)
def test_two_processes_give_the_scores_of_one(
    model: BlipRetrievalAurora, two_processes: list[tuple], case: int, rank: int
) -> None:
    *sizes, k_test, _ = SHARED[case]
    alone = retrieval_scores(model, _loader(*sizes), k_test=k_test)
    shared = two_processes[rank][0][case]
    assert (_k(shared), shared.pairs) == (_k(alone), alone.pairs)
    np.testing.assert_allclose(_itc(shared), _itc(alone), rtol=0, atol=1e-5)
    for ours, expected in zip(_matrices(shared), _matrices(alone)):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
