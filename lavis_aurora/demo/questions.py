"""Questions about the demo's scenes: what is asked in each domain, and what ten annotators answer.

Five kinds: color, shape, count, position, yes/no. The answers that a question can have come equally often, so that
the question alone does not give its answer away. `clean` and `shifted` word their questions otherwise.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from string import Formatter
from typing import NamedTuple

from lavis_aurora.demo.scenes import Domain, Scene, Shape, check_splits, domain_of, iter_scenes

ANSWER_TYPES = {"color": "other", "shape": "other", "count": "number", "position": "other", "yes/no": "yes/no"}
KINDS = tuple(ANSWER_TYPES)
# How often a picture to ask about has one, two and three shapes, while scenes of one last (about 2,000 train): more
# often one than a captioned picture, since questions about one shape are learned first.
SHAPE_COUNTS = (0.5, 0.3, 0.2)
ANNOTATORS = 10
_AGREE = 8  # annotators who always give the right answer
# How often each of the others does not: by eye of a color, in other words of a shape or position, by mistake.
_SLIPS = {"color": 0.3, "shape": 0.3, "count": 0.05, "position": 0.3, "yes/no": 0.05}
# Templates by kind. Their fields say which shapes are meant: of color, shape and position a template must fit
# exactly one, whose other property is asked for (the background's, without fields); a count is of those that fit.
_WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "clean": {
        "color": (
            "what color is the {shape}?",
            "what color is the shape {position}?",
            "what color is the {size} shape?",
            "what color is the background?",
        ),
        "shape": ("what shape is {color}?", "what shape is {position}?", "what is the {size} {color} shape?"),
        "count": ("how many shapes are there?", "how many shapes are {color}?", "how many shapes are {size}?"),
        "position": ("where is the {shape}?", "where is the {color} shape?", "where is the {size} {shape}?"),
        "yes/no": ("is there a {shape}?", "is there a {color} {shape}?", "is there a {size} {color} shape?"),
    },
    "shifted": {
        "color": (
            "which color does the {shape} have?",
            "what is the color of the object at {position}?",
            "the {size} object is of which color?",
            "which color does the backdrop have?",
        ),
        "shape": (
            "which object has the color {color}?",
            "which object is at {position}?",
            "what is the {size} {color} object?",
        ),
        "count": (
            "what is the number of objects in the image?",
            "what is the number of {color} objects?",
            "how many {size} objects does the image have?",
        ),
        "position": (
            "in which position is the {shape}?",
            "what is the position of the {color} object?",
            "at which position is the {size} {shape}?",
        ),
        "yes/no": (
            "does the image have a {shape}?",
            "does the image have a {color} {shape}?",
            "is any {size} object in the image {color}?",
        ),
    },
}
# "is the circle red?": the first field must fit exactly one shape, whether or not the second does.
_PREDICATES = {
    "clean": ("is the {shape} {color}?", "is the {shape} {size}?", "is the {shape} {position}?"),
    "shifted": (
        "does the {shape} have the color {color}?",
        "is the {shape} a {size} object?",
        "is the {shape} at {position}?",
    ),
}
# Answered by the whole caption, in training only.
DESCRIBE = {"clean": "what is in the picture?", "shifted": "what does the image have?"}
# What an annotator says who sees another color than the rest.
_NEAR_COLORS = {
    "red": "orange", "orange": "red", "yellow": "orange", "brown": "orange", "green": "cyan", "cyan": "blue",
    "blue": "purple", "purple": "pink", "pink": "purple", "white": "gray", "gray": "white", "black": "gray",
    "beige": "white", "mint": "green", "lilac": "purple",
}  # fmt: skip


class Question(NamedTuple):
    """A question about one scene."""

    kind: str  # one of KINDS
    template: str
    text: str
    answer: str
    choices: tuple[str, ...]  # answers that the question can have, over all scenes
    others: tuple[str, ...]  # what an annotator says who does not agree


def place_of(phrase: str) -> str:
    """A position as an answer, without preposition and article, which the official evaluator drops from answers."""
    return phrase.rpartition("the ")[2]


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _values(shape: Shape, domain: Domain) -> dict[str, str]:
    """What the fields of a template are for this shape."""
    position = domain.positions[shape.cell]
    return {"size": shape.size, "color": shape.color, "shape": shape.shape, "position": position}


def _tables(domain: Domain) -> dict[str, tuple[str, ...]]:
    """What the fields of a template can be in this domain."""
    tables = {"size": domain.sizes, "color": domain.colors, "shape": domain.shapes, "position": domain.positions}
    return {name: tuple(table) for name, table in tables.items()}


def _fitting(filled: Mapping[str, str], shapes: list[dict[str, str]]) -> int:
    return sum(all(shape[name] == value for name, value in filled.items()) for shape in shapes)


def _of_one_shape(kind: str, template: str, shapes: list[dict[str, str]], domain: Domain) -> Iterator[Question]:
    """Color, shape or position of each shape that the template fits alone."""
    choices = _tables(domain)[kind]
    for shape in shapes:
        filled = {name: shape[name] for name in _fields(template)}
        if _fitting(filled, shapes) != 1:
            continue
        answer = shape[kind]
        if kind == "position":
            answer, choices = place_of(answer), tuple(map(place_of, domain.positions))
            words = answer.split()
            others = tuple(words) if len(words) > 1 else ("middle",) if answer == "center" else (f"{answer} center",)
        else:
            others = (_NEAR_COLORS[answer],) if kind == "color" else (f"{shape['color']} {answer}",)
        yield Question(kind, template, template.format(**filled), answer, choices, others)


def _counts(template: str, shapes: list[dict[str, str]], domain: Domain) -> Iterator[Question]:
    fields = _fields(template)
    choices = ("0", "1", "2") if fields else ("1", "2", "3")
    for values in product(*(_tables(domain)[name] for name in fields)):
        filled = dict(zip(fields, values))
        answer = str(_fitting(filled, shapes))
        if answer in choices:
            near = tuple(choice for choice in choices if abs(int(choice) - int(answer)) == 1)
            yield Question("count", template, template.format(**filled), answer, choices, near)


def _yes_or_no(template: str, known: str | None, shapes: list[dict[str, str]], domain: Domain) -> Iterator[Question]:
    """Whether a shape fits; the field ``known`` must fit exactly one."""
    fields = _fields(template)
    for values in product(*(_tables(domain)[name] for name in fields)):
        filled = dict(zip(fields, values))
        if known and _fitting({known: filled[known]}, shapes) != 1:
            continue
        # Of two properties one is always there, or a glance at a single one would do.
        if len(fields) > 1 and not any(_fitting({name: value}, shapes) for name, value in filled.items()):
            continue
        answer, other = ("yes", "no") if _fitting(filled, shapes) else ("no", "yes")
        yield Question("yes/no", template, template.format(**filled), answer, ("yes", "no"), (other,))


def askable(scene: Scene, name: str) -> dict[str, list[list[Question]]]:
    """Every question that a scene answers, by kind and then by template."""
    domain = domain_of(name)
    shapes = [_values(shape, domain) for shape in scene.shapes]
    asked: dict[str, list[list[Question]]] = {kind: [] for kind in KINDS}
    for kind, templates in _WORDINGS[name].items():
        for template in templates:
            if kind == "count":
                questions = _counts(template, shapes, domain)
            elif kind == "yes/no":
                questions = _yes_or_no(template, None, shapes, domain)
            elif not _fields(template):
                answer, choices = scene.background, tuple(domain.backgrounds)
                questions = [Question(kind, template, template, answer, choices, (_NEAR_COLORS[answer],))]
            else:
                questions = _of_one_shape(kind, template, shapes, domain)
            asked[kind].append(list(questions))
    for template in _PREDICATES[name]:
        asked["yes/no"].append(list(_yes_or_no(template, "shape", shapes, domain)))
    return asked


def _annotations(question: Question, rng: random.Random) -> list[str]:
    """What the annotators answer: most of them the same."""
    slip = _SLIPS[question.kind]
    rest = [
        rng.choice(question.others) if rng.random() < slip else question.answer for _ in range(ANNOTATORS - _AGREE)
    ]
    return [question.answer] * _AGREE + rest


def iter_questions(
    domain: str, split: str, seed: int = 0, each: int = 4
) -> Iterator[tuple[int, Question, list[str]]]:
    """Endless questions about the pictures that `generate_pictures` draws of `SHAPE_COUNTS`, in the same order.

    Kinds come equally often. So do the answers that a question can have: none is asked where its answer is ahead.

    Args:
        domain: "clean" or "shifted".
        split: "train", "val" or "test".
        seed: of the pictures.
        each: questions about a picture.

    Yields:
        number of the picture, question, answers of the annotators.

    Raises:
        ValueError: for an unknown domain or split, or if a picture does not answer so many questions.
    """
    check_splits([split])
    domain_of(domain)
    rng = random.Random(f"{seed}/{domain}/{split}/questions")
    kinds: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()

    def balanced(question: Question) -> bool:
        # Over a template too: most questions of yes and no come once or twice only.
        return all(
            answers[asked, question.answer] == min(answers[asked, choice] for choice in question.choices)
            for asked in ({question.text, question.template} if question.kind == "yes/no" else {question.text})
        )

    for index, scene in enumerate(iter_scenes(domain, split, seed, SHAPE_COUNTS)):
        by_kind, said = askable(scene, domain), set()
        for _ in range(each):
            for kind in sorted(KINDS, key=lambda kind: (kinds[kind], rng.random())):
                fair = [[q for q in questions if q.text not in said and balanced(q)] for questions in by_kind[kind]]
                if any(fair):
                    break
            else:
                raise ValueError(f"{each} questions about each picture are too many: ask for fewer")
            question = rng.choice(rng.choice([questions for questions in fair if questions]))
            kinds[kind] += 1
            answers.update((asked, question.answer) for asked in {question.text, question.template})
            said.add(question.text)
            yield index, question, _annotations(question, rng)


def answers_of(domain: str) -> list[str]:
    """Every answer that is right for some question of a domain, sorted: the list to rank."""
    spec = domain_of(domain)
    places = map(place_of, spec.positions)
    return sorted({*spec.colors, *spec.backgrounds, *spec.shapes, *places, "0", "1", "2", "3", "yes", "no"})
