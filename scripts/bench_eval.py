"""Reranking by LAVIS and by lavis_aurora side by side: time, memory, and whether the scores are the same.

    python scripts/bench_eval.py                          # both kinds, medians of 3 runs
    python scripts/bench_eval.py --kinds images --runs 1  # a first look
    python scripts/bench_eval.py --merge 16               # ours with model.token_merging too
    python scripts/bench_eval.py --device cuda --rows 16

BLIP base with random weights, k candidates a query. Each run is a process of its own; LAVIS's and ours take turns.

- LAVIS: its BlipRetrieval with the adapter merged into its weights, and its own compute_sim_matrix on k images and
  k captions, as one of so many processes that ``--rows`` images and as many captions fall to this one. LAVIS cannot
  take a video: it is given the tokens of all frames as those of one picture, and the frames' mean as ITC feature.
- Ours: blip_retrieval_aurora with that adapter, which is merged meanwhile, and a gate, on the same set; ``2 * rows``
  of its images, so that both score as many pairs. That each of our pairs serves both directions of a real evaluation
  is not counted.
- The tokens of pictures are random numbers here, so that the reranking alone is timed; the vision tower is timed by
  itself, on ``--rows`` pictures or on one video.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from bench_eval_models import KINDS, FakeRetrievalDataset, RandomTokenEncoder, VideoAsImageModel, build
from measuring import environment_info, measure_in_subprocess, resident_memory, return_freed_memory
from torch import nn
from torch.utils.data import DataLoader

IMPLEMENTATIONS = ("lavis", "ours", "merged")  # the last with --merge

MERGED = {
    "pairs_per_second": "pairs reranked per second",
    "cpu_seconds": "processor seconds for them",
    "tower_seconds": "vision tower, seconds each",
}


class Timer:
    """Seconds on the wall and of the processor since its start; the second hardly depend on who else is at work."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """``seconds`` and ``cpu_seconds``."""
        wall, cpu = (now - then for now, then in zip(self._now(), self.start))
        return {"seconds": wall, "cpu_seconds": cpu}


class Memory:
    """Peak above what was in use at the start, in MB: of the process, and of the GPU if there is one."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.allocated = torch.cuda.memory_allocated()
        # What building the model left over must not hide what the evaluation takes.
        gc.collect()
        return_freed_memory()
        self.resident = resident_memory(reset=True)[0]

    def peak(self) -> dict[str, float]:
        """``main``, and ``gpu`` if there is one."""
        found = {"main": (resident_memory()[1] - self.resident) / 1e6}
        if self.cuda:
            found["gpu"] = (torch.cuda.max_memory_allocated() - self.allocated) / 1e6
        return found


def run_lavis(model: nn.Module, loader: DataLoader, rows: int) -> dict:
    """LAVIS's own function; the clock of the reranking starts with the first pair."""
    from lavis.models.albef_models import compute_sim_matrix

    k, clocks, pairs = len(loader.dataset), [], []

    def note(_module, args: tuple, *_rest) -> None:
        clocks.append(Timer())
        pairs.append(len(args[0]))

    hook = model.text_encoder.register_forward_pre_hook(note)
    # LAVIS gives each process k // processes + 1 rows in each direction.
    processes = next((n for n in range(1, k + 2) if k // n + 1 == rows), None)
    if processes is None:
        sys.exit(f"--rows {rows}: LAVIS cannot give that many of {k} to a process; take one more or less")
    with patch("lavis.common.dist_utils.get_world_size", return_value=processes):
        i2t, t2i = compute_sim_matrix(model, loader, k_test=k)
    took = clocks[0].read()
    hook.remove()
    return {**took, "pairs": sum(pairs), "i2t": i2t[:rows], "t2i": t2i[:rows]}


def run_aurora(model: nn.Module, loader: DataLoader, rows: int) -> dict:
    """All captions with 2 * rows images, as :func:`lavis_aurora.evaluation.rerank.retrieval_scores` does it."""
    from lavis_aurora.adapters.merging import merged_where_exact
    from lavis_aurora.evaluation.encode import ImageTokens, encode_texts
    from lavis_aurora.evaluation.rerank import score_pairs

    texts = encode_texts(model, loader.dataset.text, 256)
    images = ImageTokens(model, loader, budget_gb=4.0, dtype=torch.float32)
    count = len(texts.feats)
    keys = torch.arange(2 * rows * count)
    clock = Timer()
    with merged_where_exact(model):  # as in a run
        itm = score_pairs(model, images, texts, keys)[:, 1]
    took = clock.read()
    scores = np.full((count, count), np.nan, dtype=np.float32)
    scores[: 2 * rows] = (itm.view(2 * rows, count) + (images.feats @ texts.feats.t())[: 2 * rows]).numpy()
    return {**took, "pairs": len(keys), "i2t": scores[:rows], "t2i": scores.T[:rows]}


@torch.no_grad()
def worker(args: argparse.Namespace) -> None:
    """One run in this process; the results go to a file."""
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    kind, ours = KINDS[args.worker[1]], args.worker[0] != "lavis"
    merge = args.merge if args.worker[0] == "merged" else 0
    model = build(kind, args.worker[0], args.device, merge)
    tower = model.visual_encoder
    stand_in = RandomTokenEncoder((kind.side // 16) ** 2 + 1, max(1, kind.frames), merge)
    model.visual_encoder = stand_in.to(args.device)
    if kind.frames and not ours:
        model.visual_encoder = model.vision_proj = VideoAsImageModel(stand_in, model.vision_proj)
    loader = DataLoader(
        FakeRetrievalDataset(args.k, kind.frames, "video" if kind.frames and ours else "image"), batch_size=8
    )
    run = run_aurora if ours else run_lavis
    memory = Memory(args.device)
    result = run(model, loader, args.rows)
    result["memory"] = memory.peak()
    pixels = torch.randn(kind.frames or args.rows, 3, kind.side, kind.side)
    tower.forward_features(pixels[:1].to(args.device))
    clock = Timer()
    tower.forward_features(pixels.to(args.device))
    tower_seconds = clock.read()["seconds"] / (1 if kind.frames else len(pixels))
    result["tower_seconds"] = tower_seconds
    torch.save(result, args.result)
    if args.profile and ours:
        with torch.profiler.profile() as profile:
            run(model, loader, 1)
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)
        Path(f"{args.result}.profile").write_text(re.sub(r"(?m)^USDT.*\n|^ERROR.*\n", "", table), encoding="utf-8")


def measure(args: argparse.Namespace) -> dict:
    """All runs, LAVIS's and ours in turns."""
    sides = IMPLEMENTATIONS if args.merge else IMPLEMENTATIONS[:2]
    jobs = [(side, kind, run) for kind in args.kinds for run in range(args.runs) for side in sides]
    found: dict = {kind: {side: [] for side in sides} for kind in args.kinds}
    took: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (side, kind, run) in enumerate(jobs):
            known = [took.get((s, n)) for s, n, _ in jobs[i:]]
            left = f"{timedelta(seconds=round(sum(known)))} left" if None not in known else "time left not known yet"
            print(f"{i + 1}/{len(jobs)}: {side}, {kind}, run {run + 1} ({left})", file=sys.stderr, flush=True)
            start, path = time.time(), Path(folder) / f"{i}.pt"
            arguments = ["--worker", side, kind, "--result", str(path)]
            arguments += [f"--{key}={getattr(args, key)}" for key in ("k", "rows", "device", "threads", "merge")]
            arguments += ["--profile"] if args.profile and run == 0 else []
            measure_in_subprocess(__file__, arguments, args.threads, f"bench_eval: {side}, {kind}")
            took[side, kind] = time.time() - start
            found[kind][side].append(torch.load(path, weights_only=False))
            if Path(f"{path}.profile").exists():
                print(f"{kind}, {side}:\n" + Path(f"{path}.profile").read_text(encoding="utf-8"), file=sys.stderr)
    return found


def summarize(found: dict) -> dict:
    """Medians by kind and side, ratios, and the largest difference of scores."""
    summary = {}
    for kind, sides in found.items():
        row: dict = {}
        for side, runs in sides.items():
            row[side] = {
                "pairs": runs[0]["pairs"],
                "seconds": statistics.median(r["seconds"] for r in runs),
                "cpu_seconds": statistics.median(r["cpu_seconds"] for r in runs),
                "all_seconds": [round(r["seconds"], 2) for r in runs],
                "pairs_per_second": statistics.median(r["pairs"] / r["seconds"] for r in runs),
                "tower_seconds": statistics.median(r["tower_seconds"] for r in runs),
                "peak_mb": {m: statistics.median(r["memory"][m] for r in runs) for m in runs[0]["memory"]},
            }
        lavis, ours = row["lavis"], row["ours"]
        row["speedup"] = ours["pairs_per_second"] / lavis["pairs_per_second"]
        row["memory_ratio"] = {m: ours["peak_mb"][m] / lavis["peak_mb"][m] for m in ours["peak_mb"]}
        differences = []
        for direction in ("i2t", "t2i"):
            one, other = (sides[side][0][direction] for side in ("ours", "lavis"))
            both = ~np.isnan(one)
            assert both.any() and (other[both] != -100).all()
            differences.append(float(np.abs(one - other)[both].max()))
        row["max_score_difference"] = max(differences)
        row["score_deviation"] = float(sides["lavis"][0]["i2t"].std())
        summary[kind] = row
    return summary


def table(summary: dict) -> str:
    """For a terminal and for Markdown."""
    lines = ["| | LAVIS | lavis_aurora | |", "| --- | --- | --- | --- |"]
    for kind, row in summary.items():
        lavis, ours = row["lavis"], row["ours"]
        one = kind[:-1]
        lines += [
            f"| {kind}: pairs reranked per second | {lavis['pairs_per_second']:.2f} | {ours['pairs_per_second']:.2f} "
            f"| {row['speedup']:.1f} x |",
            f"| {kind}: seconds for {ours['pairs']} pairs | {lavis['seconds']:.1f} | {ours['seconds']:.1f} | |",
            f"| {kind}: processor seconds for them | {lavis['cpu_seconds']:.1f} | {ours['cpu_seconds']:.1f} "
            f"| {lavis['cpu_seconds'] / ours['cpu_seconds']:.1f} x |",
            f"| {kind}: vision tower, seconds a{'n' if one[0] in 'aeiou' else ''} {one} "
            f"| {lavis['tower_seconds']:.2f} | {ours['tower_seconds']:.2f} "
            f"| {lavis['tower_seconds'] / ours['tower_seconds']:.1f} x |",
        ]
        for memory, peak in ours["peak_mb"].items():
            lines.append(
                f"| {kind}: peak {memory} memory of the evaluation, MB | {lavis['peak_mb'][memory]:.0f} | {peak:.0f} "
                f"| {100 * row['memory_ratio'][memory]:.0f}% |"
            )
        lines.append(
            f"| {kind}: largest difference of scores | {row['max_score_difference']:.1e} "
            f"| | scores vary by {row['score_deviation']:.2f} |"
        )
        if "merged" in row:
            lines += [
                f"| {kind}, tokens merged: {text} | {ours[key]:.2f} (none merged) | {row['merged'][key]:.2f} "
                f"| {row['merged'][key] / ours[key]:.2f} |"
                for key, text in MERGED.items()
            ]
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Of the command line; check_gpu.py measures by it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--k", type=int, default=128, help="candidates of a query, and images and captions of the set"
    )
    parser.add_argument("--rows", type=int, default=1, help="images, and captions, that LAVIS reranks in a run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--merge", type=int, default=0, metavar="R", help="measure ours with token_merging R too")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="also write all figures here")
    parser.add_argument("--profile", action="store_true", help="print where our time goes")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.worker:
        worker(args)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_eval: --device cuda, but torch sees no GPU")
    load, start = os.getloadavg()[0], time.time()
    summary = summarize(measure(args))
    summary["machine"] = {**environment_info(args.device, args.threads), "load_before": load}
    name = summary["machine"]["device"]
    figures = {kind: summary[kind] for kind in args.kinds}
    print(f"k = {args.k}, medians of {args.runs} runs, {name}, {args.threads} threads, load before: {load:.1f}")
    print(table(figures), flush=True)
    print(f"{timedelta(seconds=round(time.time() - start))} in all", file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    else:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
