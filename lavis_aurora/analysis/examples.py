"""Plots of single examples of a run: where words look in a picture (figure 5), rankings and answers (12, 13)."""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import nn

from lavis_aurora.analysis.drawing import Plot, hide_axes, subplots
from lavis_aurora.analysis.results import (
    load_trained,
    read_config,
    result_file,
    split_data,
    tuned_model,
    untrained_model,
)
from lavis_aurora.common.answers import normalise
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json
from lavis_aurora.data.samples import read_visual
from lavis_aurora.encoders.merging import patch_shares, traced
from lavis_aurora.encoders.towers import encode_visual
from lavis_aurora.evaluation.scores import right_targets

COLUMNS = 8  # of pictures
SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[ENC]", "[DEC]")
RIGHT, WRONG, UNKNOWN = "#15803d", "#b91c1c", "#374151"


class AttentionPlot(Plot):
    """Cross-attention of each word of a text, over its picture."""

    name = "attention"
    about = "where each word of a text looks in a picture (figure 5)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs of retrieval, a row each")
        parser.add_argument("--labels", nargs="+", help="names of the rows; the runs' settings by default")
        parser.add_argument("--split", default="test")
        parser.add_argument("--picture", type=int, default=0, help="number of the split's picture; its first caption")
        parser.add_argument("--text", help="another text than its caption")
        parser.add_argument("--words", nargs="+", help="only these of its words")
        parser.add_argument(
            "--relative",
            action="store_true",
            help="what a word adds to the mean of all words: hides what all look at",
        )
        parser.add_argument("--layer", type=int, default=-1, help="of the text encoder; the last by default")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """Maps by run and word."""
        for run in args.runs:
            arch = read_config(run).model.arch
            if arch != "blip_retrieval_aurora":
                raise AuroraError(f"{run}: a run of {arch}; maps of words are those of blip_retrieval_aurora")
        dataset = split_data(args.runs[0], args.split)
        if not 0 <= args.picture < len(dataset.annotation) or "image" not in dataset.annotation[args.picture]:
            raise AuroraError(f"--picture {args.picture}: the split {args.split} has no picture of this number")
        text = args.text or dataset.text[dataset.img2txt[args.picture][0]]
        image = dataset[args.picture]["image"][None]
        rows = []
        for run, name in zip(args.runs, _run_labels(args)):
            model = untrained_model(run)
            load_trained(model, run)
            words, maps, layer = word_maps(model, image, text, args.layer)
            if args.relative:
                maps = np.maximum(maps - maps.mean(axis=0), 0)
            shown = [i for i, word in enumerate(words) if not args.words or word in args.words]
            if not shown:
                raise AuroraError(
                    f"--words {' '.join(args.words)}: not in the text; its words are {', '.join(words)}"
                )
            words, maps = [words[i] for i in shown], maps[shown]
            rows.append({"run": str(run), "label": name, "words": words, "layer": layer, "maps": maps.tolist()})
        return {"picture": dataset.file(args.picture), "text": text, "relative": args.relative, "rows": rows}

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """For each run the picture, then a map over it for each word; each map has a scale of its own."""
        picture, rows = read_visual(numbers["picture"]), numbers["rows"]
        lines = math.ceil((1 + len(rows[0]["words"])) / COLUMNS)
        columns = min(COLUMNS, 1 + len(rows[0]["words"]))
        figure, axes = subplots(len(rows) * lines, columns, 1.6, 1.85)
        height, width = picture.shape[:2]
        for axis in axes:
            hide_axes(axis)
        for i, row in enumerate(rows):
            first, *panels = axes[i * lines * columns : (i + 1) * lines * columns]
            first.imshow(picture)
            first.set_title(f"{row['label']}\nlayer {row['layer']}", fontsize=8)
            for axis, word, one in zip(panels, row["words"], np.asarray(row["maps"])):
                axis.imshow(picture)
                axis.imshow(
                    one,
                    cmap="inferno",
                    alpha=0.6,
                    interpolation="bilinear",
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                )
                axis.set_title(word, fontsize=11)
        meaning = "bright: more than other words" if numbers["relative"] else "bright: most of this word's attention"
        text = "\n".join(textwrap.wrap(f"Where each word looks: “{numbers['text']}”", 14 * columns))
        figure.suptitle(f"{text} ({meaning})", fontsize=11)
        return figure


@torch.no_grad()
def word_maps(model, image: torch.Tensor, text: str, layer: int) -> tuple[list[str], np.ndarray, int]:
    """Cross-attention of each word to each patch, the mean over heads.

    Args:
        model: blip_retrieval_aurora.
        image: (1, 3, height, width).
        text: matched with it.
        layer: of the text encoder; negative counts from the last.

    Returns:
        The words, joined from their pieces, maps (words, rows, columns), and the layer's number.
    """
    tokens = model.tokenize([text], pad_to_longest=True, device=model.device)
    pieces = model.tokenizer.convert_ids_to_tokens(tokens.input_ids[0].tolist())
    ids = tokens.input_ids.clone()
    ids[:, 0] = model.tokenizer.enc_token_id
    layers = model.text_encoder.encoder.layer
    if not -len(layers) <= layer < len(layers):
        raise AuroraError(f"--layer {layer}: the text encoder has {len(layers)} layers")
    layer %= len(layers)
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, _inputs: tuple, outputs: tuple) -> None:
        caught.append(outputs[1])

    # LAVIS's encoder drops the maps of cross-attention, its layers do not.
    handle = layers[layer].crossattention.self.register_forward_hook(catch)
    try:
        with traced(model.visual_encoder):
            embeds, _ = encode_visual(model.visual_encoder, image.to(model.device))
        model.text_encoder(
            ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones(embeds.shape[:-1], dtype=torch.long, device=model.device),
            output_attentions=True,
            return_dict=True,
        )
    finally:
        handle.remove()
    [attention] = caught  # (1, heads, pieces, tokens)
    patches = attention[0].mean(dim=0) @ patch_shares(embeds, model.visual_encoder.embed_dim)[0, :, 1:]
    size = model.visual_encoder.patch_embed.patch_size[0]
    grid = patches.unflatten(1, (image.shape[-2] // size, image.shape[-1] // size))
    words: list[str] = []
    maps: list[torch.Tensor] = []
    for piece, one in zip(pieces, grid):
        if piece in SPECIAL:
            continue
        if piece.startswith("##") and words:
            words[-1] += piece[2:]
            maps[-1] = maps[-1] + one
        else:
            words.append(piece)
            maps.append(one)
    return words, torch.stack(maps).cpu().numpy(), layer


class CasesPlot(Plot):
    """Texts with the pictures or frames ranked for them, or questions with answers."""

    name = "cases"
    about = "single texts with ranked pictures, or questions with answers (figures 12, 13)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
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

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """The cases, with the files of their pictures."""
        for name in ("count", "top"):
            if getattr(args, name) < 1:
                raise AuroraError(f"--{name} {getattr(args, name)}: must be 1 or more")
        labels = _run_labels(args)
        if "vqa" in tuned_model(read_config(args.runs[0])).arch:
            return _answers(args, labels)
        if len(args.runs) > 1:
            raise AuroraError("cases of retrieval are those of one run; name one")
        return _ranked(args)

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """Rows of ranked pictures, the right one framed; or pictures with a question and its answers."""
        return (_draw_ranked if numbers["kind"] == "retrieval" else _draw_answers)(numbers)


def _run_labels(args: argparse.Namespace) -> list[str]:
    """A name for each run."""
    labels = args.labels or [tuning_label(run) for run in args.runs]
    if len(labels) != len(args.runs):
        raise AuroraError(f"--labels: {len(labels)} names for {len(args.runs)} runs")
    return labels


def tuning_label(run: str | Path) -> str:
    """What a run was tuned by."""
    config = read_config(run)
    tuning = tuned_model(config).tuning
    if tuning != "aurora":
        return tuning
    sharing = OmegaConf.select(config, "model.mode_approx.sharing", default="global")
    return {"global": "Aurora, U and V shared", "tower": "Aurora, U and V by tower"}.get(sharing, sharing)


def _selected(args: argparse.Namespace, candidates: list[int], total: int) -> list[int]:
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
    right, cases = right_targets(dataset.text, dataset.img2txt, dataset.txt2img)[1], []
    for item in _selected(args, list(range(len(ids))), len(ids)):
        shown = [{"file": dataset.file(i), "right": i in right[item]} for i in ids[item][: args.top]]
        rank = result["ranks"][direction][item] + 1
        cases.append({"item": item, "text": dataset.text[item], "rank": rank, "candidates": shown})
    return {"kind": "retrieval", "run": str(run), "cases": cases}


def _answers(args: argparse.Namespace, labels: list[str]) -> dict[str, Any]:
    """Questions with the answers of each run; those first on which the runs differ."""
    answers: list[tuple[str, dict[str, Any]]] = []
    for run in args.runs:
        found = result_file(run, f"{args.split}_epoch_*_vqa_result.json")
        # One question's number among the samples may be the id of another.
        key = "instance_id" if all("instance_id" in one for one in found) else "question_id"
        answers.append((key, {str(one[key]): one for one in found}))
    dataset = split_data(args.runs[0], args.split)
    truths = _ground_truth(dataset)
    entries = []
    for index, entry in enumerate(dataset.annotation):
        given = [one for key, found in answers if (one := found.get(str(entry.get(key))))]
        if len(given) < len(answers):
            continue
        truth = given[0].get("truth") or truths.get(str(entry.get("question_id"))) or entry.get("answer")
        entries.append(
            {"item": index, "file": dataset.file(index), "question": entry["question"]}
            | {"answers": [one["answer"] for one in given], "truth": truth if isinstance(truth, str) else None}
        )
    if not entries:
        raise AuroraError(f"{', '.join(map(str, args.runs))}: no question was answered by all of them")
    by_item = {entry["item"]: entry for entry in entries}
    differing = [entry["item"] for entry in entries if len(set(map(normalise, entry["answers"]))) > 1]
    items = _selected(args, differing if len(differing) >= args.count else list(by_item), len(dataset.annotation))
    missing = [item for item in items if item not in by_item]
    if missing:
        raise AuroraError(f"--items {missing[0]}: this question was not answered by all runs")
    share = {"questions": len(entries), "differing": len(differing)}
    return {"kind": "answers", "labels": labels, **share, "cases": [by_item[item] for item in items]}


def _ground_truth(dataset) -> dict[str, str]:
    """The commonest true answer by question, where VQAv2's annotations are known."""
    path = getattr(dataset, "coco_fmt_anno_file", None)
    if not path:
        return {}
    found = {}
    for one in read_json(path)["annotations"]:
        given = [answer["answer"] for answer in one["answers"]]
        found[str(one["question_id"])] = max(given, key=given.count)
    return found


def _draw_ranked(numbers: dict[str, Any]) -> Figure:
    cases = numbers["cases"]
    columns = 1 + max(len(case["candidates"]) for case in cases)
    figure, axes = subplots(len(cases), columns, 1.7, 1.85)
    for i, case in enumerate(cases):
        first, *panels = axes[i * columns : (i + 1) * columns]
        hide_axes(first)
        text = "\n".join(textwrap.wrap(f"“{case['text']}”", 24))
        first.text(0.98, 0.5, f"{text}\n\nright one: rank {case['rank']}", ha="right", va="center", fontsize=8)
        for place, axis in enumerate(panels):
            hide_axes(axis)
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
    figure, axes = subplots(1, len(cases), 2.6, 3.4 + 0.22 * len(labels))
    for axis, case in zip(axes, cases):
        hide_axes(axis)
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
    """As exact match compares them."""
    return UNKNOWN if truth is None else RIGHT if normalise(answer) == normalise(truth) else WRONG


ATTENTION, CASES = AttentionPlot(), CasesPlot()
