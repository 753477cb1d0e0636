"""Pictures with questions and answers in VQAv2's format, so that the demo of question answering needs no download.

python -m lavis_aurora.demo.question_files FOLDER --domain shifted --train 1600 --val 200 --test 500
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavis_aurora.common.files import atomic_write
from lavis_aurora.demo.pictures import generate_pictures
from lavis_aurora.demo.questions import ANSWER_TYPES, DESCRIBE, SHAPE_COUNTS, answers_of, iter_questions
from lavis_aurora.demo.scenes import DOMAINS, SPLITS, caption_of, domain_of, iter_scenes

EACH = 4  # questions about a picture
_PER_PICTURE = 100  # ids of its questions, the last one for its caption


def split_files(folder: str | Path, domain: str, split: str) -> list[Path]:
    """Files of a split, in LAVIS's order: entries; to evaluate, also answers to rank, questions, true answers."""
    names = [f"{domain}_vqa_{split}.json"]
    if split != "train":
        names += [f"{domain}_answers.json", f"{domain}_{split}_questions.json", f"{domain}_{split}_annotations.json"]
    return [Path(folder) / name for name in names]


def entries_of(domain: str, split: str, count: int, seed: int = 0, each: int = EACH) -> list[dict[str, Any]]:
    """What is asked about the first ``count`` pictures of a split: LAVIS's keys and those of VQAv2's own files."""
    entries = []
    asked = islice(iter_questions(domain, split, seed, each), count * each)
    for number, (index, question, answers) in enumerate(
        tqdm(asked, desc=f"{domain} {split}", total=count * each, unit="question")
    ):
        entries.append(
            {
                "image": f"{domain}/{split}/{index:05d}.jpg",
                "image_id": index,
                "question": question.text,
                "question_id": index * _PER_PICTURE + number % each,
                "answer": answers,
                "question_type": question.kind,
                "answer_type": ANSWER_TYPES[question.kind],
                "multiple_choice_answer": Counter(answers).most_common(1)[0][0],
            }
        )
    return entries


def captions_of(domain: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Further entries to train on: what is in each picture, answered by its caption, shapes row by row."""
    scenes = islice(iter_scenes(domain, "train", seed, SHAPE_COUNTS), count)
    return [
        {
            "image": f"{domain}/train/{index:05d}.jpg",
            "question": DESCRIBE[domain],
            "question_id": (index + 1) * _PER_PICTURE - 1,
            "answer": [caption_of(scene._replace(shapes=tuple(sorted(scene.shapes))), domain_of(domain))],
        }
        for index, scene in enumerate(scenes)
    ]


def _contents(domain: str, split: str, entries: list[dict[str, Any]]) -> list[Any]:
    """What the files of :func:`split_files` hold."""

    def only(*keys: str) -> list[dict[str, Any]]:
        return [{key: entry[key] for key in keys} for entry in entries]

    if split == "train":
        return [only("image", "question", "question_id", "answer")]
    head = {
        "info": {"description": f"questions about generated pictures, {domain}", "version": "1.0"},
        "license": {"name": "BSD-3-Clause", "url": "https://opensource.org/licenses/BSD-3-Clause"},
        "data_type": "lavis_aurora_demo",
        "data_subtype": split,
    }
    truth = only("question_id", "image_id", "question_type", "answer_type", "multiple_choice_answer")
    for item, entry in zip(truth, entries):
        item["answers"] = [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i}
            for i, answer in enumerate(entry["answer"], start=1)
        ]
    questions = {**head, "task_type": "Open-Ended", "questions": only("image_id", "question", "question_id")}
    return [only("image", "question", "question_id"), answers_of(domain), questions, {**head, "annotations": truth}]


def generate_questions(
    folder: str | Path,
    domain: str,
    counts: Mapping[str, int],
    seed: int = 0,
    each: int = EACH,
    captions: bool = False,
) -> dict[str, list[Path]]:
    """Writes pictures and questions about them in the format of VQAv2, as LAVIS's coco_vqa reads it.

    Beside what `generate_pictures` writes, a split has the files of `split_files`. Each question has ten answers,
    which mostly agree. The first file of a split is in place only when all else of the split is.

    Args:
        folder: made if missing.
        domain: "clean" or "shifted".
        counts: split ("train", "val", "test") -> number of pictures.
        seed: the same seed gives the same files.
        each: questions about a picture.
        captions: also ask what is in each picture of the train split; its caption is the answer. A caption teaches
            more than a question does: for pretraining.

    Returns:
        The files of each split.

    Raises:
        ValueError: for an unknown domain or split, a negative count, or more questions than a picture answers.
    """
    if not 1 <= each < _PER_PICTURE:
        raise ValueError(f"{each} questions about each picture: give 1 to {_PER_PICTURE - 1}")
    done = {}
    for split in counts:
        split_files(folder, domain, split)[0].unlink(missing_ok=True)
    generate_pictures(folder, domain, counts, seed, SHAPE_COUNTS)
    for split, count in counts.items():
        done[split] = split_files(folder, domain, split)
        contents = _contents(domain, split, entries_of(domain, split, count, seed, each))
        if captions and split == "train":
            contents[0] += captions_of(domain, count, seed)
        for path, content in reversed([*zip(done[split], contents)]):
            with atomic_write(path) as file:
                file.write(f"{json.dumps(content, indent=1)}\n".encode())
    return done


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `generate_questions`; a split with 0 pictures is left as it is."""
    parser = argparse.ArgumentParser(description="Generate pictures with questions in VQAv2's format.")
    parser.add_argument("folder", help="where the json files and images/ go")
    parser.add_argument("--domain", choices=[*DOMAINS], default="shifted", help="default: %(default)s")
    for split, count in (("train", 1600), ("val", 200), ("test", 500)):
        parser.add_argument(
            f"--{split}", type=int, default=count, help="pictures; 0: left out (default: %(default)s)"
        )
    parser.add_argument("--each", type=int, default=EACH, help="questions about a picture (default: %(default)s)")
    parser.add_argument("--captions", action="store_true", help="also train on captions, as answers")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    counts = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    if not counts:
        parser.error("nothing to do: give --train, --val or --test a number above 0")
    try:
        files = generate_questions(args.folder, args.domain, counts, args.seed, args.each, args.captions)
    except ValueError as error:
        parser.error(str(error))
    for split, paths in files.items():
        print(f"{split}: {counts[split] * args.each} questions about {counts[split]} pictures, {paths[0]}")


if __name__ == "__main__":
    main()
