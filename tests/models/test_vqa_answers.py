"""Answers of the question answering model: generated and ranked, batched, padded, prompted, with confidence."""

from __future__ import annotations

import pytest
import torch
from lavis.models.med import XBertLMHeadDecoder
from tiny import activate
from tiny_vqa import BEAMS, GREEDY, QUESTIONS, RANK, vqa_batch, vqa_model

from lavis_aurora import AuroraError


@torch.no_grad()
def test_answers_of_the_test_model_differ():
    """Else the tests that compare answers would compare nothing."""
    model = vqa_model().eval()
    for method in (GREEDY, RANK):
        found = {answer for seed in range(3) for answer in model.predict_answers(vqa_batch(seed=seed), **method)}
        assert len(found) > 2


@pytest.mark.parametrize("method", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_cached_decoding_gives_the_same_answers(method, monkeypatch):
    model = activate(vqa_model(), std=0.5).eval()
    lengths: list[int] = []
    model.text_decoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    cached = [model.predict_answers(vqa_batch(seed=seed), **method) for seed in range(3)]
    assert max(lengths) == 1
    monkeypatch.setattr(
        "lavis_aurora.evaluation.answers.CachedDecoder.prepare_inputs_for_generation",
        XBertLMHeadDecoder.prepare_inputs_for_generation,
    )
    assert [model.predict_answers(vqa_batch(seed=seed), **method) for seed in range(3)] == cached
    assert max(lengths) == 9
    assert len({answer for answers in cached for answer in answers}) > 4


@pytest.mark.parametrize("method", [GREEDY, BEAMS, RANK], ids=["greedy", "beams", "rank"])
@pytest.mark.parametrize("mask", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_batched_answers_are_those_of_one_by_one(method, mask):
    """Questions of one length always, of several lengths where their padding is masked."""
    model = activate(vqa_model(mask_question_padding=mask)).eval()
    alike = ["is there a red circle ?", "what color is the star ?", "how many big blue circle ?", "a b c d e f"]
    padded = mask or method is RANK
    for seed in range(2):
        samples = vqa_batch(seed=seed, questions=QUESTIONS if padded else alike)
        whole = model.predict_answers(samples, **method)
        rows = [
            {"image": samples["image"][i : i + 1], "text_input": samples["text_input"][i]} for i in range(len(whole))
        ]
        assert [model.predict_answers(row, **method)[0] for row in rows] == whole


@pytest.mark.parametrize("method", [GREEDY, BEAMS, RANK], ids=["greedy", "beams", "rank"])
def test_confidence_batched_is_that_of_one_by_one(method):
    model = activate(vqa_model(mask_question_padding=True)).eval()
    samples = vqa_batch()
    answers, confidences = model.predict_answers(samples, **method, return_scores=True)
    assert answers == model.predict_answers(samples, **method)
    rows = [{"image": samples["image"][i : i + 1], "text_input": samples["text_input"][i]} for i in range(4)]
    alone = [model.predict_answers(row, **method, return_scores=True) for row in rows]
    assert [answer for [answer], _ in alone] == answers
    assert [score for _, [score] in alone] == pytest.approx(confidences, rel=1e-3)
    assert all(0 < score < 1 for score in confidences) and len({*confidences}) == 4


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_confidence_of_a_generated_answer_is_its_probability(beams, monkeypatch):
    """Token by token; with beams also what transformers says, without its division by the length."""
    model = activate(vqa_model(mask_question_padding=True)).eval()
    samples, made = vqa_batch(), []
    generate = model.text_decoder.generate

    def kept(**kwargs):
        made.append(generate(**kwargs, output_scores=True, return_dict_in_generate=True))
        return made[0].sequences

    monkeypatch.setattr(model.text_decoder, "generate", kept)
    options = dict(inference_method="generate", num_beams=beams, max_len=6)
    _, confidences = model.predict_answers(samples, **options, return_scores=True)
    states, end = model.forward_encoder(samples)[0].last_hidden_state, model.tokenizer.sep_token_id
    mask = samples["tokenized_text"].attention_mask
    for i, sequence in enumerate(made[0].sequences.tolist()):
        tokens = sequence[: sequence.index(end) + 1] if end in sequence else sequence
        total = 1.0
        for place in range(1, len(tokens)):
            question = dict(encoder_hidden_states=states[i : i + 1], encoder_attention_mask=mask[i : i + 1])
            logits = model.text_decoder(torch.tensor([tokens[:place]]), return_dict=True, **question).logits
            total *= float(logits[0, -1].softmax(dim=0)[tokens[place]])
        assert confidences[i] == pytest.approx(total, rel=1e-3)
        if beams > 1:
            length = len(tokens) - (end in tokens)
            assert confidences[i] == pytest.approx(float((made[0].sequences_scores[i] * length).exp()), rel=1e-3)


def test_confidence_of_a_ranked_answer_is_its_share_of_the_candidates():
    model, samples = activate(vqa_model()).eval(), vqa_batch()
    assert model.predict_answers(samples, answer_list=["yes"], return_scores=True) == (["yes"] * 4, [1.0] * 4)
    both = [model.predict_answers(samples, answer_list=a, return_scores=True) for a in (["yes", "no"], ["no", "yes"])]
    assert both[0][0] == both[1][0] and both[0][1] == pytest.approx(both[1][1])
    assert all(0.5 < score < 1 for score in both[0][1])


def test_padding_of_questions_is_masked_when_asked_for():
    """A longer question beside it changes how LAVIS answers the short one, and not how we do."""
    seen = {}
    for mask in (True, False):
        model = vqa_model(mask_question_padding=mask).eval()
        masks = []
        model.text_decoder.register_forward_pre_hook(
            lambda module, args, kwargs, masks=masks: masks.append(kwargs["encoder_attention_mask"]), with_kwargs=True
        )
        model.predict_answers(vqa_batch(), **BEAMS)
        seen[mask] = masks[0]
    lengths = vqa_model().tokenize(QUESTIONS, pad_to_longest=True).attention_mask
    assert torch.equal(seen[True], lengths.repeat_interleave(3, dim=0))
    assert torch.equal(seen[False], torch.ones_like(seen[True]))


def test_prompt_is_put_around_the_question():
    model, samples = vqa_model().eval(), vqa_batch()
    prompted = model.predict_answers(samples, **GREEDY, prompt="why is {} {red}")
    worded = {**samples, "text_input": [f"why is {question} {{red}}" for question in QUESTIONS]}
    assert prompted == model.predict_answers(worded, **GREEDY) != model.predict_answers(samples, **GREEDY)


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        ({}, {}, "answer_list: missing; inference_method rank chooses from a list, generate needs none"),
        ({}, {"answer_list": []}, "answer_list: missing"),
        ({}, {"answer_list": "yes"}, "answer_list: 'yes' cannot be used; it must be a list of strings"),
        ({}, {"answer_list": ["yes", 2]}, "it must be a list of strings"),
        ({}, {"answer_list": ["a " * 70]}, "has 72 tokens, but the decoder has 64 positions"),
        ({}, {"inference_method": "rnk"}, "unknown method 'rnk'; did you mean 'rank'"),
        ({}, {**GREEDY, "max_len": 65}, "max_len: 65 tokens do not fit the 64 positions of the decoder"),
        ({"text_input": ["why", " ", "a", "b"]}, RANK, "question 1 of the batch is ' '; it must have words"),
        ({"text_input": ["why", None, "a", "b"]}, RANK, "question 1 of the batch is None"),
        ({"text_input": ["why"]}, RANK, "1 questions for 4 images; there must be one each"),
        ({"text_input": "why"}, RANK, "1 questions for 4 images"),
    ],
)
def test_questions_that_cannot_be_answered(change, method, message):
    with pytest.raises(AuroraError) as caught:
        vqa_model().predict_answers({**vqa_batch(), **change}, **method)
    assert message in str(caught.value)
