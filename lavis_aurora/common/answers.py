"""Answers as text: how VQAv2's evaluator and exact match compare them, and which true ones can be answered at all.

The truth of a question is one answer, which is compared by exact match, or a list of its annotators' answers, whose
measure is VQAv2's accuracy.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Union

from lavis.common.vqa_tools.vqa_eval import VQAEval

from lavis_aurora.common.errors import AuroraError, abbreviated, shown

Truth = Union[str, Sequence[str]]
Form = Callable[[str], str]
Generated = Callable[[Iterable[str]], dict[str, str]]

ANNOTATORS = 10  # of a question of VQAv2
AGREEING = 3  # annotators who make an answer right
EXAMPLES = 5  # that a report names
_RULES = VQAEval()  # its rules for a single answer are those of VQAv2's own evaluator
_QUOTES = str.maketrans("‘’“”", "''\"\"")


@lru_cache(maxsize=1 << 18)
def _processed(answer: str) -> str:
    """By VQAv2's rules: lower case, no punctuation and articles, digits for number words."""
    processed: str = _RULES.processDigitArticle(_RULES.processPunctuation(_stripped(answer)))
    return processed


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _agreement(matches: int, annotators: int) -> float:
    """Of all choices of annotators but one, the mean of min(1, those who gave the answer / 3)."""
    kept, left_out = min(1.0, matches / AGREEING), min(1.0, (matches - 1) / AGREEING)
    return ((annotators - matches) * kept + matches * left_out) / annotators


def _vqa_form(annotators: Sequence[str]) -> Form:
    """What VQAv2's evaluator compares: answers as processed, but as they are where all annotators gave the same.

    Raises:
        AuroraError: there is no annotator.
    """
    if not annotators:
        raise AuroraError("a question has no annotator's answer; VQAv2's accuracy needs ten")
    return _processed if len(set(map(_stripped, annotators))) > 1 else _stripped


def vqa_score(annotators: Sequence[str], answer: str) -> float:
    """VQAv2's accuracy of an answer, from 0 to 1, as its own evaluator has it.

        mean over annotators left out of min(1, matches among the others / 3)

    Args:
        annotators: their answers, ten in VQAv2; of fewer than four, even the answer of all gets less than 1.
        answer: the model's.

    Raises:
        AuroraError: there is no annotator.
    """
    form = _vqa_form(annotators)
    return _agreement(list(map(form, annotators)).count(form(answer)), len(annotators))


def normalise(answer: str) -> str:
    """What exact match compares: an answer without case, articles, spaces around signs and separating punctuation.

    Number words are digits and contractions have their apostrophe, as in VQAv2's rules. Unlike there, signs that tell
    answers apart stay: ``-5``, ``c++``, ``3.5``, ``10:30``, ``50%``, ``#1``. An answer of which nothing would be left
    is only put in lower case.
    """
    text = unicodedata.normalize("NFC", answer).translate(_QUOTES).lower()
    text = re.sub(r"\s*([^\w\s.])\s*", r"\1", text)
    text = re.sub(r"(?<=\d)\s*\.\s*(?=\d)", ".", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,000
    text = re.sub(r"\.(?!\d)", "", text)
    # A hyphen or slash before a letter joins words; before a digit it may be a minus or a fraction.
    text = re.sub(r"""[][(){}";,?!`_\\]|[-/](?=[^\W\d])""", " ", text)
    words = [_RULES.contractions.get(word, _RULES.manualMap.get(word, word)) for word in text.split()]
    # At the end it is no article: vitamin a.
    words = [word for i, word in enumerate(words) if word not in _RULES.articles or i == len(words) - 1]
    return " ".join(words) or " ".join(answer.lower().split())


def as_generated(texts: Iterable[str], tokenizer: Any, min_len: int, max_len: int) -> dict[str, str]:
    """Answers as a model that generates them has them: encoded and decoded, ``10:30`` as ``10 : 30``.

    Args:
        texts: answers.
        tokenizer: the model's, of transformers.
        min_len, max_len: tokens of a generated answer, [DEC] included.

    Returns:
        By text; those that cannot be generated, being too short or long or with characters that the vocabulary does
        not have, are left out.
    """
    unique = list(dict.fromkeys(texts))
    encoded = tokenizer(unique, add_special_tokens=False).input_ids if unique else []
    special = {*tokenizer.all_special_ids}
    kept = {
        text: ids
        for text, ids in zip(unique, encoded)
        if ids and min_len <= 1 + len(ids) <= max_len and special.isdisjoint(ids)
    }
    return dict(zip(kept, tokenizer.batch_decode(list(kept.values()))))


def generated_truths(truths: Iterable[Truth], generated: Generated) -> tuple[list[Any], list[str]]:
    """Truths with each answer as a model that generates it has it, and the answers that it can generate.

    Args:
        truths: of each question.
        generated: :func:`as_generated` with all but the texts; what it leaves out stays as it is.
    """
    listed = list(truths)
    forms = generated(chain.from_iterable([truth] if isinstance(truth, str) else truth for truth in listed))
    read = [forms.get(t, t) if isinstance(t, str) else [forms.get(one, one) for one in t] for t in listed]
    return read, list(forms.values())


class Unreachable(NamedTuple):
    """How many questions cannot be answered rightly, whatever the model.

    Attributes:
        questions: all of them.
        unreachable: those of which no true answer can be given.
        upper_bound: accuracy in percent if each question got the best answer that can be given.
        examples: true answers that cannot be given, of these questions, the commonest first.
    """

    questions: int
    unreachable: int
    upper_bound: float
    examples: list[str]

    def __str__(self) -> str:
        """One line: their share, what follows for the accuracy, and examples."""
        return (
            f"{self.unreachable} of {self.questions} questions ({100 * self.unreachable / self.questions:.1f} %) "
            f"have no true answer that can be given: {abbreviated(map(shown, self.examples), EXAMPLES)}; "
            f"the accuracy is at most {self.upper_bound:.2f} %"
        )


def unreachable_answers(truths: Iterable[Truth], answers: Iterable[str]) -> Unreachable:
    """Count the questions that no answer of a list is right for.

    Args:
        truths: of each question.
        answers: the list; for a model that generates, the values of :func:`as_generated`, and truths by it.

    Raises:
        AuroraError: a question has no annotator.
    """
    listed = list(answers)
    forms: tuple[Form, ...] = (normalise, _processed, _stripped)
    known = {form: {*map(form, listed)} for form in forms}
    best: list[float] = []
    missing: Counter[str] = Counter()
    for truth in truths:
        form: Form = normalise if isinstance(truth, str) else _vqa_form(truth)
        given = [truth] if isinstance(truth, str) else truth
        counts = Counter(map(form, given))
        reached = [count for answer, count in counts.items() if answer in known[form]]
        if not reached:
            missing[Counter(given).most_common(1)[0][0]] += 1
            best.append(0.0)
        else:
            best.append(1.0 if isinstance(truth, str) else _agreement(max(reached), len(given)))
    bound = 100 * sum(best) / len(best) if best else 100.0
    examples = [answer for answer, _ in missing.most_common()]
    return Unreachable(len(best), sum(missing.values()), bound, examples)
