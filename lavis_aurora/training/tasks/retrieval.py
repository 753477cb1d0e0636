"""Retrieval of images and videos: LAVIS's task, with reports that say what was measured."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.retrieval import RetrievalTask

from lavis_aurora.common.files import write_text
from lavis_aurora.config.run import RetrievalRunConfig
from lavis_aurora.evaluation.scores import TOP, chance_recall, own_targets, recall_metrics, right_targets
from lavis_aurora.training.tasks.base import AuroraTaskBase, LavisTaskMixin, extremes

# Candidates of each query that a result file holds, best first, with their scores.
TOP_K_SAVED = 10


@registry.register_task("retrieval_aurora")
class RetrievalAuroraTask(LavisTaskMixin, RetrievalTask, AuroraTaskBase):
    """LAVIS's retrieval of pictures or videos: R@K and median rank both ways, before and after reranking."""

    shard_evaluation = False
    evaluation_method = "retrieval_scores"
    scores: Sequence[float] | None = ()

    def evaluation(self, model: Any, data_loader: Any, **_kwargs: Any) -> dict[str, Any] | None:
        """Metrics, ranks and best candidates of a split, on the main process; None on the others."""
        start = time.time()
        scores = model.retrieval_scores(data_loader, self.cfg)
        if not is_main_process():
            return None
        dataset = data_loader.dataset
        kind = "video" if "video" in dataset.annotation[0] else "image"
        i2t, t2i = directions(kind)
        own = own_targets(dataset.img2txt, dataset.txt2img)
        right = right_targets(dataset.text, dataset.img2txt, dataset.txt2img)
        shared = sum(len(images) > 1 for images in right[1])
        result: dict[str, Any] = {
            "kind": kind,
            f"{kind}s": len(dataset.image),
            "texts": len(dataset.text),
            "shared_texts": shared,
            "k_test": {i2t: scores.i2t.indices.shape[1], t2i: scores.t2i.indices.shape[1]},
            "itc_weight": float(self.cfg.get("itc_weight", RetrievalRunConfig.itc_weight)),
            "pairs": scores.pairs,
            "metrics": {},
            "ranks": {},
            "candidates": {},
        }
        for direction, targets, lavis_targets in zip((i2t, t2i), right, own):
            found = {}
            for name, ranks in zip(("", "_itc"), scores.ranks(direction, targets)):
                found[name] = recall_metrics(ranks)
                result["ranks"][f"{direction}{name}"] = ranks.tolist()
            if shared:
                lavis = recall_metrics(scores.lavis_ranks(direction, lavis_targets))
                found["_lavis"] = {f"r{k}": lavis[f"r{k}"] for k in TOP}
            found["_chance"] = chance_recall(targets, result["texts" if direction == i2t else f"{kind}s"])
            for name, metrics in found.items():
                result["metrics"].update({f"{direction}{name}_{key}": value for key, value in metrics.items()})
            ids, values = scores.best(direction, TOP_K_SAVED)
            result["candidates"][direction] = {"ids": ids.tolist(), "scores": values.astype(float).round(4).tolist()}
        image_of = [dataset.txt2img[i] for i in range(len(dataset.text))]
        self.scores = image_scores(result["ranks"][i2t], result["ranks"][t2i], image_of)
        result["seconds"] = {**scores.seconds, "all": time.time() - start}
        self._evaluated = dataset, result["ranks"][t2i]
        return result

    def cases(self) -> list[tuple[str, str]]:
        """Pictures that are found worst and best together with their texts, each with its first text."""
        dataset, ranks = self._evaluated
        found = []
        for i in extremes(self.scores or ()):
            text = dataset.img2txt[i][0]
            words = f"{dataset.text[text]}\nrank {ranks[text] + 1} of {len(dataset.image)}"
            found.append((dataset.file(i), words))
        return found

    def after_evaluation(
        self, val_result: dict[str, Any] | None, split_name: str, epoch: int | str, **_kwargs: Any
    ) -> dict[str, Any] | None:
        """Print the table, write ``result/SPLIT_epoch_N.json``, and return the metrics for the log."""
        if val_result is None:
            return None
        metrics = val_result["metrics"]
        recalls = [metrics[f"{d}_r{k}"] for d in directions(val_result["kind"]) for k in TOP]
        # LAVIS selects the best epoch by image-to-text alone; both directions count here.
        metrics["agg_metrics"] = float(np.mean(recalls))
        print(report(split_name, val_result), flush=True)
        self.print_findings(split_name)
        path = Path(registry.get_path("result_dir")) / f"{split_name}_epoch_{epoch}.json"
        # A line for each part: with one for each number, nobody would find the metrics.
        parts = {"split": split_name, "epoch": epoch, **val_result}
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items())
        write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
        logging.info("metrics, ranks and best candidates written to %s", path)
        return dict(metrics)


def image_scores(image_ranks: Sequence[int], text_ranks: Sequence[int], image_of: Sequence[int]) -> list[float]:
    """Mean recall of each image with its own texts, in percent; the mean over images is that of both directions.

    An image and its texts are found together or not at all: apart, they would count as more than they are.

    Args:
        image_ranks, text_ranks: of the right candidate of each image and of each text, from 0.
        image_of: the image of each text.
    """
    of_images, of_texts = (np.mean([np.less(ranks, k) for k in TOP], axis=0) for ranks in (image_ranks, text_ranks))
    own = np.bincount(image_of, weights=of_texts, minlength=len(of_images))
    both: list[float] = (50 * (of_images + own * len(of_images) / len(of_texts))).tolist()
    return both


# Rows of the table for each direction.
ROWS = {"": "", "_lavis": ", as LAVIS counts", "_itc": ", ITC only", "_chance": ", chance"}


def directions(kind: str) -> tuple[str, str]:
    """Names of both directions of a retrieval of ``kind`` image or video, texts of a picture or video first."""
    return f"{kind}_to_text", f"text_to_{kind}"


def report(split: str, result: dict[str, Any]) -> str:
    """The table of a split: counts, both directions, before and after reranking, chance."""
    metrics, k, kind = result["metrics"], result["k_test"], result["kind"]
    i2t, t2i = directions(kind)
    head = f"{split}: {result[f'{kind}s']} {kind}s, {result['texts']} texts; score = "
    if k[i2t]:
        each = {"image": "an image", "video": "a video"}[kind]
        head += (
            f"ITM + {result['itc_weight']:g} x ITC for the best {k[i2t]} texts of {each} and {k[t2i]} {kind}s of "
            f"a text by ITC"
        )
    else:
        head += "ITC, not reranked"
    lines = [head]
    if result["shared_texts"]:
        lines.append(
            f"  {result['shared_texts']} texts are those of other {kind}s too: a text that equals a right one is "
            f"right; for LAVIS, and in published figures, it is wrong"
        )
    lines += [f"{'':<34}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median rank':>13}"]
    for direction in (i2t, t2i):
        for name, label in ROWS.items():
            if (name == "_itc" and not k[i2t]) or (name == "_lavis" and not result["shared_texts"]):
                continue
            prefix = f"{direction}{name}"
            row = "".join(f"{metrics[f'{prefix}_r{n}']:7.1f}" for n in TOP)
            median = f"{metrics[f'{prefix}_median_rank']:13.1f}" if f"{prefix}_median_rank" in metrics else ""
            lines.append(f"  {direction.replace('_', '-') + label:<32}{row}{median}")
    return "\n".join(lines)
