"""Values that cannot be used, and those at the limits, which can."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import refused

from lavis_aurora.config.method import (
    CONTEXT_FORMS,
    GATE_FORMS,
    GATE_INITS,
    ContextConfig,
    GateConfig,
    ModeApproxConfig,
)
from lavis_aurora.config.models import TUNINGS, RetrievalAuroraConfig, VitConfig
from lavis_aurora.config.run import RetrievalRunConfig, RunConfig

OUT_OF_RANGE = [
    ("model.mode_approx.rank", "0", "1 or more"),
    ("model.mode_approx.rank", "-4", "1 or more"),
    ("model.mode_approx.scale", "0", "above 0"),
    ("model.mode_approx.scale", "-1.5", "above 0"),
    ("model.mode_approx.scale", "nan", "above 0"),
    *[
        ("model.mode_approx.layers", value, "it must be {last: 6}, a list of different numbers from 0, or one of")
        for value in ("6", "last", "{}", "[-1]", "[1, 1]", "[1.5]", "[true]", "{last: -1}", "{last: 2, first: 1}")
    ],
    *[
        ("model.mode_approx.layers", f"{{visual_encoder: {value}}}", "it must be {last: 6}, a list of")
        for value in ("1", "null", "{last: two}", "{last: 1, first: 1}", "{text_encoder: [1]}")
    ],
    ("model.lora.layers", "6", "it must be {last: 6}"),
    ("model.uniadapter.layers", "{visual_encoder: [1]}", "so it must be {last: 6} or a list of numbers, for all"),
    ("model.gate.form", "residul", "did you mean 'residual'"),
    ("model.gate.init", "zero", "did you mean 'zeros'"),
    ("model.context.form", "atention", "did you mean 'attention'"),
    ("model.vit.patch_size", "0", "1 or more"),
    ("model.vit.embed_dim", "0", "1 or more"),
    ("model.vit.depth", "0", "1 or more"),
    ("model.vit.num_heads", "-1", "1 or more"),
    ("model.vit.num_heads", "3", "a multiple of vit.num_heads (3)"),
    ("model.tuning", "auror", "did you mean 'aurora'"),
    ("model.vit_type", "huge", "known: base, large"),
    ("model.image_size", "0", "1 or more (pixels)"),
    ("model.image_size", "50", "a multiple of the patch size (16)"),
    ("model.max_txt_len", "1", "2 or more (tokens)"),
    ("model.load_finetuned", "true", "model.finetuned: missing although model.load_finetuned is true"),
    ("model.queue_size", "-1", "0 (no queue) or more"),
    ("model.embed_dim", "0", "1 or more"),
    ("model.alpha", "-0.1", "between 0 and 1"),
    ("model.alpha", "1.1", "between 0 and 1"),
    ("model.momentum", "-0.1", "between 0 and 1"),
    ("model.momentum", "1.5", "between 0 and 1"),
    ("run.device", "tpu9", "known: auto, cpu, cuda"),
    ("run.max_broken_share", "-0.1", "between 0 and 1"),
    ("run.max_broken_share", "1.1", "between 0 and 1"),
    ("run.token_dtype", "float16", "did you mean 'bfloat16'"),
    ("run.token_budget_gb", "-1", "0 or more"),
    ("run.beta2", "1", "0 or more and below 1"),
    ("run.seed", "9223372036854775808", "below 2^63"),
    ("run.num_workers", "257", "256 or fewer (processes)"),
    ("run.max_epoch", "1000001", "10^6 or fewer"),
    ("run.num_beams", "1001", "1000 or fewer"),
    ("run.max_len", "513", "512 or fewer (tokens)"),
    *[
        (f"run.{key}", value, "a finite number")
        for key in ("init_lr", "min_lr", "warmup_lr", "weight_decay", "itc_weight")
        for value in (".inf", "-.inf", ".nan", "1e39")
    ],
    *[
        (f"run.{key}", "9" * 30, "at most 10^12")
        for key in ("batch_size_train", "batch_size_eval", "accum_grad_iters", "k_test", "warmup_steps", "log_freq")
    ],
    *[
        (f"run.{key}", "0", "1 or more")
        for key in ("max_epoch", "accum_grad_iters", "batch_size_train", "batch_size_eval", "log_freq")
    ],
    *[
        (f"run.{key}", "-1", "0 or more")
        for key in ("init_lr", "min_lr", "weight_decay", "grad_clip", "num_workers", "k_test", "warmup_steps", "seed")
    ],
]


@pytest.mark.parametrize(("key", "value", "need"), OUT_OF_RANGE, ids=[f"{k}={v}" for k, v, _ in OUT_OF_RANGE])
def test_value_out_of_range_names_key_value_and_need(project: Path, key: str, value: str, need: str) -> None:
    own = re.sub("^model.(mode_approx|lora|uniadapter)", r"\1", key)
    named = {"model.load_finetuned": "model.finetuned"}.get(key, own)
    named = named.replace("model.gate.", "gate.").replace("model.context.", "context.")
    named = "vit.embed_dim" if "multiple of vit" in need else named.replace("model.vit.", "vit.")
    refused(project, f"{named}: ", need, options=[f"{key}={value}"])


def test_limits_themselves_are_allowed() -> None:
    for form in GATE_FORMS:
        for init in GATE_INITS:
            assert GateConfig(form, init).form == form
    assert [ContextConfig(form).form for form in CONTEXT_FORMS] == list(CONTEXT_FORMS)
    assert ModeApproxConfig(rank=1, scale=1e-6).rank == 1
    assert VitConfig(1, 1, 1, 1).depth == 1
    for tuning in TUNINGS:
        settings = RetrievalAuroraConfig(tuning=tuning, queue_size=0, alpha=0, momentum=1, max_txt_len=2)
        assert settings.tuning == tuning
    assert RunConfig(max_epoch=1, num_workers=0, init_lr=0, grad_clip=0).grad_clip == 0
    assert RunConfig(seed=2**63 - 1, num_workers=256).seed == 2**63 - 1
    assert RetrievalRunConfig(k_test=0, token_budget_gb=float("inf")).k_test == 0
