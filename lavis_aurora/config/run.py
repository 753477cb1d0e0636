"""``run:`` of this plugin's runner, and the keys that tasks add to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Optional, TypeVar

from lavis_aurora.common.errors import AuroraError, abbreviated, one_of, require
from lavis_aurora.common.parsing import TRUTH

INFERENCE_METHODS = ("rank", "generate")
TOKEN_DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("float16", "float32")
LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
# Beyond these nothing can run, or for longer than can be told; the largest value and what it must be.
MOST = {
    "token_budget_gb": (float("inf"), "0 or more"),
    "grad_clip": (float("inf"), "0 or more"),
    "seed": (2**63 - 1, "below 2^63"),
    "num_workers": (256, "256 or fewer (processes)"),
    "max_epoch": (10**6, "10^6 or fewer"),
    "num_beams": (1000, "1000 or fewer"),
    "max_len": (512, "512 or fewer (tokens)"),
}


def _check_numbers(keys: Any) -> None:
    """Refuse numbers of a dataclass beyond :data:`MOST`, or NaN."""
    for field_ in fields(keys):
        value = getattr(keys, field_.name)
        if isinstance(value, (int, float)):
            usual = (1e38, "a finite number") if isinstance(value, float) else (10**12, "at most 10^12")
            most, need = MOST.get(field_.name, usual)
            require(abs(value) <= most, f"run.{field_.name}", value, need)


def _at_least(keys: Any, least: int, *names: str) -> None:
    for name in names:
        require(getattr(keys, name) >= least, f"run.{name}", getattr(keys, name), f"{least} or more")


@dataclass
class RunConfig:
    """``run:`` of runner_aurora: LAVIS's own keys, and those of this package; tasks add theirs.

    Attributes:
        task: retrieval_aurora, vqa_aurora, video_qa_aurora, or one of LAVIS's.
        runner: the one that knows these keys.
        lr_sched: linear_warmup_cosine_lr, or linear_warmup_step_lr, which multiplies by lr_decay_rate each epoch.
        init_lr, min_lr: learning rate after the warm-up, and the least one.
        lr_scales: factors on the learning rate for groups of what is trained, by the names that the log gives them
            when the model is built, e.g. {heads: 0.1}; all others have 1.
        warmup_steps: batches in which the rate rises from warmup_lr to init_lr, in as many epochs as they take.
        warmup_lr: rate at which the warm-up starts; below 0: at init_lr.
        lr_decay_rate: of linear_warmup_step_lr.
        weight_decay, beta2: of AdamW.
        weight_decay_all: weight decay is of everything that is trained; LAVIS leaves out vectors and biases (here the
            gates), the authors' released code does not.
        max_epoch: epochs in all.
        num_workers: processes that read data, for each process that computes; with 0 it reads them itself.
        batch_size_train: pairs, questions or videos of a step, for each process.
        train_splits: splits to train on.
        seed: of everything that is drawn, with the process's rank added.
        world_size, distributed: set from what torch.distributed.run says, whatever the YAML has.
        evaluate: only test; evaluate.py sets it.
        accum_grad_iters: steps whose gradients are averaged; a pair is compared with those of its own step alone.
        valid_splits: the best epoch is chosen on these; with none it is the last.
        test_splits: tested after training, with the best epoch, and by an evaluation.
        amp: mixed precision: bf16 (bfloat16, on a GPU or a CPU), or true (float16 with scaled losses, on a GPU).
        log_freq: steps between lines of the log.
        loggers: where numbers go besides the log and metrics.csv, which is always written: tensorboard, wandb and
            mlflow, each with the library's own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI).
        resume_ckpt_path: checkpoint to continue in a new folder, or to evaluate.
        device: auto (a GPU if there is one), cuda or cpu.
        batch_size_eval: samples of an evaluation that are in the towers at once, pictures or whole videos; of
            retrieval's texts 16 times as many.
        use_dist_eval_sampler: without effect: here the task knows whether processes may share a split.
        compile: compile the layers of the towers with torch.compile; the first steps then take minutes.
        grad_clip: largest norm of the gradient; 0 for no clipping.
        max_broken_share: share of an epoch's samples whose video may be missing or broken; others are trained on in
            their place, and the run stops above it.
        output_dir: relative paths start at the current directory; each run adds a folder of its own.
        rank: auto finds the rank of an adapter that is trained with model.mode_approx.nested: at the end all of its
            ranks are compared on the first of valid_splits, and the smallest within one standard error of the best is
            written as adapter_auto, with the comparison as ranks.json and ranks.png. Or null.
        resume: auto goes on with the newest run under output_dir of the same configuration, if there is one; an
            evaluation takes the best checkpoint of it, and there must be one. Or none.
        checkpoint_every: steps between checkpoints within an epoch; 0 for none but at its end.
        save_queue: also keep the queue of features in checkpoints (118 MB with LAVIS's sizes), so that a resumed run
            is exactly the run that was interrupted.
        dist_timeout_minutes: how long processes of one run wait for each other, at most, before they end; also while
            the main one downloads or makes the data.
        cache_features: folder for tokens of pictures as they leave the part of the vision tower that no tuning
            reaches (mode_approx.layers). They are computed before the first step, and take the place of the pictures
            in training and evaluation, also of later runs with that backbone, layer and preprocessing. For
            processors that draw nothing at random. null: nothing is kept.
        cache_dtype: of these tokens, float16 or float32 (bit for bit the results without, and twice the room).
        cache_limit_gb: 10^9 bytes that the folder may hold, of all caches in it.
        skip_nonfinite: leave out steps whose gradient is not finite, and count them, instead of stopping.
        stop_collapsed: stop where retrieval has learned to tell pairs apart and then gives all of them the same score
            for 50 steps, as too high a rate makes it do.
    """

    task: str = "retrieval_aurora"
    runner: str = "runner_aurora"
    lr_sched: str = "linear_warmup_cosine_lr"
    init_lr: float = 1e-4
    lr_scales: dict[str, float] = field(default_factory=dict)
    min_lr: float = 0.0
    warmup_lr: float = -1.0
    warmup_steps: int = 0
    lr_decay_rate: Optional[float] = None
    weight_decay: float = 0.05
    weight_decay_all: bool = False
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
    device: str = "auto"
    world_size: int = 1
    dist_url: str = "env://"
    dist_timeout_minutes: float = 30.0
    distributed: bool = False
    use_dist_eval_sampler: bool = False
    seed: int = 42
    output_dir: str = "output"
    amp: Any = False
    compile: bool = False
    log_freq: int = 50
    loggers: list[str] = field(default_factory=list)
    rank: Any = None
    resume_ckpt_path: Optional[str] = None
    resume: str = "none"
    checkpoint_every: int = 0
    save_queue: bool = False
    cache_features: Optional[str] = None
    cache_dtype: str = "float16"
    cache_limit_gb: float = 50.0
    skip_nonfinite: bool = False
    stop_collapsed: bool = True
    evaluate: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self)
        self.amp = TRUTH.get(str(self.amp).lower(), self.amp)
        require(self.amp in (False, True, "bf16"), "run.amp", self.amp, "false, true or bf16")
        one_of("run.device", self.device, ("auto", "cuda", "cpu"))
        one_of("run.resume", self.resume, ("auto", "none"))
        one_of("run.cache_dtype", self.cache_dtype, CACHE_DTYPES)
        for name in self.loggers:
            one_of("run.loggers", name, LOGGERS)
        require(self.cache_limit_gb > 0, "run.cache_limit_gb", self.cache_limit_gb, "above 0")
        if self.rank is not None:
            one_of("run.rank", str(self.rank), ("auto",))
            if not self.valid_splits and not self.evaluate:
                raise AuroraError("run.rank: auto compares ranks on the first of run.valid_splits; name one")
        if self.resume == "auto" and self.resume_ckpt_path:
            raise AuroraError("run.resume: auto finds the run by itself; leave out run.resume_ckpt_path, or set none")
        _at_least(self, 1, "max_epoch", "accum_grad_iters", "batch_size_train", "batch_size_eval", "log_freq")
        _at_least(self, 0, "init_lr", "min_lr", "weight_decay", "grad_clip", "num_workers", "warmup_steps")
        _at_least(self, 0, "checkpoint_every", "seed")
        for name, scale in self.lr_scales.items():
            require(0 <= scale <= 1e4, f"run.lr_scales.{name}", scale, "0 or more, and at most 10^4")
        minutes = self.dist_timeout_minutes
        require(0 < minutes <= 7 * 24 * 60, "run.dist_timeout_minutes", minutes, "above 0 and at most a week, 10080")
        require(0 <= self.beta2 < 1, "run.beta2", self.beta2, "0 or more and below 1")
        share = self.max_broken_share
        require(0 <= share <= 1, "run.max_broken_share", share, "between 0 and 1")
        if self.lr_sched == "linear_warmup_step_lr" and self.lr_decay_rate is None:
            raise AuroraError("run.lr_decay_rate: missing; run.lr_sched linear_warmup_step_lr needs it, e.g. 0.9")


Keys = TypeVar("Keys")
# Dataclasses of tasks' keys, by the tasks' registered names.
RUN_KEYS: dict[str, type] = {}


def register_run_keys(*tasks: str) -> Callable[[type[Keys]], type[Keys]]:
    """Decorator of a dataclass whose fields a YAML may hold below ``run``, beside those of :class:`RunConfig`.

    They are checked like those: unknown names, types, and what its ``__post_init__`` refuses by an AuroraError. The
    task finds them in ``cfg.run_cfg``. The section Attributes of its docstring says what they mean.

    Args:
        tasks: registered names of the tasks that read the keys; tasks derived from these have them too.

    Raises:
        AuroraError: it is no dataclass, one of its keys is the runner's, or a task has keys already.
    """

    def register(cls: type[Keys]) -> type[Keys]:
        if not is_dataclass(cls):
            raise AuroraError(f"{cls.__name__}: keys of a task are the fields of a dataclass; decorate it as one")
        taken = {one.name for one in fields(cls)} & {one.name for one in fields(RunConfig)}
        if taken:
            names = abbreviated(sorted(taken))
            raise AuroraError(f"{cls.__name__}: {names} is the runner's; give the task's key another name")
        for task in tasks:
            if RUN_KEYS.get(task) is not None:
                raise AuroraError(f"{cls.__name__}: the task {task} has keys already; derive a task of another name")
            RUN_KEYS[task] = cls
        return cls

    return register


@register_run_keys("retrieval_aurora", "retrieval")
@dataclass
class RetrievalRunConfig:
    """Of the tasks retrieval_aurora and retrieval.

    Attributes:
        itc_weight: score of a reranked pair = ITM + itc_weight * ITC (1 as LAVIS and BLIP; 0 is ITM alone).
        k_test: candidates per query that are reranked; 0 ranks by ITC alone.
        token_budget_gb: 10^9 bytes of main memory in which each process keeps tokens of images or videos for the
            reranking; those beyond go through the vision tower a second time.
        token_dtype: of these tokens, float32 (LAVIS's scores) or bfloat16 (twice as many in the same memory).
        eval_bf16: retrieval is evaluated in bfloat16 (autocast), tokens too; faster on hardware that has it.
    """

    k_test: int = 128
    itc_weight: float = 1.0
    token_budget_gb: float = 4.0
    token_dtype: str = "float32"
    eval_bf16: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self)
        one_of("run.token_dtype", self.token_dtype, TOKEN_DTYPES)
        _at_least(self, 0, "k_test", "token_budget_gb")


@register_run_keys("captioning", "dialogue")
@dataclass
class CaptionRunConfig:
    """Of LAVIS's tasks captioning and dialogue.

    Attributes:
        num_beams, max_len, min_len: of generated texts; 1 beam is greedy, lengths in tokens.
        report_metric: whether texts are scored, or only written.
    """

    num_beams: int = 3
    max_len: int = 10
    min_len: int = 1
    report_metric: bool = True

    def __post_init__(self) -> None:
        _check_generated(self)


@register_run_keys("vqa_aurora", "video_qa_aurora", "vqa")
@dataclass
class AnswerRunConfig:
    """Of the tasks vqa_aurora and video_qa_aurora, and of LAVIS's vqa, gqa and aok_vqa.

    Attributes:
        inference_method: how questions are answered: rank (the likeliest of a list) or generate.
        num_ans_candidates: answers of the list that are scored as a whole, the likeliest by their first token.
        num_beams, max_len, min_len: of generated answers; 1 beam is greedy, lengths in tokens.
        prompt: wording around each question at evaluation, ``{}`` in the question's place; empty for none.
    """

    inference_method: str = "rank"
    num_ans_candidates: int = 128
    num_beams: int = 3
    max_len: int = 10
    min_len: int = 1
    prompt: str = ""

    def __post_init__(self) -> None:
        _check_generated(self)
        one_of("run.inference_method", self.inference_method, INFERENCE_METHODS)
        _at_least(self, 1, "num_ans_candidates")
        require(not self.prompt or "{}" in self.prompt, "run.prompt", self.prompt, "empty, or hold a {}")


def _check_generated(keys: CaptionRunConfig | AnswerRunConfig) -> None:
    _check_numbers(keys)
    _at_least(keys, 1, "num_beams")
    _at_least(keys, 0, "min_len")
    least = max(2, keys.min_len + 1)
    require(keys.max_len >= least, "run.max_len", keys.max_len, f"{least} or more (tokens, with the first)")


FRAMES, CROPS = ("random", "middle"), ("random", "center", "none")


@dataclass
class VideoProcessorConfig:
    """``vis_processor.train`` or ``.eval`` of a dataset of videos: aurora_video_train, aurora_video_eval.

    Attributes:
        name: aurora_video_train (random frames, a random crop) or aurora_video_eval (middle frames of equal parts).
        n_frms: T, frames of a video (LAVIS's name; the paper has 8 in training and 16 at test, D.3).
        image_size: pixels of a side; in a run, model.image_size where it is left out.
        mean, std: of the three colours; BLIP's by default.
        frames: random (drawn, in order) or middle (the middle ones of equal parts); null: as the name says.
        crop: random (a share of the area, the same for all frames), center (the shorter side is resized, and the
            middle kept) or none (all of a frame is resized, whatever its proportions); null: as the name says.
        min_scale, max_scale: share of a frame's area that a random crop keeps; refused with another crop.
    """

    name: Optional[str] = None
    n_frms: int = 8
    image_size: int = 224
    mean: Optional[list[float]] = None
    std: Optional[list[float]] = None
    frames: Optional[str] = None
    crop: Optional[str] = None
    min_scale: float = 0.5
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        for key in ("n_frms", "image_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key, known in (("frames", FRAMES), ("crop", CROPS)):
            if getattr(self, key) is not None:
                one_of(key, getattr(self, key), known)
        require(0 < self.min_scale <= 1, "min_scale", self.min_scale, "above 0, and at most 1")
        require(self.min_scale <= self.max_scale <= 1, "max_scale", self.max_scale, "min_scale to 1")
        for key in ("mean", "std"):
            value = getattr(self, key)
            require(value is None or len(value) == 3, key, value, "three numbers, of red, green and blue")
