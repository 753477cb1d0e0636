"""Tasks: LAVIS's, with training on any device and reports that say what was measured."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_dist_avail_and_initialized, is_main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.tasks.retrieval import RetrievalTask
from torch import Tensor

from lavis_aurora.data.annotations import build_checked
from lavis_aurora.progress import TrainingProgress
from lavis_aurora.retrieval.metrics import chance_recall, recall_metrics

# Candidates of each query that a result file holds, best first, with their scores.
BEST_KEPT = 10


class AuroraTrainMixin:
    """Training and data for any LAVIS task, on CPU and GPU, in one process or several."""

    # Whether processes may share an evaluation split by samples; retrieval ranks the whole split at once.
    shards_evaluation = True

    def build_datasets(self, cfg) -> dict:
        """Datasets by name and split, their files checked."""
        return {name: build_checked(name, cfg.datasets_cfg[name]) for name in cfg.datasets_cfg}

    def _train_inner_loop(
        self,
        epoch,
        iters_per_epoch,
        model,
        data_loader,
        optimizer,
        lr_scheduler,
        scaler=None,
        start_iters=None,
        log_freq=50,
        cuda_enabled=False,
        accum_grad_iters=1,
    ) -> dict[str, float]:
        """One epoch; returns the mean of each loss over steps and processes. Arguments are LAVIS's.

        LAVIS's own loop waits for the GPU every step and gathers its means on a GPU only.
        """
        device = "cuda" if cuda_enabled else "cpu"
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        progress = TrainingProgress(epoch, int(self.cfg.max_epoch), iters_per_epoch)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        for i, samples in enumerate(data_loader):
            samples = prepare_sample(samples, cuda_enabled=cuda_enabled)
            samples.update(epoch=epoch, num_iters_per_epoch=iters_per_epoch, iters=i)
            lr_scheduler.step(cur_epoch=epoch, cur_step=i)
            with torch.autocast(device, enabled=scaler is not None):
                output = model(samples)
            # The last steps of an epoch may be fewer than are accumulated.
            rest = iters_per_epoch % accum_grad_iters
            loss = output["loss"] / (rest if i >= iters_per_epoch - rest else accum_grad_iters)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if (i + 1) % accum_grad_iters == 0 or i + 1 == iters_per_epoch:
                _step(optimizer, scaler, trained, float(self.cfg.get("grad_clip", 0)))
            losses = {key: output[key].detach() for key in output if "loss" in key and output[key] is not None}
            for key, value in losses.items():
                totals[key] = totals[key] + value.double()
            if (i + 1) % log_freq == 0 or i + 1 == iters_per_epoch:
                progress.log(i, {key: float(v) for key, v in losses.items()}, optimizer.param_groups[0]["lr"])
        return _means(totals, iters_per_epoch)


def _step(optimizer, scaler, trained: list[Tensor], clip: float) -> None:
    if clip:
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)


def _means(totals: dict[str, Tensor], steps: int) -> dict[str, float]:
    """Mean over steps and processes."""
    if not totals:
        return {}
    stacked = torch.stack(list(totals.values()))
    if is_dist_avail_and_initialized():
        dist.all_reduce(stacked)
    values = (stacked / (steps * get_world_size())).tolist()
    return dict(zip(totals, values))


@registry.register_task("retrieval_aurora")
class RetrievalAuroraTask(AuroraTrainMixin, RetrievalTask):
    """LAVIS's retrieval, with R@K and median rank in both directions, before and after reranking."""

    shards_evaluation = False

    def evaluation(self, model, data_loader, **_kwargs) -> dict[str, Any] | None:
        """Metrics, ranks and best candidates of a split, on the main process; None on the others."""
        start = time.time()
        scores = model.retrieval_scores(data_loader, self.cfg)
        if not is_main_process():
            return None
        dataset = data_loader.dataset
        targets = {
            "image_to_text": [dataset.img2txt[i] for i in range(len(dataset.image))],
            "text_to_image": [[dataset.txt2img[i]] for i in range(len(dataset.text))],
        }
        result: dict[str, Any] = {
            "images": len(dataset.image),
            "texts": len(dataset.text),
            "k_test": {"image_to_text": scores.i2t.indices.shape[1], "text_to_image": scores.t2i.indices.shape[1]},
            "itc_weight": float(self.cfg.get("itc_weight", 1.0)),
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
            chance = chance_recall(right, result["texts" if direction == "image_to_text" else "images"])
            result["metrics"].update({f"{direction}_chance_{key}": value for key, value in chance.items()})
            ids, values = scores.best(direction, BEST_KEPT)
            result["candidates"][direction] = {"ids": ids.tolist(), "scores": values.astype(float).round(4).tolist()}
        result["seconds"] = {**scores.seconds, "all": time.time() - start}
        return result

    def after_evaluation(self, val_result, split_name, epoch, **_kwargs) -> dict[str, Any] | None:
        """Print the table, write ``result/SPLIT_epoch_N.json``, and return the metrics for the log."""
        if val_result is None:
            return None
        metrics = val_result["metrics"]
        recalls = [metrics[f"{d}_r{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
        # LAVIS selects the best epoch by image-to-text alone; both directions count here.
        metrics["agg_metrics"] = float(np.mean(recalls))
        print(report(split_name, val_result), flush=True)
        path = Path(registry.get_path("result_dir")) / f"{split_name}_epoch_{epoch}.json"
        # A line for each part: with one for each number, nobody would find the metrics.
        parts = {"split": split_name, "epoch": epoch, **val_result}
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        logging.info("metrics, ranks and best candidates written to %s", path)
        return dict(metrics)


def report(split: str, result: dict[str, Any]) -> str:
    """The table of a split: counts, both directions, before and after reranking, chance."""
    metrics, k = result["metrics"], result["k_test"]
    head = (
        f"{split}: {result['images']} images, {result['texts']} texts; score = ITM + {result['itc_weight']:g} x ITC "
        f"for the best {k['image_to_text']} texts of an image and {k['text_to_image']} images of a text by ITC"
    )
    if not k["image_to_text"]:
        head = f"{split}: {result['images']} images, {result['texts']} texts; score = ITC, not reranked"
    lines = [head, f"{'':<34}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median rank':>13}"]
    for direction in ("image_to_text", "text_to_image"):
        for name, label in (("", ""), ("_itc", ", ITC only"), ("_chance", ", chance")):
            if name == "_itc" and not k["image_to_text"]:
                continue
            prefix = f"{direction}{name}"
            row = "".join(f"{metrics[f'{prefix}_r{n}']:7.1f}" for n in (1, 5, 10))
            median = f"{metrics[f'{prefix}_median_rank']:13.1f}" if name != "_chance" else ""
            lines.append(f"  {direction.replace('_', '-') + label:<32}{row}{median}")
    return "\n".join(lines)
