"""Answers: the likeliest of a list in bounded memory, cached decoding, and their accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lavis.common.vqa_tools.vqa import VQA
from lavis.common.vqa_tools.vqa_eval import VQAEval
from lavis.models.med import XBertLMHeadDecoder
from torch import Tensor
from transformers import BertTokenizer, LogitsProcessor

from lavis_aurora.common.errors import AuroraError, shown


def vqa_accuracy(results: str | Path, questions: str | Path, annotations: str | Path) -> dict:
    """Accuracy of answers, percent: min(1, matches / 3) over nine of ten annotators, averaged over the ten choices.

    Args:
        results: json list of ``question_id`` and ``answer``, one for each question.
        questions: VQAv2's questions file.
        annotations: VQAv2's annotations file.

    Returns:
        ``accuracy``, and by name ``answer_types`` and ``question_types``, as the annotations name them.
    """
    truth = VQA(str(annotations), str(questions))
    scorer = VQAEval(truth, truth.loadRes(str(results), str(questions)), n=2)
    scorer.evaluate()
    print()  # after the evaluator's progress bar
    return {
        "accuracy": scorer.accuracy["overall"],
        "answer_types": scorer.accuracy["perAnswerType"],
        "question_types": scorer.accuracy["perQuestionType"],
    }


# Of MSRVTT-QA (Xu et al., ACM MM 2017), whose questions all begin with one of them.
QUESTION_WORDS = ("what", "who", "how", "when", "where")


def normalise(answer: str, evaluator: VQAEval) -> str:
    """An answer without case, punctuation and articles, and with digits for numbers, as VQAv2's evaluator has it.

    An answer of which nothing would be left is only put in lower case.
    """
    text = " ".join(answer.split())
    return evaluator.processDigitArticle(evaluator.processPunctuation(text)) or text.lower()


def exact_match(results: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy in percent of results with ``question``, ``answer`` and ``truth``: overall and by question word.

    Returns:
        ``agg_metrics`` (overall), a figure for each of :data:`QUESTION_WORDS` that occurs, ``other`` for questions
        that begin differently.
    """
    evaluator = VQAEval()
    right: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        first = (result["question"].lower().split() or [""])[0]
        word = first if first in QUESTION_WORDS else "other"
        right[word].append(normalise(result["answer"], evaluator) == normalise(result["truth"], evaluator))
    words = [word for word in (*QUESTION_WORDS, "other") if word in right]
    metrics = {"agg_metrics": 100 * sum(sum(right[word]) for word in words) / len(results)}
    return {**metrics, **{word: 100 * sum(right[word]) / len(right[word]) for word in words}}


def check_nan(scores: Tensor) -> None:
    """Raises AuroraError if a score is NaN: the largest of such is any."""
    nans = int(scores.isnan().sum())
    if nans:
        raise AuroraError(f"{nans} scores of answers are NaN; none is chosen")


class NanCheckLogitsProcessor(LogitsProcessor):
    """Lets a generation stop at the first token whose scores are no numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_nan(scores)
        return scores


class CachedDecoder(XBertLMHeadDecoder):
    """XBertLMHeadDecoder that decodes one new token a step.

    LAVIS reads the keys and values of earlier tokens from an argument ``past``, which transformers 4.26 renamed, so
    that there every step would compute all tokens anew.
    """

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past: tuple | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: tuple | None = None,
        **kwargs,
    ) -> dict:
        """As LAVIS's, with the cache under either name."""
        past = past if past_key_values is None else past_key_values
        return super().prepare_inputs_for_generation(input_ids, past=past, attention_mask=attention_mask, **kwargs)


IGNORE_INDEX = -100  # of torch's cross-entropy


class AnswerList:
    """Answers as token ids, [DEC] first; tokenized once for a whole evaluation.

    Args:
        texts: the answers.
        tokenizer: BLIP's.
        positions: tokens that the decoder has room for.

    Raises:
        AuroraError: there is no answer, one is not a string, or one is too long.
    """

    def __init__(self, texts: Sequence[str], tokenizer: BertTokenizer, positions: int) -> None:
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise AuroraError(f"answer_list: {shown(texts)} cannot be used; it must be a list of strings")
        self.texts = list(texts)
        tokens = tokenizer(self.texts, padding="longest", return_tensors="pt")
        self.ids, self.mask = tokens.input_ids, tokens.attention_mask
        self.ids[:, 0] = tokenizer.bos_token_id
        self.lengths = self.mask.sum(dim=1)
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > positions:
            raise AuroraError(
                f"answer_list: {shown(self.texts[longest])} has {self.lengths[longest]} tokens, but the decoder "
                f"has {positions} positions; leave it out"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device) -> AnswerList:
        """Move the tokens to ``device``, in place."""
        self.ids, self.mask, self.lengths = self.ids.to(device), self.mask.to(device), self.lengths.to(device)
        return self


def first_token_candidates(
    decoder: XBertLMHeadDecoder, states: Tensor, mask: Tensor, answers: AnswerList, k: int
) -> Tensor:
    """The k answers whose first tokens are the likeliest, (questions, k), best first.

    Answers that begin alike are equally likely; which of them is among the first k is torch.topk's choice, here
    and in LAVIS.
    """
    start = answers.ids[:1, :1].expand(len(states), 1)
    output = decoder(start, encoder_hidden_states=states, encoder_attention_mask=mask, return_dict=True)
    likely = output.logits[:, 0].softmax(dim=1).index_select(1, answers.ids[:, 1])
    return likely.topk(min(k, len(answers)), dim=1).indices


def rank_answers(
    decoder: XBertLMHeadDecoder, states: Tensor, mask: Tensor, answers: AnswerList, k: int, chunk: int
) -> list[int]:
    """Index of the likeliest answer to each question.

        argmin_{a in A_q} sum_i CE(p(. | a_<i, q), a_i),   A_q: the k answers with the likeliest first tokens

    as LAVIS's BlipVQA, whose memory grows with questions * k; here it grows with ``chunk``.

    Args:
        decoder: the answer decoder.
        states: of the questions, (questions, length, d).
        mask: 1 where a position is text, (questions, length).
        answers: the list.
        k: answers scored for each question.
        chunk: pairs of question and answer scored at once.

    Returns:
        An index into the list for each question.

    Raises:
        AuroraError: a score is NaN.
    """
    answers.to(states.device)
    candidates = first_token_candidates(decoder, states, mask, answers, k)
    k = candidates.shape[1]
    losses = []
    for rows in torch.arange(candidates.numel(), device=states.device).split(chunk):
        question, answer = rows // k, candidates.flatten()[rows]
        length = int(answers.lengths[answer].max())
        ids, keep = answers.ids[answer, :length], answers.mask[answer, :length]
        output = decoder(
            ids,
            attention_mask=keep,
            encoder_hidden_states=states[question],
            encoder_attention_mask=mask[question],
            labels=ids.masked_fill(keep == 0, IGNORE_INDEX),
            return_dict=True,
            reduction="none",
        )
        losses.append(output.loss)
    scores = torch.cat(losses).view(-1, k)
    check_nan(scores)
    best = scores.argmin(dim=1, keepdim=True)
    return candidates.gather(1, best)[:, 0].tolist()
