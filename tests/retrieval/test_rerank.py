"""Reranking in one pass: LAVIS's own two passes, plain loops over pairs, and two processes give the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import run_processes
from lavis.models.albef_models import compute_sim_matrix
from tiny import COLORS, SHAPES, SIZES, activate, tiny_model
from torch.utils.data import DataLoader, Dataset

from lavis_aurora.mode_approx.trainable import adapter_parameters
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.retrieval import rerank
from lavis_aurora.retrieval.rerank import NOT_RERANKED, RetrievalScores, retrieval_scores

SIDE = 48
SAME = {"rtol": 0, "atol": 1e-4}


class Pictures(Dataset):
    """What retrieval reads of LAVIS's RetrievalEvalDataset; captions of 1 to 60 words."""

    def __init__(self, images: int, captions_each: int = 1, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.pixels = torch.from_numpy(rng.standard_normal((images, 3, SIDE, SIDE)).astype(np.float32))
        self.image = [f"{i}.jpg" for i in range(images)]
        self.text: list[str] = []
        self.txt2img: dict[int, int] = {}
        self.img2txt: dict[int, list[int]] = {i: [] for i in range(images)}
        lengths = (1, 60, 3, 17, 7, 33, 34, 2)
        for i in range(images * captions_each):
            words = rng.choice(COLORS + SHAPES + SIZES, lengths[i % len(lengths)])
            self.text.append(" ".join([COLORS[i % len(COLORS)], SHAPES[i // len(COLORS) % len(SHAPES)], *words]))
            self.txt2img[i] = i // captions_each
            self.img2txt[i // captions_each].append(i)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.pixels[index], "index": index}


def _loader(images: int, captions_each: int = 1) -> DataLoader:
    return DataLoader(Pictures(images, captions_each), batch_size=3)


def _model() -> BlipRetrievalAurora:
    """Everything active, and scores that differ by much more than the tolerance."""
    model = activate(tiny_model(tuning="aurora"), std=0.25).eval()
    with torch.no_grad():
        for head in (model.vision_proj, model.text_proj, model.itm_head):
            torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def model() -> BlipRetrievalAurora:
    return _model()


@torch.no_grad()
def _plain(model: BlipRetrievalAurora, dataset: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """(ITC, ITM) of every image with every text, a pair at a time."""
    itc = np.zeros((len(dataset.image), len(dataset.text)))
    itm = np.zeros_like(itc)
    for i, pixels in enumerate(dataset.pixels):
        embeds = model.visual_encoder.forward_features(pixels[None])
        image_feat = F.normalize(model.vision_proj(embeds[:, 0]), dim=-1)
        for j, caption in enumerate(dataset.text):
            text = model.tokenizer(caption, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
            hidden = model.text_encoder.forward_text(text).last_hidden_state
            itc[i, j] = image_feat @ F.normalize(model.text_proj(hidden[:, 0]), dim=-1).t()
            text.input_ids[:, 0] = model.tokenizer.enc_token_id
            fused = model.text_encoder(
                text.input_ids,
                attention_mask=text.attention_mask,
                encoder_hidden_states=embeds,
                encoder_attention_mask=torch.ones(embeds.shape[:-1], dtype=torch.long),
                return_dict=True,
            )
            itm[i, j] = model.itm_head(fused.last_hidden_state[:, 0])[0, 1]
    return itc, itm


def test_the_model_of_these_tests_is_wholly_active(model: BlipRetrievalAurora) -> None:
    """Every part of the adapter changes the scores by much more than the tolerance."""
    loader = _loader(4)
    scores = retrieval_scores(model, loader, k_test=4).i2t
    assert scores.std() > 0.1
    groups = {group for group, _ in adapter_parameters(model)}
    assert groups == {"factors U, V", "slot factors P", "coefficients lambda", "gate"}
    for group in groups:
        parameters = [p for name, p in adapter_parameters(model) if name == group]
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.5)
        changed = retrieval_scores(model, loader, k_test=4).i2t
        with torch.no_grad():
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)
        assert np.abs(changed - scores).max() > 100 * SAME["atol"], group


@pytest.mark.parametrize(
    ("images", "captions_each", "k_test"), [(5, 1, 2), (6, 1, 6), (4, 3, 4), (7, 2, 1), (4, 5, 3)]
)
def test_scores_equal_lavis(model: BlipRetrievalAurora, images: int, captions_each: int, k_test: int) -> None:
    loader = _loader(images, captions_each)
    with torch.no_grad():
        i2t, t2i = compute_sim_matrix(model, loader, k_test=k_test)
    scores = retrieval_scores(model, loader, k_test=k_test)
    assert (scores.k_i2t, scores.k_t2i) == (k_test, k_test)
    assert ((scores.i2t != NOT_RERANKED).sum(1) == k_test).all()
    assert ((scores.t2i != NOT_RERANKED).sum(1) == k_test).all()
    np.testing.assert_allclose(scores.i2t, i2t, **SAME)
    np.testing.assert_allclose(scores.t2i, t2i, **SAME)


def test_the_models_own_methods_give_these_scores(model: BlipRetrievalAurora) -> None:
    loader = _loader(4, 2)
    scores = retrieval_scores(model, loader, k_test=2, itc_weight=0.5)
    i2t, t2i = model.compute_sim_matrix(loader, task_cfg={"k_test": 2, "itc_weight": 0.5})
    np.testing.assert_array_equal(i2t, scores.i2t)
    np.testing.assert_array_equal(t2i, scores.t2i)


@pytest.mark.parametrize(("images", "captions_each"), [(3, 2), (1, 1), (1, 3)])
def test_k_test_beyond_the_set_scores_every_pair(model: BlipRetrievalAurora, images: int, captions_each: int) -> None:
    loader = _loader(images, captions_each)
    itc, itm = _plain(model, loader.dataset)
    scores = retrieval_scores(model, loader, k_test=1000)
    assert (scores.k_i2t, scores.k_t2i) == (images * captions_each, images)
    np.testing.assert_allclose(scores.itc, itc, **SAME)
    np.testing.assert_allclose(scores.i2t, itm + itc, **SAME)
    np.testing.assert_allclose(scores.t2i, (itm + itc).T, **SAME)


def test_itc_weight_scales_itc_and_zero_leaves_itm_alone(model: BlipRetrievalAurora) -> None:
    loader = _loader(3, 2)
    itc, itm = _plain(model, loader.dataset)
    for weight in (0.0, 2.5):
        scores = retrieval_scores(model, loader, k_test=6, itc_weight=weight)
        np.testing.assert_allclose(scores.i2t, itm + weight * itc, **SAME)
        np.testing.assert_allclose(scores.t2i, (itm + weight * itc).T, **SAME)


def test_k_test_zero_ranks_by_itc_without_the_fusion_encoder(
    model: BlipRetrievalAurora, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = _loader(4, 2)
    expected = retrieval_scores(model, loader, k_test=4).itc
    monkeypatch.setattr(rerank, "_match", None)
    scores = retrieval_scores(model, loader, k_test=0)
    assert (scores.k_i2t, scores.k_t2i) == (0, 0)
    for matrix in (scores.itc, scores.i2t, scores.t2i.T):
        np.testing.assert_array_equal(matrix, expected)


def test_each_pair_meets_the_fusion_encoder_once(model: BlipRetrievalAurora, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    match = rerank._match

    def counted(model: BlipRetrievalAurora, tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor):
        seen.append(len(ids))
        return match(model, tokens, ids, mask)

    monkeypatch.setattr(rerank, "_match", counted)
    scores = retrieval_scores(model, _loader(6), k_test=2)
    wanted = (scores.i2t != NOT_RERANKED) | (scores.t2i.T != NOT_RERANKED)
    assert sum(seen) == wanted.sum() < 36


def test_batches_of_texts_and_pairs_do_not_change_scores(
    model: BlipRetrievalAurora, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = _loader(3, 3)
    whole = retrieval_scores(model, loader, k_test=9)
    monkeypatch.setattr(rerank, "TEXT_BATCH", 2)
    monkeypatch.setattr(rerank, "PAIR_BATCH", 2)
    parts = retrieval_scores(model, loader, k_test=9)
    np.testing.assert_allclose(parts.i2t, whole.i2t, **SAME)
    np.testing.assert_allclose(parts.t2i, whole.t2i, **SAME)


# (images, captions of each, k_test): an odd number of images, fewer images than processes, no reranking.
SHARED = [(5, 2, 3), (1, 2, 2), (3, 1, 0)]


def _scores_of_shared(rank: int) -> list[RetrievalScores]:
    model = _model()
    return [retrieval_scores(model, _loader(*case[:2]), k_test=case[2]) for case in SHARED]


@pytest.fixture(scope="module")
def two_processes() -> list[list[RetrievalScores]]:
    """By rank, then by case."""
    return run_processes(2, _scores_of_shared)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", range(len(SHARED)), ids=str)
def test_two_processes_give_the_scores_of_one(
    model: BlipRetrievalAurora, two_processes: list[list[RetrievalScores]], case: int, rank: int
) -> None:
    images, captions_each, k_test = SHARED[case]
    alone = retrieval_scores(model, _loader(images, captions_each), k_test=k_test)
    shared = two_processes[rank][case]
    assert (shared.k_i2t, shared.k_t2i) == (alone.k_i2t, alone.k_t2i)
    for name in ("itc", "i2t", "t2i"):
        np.testing.assert_allclose(getattr(shared, name), getattr(alone, name), rtol=0, atol=1e-5, err_msg=name)
