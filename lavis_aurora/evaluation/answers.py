"""Answers: the likeliest of a list in bounded memory, cached decoding, and their accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from lavis.common.vqa_tools.vqa import VQA
from lavis.common.vqa_tools.vqa_eval import VQAEval
from lavis.models.med import XBertLMHeadDecoder
from torch import Tensor
from transformers import BertTokenizer, LogitsProcessor

from lavis_aurora.common.answers import (
    ANNOTATORS,
    Generated,
    generated_truths,
    normalise,
    unreachable_answers,
    vqa_score,
)
from lavis_aurora.common.errors import AuroraError, Diverged, shown


def vqa_accuracy(
    results: str | Path,
    questions: str | Path,
    annotations: str | Path,
    answer_list: Sequence[str] | None = None,
    generated: Generated | None = None,
) -> dict[str, Any]:
    """VQAv2's accuracy of answers in percent, by the rules of its own evaluator (:func:`vqa_score`).

    Args:
        results: json list of ``question_id`` and ``answer``, one for each question.
        questions: VQAv2's questions file.
        annotations: VQAv2's annotations file.
        answer_list: what was ranked, to count the questions that it has no true answer to.
        generated: :func:`as_generated` with all but the texts, where answers were generated: true answers are then
            compared as the model would have them.

    Returns:
        ``accuracy``, ``scores`` (of each question), and by name ``answer_types`` and ``question_types``, as the
        annotations name them;
        ``official_accuracy`` and ``lavis_accuracy``, of VQAv2's and of LAVIS's evaluator on the file as it is;
        ``unreachable`` (see :class:`Unreachable`), if it can be known; ``few_annotators`` (``questions``, and of one
        with the fewest ``question_id`` and ``annotators``), if a question has fewer than ten.

    Raises:
        AuroraError: a question has no annotator.
    """
    with redirect_stdout(StringIO()):  # of LAVIS's evaluator
        truth = VQA(str(annotations), str(questions))
        given = truth.loadRes(str(results), str(questions))
    asked = truth.qa
    people = {i: [one["answer"] for one in question["answers"]] for i, question in asked.items()}
    fewest = min(people, key=lambda i: len(people[i]))
    if not people[fewest]:
        raise AuroraError(f"{annotations}: question {shown(fewest)} has no answers; VQAv2's accuracy needs ten")
    official = [vqa_score(people[i], given.qa[i]["answer"]) for i in asked]
    scores, compared, possible = official, list(people.values()), answer_list
    if generated is not None:
        compared, possible = generated_truths(compared, generated)
        scores = [vqa_score(answers, given.qa[i]["answer"]) for i, answers in zip(asked, compared)]
    found: dict[str, Any] = {"accuracy": _percent(scores), "scores": [100 * score for score in scores]}
    for name in ("answer_type", "question_type"):
        parts: dict[str, list[float]] = defaultdict(list)
        for question, score in zip(asked.values(), scores):
            parts[question[name]].append(score)
        found[f"{name}s"] = {kind: _percent(part) for kind, part in parts.items()}
    if possible is not None:
        found["unreachable"] = unreachable_answers(compared, possible)
    if len(people[fewest]) < ANNOTATORS:
        count = sum(len(answers) < ANNOTATORS for answers in people.values())
        few = {"questions": count, "question_id": fewest, "annotators": len(people[fewest])}
        found["few_annotators"] = few
    scorer = VQAEval(truth, given, n=2)
    with redirect_stdout(StringIO()):
        scorer.evaluate()  # changes the annotators' answers
    return {**found, "official_accuracy": _percent(official), "lavis_accuracy": scorer.accuracy["overall"]}


def _percent(scores: Sequence[float]) -> float:
    """Of scores from 0 to 1, with VQAv2's two digits."""
    return round(100 * sum(scores) / len(scores), 2)


# Of MSRVTT-QA (Xu et al., ACM MM 2017), whose questions all begin with one of them.
QUESTION_WORDS = ("what", "who", "how", "when", "where")


def exact_match(
    results: Sequence[dict[str, Any]],
    answer_list: Sequence[str] | None = None,
    generated: Generated | None = None,
) -> dict[str, Any]:
    """Accuracy in percent of results with ``question``, ``answer`` and ``truth``: overall and by question word.

    Args:
        results: an answer is right if :func:`normalise` makes the same of it and of the truth.
        answer_list, generated: as of :func:`vqa_accuracy`.

    Returns:
        ``agg_metrics`` (overall), a figure for each of :data:`QUESTION_WORDS` that occurs, ``other`` for questions
        that begin differently; ``scores`` (of each question); ``unreachable`` (see :class:`Unreachable`), if it can
        be known.
    """
    truths: list[str] = [result["truth"] for result in results]
    possible = answer_list
    if generated is not None:
        truths, possible = generated_truths(truths, generated)
    right: dict[str, list[bool]] = defaultdict(list)
    scores = [normalise(result["answer"]) == normalise(truth) for result, truth in zip(results, truths)]
    for result, is_right in zip(results, scores):
        first = (result["question"].lower().split() or [""])[0]
        word = first if first in QUESTION_WORDS else "other"
        right[word].append(is_right)
    words = [word for word in (*QUESTION_WORDS, "other") if word in right]
    metrics: dict[str, Any] = {"agg_metrics": 100 * sum(sum(right[word]) for word in words) / len(results)}
    metrics |= {word: 100 * sum(right[word]) / len(right[word]) for word in words}
    metrics["scores"] = [100.0 * is_right for is_right in scores]
    return metrics if possible is None else {**metrics, "unreachable": unreachable_answers(truths, possible)}


def check_nan(scores: Tensor) -> None:
    """Raises Diverged if a score is NaN: the largest of such is any."""
    nans = int(scores.isnan().sum())
    if nans:
        raise Diverged(f"{nans} scores of answers are NaN; none is chosen")


class NanCheckLogitsProcessor(LogitsProcessor):
    """Stops a generation at the first token with a score that is NaN."""

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
        texts: the answers; of those with the same tokens, the first counts.
        tokenizer: BLIP's.
        positions: tokens that the decoder has room for.

    Attributes:
        given: the answers as they were listed.
        texts: different ones, in their order.

    Raises:
        AuroraError: there is no answer, one is not a string, or one is too long.
    """

    def __init__(self, texts: Sequence[str], tokenizer: BertTokenizer, positions: int) -> None:
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise AuroraError(f"answer_list: {shown(texts)} cannot be used; it must be a list of strings")
        # Twice, one would take a candidate's place and have half of its confidence.
        self.given = list(texts)
        tokens = tokenizer(self.given, padding="longest", return_tensors="pt")
        first = {tuple(ids): i for i, ids in reversed([*enumerate(tokens.input_ids.tolist())])}
        kept = sorted(first.values())
        self.texts = [self.given[i] for i in kept]
        self.ids, self.mask = tokens.input_ids[kept], tokens.attention_mask[kept]
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
) -> tuple[list[int], list[float]]:
    """The likeliest answer to each question, and its confidence.

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
        For each question an index into the list, and the answer's share among the candidates: exp(-loss) over the sum
        of all k, as ALBEF has it.

    Raises:
        Diverged: a score is NaN.
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
    shares = (-scores.float()).softmax(dim=1).gather(1, best)
    return candidates.gather(1, best)[:, 0].tolist(), shares[:, 0].tolist()


def sequence_probabilities(
    decoder: XBertLMHeadDecoder, states: Tensor, mask: Tensor, tokens: Tensor, end: int
) -> list[float]:
    """Probability of each generated answer, its [SEP] included, given its question; as if there were no min_len.

        prod_i p(a_i | a_<i, q)

    Args:
        decoder: the answer decoder.
        states: of the questions, (questions, length, d).
        mask: 1 where a position is text, (questions, length).
        tokens: of the answers, (questions, tokens), [DEC] first; whatever follows an end does not count.
        end: the token that ends an answer; one without it was cut off.
    """
    ended = (tokens == end).cumsum(dim=1)
    keep = (ended == 0) | ((ended == 1) & (tokens == end))
    output = decoder(
        tokens,
        attention_mask=keep.long(),
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        return_dict=True,
    )
    likely = output.logits[:, :-1].float().log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
    return likely.masked_fill(~keep[:, 1:], 0).sum(dim=1).exp().tolist()
