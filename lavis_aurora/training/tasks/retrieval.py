"""Retrieval of images and videos: LAVIS's task, with reports that say what was measured."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.retrieval import RetrievalTask

from lavis_aurora.common.files import write_text
from lavis_aurora.config.run import RetrievalRunConfig
from lavis_aurora.evaluation.scores import TOP, chance_recall, recall_metrics
from lavis_aurora.training.tasks.base import AuroraTaskBase, LavisTaskMixin

# Candidates of each query that a result file holds, best first, with their scores.
TOP_K_SAVED = 10


@registry.register_task("retrieval_aurora")
class RetrievalAuroraTask(LavisTaskMixin, RetrievalTask, AuroraTaskBase):
    """LAVIS's retrieval of pictures or videos: R@K and median rank both ways, before and after reranking."""

    shard_evaluation = False
    evaluation_method = "retrieval_scores"

    def evaluation(self, model: Any, data_loader: Any, **_kwargs: Any) -> dict[str, Any] | None:
        """Metrics, ranks and best candidates of a split, on the main process; None on the others."""
        start = time.time()
        scores = model.retrieval_scores(data_loader, self.cfg)
        if not is_main_process():
            return None
        dataset = data_loader.dataset
        kind = "video" if "video" in dataset.annotation[0] else "image"
        i2t, t2i = directions(kind)
        targets = {
            i2t: [dataset.img2txt[i] for i in range(len(dataset.image))],
            t2i: [[dataset.txt2img[i]] for i in range(len(dataset.text))],
        }
        result: dict[str, Any] = {
            "kind": kind,
            f"{kind}s": len(dataset.image),
            "texts": len(dataset.text),
            "k_test": {i2t: scores.i2t.indices.shape[1], t2i: scores.t2i.indices.shape[1]},
            "itc_weight": float(self.cfg.get("itc_weight", RetrievalRunConfig.itc_weight)),
            "pairs": scores.pairs,
            "metrics": {},
            "ranks": {},
            "candidates": {},
        }
        for direction, right in targets.items():
            for name, ranks in zip(("", "_itc"), scores.ranks(direction, right)):
                metrics = recall_metrics(ranks)
                result["metrics"].update({f"{direction}{name}_{key}": value for key, value in metrics.items()})
                result["ranks"][f"{direction}{name}"] = ranks.tolist()
            chance = chance_recall(right, result["texts" if direction == i2t else f"{kind}s"])
            result["metrics"].update({f"{direction}_chance_{key}": value for key, value in chance.items()})
            ids, values = scores.best(direction, TOP_K_SAVED)
            result["candidates"][direction] = {"ids": ids.tolist(), "scores": values.astype(float).round(4).tolist()}
        result["seconds"] = {**scores.seconds, "all": time.time() - start}
        return result

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
        path = Path(registry.get_path("result_dir")) / f"{split_name}_epoch_{epoch}.json"
        # A line for each part: with one for each number, nobody would find the metrics.
        parts = {"split": split_name, "epoch": epoch, **val_result}
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items())
        write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
        logging.info("metrics, ranks and best candidates written to %s", path)
        return dict(metrics)


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
    lines = [head, f"{'':<34}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median rank':>13}"]
    for direction in (i2t, t2i):
        for name, label in (("", ""), ("_itc", ", ITC only"), ("_chance", ", chance")):
            if name == "_itc" and not k[i2t]:
                continue
            prefix = f"{direction}{name}"
            row = "".join(f"{metrics[f'{prefix}_r{n}']:7.1f}" for n in TOP)
            median = f"{metrics[f'{prefix}_median_rank']:13.1f}" if name != "_chance" else ""
            lines.append(f"  {direction.replace('_', '-') + label:<32}{row}{median}")
    return "\n".join(lines)
