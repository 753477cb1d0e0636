"""Single cases: texts with the pictures or frames ranked for them, questions with answers; figures 12 and 13."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lavis_aurora.analysis.attention import run_label
from lavis_aurora.analysis.drawing import blank, canvas
from lavis_aurora.analysis.results import read_config, read_visual, result_file, split_data, tuned_model
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json

RIGHT, WRONG, UNKNOWN = "#15803d", "#b91c1c", "#374151"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the figure."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="one of retrieval, or one or more of question answering"
    )
    parser.add_argument("--labels", nargs="+", help="names of the runs; their settings by default")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--items", nargs="+", type=int, help="numbers of texts or questions; chosen evenly by default"
    )
    parser.add_argument("--count", type=int, default=4, help="cases, if --items does not name them")
    parser.add_argument("--top", type=int, default=5, help="ranked pictures of each text")


def numbers(args: argparse.Namespace) -> dict[str, Any]:
    """The cases, with the files of their pictures."""
    for name in ("count", "top"):
        if getattr(args, name) < 1:
            raise AuroraError(f"--{name} {getattr(args, name)}: must be 1 or more")
    labels = args.labels or [run_label(run) for run in args.runs]
    if len(labels) != len(args.runs):
        raise AuroraError(f"--labels: {len(labels)} names for {len(args.runs)} runs")
    if "vqa" in tuned_model(read_config(args.runs[0])).arch:
        return _answers(args, labels)
    if len(args.runs) > 1:
        raise AuroraError("cases of retrieval are those of one run; name one")
    return _ranked(args)


def _chosen(args: argparse.Namespace, candidates: list[int], total: int) -> list[int]:
    """The items named, or some of the candidates, evenly spaced: not picked for what they show."""
    if args.items:
        bad = [item for item in args.items if not 0 <= item < total]
        if bad:
            raise AuroraError(f"--items {bad[0]}: there are {total}, from 0")
        return args.items
    places = np.linspace(0, len(candidates) - 1, min(args.count, len(candidates))).round().astype(int)
    return [candidates[place] for place in places]


def _ranked(args: argparse.Namespace) -> dict[str, Any]:
    """Texts with the best candidates that the result file holds."""
    [run] = args.runs
    result, dataset = result_file(run, f"{args.split}_epoch_*.json"), split_data(run, args.split)
    direction = next((key for key in result.get("candidates", {}) if key.startswith("text_to_")), None)
    if direction is None:
        raise AuroraError(f"{run}: its result file holds no ranked candidates; evaluate the run again")
    ids = result["candidates"][direction]["ids"]
    cases = []
    for item in _chosen(args, list(range(len(ids))), len(ids)):
        right = dataset.txt2img[item]
        shown = [{"file": dataset.file(i), "right": i == right} for i in ids[item][: args.top]]
        rank = result["ranks"][direction][item] + 1
        cases.append({"item": item, "text": dataset.text[item], "rank": rank, "candidates": shown})
    return {"kind": "retrieval", "run": str(run), "cases": cases}


def _answers(args: argparse.Namespace, labels: list[str]) -> dict[str, Any]:
    """Questions with the answers of each run; those first on which the runs differ."""
    answers = []
    for run in args.runs:
        found = result_file(run, f"{args.split}_epoch_*_vqa_result.json")
        answers.append({str(_key(one)): one for one in found})
    dataset = split_data(args.runs[0], args.split)
    truths = _truths(dataset)
    entries = []
    for index, entry in enumerate(dataset.annotation):
        key = next(
            (k for k in (str(entry.get("instance_id")), str(entry.get("question_id"))) if k in answers[0]), None
        )
        if key is None or any(key not in given for given in answers):
            continue
        given = [run[key]["answer"] for run in answers]
        truth = answers[0][key].get("truth") or truths.get(str(entry.get("question_id"))) or entry.get("answer")
        entries.append(
            {"item": index, "file": dataset.file(index), "question": entry["question"]}
            | {"answers": given, "truth": truth if isinstance(truth, str) else None}
        )
    if not entries:
        raise AuroraError(f"{', '.join(map(str, args.runs))}: no question was answered by all of them")
    by_item = {entry["item"]: entry for entry in entries}
    differing = [entry["item"] for entry in entries if len(set(entry["answers"])) > 1]
    items = _chosen(args, differing if len(differing) >= args.count else list(by_item), len(dataset.annotation))
    missing = [item for item in items if item not in by_item]
    if missing:
        raise AuroraError(f"--items {missing[0]}: this question was not answered by all runs")
    share = {"questions": len(entries), "differing": len(differing)}
    return {"kind": "answers", "labels": labels, **share, "cases": [by_item[item] for item in items]}


def _key(result: dict[str, Any]) -> Any:
    return result.get("instance_id", result.get("question_id"))


def _truths(dataset) -> dict[str, str]:
    """The commonest true answer by question, where VQAv2's annotations are known."""
    path = getattr(dataset, "coco_fmt_anno_file", None)
    if not path:
        return {}
    found = {}
    for one in read_json(path)["annotations"]:
        given = [answer["answer"] for answer in one["answers"]]
        found[str(one["question_id"])] = max(given, key=given.count)
    return found


def draw(numbers: dict[str, Any]) -> Figure:
    """Rows of ranked pictures, the right one framed; or pictures with a question and its answers."""
    return (_draw_ranked if numbers["kind"] == "retrieval" else _draw_answers)(numbers)


def _draw_ranked(numbers: dict[str, Any]) -> Figure:
    cases = numbers["cases"]
    columns = 1 + max(len(case["candidates"]) for case in cases)
    figure, axes = canvas(len(cases), columns, 1.7, 1.85)
    for i, case in enumerate(cases):
        first, *panels = axes[i * columns : (i + 1) * columns]
        blank(first)
        text = "\n".join(textwrap.wrap(f"“{case['text']}”", 24))
        first.text(0.98, 0.5, f"{text}\n\nright one: rank {case['rank']}", ha="right", va="center", fontsize=8)
        for place, axis in enumerate(panels):
            blank(axis)
            if place >= len(case["candidates"]):
                continue
            one = case["candidates"][place]
            axis.imshow(read_visual(one["file"]))
            axis.set_title(f"{place + 1}.", fontsize=9, color=RIGHT if one["right"] else UNKNOWN)
            if one["right"]:
                for side in axis.spines.values():
                    side.set(visible=True, color=RIGHT, linewidth=4)
    figure.suptitle("Texts and what is ranked best for them; the right one is framed", fontsize=11)
    return figure


def _draw_answers(numbers: dict[str, Any]) -> Figure:
    cases, labels = numbers["cases"], numbers["labels"]
    figure, axes = canvas(1, len(cases), 2.6, 3.4 + 0.22 * len(labels))
    for axis, case in zip(axes, cases):
        blank(axis)
        axis.imshow(read_visual(case["file"]))
        axis.set_title("\n".join(textwrap.wrap(case["question"], 30)), fontsize=9)
        truth = case["truth"]
        lines = [(f"{label}: {answer}", _color(answer, truth)) for label, answer in zip(labels, case["answers"])]
        lines.append((f"true: {truth}" if truth else "true answer not known", UNKNOWN))
        # The layout reserves room for labels of an axis; they have one color each, so lines are written over it.
        axis.set_xlabel("\n" * len(lines), fontsize=9)
        for i, (line, color) in enumerate(lines):
            place = {"xytext": (0, -6 - 13 * i), "xycoords": "axes fraction", "textcoords": "offset points"}
            axis.annotate(line, (0.5, 0), **place, ha="center", va="top", fontsize=9, color=color)
    known = any(case["truth"] for case in cases)
    title = f"Answers; the runs differ on {numbers['differing']} of {numbers['questions']} questions"
    figure.suptitle(title + "; green is right, red wrong" * known, fontsize=11)
    return figure


def _color(answer: str, truth: str | None) -> str:
    return UNKNOWN if truth is None else RIGHT if answer == truth else WRONG
