"""Files of VQAv2's format behind a split's questions: answers to rank, questions and true answers to score."""

from __future__ import annotations

from collections.abc import Sequence

from lavis_aurora.errors import AuroraError, near_names, shown
from lavis_aurora.files import read_json

# Of VQAv2's official files: keys of the file, the list it holds, and keys of each item.
QUESTIONS = (("info", "task_type", "data_type", "data_subtype", "license"), "questions", ("question_id",))
TRUE_ANSWERS = ((), "annotations", ("question_id", "image_id", "question_type", "answer_type", "answers"))


def _read_official(path: str, key: str, form: tuple) -> set:
    """Question ids of an official file, whose keys are checked."""
    top, items, each = form
    content = read_json(path, key)
    for name in (*top, items):
        if not isinstance(content, dict) or name not in content:
            near = near_names(name, content) if isinstance(content, dict) else ""
            raise AuroraError(f"{key}: {path} has no {name!r}, as VQAv2's own files have{near}")
    for i, item in enumerate(content[items]):
        for name in each:
            if name not in item:
                raise AuroraError(f"{key}: item {i} of {items!r} in {path} has no {name!r}{near_names(name, item)}")
    return {item["question_id"] for item in content[items]}


def check_answers(path: str, key: str) -> None:
    """Refuse a file of answers to rank that is no list of them."""
    answers = read_json(path, key)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise AuroraError(f'{key}: {path} must hold a list of answers, e.g. ["yes", "no"]')


def check_vqa_files(entries: list[dict], files: Sequence[str], key: str) -> None:
    """Check the files of a split to evaluate: entries, and if there are more, answers to rank, questions, truth.

    Args:
        entries: of the first file.
        files: all paths, in LAVIS's order.
        key: the YAML key that names them.

    Raises:
        AuroraError: a question is there twice, a file has another format, or they hold different questions (the
            official evaluator would stop, after the evaluation).
    """
    if len(files) not in (2, 4):
        raise AuroraError(
            f"{key}: {len(files)} files; it must be two, questions and a list of answers, or four, also VQAv2's own "
            f"questions and annotations"
        )
    ids = {entry["question_id"] for entry in entries}
    if len({type(i) for i in ids}) > 1:
        raise AuroraError(f"{key}: the question_id of {files[0]} must be all numbers or all strings")
    if len(ids) < len(entries):
        raise AuroraError(
            f"{key}: {files[0]} has {len(entries)} entries with {len(ids)} question_id; each needs its own"
        )
    for path, form in zip(files[2:], (QUESTIONS, TRUE_ANSWERS)):
        official = _read_official(path, key, form)
        if official != ids:
            some = next(iter(official ^ ids))
            raise AuroraError(
                f"{key}: {path} and {files[0]} must hold the same questions; {shown(some)} is in one of them only"
            )
