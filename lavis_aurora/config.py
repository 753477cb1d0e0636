"""Every key that a lavis_aurora YAML may hold: its default, its check, and where it comes from.

LAVIS's own keys keep their names and meaning. Sections and tables are those of the Aurora paper
(NeurIPS 2023). This module needs nothing but the standard library, so that the method can use it
without LAVIS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Optional

from lavis_aurora.errors import AuroraError, near_names

GATE_FORMS = ("residual", "convex", "affine", "none")
GATE_INITS = ("zeros", "ones")
SHARINGS = ("global", "tower")
CONTEXT_FORMS = ("attention", "mean", "random", "none")
TUNINGS = ("aurora", "heads", "lora", "uniadapter", "full", "frozen")
LORA_TARGETS = ("attention", "feed_forward")
INFERENCE_METHODS = ("rank", "generate")
TOKEN_DTYPES = ("float32", "bfloat16")


def _require(ok: bool, key: str, value: object, need: str) -> None:
    if not ok:
        raise AuroraError(f"{key}: {value!r} cannot be used; it must be {need}")


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise AuroraError(f"{key}: unknown value {value!r}{near_names(str(value), known)}")


def _patterns(key: str, value: Any) -> list[str]:
    """Regular expressions, from one or a list of them."""
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise AuroraError(
            f"{key}: {value!r} cannot be used; it must be a name or regular expression, or a list of them"
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise AuroraError(f"{key}: {pattern!r} is no regular expression ({error})") from None
    return list(patterns)


@dataclass
class ModeApproxConfig:
    """Mode approximation (paper 3.2, eq. 2-4).

    Attributes:
        rank: R, the number of rank-one components. The paper uses 64 and 128.
        scale: factor on the whole update; the rest of the scaling follows rank and width by itself. With 8, the
            learning rate that suits the heads suits the factors.
        sharing: global (one U and V for all towers, the paper) or tower (one for each, the paper's comparison in 4.4,
            with 2dr more parameters for each tower beyond the first).
        dropout: probability of dropping a feature that the update of a linear layer reads, in training. The update
            is then computed beside the layer, which costs time and memory.
        targets: which layers are adapted: regular expressions over their whole names, or names of presets
            (``mode_approx/presets.py``), one or a list; null for those that the model is meant for.
    """

    rank: int = 64
    scale: float = 8.0
    sharing: str = "global"
    dropout: float = 0.0
    targets: Any = None

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "mode_approx.rank", self.rank, "1 or more")
        _require(self.scale > 0, "mode_approx.scale", self.scale, "above 0")
        _one_of("mode_approx.sharing", self.sharing, SHARINGS)
        _require(0 <= self.dropout < 1, "mode_approx.dropout", self.dropout, "0 or more and below 1")
        if self.targets is not None:
            self.targets = _patterns("mode_approx.targets", self.targets)


@dataclass
class GateConfig:
    """Gated query transformation (paper 3.3, figure 6).

    Attributes:
        form: residual (ours; equals the backbone at step 0), convex (the paper's words), affine (the form
            in the authors' released code), none.
        init: starting value of gamma and beta. The paper finds zeros better than ones.
    """

    form: str = "residual"
    init: str = "zeros"

    def __post_init__(self) -> None:
        _one_of("gate.form", self.form, GATE_FORMS)
        _one_of("gate.init", self.init, GATE_INITS)


@dataclass
class ContextConfig:
    """Informative context enhancement (paper 3.3, eq. 5, figure 4).

    Attributes:
        form: attention (the paper), mean, random, none.
    """

    form: str = "attention"

    def __post_init__(self) -> None:
        _one_of("context.form", self.form, CONTEXT_FORMS)


@dataclass
class LoraConfig:
    """LoRA, a baseline (arXiv 2106.09685; the Aurora paper's tables have rank 32).

    Attributes:
        rank: of the update of each weight.
        alpha: the update is multiplied by alpha / rank.
        dropout: probability of dropping a feature that the update reads, in training.
        targets: attention (query, key, value), feed_forward, or both, which gives the paper's 10.6M parameters.
    """

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", self.rank, "1 or more")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 or more and below 1")
        _require(bool(self.targets), "lora.targets", self.targets, f"some of {', '.join(LORA_TARGETS)}")
        for target in self.targets:
            _one_of("lora.targets", target, LORA_TARGETS)


@dataclass
class UniAdapterConfig:
    """UniAdapter, a baseline (arXiv 2302.06605; the Aurora paper's tables have ranks 128 and 512).

    Attributes:
        rank: width of the bottlenecks.
        scale: factor on their output, 0.1 as in its authors' code.
    """

    rank: int = 512
    scale: float = 0.1

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "uniadapter.rank", self.rank, "1 or more")
        _require(self.scale > 0, "uniadapter.scale", self.scale, "above 0")


@dataclass
class VitConfig:
    """A ViT of any size, instead of LAVIS's ``vit_type: base | large``. Sizes in pixels, dimensions, layers."""

    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12

    def __post_init__(self) -> None:
        for key in ("patch_size", "embed_dim", "depth", "num_heads"):
            _require(getattr(self, key) >= 1, f"vit.{key}", getattr(self, key), "1 or more")
        _require(
            self.embed_dim % self.num_heads == 0,
            "vit.embed_dim",
            self.embed_dim,
            f"a multiple of vit.num_heads ({self.num_heads})",
        )


@dataclass
class BlipAuroraConfig:
    """What every BLIP model of this plugin takes under ``model:``.

    Attributes:
        arch, model_type, pretrained, finetuned, load_finetuned, image_size, vit_type, vit_grad_ckpt,
        vit_ckpt_layer, vit_drop_path_rate, vit_layer_norm_epsilon, med_config_path, max_txt_len: LAVIS's own.
        vit: sizes of another ViT than LAVIS's two.
        tokenizer: hub name of a BERT tokenizer, or a folder with its vocab.txt.
        tuning: aurora (the method), heads (only the heads), frozen, and the baselines lora, uniadapter, full (the
            whole model).
        freeze_vit: with tuning full, leave the vision encoder as it is (LAVIS's name for it in BLIP-2).
        train_heads: also train the heads (projections, matching head, temperature), reported apart.
        mode_approx, gate: parts of the method.
        lora, uniadapter: settings of these baselines.
        adapter: folder of an adapter to start from, see save_adapter; its mode_approx and gate are the defaults then.
        adapter_check_base: refuse an adapter that was tuned on other weights than the model's.
    """

    arch: Optional[str] = None
    model_type: Optional[str] = None
    pretrained: Optional[str] = None
    finetuned: Optional[str] = None
    load_finetuned: bool = False
    image_size: int = 384
    vit_type: str = "base"
    vit_grad_ckpt: bool = False
    vit_ckpt_layer: int = 0
    vit_drop_path_rate: float = 0
    vit_layer_norm_epsilon: float = -1
    vit: Optional[VitConfig] = None
    med_config_path: str = "configs/models/med_config.json"
    max_txt_len: int = 35
    tokenizer: str = "bert-base-uncased"
    tuning: str = "aurora"
    freeze_vit: bool = False
    train_heads: bool = True
    mode_approx: ModeApproxConfig = field(default_factory=ModeApproxConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    uniadapter: UniAdapterConfig = field(default_factory=UniAdapterConfig)
    adapter: Optional[str] = None
    adapter_check_base: bool = True

    def __post_init__(self) -> None:
        _one_of("model.tuning", self.tuning, TUNINGS)
        if self.freeze_vit and self.tuning != "full":
            raise AuroraError(
                f"model.freeze_vit: for model.tuning: full, not {self.tuning}, which freezes the whole backbone; "
                f"leave it out"
            )
        if self.adapter is not None and self.tuning != "aurora":
            raise AuroraError(
                f"model.adapter: needs model.tuning: aurora, not {self.tuning}; leave one of the two out"
            )
        _one_of("model.vit_type", self.vit_type, ("base", "large"))
        _require(self.image_size >= 1, "model.image_size", self.image_size, "1 or more (pixels)")
        _require(self.max_txt_len >= 2, "model.max_txt_len", self.max_txt_len, "2 or more (tokens)")
        patch = self.vit.patch_size if self.vit else 16
        _require(
            self.image_size % patch == 0,
            "model.image_size",
            self.image_size,
            f"a multiple of the patch size ({patch})",
        )
        if self.load_finetuned and not self.finetuned:
            raise AuroraError(
                "model.finetuned: missing although model.load_finetuned is true; name a checkpoint, or set "
                "model.load_finetuned: false"
            )


@dataclass
class RetrievalAuroraConfig(BlipAuroraConfig):
    """``model:`` of blip_retrieval_aurora.

    Attributes:
        context: the third part of the method.
        queue_size, alpha, embed_dim, momentum, negative_all_rank: LAVIS's blip_retrieval's own. The queue may
            have any size; it wraps around.
        train_temp: also train the temperature of ITC, with the heads or the whole model. It is a number of
            about 0.07 that one step moves by the learning rate: set false with rates of 1e-3 and more.
    """

    context: ContextConfig = field(default_factory=ContextConfig)
    queue_size: int = 57600
    alpha: float = 0.4
    embed_dim: int = 256
    momentum: float = 0.995
    negative_all_rank: bool = True
    train_temp: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.queue_size >= 0, "model.queue_size", self.queue_size, "0 (no queue) or more")
        _require(self.embed_dim >= 1, "model.embed_dim", self.embed_dim, "1 or more")
        _require(0 <= self.alpha <= 1, "model.alpha", self.alpha, "between 0 and 1")
        _require(0 <= self.momentum <= 1, "model.momentum", self.momentum, "between 0 and 1")


@dataclass
class VqaAuroraConfig(BlipAuroraConfig):
    """``model:`` of blip_vqa_aurora.

    Attributes:
        share_decoder: the answer decoder uses the slots of the question encoder, layer by layer (paper D.2); false
            gives it slots of its own.
        mask_question_padding: generated answers do not see the padding of shorter questions, so that they are the
            same in any batch. LAVIS and BLIP let them see it; ranked answers never see it.
        rank_chunk: pairs of question and answer scored at once when ranking; bounds the memory.
    """

    image_size: int = 480
    share_decoder: bool = True
    mask_question_padding: bool = False
    rank_chunk: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.rank_chunk >= 1, "model.rank_chunk", self.rank_chunk, "1 or more (pairs)")
        if self.tuning == "heads":
            raise AuroraError(
                "model.tuning: blip_vqa_aurora has no heads besides its answer decoder; use aurora, lora, "
                "uniadapter, full or frozen"
            )


@dataclass
class VideoProcessorConfig:
    """``vis_processor.train`` or ``.eval`` of a dataset of videos: aurora_video_train, aurora_video_eval.

    Attributes:
        n_frms: T, frames of a video (LAVIS's name; the paper has 8 in training and 16 at test, D.3).
        image_size: pixels of a side.
        mean, std: of the three colours; BLIP's by default.
        min_scale, max_scale: share of a frame's area that a random crop keeps; in training only.
    """

    name: Optional[str] = None
    n_frms: int = 8
    image_size: int = 224
    mean: Optional[list[float]] = None
    std: Optional[list[float]] = None
    min_scale: float = 0.5
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        for key in ("n_frms", "image_size"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        _require(0 < self.min_scale <= 1, "min_scale", self.min_scale, "above 0, and at most 1")
        _require(self.min_scale <= self.max_scale <= 1, "max_scale", self.max_scale, "min_scale to 1")
        for key in ("mean", "std"):
            value = getattr(self, key)
            _require(value is None or len(value) == 3, key, value, "three numbers, of red, green and blue")


@dataclass
class ModeApproxModelConfig:
    """``model:`` of mode_approx: the method around any model that is registered with LAVIS.

    Attributes:
        arch, model_type: LAVIS's own; there is one type, default.
        base: ``model:`` of the model inside: its arch, its model_type, and what differs from that type's defaults.
        mode_approx: the method; without targets those of the preset for ``base.arch``.
        modules_to_save: regular expressions over names of modules that are trained besides, e.g. a new classifier.
        adapter: folder of an adapter to start from, see save_adapter; the base and the method are then its own,
            where they are left out.
        adapter_check_base: refuse an adapter that was tuned on other weights than the model's.
    """

    arch: Optional[str] = None
    model_type: Optional[str] = None
    base: dict[str, Any] = field(default_factory=dict)
    mode_approx: ModeApproxConfig = field(default_factory=ModeApproxConfig)
    modules_to_save: Any = None
    adapter: Optional[str] = None
    adapter_check_base: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.base.get("arch"), str):
            raise AuroraError("model.base.arch: missing; name the registered model to wrap, e.g. blip_retrieval")
        if self.modules_to_save is not None:
            self.modules_to_save = _patterns("model.modules_to_save", self.modules_to_save)


@dataclass
class RunConfig:
    """``run:`` of runner_aurora: LAVIS's own keys, and these.

    Attributes:
        device: auto (a GPU if there is one), cuda or cpu.
        itc_weight: score of a reranked pair = ITM + itc_weight * ITC (1 as LAVIS and BLIP; 0 is ITM alone).
        k_test: candidates per query that are reranked; 0 ranks by ITC alone.
        token_budget_gb: 10^9 bytes of main memory in which each process keeps tokens of images or videos for the
            reranking; those beyond go through the vision tower a second time.
        token_dtype: of these tokens, float32 (LAVIS's scores) or bfloat16 (twice as many in the same memory).
        eval_bf16: retrieval is evaluated in bfloat16 (autocast), tokens too; faster on hardware that has it.
        inference_method: how questions are answered: rank (the likeliest of a list) or generate.
        num_ans_candidates: answers of the list that are scored as a whole, the likeliest by their first token.
        num_beams, max_len, min_len: of generated answers; 1 beam is greedy, lengths in tokens.
        prompt: wording around each question at evaluation, ``{}`` in the question's place; empty for none.
        use_dist_eval_sampler: LAVIS's; here the task knows whether processes may share a split, and it has no effect.
        compile: compile the layers of the towers with torch.compile; the first steps then take minutes.
        grad_clip: largest norm of the gradient; 0 for no clipping.
        max_broken_share: share of an epoch's samples whose video may be missing or broken; others are trained on in
            their place, and the run stops above it.
        output_dir: relative paths start at the current directory; each run adds a folder of its own.
        resume: auto goes on with the newest run under output_dir of the same configuration, if there is one; none.
        checkpoint_every: steps between checkpoints within an epoch; 0 for none but at its end.
        save_queue: also keep the queue of features in checkpoints (118 MB with LAVIS's sizes), so that a resumed run
            is exactly the run that was interrupted.
        skip_nonfinite: leave out steps whose gradient is not finite, and count them, instead of stopping.
    """

    task: str = "retrieval_aurora"
    runner: str = "runner_aurora"
    lr_sched: str = "linear_warmup_cosine_lr"
    init_lr: float = 1e-4
    min_lr: float = 0.0
    warmup_lr: float = -1.0
    warmup_steps: int = 0
    lr_decay_rate: Optional[float] = None
    weight_decay: float = 0.05
    beta2: float = 0.999
    grad_clip: float = 0.0
    max_broken_share: float = 0.01
    max_epoch: int = 6
    accum_grad_iters: int = 1
    num_workers: int = 4
    batch_size_train: int = 16
    batch_size_eval: int = 64
    train_splits: list[str] = field(default_factory=list)
    valid_splits: list[str] = field(default_factory=list)
    test_splits: list[str] = field(default_factory=list)
    train_dataset_ratios: Any = None
    k_test: int = 128
    itc_weight: float = 1.0
    token_budget_gb: float = 4.0
    token_dtype: str = "float32"
    eval_bf16: bool = False
    inference_method: str = "rank"
    num_ans_candidates: int = 128
    num_beams: int = 3
    max_len: int = 10
    min_len: int = 1
    prompt: str = ""
    device: str = "auto"
    world_size: int = 1
    dist_url: str = "env://"
    distributed: bool = False
    use_dist_eval_sampler: bool = False
    seed: int = 42
    output_dir: str = "output"
    amp: bool = False
    compile: bool = False
    log_freq: int = 50
    resume_ckpt_path: Optional[str] = None
    resume: str = "none"
    checkpoint_every: int = 0
    save_queue: bool = False
    skip_nonfinite: bool = False
    evaluate: bool = False

    def __post_init__(self) -> None:
        _one_of("run.device", self.device, ("auto", "cuda", "cpu"))
        _one_of("run.resume", self.resume, ("auto", "none"))
        if self.resume == "auto" and self.resume_ckpt_path:
            raise AuroraError("run.resume: auto finds the run by itself; leave out run.resume_ckpt_path, or set none")
        _one_of("run.inference_method", self.inference_method, INFERENCE_METHODS)
        _one_of("run.token_dtype", self.token_dtype, TOKEN_DTYPES)
        for key in (
            "max_epoch",
            "accum_grad_iters",
            "batch_size_train",
            "batch_size_eval",
            "log_freq",
            "num_ans_candidates",
            "num_beams",
        ):
            _require(getattr(self, key) >= 1, f"run.{key}", getattr(self, key), "1 or more")
        least = max(2, self.min_len + 1)
        _require(self.max_len >= least, "run.max_len", self.max_len, f"{least} or more (tokens, with the first)")
        _require(not self.prompt or "{}" in self.prompt, "run.prompt", self.prompt, "empty, or hold a {}")
        for key in (
            "init_lr",
            "min_lr",
            "weight_decay",
            "grad_clip",
            "num_workers",
            "k_test",
            "token_budget_gb",
            "warmup_steps",
            "min_len",
            "checkpoint_every",
        ):
            _require(getattr(self, key) >= 0, f"run.{key}", getattr(self, key), "0 or more")
        share = self.max_broken_share
        _require(0 <= share <= 1, "run.max_broken_share", share, "between 0 and 1")
        if self.lr_sched == "linear_warmup_step_lr" and self.lr_decay_rate is None:
            raise AuroraError("run.lr_decay_rate: missing; run.lr_sched linear_warmup_step_lr needs it, e.g. 0.9")
