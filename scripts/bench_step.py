"""One measurement of scripts/bench_train.py: the steps of one way of tuning, in this process."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import time
from collections.abc import Callable, Iterator
from unittest import mock

import lavis_aurora_compat  # noqa: F401

import torch
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.blip_models.blip_vqa import BlipVQA
from lavis.models.med import XBertEncoder, XBertLMHeadDecoder
from lavis.models.vit import VisionTransformerEncoder
from measuring import environment_info, resident_memory, return_freed_memory
from omegaconf import OmegaConf
from torch import nn

import lavis_aurora
from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.alignment.gate import QueryGate
from lavis_aurora.baselines.uniadapter import UniAdapters
from lavis_aurora.common.modules import retyped
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import RetrievalAuroraConfig, VqaAuroraConfig
from lavis_aurora.encoders.fusion import add_bottlenecks
from lavis_aurora.encoders.towers import build_tokenizer, compile_layers, frozen_tokens, plain_vision_encoder
from lavis_aurora.mode_approx import layers as adapted
from lavis_aurora.mode_approx.factors import FactorSet
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora

# Method: (class of the model, its configuration). "lavis" is LAVIS's own model as published: attention written out,
# keys and values of an image for each text, a second backbone as momentum teacher; "ours" is this package's.
METHODS = {
    "lavis-full": ("lavis", {"tuning": "full"}),
    "lavis-uniadapter-512": ("lavis", {"tuning": "uniadapter", "uniadapter": {"rank": 512}}),
    "full": ("ours", {"tuning": "full"}),
    "lora-32": ("ours", {"tuning": "lora", "lora": {"rank": 32}}),
    "lora-attention-32": ("ours", {"tuning": "lora", "lora": {"rank": 32, "targets": ["attention"]}}),
    "uniadapter-512": ("ours", {"tuning": "uniadapter", "uniadapter": {"rank": 512}}),
    "uniadapter-128": ("ours", {"tuning": "uniadapter", "uniadapter": {"rank": 128}}),
    "aurora-128": ("ours", {"tuning": "aurora", "mode_approx": {"rank": 128}}),
    "aurora-64": ("ours", {"tuning": "aurora", "mode_approx": {"rank": 64}}),
    "aurora-all-64": ("ours", {"tuning": "aurora", "mode_approx": {"rank": 64, "targets": "all_linear"}}),
    # A frozen backbone through which gradients flow: only the inputs of the towers are trained (the ViT's [CLS]
    # and the bias of the word embeddings' normalisation), so that every layer passes a gradient on and no weight
    # of a layer has one; with a teacher pass, as the methods have.
    "frozen-flow": ("ours", {"tuning": "frozen"}),
}
# METHOD+SETTING...: with less to compute. Of "cached" the features of the frozen layers are there, in half precision.
SETTINGS: dict[str, dict] = {
    **{f"last{n}": {"mode_approx": {"layers": {"last": n}}} for n in (8, 6, 4, 3)},
    "vision8": {"mode_approx": {"layers": {"visual_encoder": {"last": 8}}}},
    **{f"merge{n}": {"token_merging": n} for n in (16, 32)},
    "alone": {"momentum": 0},
    "cached": {},
}
LESS = {
    "aurora-64": (
        *("last6", "last3", "merge16", "alone", "last6+cached", "last3+cached", "last6+merge16", "last6+alone"),
        *("last6+merge16+cached+alone", "last3+merge16+cached+alone"),
    ),
    # As the demos tune: 8 and 4 of 12 layers are their 2 and 1 of 3, and without a teacher, as they are.
    "aurora-all-64": (
        *("alone", "last8+alone", "last4+alone", "merge16+alone", "merge32+alone", "vision8+merge16+alone"),
        *("last8+merge16+alone", "last4+merge16+alone", "last4+merge16+cached+alone"),
    ),
    **dict.fromkeys(("full", "lora-32", "lora-attention-32", "uniadapter-128"), ("alone",)),
}
METHODS.update((f"{name}+{settings}", METHODS[name]) for name, several in LESS.items() for settings in several)
# What the method adds to a step, by the functions that compute it; folding is called in the backward pass too.
OWN_PARTS = (
    ("folding", adapted, "_folded"),
    ("factors of the folded weights", FactorSet, "low_rank"),
    ("gate, forward", QueryGate, "forward"),
    ("ITC with its queue, forward", BlipRetrievalAurora, "_itc_loss"),
    ("queue", BlipRetrievalAurora, "_dequeue_and_enqueue"),
)
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
HEADS = ("vision_proj", "text_proj", "itm_head", "temp")
BLIP = ("visual_encoder", "text_encoder", "text_decoder", *HEADS)


def tower_config(task: str, size: str) -> dict:
    """``model:`` of BLIP base, or of the tiny model, without downloads."""
    tiny = OmegaConf.load(BlipVqaAurora.default_config_path("tiny")).model
    config: dict = {"image_size": TASKS[task][0], "tokenizer": tiny.tokenizer, "pretrained": None}
    if task != "vqa":
        config["queue_size"] = 512
    if size == "tiny":
        config.update((key, tiny[key]) for key in ("image_size", "vit", "med_config_path"))
    return config


def build(task: str, method: str, size: str, checkpointed: int = 0, mini_batch: int = 0):
    """The model, and the parameters that are trained besides heads (all of them where the backbone is trained)."""
    kind, overrides = METHODS[method]
    config = OmegaConf.merge(tower_config(task, size), overrides, *(SETTINGS[one] for one in method.split("+")[1:]))
    config = dict(OmegaConf.to_container(config))
    if task == "vqa":
        config.pop("momentum", None)  # there is no teacher
    if size == "tiny" and "+" in method:  # of 3 layers and 9 patches
        config["token_merging"] = config.get("token_merging", 0) // 16
        choice = config.get("mode_approx", {}).get("layers", {})
        for chosen in [choice] if "last" in choice else choice.values():
            chosen["last"] = max(1, chosen["last"] // 4)
    if checkpointed:
        config.update(vit_grad_ckpt=True, vit_ckpt_layer=checkpointed)
    if mini_batch and task != "vqa":  # its questions are not compared with each other
        config["mini_batch_size"] = mini_batch
    if kind == "lavis":
        model = lavis_model(
            task, parse_config(VqaAuroraConfig if task == "vqa" else RetrievalAuroraConfig, config, "")
        )
    else:
        model = (BlipVqaAurora if task == "vqa" else BlipRetrievalAurora).from_config(config)
    if method == "frozen-flow":
        model.visual_encoder.cls_token.requires_grad_(True)
        model.text_encoder.embeddings.LayerNorm.bias.requires_grad_(True)
        model._momentum_moves = True
    heads = {id(p) for name, p in model.named_parameters() if name.partition(".")[0] in HEADS}
    whole = METHODS[method][1]["tuning"] == "full"
    trained = [p for p in model.parameters() if p.requires_grad and (id(p) not in heads or whole)]
    return model, trained


def lavis_model(task: str, cfg):
    """LAVIS's own model of BLIP, fully trained or with UniAdapter in its towers, as its authors built theirs."""

    class Frames(VisionTransformerEncoder):
        """Videos frame by frame; LAVIS's retrieval knows pictures only."""

        def forward_features(self, x):
            if x.dim() == 4:
                return super().forward_features(x)
            tokens = super().forward_features(x.transpose(1, 2).flatten(0, 1))
            return tokens.unflatten(0, (len(x), -1)).flatten(1, 2)

        def forward(self, x):
            return self.forward_features(x)

    vision = retyped(Frames, plain_vision_encoder(cfg))
    text = XBertEncoder.from_config(OmegaConf.structured(cfg))
    decoder = XBertLMHeadDecoder.from_config(OmegaConf.structured(cfg)) if task == "vqa" else None
    adapters = None
    if cfg.tuning == "uniadapter":
        texts = [text] if decoder is None else [text, decoder.bert]
        adapters = add_bottlenecks(vision, texts, lambda depth, dim: UniAdapters(depth, dim, cfg.uniadapter))
    cls = BlipVQA if task == "vqa" else BlipRetrieval

    class Plain(cls):
        init_tokenizer = staticmethod(functools.partial(build_tokenizer, cfg.tokenizer))

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


def keep_features(model: nn.Module, batch: dict) -> dict:
    """The batch with tokens in place of its pictures, as run.cache_features gives them; videos stay."""
    if "video" in batch:
        return batch
    frozen = frozen_tokens(model.visual_encoder, batch["image"])
    rest = {key: value for key, value in batch.items() if key != "image"}
    return {**rest, "tokens": frozen.tokens.half()}


@contextlib.contextmanager
def profiled(cuda: bool) -> Iterator[None]:
    """Print where the time of the steps inside goes: by operation, and the share of the method's own parts."""
    with contextlib.ExitStack() as patches:
        for label, owner, name in OWN_PARTS:
            patches.enter_context(mock.patch.object(owner, name, labelled(label, getattr(owner, name))))
        profiler = patches.enter_context(torch.profiler.profile())
        with torch.profiler.record_function("steps"):
            yield
    found = profiler.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    print(found.table(sort_by=key, row_limit=20, max_name_column_width=40))
    total = {event.key: event.device_time_total if cuda else event.cpu_time_total for event in found}
    for label in dict.fromkeys(label for label, *_ in OWN_PARTS):
        print(f"{label}: {total.get(label, 0) / total['steps']:.1%} of the steps")


def labelled(label: str, function: Callable) -> Callable:
    """The function, named in a profile."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with torch.profiler.record_function(label):
            return function(*args, **kwargs)

    return call


def measure(args: argparse.Namespace) -> dict:
    """Steps of one method: seconds each, peak memory, parameters, checkpoint."""
    torch.manual_seed(0)
    task, method, device = args.task, args.method, args.device
    start_memory = resident_memory()[0]
    model, trained = build(task, method, args.size, args.checkpointed, args.mini_batch)
    model = model.to(device).train()
    adapter = {id(p) for _, p in adapter_parameters(model)}
    parts = {name: p for name, p in model.named_parameters() if id(p) not in adapter}
    backbone = sum(p.numel() * p.element_size() for name, p in parts.items() if name.partition(".")[0] in BLIP)
    if args.compile and METHODS[method][0] == "ours":
        compile_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05)
    cuda = device.startswith("cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=cuda and args.amp)
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def train(step: int) -> tuple[float, float]:
        """A step on a batch of its own: seconds, and the processor's."""
        batch = samples(task, args.batch, args.size, step, device)
        if task == "video" and METHODS[method][0] == "ours":
            del batch["image"]
        if "cached" in method:
            batch = keep_features(model, batch)
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
        return time.perf_counter() - start, time.process_time() - start_processor

    for step in range(args.warmup):
        train(step)
    with profiled(cuda) if args.profile else contextlib.nullcontext():
        clocks = [train(step) for step in range(args.warmup, args.warmup + args.steps)]
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        return_freed_memory(threshold=1 << 20)  # it costs time, so in a step of its own
        resident_memory(reset=True)
        train(args.warmup + args.steps)
        peak = resident_memory()[1] - start_memory
    file = io.BytesIO()
    torch.save([p.detach().cpu().clone() for p in trained], file)
    return {
        "seconds": [processor if args.clock == "processor" else wall for wall, processor in clocks],
        "memory": peak - backbone,
        "backbone": backbone,
        "trained": sum(p.numel() for p in trained),
        "checkpoint": file.tell(),
        "machine": environment_info(device, args.threads) | {"lavis_aurora": lavis_aurora.__version__},
    }
