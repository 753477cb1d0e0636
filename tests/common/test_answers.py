"""Answers as text: VQAv2's accuracy, exact match, what the tokenizer makes of them, and what can be reached."""

from __future__ import annotations

from itertools import combinations
from statistics import mean

import pytest
from lavis.common.vqa_tools.vqa_eval import VQAEval
from transformers import BertTokenizer

from lavis_aurora.common.answers import as_generated, normalise, unreachable_answers, vqa_score
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.encoders.towers import build_tokenizer

# VQAv2


def official(annotators: list[str], answer: str) -> float:
    """The rule of VQAv2's own evaluator, written out: both sides processed if annotators differ, else neither."""
    rules = VQAEval()
    texts = [text.replace("\n", " ").replace("\t", " ").strip() for text in (*annotators, answer)]
    if len(set(texts[:-1])) > 1:
        texts = [rules.processDigitArticle(rules.processPunctuation(text)) for text in texts]
    *truths, given = texts
    return mean(min(1.0, others.count(given) / 3) for others in combinations(truths, len(truths) - 1))


@pytest.mark.parametrize("answer", ["two", "the cat", "none", "10:30", "t-shirt", "a", "yes"])
def test_what_all_ten_annotators_say_is_right(answer: str) -> None:
    assert vqa_score([answer] * 10, answer) == 1


@pytest.mark.parametrize(
    ("annotators", "answer", "score"),
    [
        (["two"] * 9 + ["2"], "two", 1),
        (["two"] * 9 + ["2"], "2", 1),
        (["the cat"] * 2 + ["dog"] * 8, "cat", 0.6),
        (["none"] * 3 + ["some"] * 7, "0", 0.9),
        (["Yes"] * 1 + ["no"] * 9, "yes.", 0.3),
        (["t-shirt"] * 4 + ["shirt"] * 6, "t shirt", 1),
        (["red"] * 10, "blue", 0),
        # Where all agree the official evaluator processes neither side.
        (["two"] * 10, "2", 0),
        ([" red\n"] * 10, "red", 1),
    ],
)
def test_score_is_the_official_one(annotators: list[str], answer: str, score: float) -> None:
    assert vqa_score(annotators, answer) == pytest.approx(score) == pytest.approx(official(annotators, answer))


@pytest.mark.parametrize("count", range(1, 13))
def test_score_of_any_number_of_annotators(count: int) -> None:
    """Also without an answer_id, by which LAVIS's evaluator tells annotators apart."""
    for right in range(count + 1):
        annotators = ["red"] * right + ["blue"] * (count - right)
        assert vqa_score(annotators, "red") == pytest.approx(official(annotators, "red"))
    assert (vqa_score(["red"] * count, "red") == 1) == (count >= 4)


def test_no_annotator_is_refused() -> None:
    with pytest.raises(AuroraError, match="no annotator"):
        vqa_score([], "red")


# Exact match


@pytest.mark.parametrize(
    "answers",
    [
        ("red", "Red.", " red "),
        ("the dog", "dog", "A dog", "dog!"),
        ("two dogs", "2 dogs"),
        ("t - shirt", "t-shirt", "t shirt"),
        ("10 : 30", "10:30"),
        ("3. 5", "3.5"),
        ("1, 000", "1,000", "1000"),
        ("50 %", "50%"),
        ("café", "cafe\u0301", "Café"),
        ("rock'n'roll", "rock 'n' roll", "rock ' n ' roll", "rock ’n’ roll"),
        ("- 5", "-5"),
        ("c + +", "c++"),
        ("# 1", "#1"),
        ("dont", "don't", "don’t"),
        ("and / or", "and/or", "and or"),
        ("red, white and blue", "red white and blue"),
        ('"stop"', "stop", "(stop)"),
        ("20 - year - old", "20-year-old", "20 year old"),
        ("no. 5", "no 5"),
        ("u.s.", "US"),
        ("a", "A"),
    ],
)
def test_the_same_answer(answers: tuple[str, ...]) -> None:
    assert len({normalise(answer) for answer in answers}) == 1


@pytest.mark.parametrize(
    "answers",
    [
        ("-5", "5"),
        ("minus", "-"),
        ("c++", "c", "c#"),
        ("#1", "1", "1%", "$1", "1°"),
        ("10:30", "1030", "10 30"),
        ("3.5", "35", "3 5"),
        ("1/2", "12", "1 2"),
        ("1, 2", "12"),
        ("a+", "a-", "a"),
        ("temperature -5", "temperature 5"),
        ("vitamin a", "vitamin"),
        ("a", "the"),
        ("?", "!"),
        ("", "red"),
        ("red", "blue"),
        ("dogs", "dog"),
        ("cats' tails", "cat's tails"),
        ("café", "cafe"),
    ],
)
def test_different_answers_stay_different(answers: tuple[str, ...]) -> None:
    assert len({normalise(answer) for answer in answers}) == len(answers)


# Encoding and decoding


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    """BLIP's, of a vocabulary of single letters, digits and signs, and some words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    signs = "'.,:;!?%#$+-/()&"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{one}" for one in letters), *signs]
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("\n".join([*words, "cafe", "rock", "roll", "red", "shirt"]), encoding="utf-8")
    return build_tokenizer(str(folder))


def test_answers_as_the_model_decodes_them(tokenizer: BertTokenizer) -> None:
    answers = {
        "10:30": "10 : 30",
        "3.5": "3. 5",
        "1,000": "1, 000",
        "50%": "50 %",
        "café": "cafe",
        "rock 'n' roll": "rock'n'roll",
        "Red": "red",
        "t-shirt": "t - shirt",
    }
    assert as_generated(answers, tokenizer, 1, 20) == answers
    # What was decoded is decoded like this again.
    assert as_generated(answers.values(), tokenizer, 1, 20) == {answer: answer for answer in answers.values()}
    forms = as_generated(["-5", "5", "c++", "c", "#1", "1"], tokenizer, 1, 20)
    assert len({*forms.values()}) == 6


@pytest.mark.parametrize("text", ["猫", "red 猫", "[SEP]", "red [MASK]", "\u200b", ""])
def test_what_the_vocabulary_does_not_have_cannot_be_generated(tokenizer: BertTokenizer, text: str) -> None:
    assert as_generated([text, "red"], tokenizer, 1, 20) == {"red": "red"}


def test_answers_of_other_lengths_cannot_be_generated(tokenizer: BertTokenizer) -> None:
    texts = ["red", "red shirt", "red shirt red"]
    assert list(as_generated(texts, tokenizer, 1, 3)) == texts[:2]
    assert list(as_generated(texts, tokenizer, 3, 9)) == texts[1:]
    assert as_generated([], tokenizer, 1, 9) == {}


# What can be reached


def test_unreachable_by_exact_match() -> None:
    found = unreachable_answers(["Red", "blue", "the cat", "blue", "green"], ["red.", "cat", "dog"])
    assert found == (5, 3, 40.0, ["blue", "green"])
    assert str(found) == (
        "3 of 5 questions (60.0 %) have no true answer that can be given: 'blue', 'green'; "
        "the accuracy is at most 40.00 %"
    )


def test_unreachable_by_vqa_accuracy_bounds_what_any_answer_gets() -> None:
    truths = [
        ["red"] * 8 + ["scarlet"] * 2,
        ["scarlet"] * 8 + ["red"] * 2,
        ["two"] * 10,
        ["two"] * 9 + ["three"],
        ["pink"] * 10,
        ["yes"] * 2,
    ]
    answers = ["red", "2", "Pink", "yes"]
    found = unreachable_answers(truths, answers)
    best = [max(vqa_score(one, answer) for answer in answers) for one in truths]
    assert best == pytest.approx([1, 0.6, 0, 1, 0, 1 / 3])
    assert found.upper_bound == pytest.approx(100 * mean(best))
    assert (found.questions, found.unreachable, found.examples) == (6, 2, ["two", "pink"])


def test_all_is_reachable_where_there_is_nothing() -> None:
    assert unreachable_answers([], ["red"]) == (0, 0, 100.0, [])
