"""Ranking a long list of answers, against LAVIS's own."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from lavis.models.blip_models.blip_vqa import BlipVQA
from tiny import COLORS, SHAPES, SIZES, activate
from tiny_vqa import vqa_batch, vqa_model

from lavis_aurora.common.errors import Diverged
from lavis_aurora.evaluation.answers import AnswerList, rank_answers

SHORT = [*COLORS, *SHAPES, "yes", "no", "two"]
LONG = [
    " ".join(words) for words in product(("a", "the", "one"), SIZES, COLORS, SHAPES, ("left", "right", "up", "down"))
]
ANSWERS = [*SHORT, *LONG][:3000]


def lavis_answers(model: BlipVQA, samples: dict, answers: list[str], k: int) -> list[str]:
    with torch.no_grad():
        return BlipVQA._rank_answers(model, dict(samples), answers, k)


@pytest.mark.parametrize("k", [1, pytest.param(128, marks=pytest.mark.slow)])
def test_three_thousand_answers_are_ranked_as_by_lavis(k):
    model = activate(vqa_model()).eval()
    assert len(ANSWERS) == 3000
    found = set()
    for seed in range(2 if k > 1 else 1):
        samples = vqa_batch(seed=seed)
        ours = model.predict_answers(samples, answer_list=ANSWERS, num_ans_candidates=k)
        assert ours == lavis_answers(model, samples, ANSWERS, k)
        found.update(ours)
    assert len(found) > 1


@pytest.mark.parametrize(("method", "beams"), [("rank", 1), ("generate", 1), ("generate", 3)])
def test_nan_scores_are_refused(method, beams):
    options = dict(answer_list=SHORT, inference_method=method, num_beams=beams)
    model = vqa_model().eval()
    samples = vqa_batch()
    good = model.predict_answers(samples, **options)
    assert len(good) == 4
    samples["image"][1, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"^\d+ scores of answers are NaN; none is chosen"):
        model.predict_answers(samples, **options)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunks_bound_the_batch_and_keep_the_result(chunk):
    model = activate(vqa_model(rank_chunk=chunk)).eval()
    samples, k = vqa_batch(), 16
    sizes = []
    model.text_decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    ours = model.predict_answers(samples, answer_list=ANSWERS[:200], num_ans_candidates=k)
    assert max(sizes) == max(4, min(chunk, 4 * k)) and sum(sizes) == 4 + 4 * k
    assert ours == lavis_answers(model, samples, ANSWERS[:200], k)


@torch.no_grad()
def test_all_answers_scored_one_by_one_give_the_same():
    """Without LAVIS's code: the likeliest of all answers, each alone, without any padding."""
    model = activate(vqa_model()).eval()
    samples, answers = vqa_batch(), SHORT[::2] + LONG[::300]
    states = model.forward_encoder(samples)[0].last_hidden_state
    mask = samples["tokenized_text"].attention_mask
    losses = torch.empty(4, len(answers))
    for i, j in product(range(4), range(len(answers))):
        ids = model.tokenizer([answers[j]], return_tensors="pt").input_ids
        ids[:, 0] = model.tokenizer.bos_token_id
        text = mask[i].sum()
        logits = model.text_decoder(ids, encoder_hidden_states=states[i : i + 1, :text], return_dict=True).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum", label_smoothing=0.1)
        losses[i, j] = loss
    listed = AnswerList(answers, model.tokenizer, 64)
    best, confidences = rank_answers(model.text_decoder, states, mask, listed, len(answers), chunk=50)
    assert best == losses.argmin(dim=1).tolist()
    assert confidences == pytest.approx((-losses).softmax(dim=1).amax(dim=1).tolist(), rel=1e-3)


def test_fewer_answers_than_candidates():
    model = vqa_model().eval()
    assert set(model.predict_answers(vqa_batch(), answer_list=["yes", "no"])) <= {"yes", "no"}
    assert model.predict_answers(vqa_batch(), answer_list=["yes"]) == ["yes"] * 4


def test_an_answer_that_is_listed_twice_is_one():
    """No candidate's place is lost to it, and no confidence."""
    model = activate(vqa_model()).eval()
    once, twice = ANSWERS[:6], [one for answer in ANSWERS[:6] for one in (answer, answer, answer.upper())]
    found = [
        model.predict_answers(vqa_batch(), answer_list=listed, num_ans_candidates=4, return_scores=True)
        for listed in (once, twice)
    ]
    assert found[0] == found[1]


def test_list_is_tokenized_once_and_again_when_it_changes():
    model = vqa_model().eval()
    answers = ["yes", "no"]
    model.predict_answers(vqa_batch(), answer_list=answers)
    first = model._answers
    model.predict_answers(vqa_batch(), answer_list=list(answers))
    assert model._answers is first
    answers[0] = "two"
    assert set(model.predict_answers(vqa_batch(), answer_list=answers)) <= {"two", "no"}
