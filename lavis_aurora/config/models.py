"""``model:`` of every model that this plugin registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

from lavis_aurora.common.errors import AuroraError, one_of, patterns, require
from lavis_aurora.common.registry import Registry
from lavis_aurora.config.method import ContextConfig, GateConfig, LoraConfig, ModeApproxConfig, UniAdapterConfig


@dataclass(frozen=True)
class Tuning:
    """A way of tuning a model, see :func:`register_tuning`."""

    set_up: Callable[..., Any]
    settings: tuple[str, ...]
    adapters: bool
    heads: bool
    backbone: bool


TUNINGS: Registry[Tuning] = Registry("model.tuning")


def register_tuning(
    name: str,
    settings: tuple[str, ...] = (),
    adapters: bool = False,
    heads: bool = True,
    backbone: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a function that puts into a model what ``model.tuning: NAME`` trains.

    It is called as ``set_up(model, cfg, places)``, with the model frozen, its configuration, and where the method
    goes in it (:class:`lavis_aurora.models.base.Places`). It returns the sets of adapters that it put there
    (:class:`lavis_aurora.adapters.sets.AdapterSets`), which are trained then, or None; further parameters to train
    it lets require gradients itself.

    Args:
        name: in the YAML.
        settings: keys of ``model:`` that are its own: an adapter of another way of tuning holds none of them.
        adapters: it returns sets of adapters, which ``model.adapter`` may be loaded into.
        heads: the heads are trained too, unless ``model.train_heads`` is false.
        backbone: the model is not frozen first.

    Raises:
        AuroraError: the name is taken.
    """

    def register(set_up: Callable[..., Any]) -> Callable[..., Any]:
        TUNINGS.register(name)(Tuning(set_up, settings, adapters, heads, backbone))
        return set_up

    return register


@dataclass
class VitConfig:
    """A ViT of any size, instead of LAVIS's ``vit_type: base | large``.

    Attributes:
        patch_size: pixels of a side of a patch.
        embed_dim: width of the features, a multiple of num_heads.
        depth: layers.
        num_heads: attention heads of a layer.
    """

    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12

    def __post_init__(self) -> None:
        for key in ("patch_size", "embed_dim", "depth", "num_heads"):
            require(getattr(self, key) >= 1, f"vit.{key}", getattr(self, key), "1 or more")
        require(
            self.embed_dim % self.num_heads == 0,
            "vit.embed_dim",
            self.embed_dim,
            f"a multiple of vit.num_heads ({self.num_heads})",
        )


@dataclass
class BlipAuroraConfig:
    """What every BLIP model of this plugin takes under ``model:``.

    Attributes:
        arch, model_type, finetuned, load_finetuned, vit_drop_path_rate, vit_layer_norm_epsilon, med_config_path:
            as in LAVIS.
        pretrained: weights of the backbone: URL or local file (.pth, .safetensors), or null for random weights.
        image_size: pixels of a side, a multiple of the ViT's patch size; processors without a size follow it.
        vit_type: base or large, LAVIS's two ViTs.
        vit_grad_ckpt, vit_ckpt_layer: recompute the last vit_ckpt_layer layers of the ViT in the backward pass,
            instead of keeping their activations.
        token_merging: r, tokens that each layer of the ViT merges into others that are alike (ToMe, arXiv
            2210.09461); what follows weighs a token by its patches. Less time and memory in training, evaluation
            and reranking, for some accuracy; 0 merges none.
        max_txt_len: tokens at which texts are cut.
        vit: sizes of another ViT than LAVIS's two.
        tokenizer: hub name of a BERT tokenizer, or a folder with its vocab.txt.
        tuning: aurora (the method), heads (only the heads), frozen, and the baselines lora, uniadapter, full (the
            whole model).
        freeze_vit: with tuning full, leave the vision encoder as it is (LAVIS's name for it in BLIP-2).
        train_heads: also train the heads (projections, matching head, temperature), reported apart; heads and full
            always do.
        mode_approx, gate: parts of the method.
        lora, uniadapter: settings of these baselines.
        adapter: folder of an adapter to start from, see save_adapter; its tuning and settings are the defaults then.
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
    token_merging: int = 0
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
        one_of("model.tuning", self.tuning, TUNINGS)
        if self.freeze_vit and self.tuning != "full":
            raise AuroraError(
                f"model.freeze_vit: for model.tuning: full, not {self.tuning}, which freezes the whole backbone; "
                f"leave it out"
            )
        if not self.train_heads and self.tuning in ("heads", "full"):
            raise AuroraError(
                f"model.train_heads: false does not go with model.tuning: {self.tuning}, which trains the heads; "
                f"leave it out, or choose another tuning"
            )
        if self.adapter is not None and not TUNINGS[self.tuning].adapters:
            those = " or ".join(name for name, tuning in TUNINGS.items() if tuning.adapters)
            raise AuroraError(
                f"model.adapter: needs model.tuning: {those}, not {self.tuning}, which has no adapters; leave one of "
                f"the two out"
            )
        one_of("model.vit_type", self.vit_type, ("base", "large"))
        require(self.image_size >= 1, "model.image_size", self.image_size, "1 or more (pixels)")
        require(self.max_txt_len >= 2, "model.max_txt_len", self.max_txt_len, "2 or more (tokens)")
        patch = self.vit.patch_size if self.vit else 16
        require(
            self.image_size % patch == 0,
            "model.image_size",
            self.image_size,
            f"a multiple of the patch size ({patch})",
        )
        most = (self.image_size // patch) ** 2 // 2
        need = f"0 to half of the patches of a picture ({most})"
        require(0 <= self.token_merging <= most, "model.token_merging", self.token_merging, need)
        if self.vit is not None:
            width, positions = self.vit.embed_dim, (self.image_size // patch) ** 2
            weights = width * (12 * self.vit.depth * width + positions + 3 * patch**2)
            require(weights <= 2**30, "model.vit", vars(self.vit), "of at most 1 billion weights; check the sizes")
        if self.load_finetuned and not self.finetuned:
            raise AuroraError(
                "model.finetuned: missing although model.load_finetuned is true; name a checkpoint, or set "
                "model.load_finetuned: false"
            )


@dataclass
class RetrievalAuroraConfig(BlipAuroraConfig):
    """``model:`` of blip_retrieval_aurora.

    Attributes:
        context: the third part of the method; always set once this class is made.
        queue_size: features that ITC compares with beside the batch; any size, the queue wraps around; 0 for none.
        alpha: share of the momentum teacher's answer in the targets of ITC, as in LAVIS's blip_retrieval.
        embed_dim: width of the features of ITC, as there.
        alpha_epochs: in which alpha rises from 0 to its value; 2 as there, 1 in the authors' released code.
        momentum: of the teacher's moving average, as there.
        teacher_factors: what all slots share of the teacher's factors (U, V and a core) is an average too, or the
            student's own, as in the released code; the slots' own vectors and the heads are averages with both.
        negative_all_rank: negatives of ITM come from all processes, as in LAVIS's training on COCO; false takes those
            of a process's own batch, as on Flickr30K. (The default of LAVIS's class is false.)
        mini_batch_size: samples whose activations training keeps at a time; null for the whole batch. The losses are
            those of the batch all the same; each part is computed a second time in the backward pass.
        train_temp: also train the temperature of ITC, with the heads or the whole model. It is a number of
            about 0.07 that one step moves by the learning rate: set false with rates of 1e-3 and more.
        train_text_proj: also train the projection of texts, with the heads; false as in the released code, where it
            stays frozen.
    """

    context: ContextConfig = field(default_factory=ContextConfig)
    queue_size: int = 57600
    alpha: float = 0.4
    alpha_epochs: float = 2
    embed_dim: int = 256
    momentum: float = 0.995
    teacher_factors: str = "average"
    negative_all_rank: bool = True
    mini_batch_size: Optional[int] = None
    train_temp: bool = True
    train_text_proj: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        form = self.context.form
        if form is None:
            self.context = ContextConfig("attention" if self.tuning == "aurora" else "none")
        elif form != "none" and self.tuning != "aurora":
            raise AuroraError(
                f"model.context.form: {form} is for model.tuning: aurora, not {self.tuning}; leave it out or set none"
            )
        require(self.queue_size >= 0, "model.queue_size", self.queue_size, "0 (no queue) or more")
        require(self.embed_dim >= 1, "model.embed_dim", self.embed_dim, "1 or more")
        fits = self.queue_size * self.embed_dim <= 2**28
        require(fits, "model.queue_size", self.queue_size, "at most 2**28 / model.embed_dim, which takes 2 GB")
        size = self.mini_batch_size
        require(size is None or size >= 1, "model.mini_batch_size", size, "1 or more (samples), or null")
        require(self.alpha_epochs > 0, "model.alpha_epochs", self.alpha_epochs, "above 0")
        one_of("model.teacher_factors", self.teacher_factors, ("average", "student"))
        if self.teacher_factors == "student" and self.tuning != "aurora":
            raise AuroraError(
                f"model.teacher_factors: student is for model.tuning: aurora, not {self.tuning}; leave it out"
            )
        require(0 <= self.alpha <= 1, "model.alpha", self.alpha, "between 0 and 1")
        require(0 <= self.momentum <= 1, "model.momentum", self.momentum, "between 0 and 1")


@dataclass
class VqaAuroraConfig(BlipAuroraConfig):
    """``model:`` of blip_vqa_aurora.

    Attributes:
        image_size: pixels of a side, a multiple of the ViT's patch size; processors without a size follow it.
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
        require(self.rank_chunk >= 1, "model.rank_chunk", self.rank_chunk, "1 or more (pairs)")
        if self.tuning == "heads":
            raise AuroraError(
                "model.tuning: blip_vqa_aurora has no heads besides its answer decoder; use aurora, lora, "
                "uniadapter, full or frozen"
            )


@dataclass
class ModeApproxModelConfig:
    """``model:`` of mode_approx: the method around any model that is registered with LAVIS.

    Attributes:
        arch, model_type: as in LAVIS; there is one type, default.
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
            self.modules_to_save = patterns("model.modules_to_save", self.modules_to_save)
