"""Time and memory of a training step, all ways of tuning side by side.

    python scripts/bench_train.py --tasks retrieval --batch 2 --out bench.json

Each measurement is a process of its own; the methods take turns, and the medians over all rounds are printed, also in
the form of the paper's table 5. Weights are random and data are made up: neither changes the cost.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

MB = 1e6
# Method: (class of the model, its configuration). "lavis" is LAVIS's own model as published: attention written out,
# keys and values of an image for each text, a second backbone as momentum teacher; "ours" is this package's.
METHODS = {
    "lavis-full": ("lavis", {"tuning": "full"}),
    "lavis-uniadapter-512": ("lavis", {"tuning": "uniadapter", "uniadapter": {"rank": 512}}),
    "full": ("ours", {"tuning": "full"}),
    "lora-32": ("ours", {"tuning": "lora", "lora": {"rank": 32}}),
    "uniadapter-512": ("ours", {"tuning": "uniadapter", "uniadapter": {"rank": 512}}),
    "uniadapter-128": ("ours", {"tuning": "uniadapter", "uniadapter": {"rank": 128}}),
    "aurora-128": ("ours", {"tuning": "aurora", "mode_approx": {"rank": 128}}),
    "aurora-64": ("ours", {"tuning": "aurora", "mode_approx": {"rank": 64}}),
    # A frozen backbone through which gradients flow: only the inputs of the towers are trained (the ViT's [CLS]
    # and the bias of the word embeddings' normalisation), so that every layer passes a gradient on and no weight
    # of a layer has one; with a teacher pass, as the methods have.
    "frozen-flow": ("ours", {"tuning": "frozen"}),
}
LABELS = {
    "lavis-full": "full, LAVIS's own model",
    "lavis-uniadapter-512": "UniAdapter r=512, LAVIS's own model",
    "full": "full",
    "lora-32": "LoRA r=32",
    "uniadapter-512": "UniAdapter r=512",
    "uniadapter-128": "UniAdapter r=128",
    "aurora-128": "Aurora r=128",
    "aurora-64": "Aurora r=64",
    "frozen-flow": "frozen, gradients flow",
}
UNITS = ("lavis-uniadapter-512", "uniadapter-512")
# Pixels and frames, as the paper trains (D.3).
TASKS = {"retrieval": (384, 0), "vqa": (480, 0), "video": (224, 8)}
CAPTIONS = (
    "a small red circle above a large blue square on a white background",
    "a green star left of two yellow triangles",
    "three purple diamonds in a row below a big gray ring and a small black cross on the right",
    "an orange circle",
    "a pink triangle right of a brown star above a cyan square",
    "a large white cross on a dark background with a small yellow circle in the middle",
    "two blue rings and a red diamond",
    "a black square below a green circle left of a small orange star",
)
QUESTIONS = ("what color is the circle above the square ?", "how many stars are there ?", "is there a blue ring ?")
ANSWERS = ("red", "two", "yes", "left of the square")


# --- one measurement, in a process of its own ------------------------------------------------------------------


def tower_config(task: str, size: str) -> dict:
    """``model:`` of BLIP base, or of the tiny model, without downloads."""
    from lavis_aurora.paths import package_file

    tokenizer = package_file("configs/models/tiny")
    config: dict = {"image_size": TASKS[task][0], "tokenizer": tokenizer, "pretrained": None}
    if task != "vqa":
        config["queue_size"] = 512
    if size == "tiny":
        vit = {"patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 4}
        config.update(image_size=48, vit=vit, med_config_path=package_file("configs/models/tiny/med_config.json"))
    return config


def build(task: str, method: str, size: str, checkpointed: int):
    """(model, parameters of the adapter or backbone that are trained, parameters of one plain BLIP in bytes)."""
    from lavis_aurora.config import RetrievalAuroraConfig, VqaAuroraConfig
    from lavis_aurora.config_check import parse_config
    from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
    from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora

    kind, overrides = METHODS[method]
    config = {**tower_config(task, size), **overrides}
    if checkpointed:
        config.update(vit_grad_ckpt=True, vit_ckpt_layer=checkpointed)
    if kind == "lavis":
        model = lavis_model(
            task, parse_config(VqaAuroraConfig if task == "vqa" else RetrievalAuroraConfig, config, "")
        )
    else:
        model = (BlipVqaAurora if task == "vqa" else BlipRetrievalAurora).from_config(config)
    if method == "frozen-flow":
        model.visual_encoder.cls_token.requires_grad_(True)
        model.text_encoder.embeddings.LayerNorm.bias.requires_grad_(True)
        model._towers_are_trained = True
    heads = {id(p) for name, p in model.named_parameters() if name.partition(".")[0] in HEADS}
    trained = [p for p in model.parameters() if p.requires_grad and (id(p) not in heads or method.endswith("full"))]
    return model, trained


HEADS = ("vision_proj", "text_proj", "itm_head", "temp")


def lavis_model(task: str, cfg):
    """LAVIS's own model of BLIP, fully trained or with UniAdapter in its towers, as its authors built theirs."""
    from functools import partial

    from lavis.models.blip_models.blip_retrieval import BlipRetrieval
    from lavis.models.blip_models.blip_vqa import BlipVQA
    from lavis.models.med import XBertEncoder, XBertLMHeadDecoder
    from lavis.models.vit import VisionTransformer, VisionTransformerEncoder
    from omegaconf import OmegaConf
    from torch import nn

    from lavis_aurora.baselines.uniadapter import add_uniadapter
    from lavis_aurora.models.towers import build_tokenizer

    class Frames(VisionTransformerEncoder):
        """Videos frame by frame; LAVIS's retrieval knows pictures only."""

        def forward_features(self, x):
            if x.dim() == 4:
                return super().forward_features(x)
            tokens = super().forward_features(x.transpose(1, 2).flatten(0, 1))
            return tokens.unflatten(0, (len(x), -1)).flatten(1, 2)

    if cfg.vit is None:
        vision = VisionTransformerEncoder.from_config(OmegaConf.structured(cfg))
    else:
        vision = VisionTransformerEncoder(
            img_size=cfg.image_size,
            patch_size=cfg.vit.patch_size,
            embed_dim=cfg.vit.embed_dim,
            depth=cfg.vit.depth,
            num_heads=cfg.vit.num_heads,
        )
        vision.vision_width = cfg.vit.embed_dim
    assert isinstance(vision, VisionTransformer)
    vision.__class__ = Frames
    text = XBertEncoder.from_config(OmegaConf.structured(cfg))
    decoder = XBertLMHeadDecoder.from_config(OmegaConf.structured(cfg)) if task == "vqa" else None
    adapters = None
    if cfg.tuning == "uniadapter":
        texts = [text] if decoder is None else [text, decoder.bert]
        adapters = add_uniadapter(vision, texts, cfg.uniadapter)
    cls = BlipVQA if task == "vqa" else BlipRetrieval

    class Plain(cls):
        init_tokenizer = staticmethod(partial(build_tokenizer, cfg.tokenizer))

    if task == "vqa":
        model = Plain(vision, text, decoder, max_txt_len=cfg.max_txt_len)
    else:
        model = Plain(vision, text, queue_size=cfg.queue_size, embed_dim=cfg.embed_dim, alpha=cfg.alpha)
    if adapters is not None:
        model.requires_grad_(False)
        model.adapters = adapters.requires_grad_(True)
        for name in HEADS:
            head = getattr(model, name, None)
            if isinstance(head, (nn.Module, nn.Parameter)):
                head.requires_grad_(True)
    return model


def samples(task: str, batch: int, size: str, step: int, device: str) -> dict:
    """A made-up batch."""
    import torch

    pixels, frames = TASKS[task]
    pixels = 48 if size == "tiny" else pixels
    shape = (batch, 3, frames, pixels, pixels) if frames else (batch, 3, pixels, pixels)
    visual = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(device)
    repeated = [i % len(CAPTIONS) for i in range(batch)]
    if task == "vqa":
        return {
            "image": visual,
            "text_input": [QUESTIONS[i % len(QUESTIONS)] for i in range(batch)],
            "answer": [ANSWERS[i % len(ANSWERS)] for i in range(2 * batch)],
            "n_answers": torch.full((batch,), 2),
            "weight": torch.full((2 * batch,), 0.5, device=device),
        }
    ids = torch.arange(batch, device=device) + step * batch
    position = {"epoch": 1, "iters": step, "num_iters_per_epoch": 1000}
    # LAVIS reads "image"; its own model meets videos there, see Frames.
    visuals = {"image": visual, "video": visual} if frames else {"image": visual}
    return {**visuals, "text_input": [CAPTIONS[i] for i in repeated], "image_id": ids, **position}


def resident(reset: bool = False) -> tuple[int, int]:
    """(resident memory, its peak) of this process in bytes; ``reset`` starts a new peak where Linux lets us."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return tuple(int(values[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak


def measure(args: argparse.Namespace) -> dict:
    """Steps of one method: seconds each, peak memory, parameters, checkpoint."""
    import contextlib
    import logging
    import warnings

    warnings.simplefilter("ignore")
    import torch

    import lavis_aurora

    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    task, method, device = args.task, args.method, args.device
    start_memory = resident()[0]
    model, trained = build(task, method, args.size, args.checkpointed)
    model = model.to(device).train()
    own = {name: p for name, p in model.named_parameters() if "_m." not in name and ".momentum." not in name}
    backbone = sum(p.numel() * p.element_size() for p in own.values())
    if METHODS[method][1]["tuning"] not in ("full", "frozen"):
        backbone -= sum(p.numel() * p.element_size() for p in trained)
    if args.compile:
        model.compile_layers()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05)
    cuda = device.startswith("cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=cuda and args.amp)
    resident(reset=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, processor = [], []
    profiler = torch.profiler.profile() if args.profile else contextlib.nullcontext()
    with profiler:
        for step in range(args.warmup + args.steps):
            batch = samples(task, args.batch, args.size, step, device)
            if task == "video" and METHODS[method][0] == "ours":
                del batch["image"]
            if cuda:
                torch.cuda.synchronize()
            start, start_processor = time.perf_counter(), time.process_time()
            with torch.autocast(device.partition(":")[0], enabled=args.amp):
                loss = model(batch)["loss"]
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - start_processor)
    if args.profile:
        key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=40))
    peak = torch.cuda.max_memory_allocated() if cuda else resident()[1] - start_memory
    file = io.BytesIO()
    torch.save([p.detach().cpu().clone() for p in trained], file)
    return {
        "seconds": (processor if args.clock == "processor" else seconds)[args.warmup :],
        "memory": peak - backbone,
        "backbone": backbone,
        "trained": sum(p.numel() for p in trained),
        "checkpoint": file.tell(),
        "machine": machine(device, args.threads) | {"lavis_aurora": lavis_aurora.__version__},
    }


def machine(device: str, threads: int) -> dict:
    """What the figures depend on."""
    import torch

    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").is_file():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return {"device": name, "threads": threads, "python": platform.python_version(), "torch": torch.__version__}


# --- all of them ---------------------------------------------------------------------------------------------------


def measure_apart(args: argparse.Namespace, task: str, method: str) -> dict:
    """:func:`measure` in a new process."""
    command = [sys.executable, __file__, "--task", task, "--method", method, "--device", args.device]
    for key in ("batch", "steps", "warmup", "threads", "size", "checkpointed", "clock"):
        command += [f"--{key}", str(getattr(args, key))]
    command += [f"--{key}" for key in ("amp", "compile", "profile") if getattr(args, key)]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{task}, {method}: {done.stderr.strip()[-2000:]}")
    *before, result = done.stdout.strip().splitlines()
    if args.profile:
        print("\n".join(before))
    return json.loads(result)


def run_all(args: argparse.Namespace) -> dict:
    """Medians by task and method; the methods take turns."""
    runs = [(task, method) for task in args.tasks for _ in range(args.rounds) for method in args.methods]
    results: dict = defaultdict(lambda: defaultdict(list))
    start = time.time()
    for i, (task, method) in enumerate(runs):
        results[task][method].append(result := measure_apart(args, task, method))
        left = (time.time() - start) / (i + 1) * (len(runs) - i - 1)
        print(
            f"[{i + 1}/{len(runs)}] {task:<10} {LABELS[method]:<37} {statistics.median(result['seconds']):7.2f} s/step  "
            f"{result['memory'] / MB:8.0f} MB  left: about {timedelta(seconds=round(left))}",
            flush=True,
        )
    return {task: {m: summary(rounds) for m, rounds in methods.items()} for task, methods in results.items()}


def summary(rounds: list[dict]) -> dict:
    """One method's rounds as medians."""
    seconds = [value for one in rounds for value in one["seconds"]]
    fixed = {key: rounds[0][key] for key in ("trained", "checkpoint", "backbone", "machine")}
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "memory": statistics.median(one["memory"] for one in rounds),
        "steps": len(seconds),
        **fixed,
    }


def tables(results: dict) -> str:
    """What was measured, then each unit's ratios in the form of the paper's table 5; Markdown."""
    lines = []
    for task, methods in results.items():
        lines += [
            f"{task}, {TASKS[task][0]} px" + (f", {TASKS[task][1]} frames" if TASKS[task][1] else ""),
            "",
            "| tuning | trained, without heads | checkpoint, MB | s/step (fastest - slowest) | memory above the model, MB |",
            "| --- | --- | --- | --- | --- |",
        ]
        for method, one in methods.items():
            spread = f"{one['seconds']:.3g} ({one['fastest']:.3g} - {one['slowest']:.3g})"
            lines.append(
                f"| {LABELS[method]} | {one['trained']:,} | {one['checkpoint'] / MB:.2f} | {spread} | "
                f"{one['memory'] / MB:,.0f} |"
            )
        lines.append("")
    for unit in UNITS:
        measured = [task for task, methods in results.items() if unit in methods]
        if not measured:
            continue
        head = " | ".join(f"{task}: time | memory" for task in measured)
        lines += [
            f"Unit: {LABELS[unit]}",
            "",
            f"| tuning | trained | {head} |",
            "| --- | --- |" + " --- |" * 2 * len(measured),
        ]
        for method in METHODS:
            rows = [results[task].get(method) for task in measured]
            if not all(rows):
                continue
            ratios = [
                f"{one[key] / results[task][unit][key]:.2f}"
                for one, task in zip(rows, measured)
                for key in ("seconds", "memory")
            ]
            lines.append(f"| {LABELS[method]} | {rows[0]['trained'] / 1e6:.2f}M | {' | '.join(ratios)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=2, help="pairs, questions or videos of a step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a process")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each method and task")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--compile", action="store_true", help="compile the layers, as run.compile")
    parser.add_argument("--checkpointed", type=int, default=0, help="layers of the ViT computed again backward")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a process")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: the time of all threads, which other programs on the machine disturb less",
    )
    parser.add_argument("--size", choices=("base", "tiny"), default="base", help="of the model")
    parser.add_argument("--profile", action="store_true", help="print each process's costliest operations")
    parser.add_argument("--out", help="write the results as json")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measure(args)))
        return
    results = run_all(args)
    print("\n" + tables(results))
    first = next(iter(next(iter(results.values())).values()))
    settings = {**first["machine"], "batch": args.batch, "clock": args.clock}
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    if args.out:
        Path(args.out).write_text(json.dumps({"arguments": vars(args), "results": results}, indent=1))
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
