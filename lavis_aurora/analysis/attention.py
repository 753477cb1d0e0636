"""Where each word looks: cross-attention maps over a picture, figure 5."""

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

from lavis_aurora.analysis.drawing import blank, canvas
from lavis_aurora.analysis.results import (
    load_trained,
    read_config,
    read_visual,
    split_data,
    tuned_model,
    untrained_model,
)
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.encoders.towers import encode_visual

COLUMNS = 8  # of pictures
SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[ENC]", "[DEC]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the figure."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs of retrieval, a row each")
    parser.add_argument("--labels", nargs="+", help="names of the rows; the runs' settings by default")
    parser.add_argument("--split", default="test")
    parser.add_argument("--picture", type=int, default=0, help="number of the split's picture; its first caption")
    parser.add_argument("--text", help="another text than its caption")
    parser.add_argument("--words", nargs="+", help="only these of its words")
    parser.add_argument(
        "--relative", action="store_true", help="what a word adds to the mean of all words: hides what all look at"
    )
    parser.add_argument("--layer", type=int, default=-1, help="of the text encoder; the last by default")


def numbers(args: argparse.Namespace) -> dict[str, Any]:
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
    labels = args.labels or [run_label(run) for run in args.runs]
    if len(labels) != len(args.runs):
        raise AuroraError(f"--labels: {len(labels)} names for {len(args.runs)} runs")
    rows = []
    for run, name in zip(args.runs, labels):
        model = untrained_model(run)
        load_trained(model, run)
        words, maps, layer = word_maps(model, image, text, args.layer)
        if args.relative:
            maps = np.maximum(maps - maps.mean(axis=0), 0)
        shown = [i for i, word in enumerate(words) if not args.words or word in args.words]
        if not shown:
            raise AuroraError(f"--words {' '.join(args.words)}: not in the text; its words are {', '.join(words)}")
        words, maps = [words[i] for i in shown], maps[shown]
        rows.append({"run": str(run), "label": name, "words": words, "layer": layer, "maps": maps.tolist()})
    picture = dataset.file(args.picture)
    return {"picture": picture, "text": text, "relative": args.relative, "rows": rows}


def run_label(run: str | Path) -> str:
    """What a run was tuned by."""
    config = read_config(run)
    tuning = tuned_model(config).tuning
    if tuning != "aurora":
        return tuning
    sharing = OmegaConf.select(config, "model.mode_approx.sharing", default="global")
    return {"global": "Aurora, U and V shared", "tower": "Aurora, U and V by tower"}.get(sharing, sharing)


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
    tokens = model.tokenize([text], to_longest=True)
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
        embeds, _ = encode_visual(model.visual_encoder, image)
        model.text_encoder(
            ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones(embeds.shape[:-1], dtype=torch.long),
            output_attentions=True,
            return_dict=True,
        )
    finally:
        handle.remove()
    [attention] = caught  # (1, heads, pieces, 1 + patches)
    patches = attention[0].mean(dim=0)[:, 1:]
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
    return words, torch.stack(maps).numpy(), layer


def draw(numbers: dict[str, Any]) -> Figure:
    """For each run the picture, then a map over it for each word; each map has a scale of its own."""
    picture = read_visual(numbers["picture"])
    rows = numbers["rows"]
    lines = math.ceil((1 + len(rows[0]["words"])) / COLUMNS)
    columns = min(COLUMNS, 1 + len(rows[0]["words"]))
    figure, axes = canvas(len(rows) * lines, columns, 1.6, 1.85)
    height, width = picture.shape[:2]
    for axis in axes:
        blank(axis)
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
