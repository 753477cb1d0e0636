"""What the BLIP models of this plugin share: configuration, weights, and what is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lavis.models.med import BertModel
from torch import Tensor
from transformers import BatchEncoding

from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.adapters.sets import AdapterSets
from lavis_aurora.adapters.switching import SETS, bind_companions, trainable_parameters_summary
from lavis_aurora.baselines.lora import LoraSets, inject_lora
from lavis_aurora.baselines.uniadapter import UniAdapters
from lavis_aurora.common.errors import AuroraError, did_you_mean
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.method import chosen_layers
from lavis_aurora.config.models import TUNINGS, BlipAuroraConfig, register_tuning
from lavis_aurora.encoders.fusion import add_bottlenecks, add_gates
from lavis_aurora.mode_approx.factors import ModeFactors
from lavis_aurora.mode_approx.inject import inject_mode_approx
from lavis_aurora.models.loading import blip_weights, load_backbone, other_kind, read_content
from lavis_aurora.models.matching import all_reduce_max_length, to_device
from lavis_aurora.models.owner import AdapterOwnerMixin, RunState, load_configured_adapter


@dataclass(frozen=True)
class Places:
    """Where the method goes in a model.

    Attributes:
        targets: regular expressions of the attention projections' names.
        gated: the text tower whose cross-attention has the gate.
        slot_name: the slot that a layer uses, by the layer's name; layers of the same slot share it.
    """

    targets: Sequence[str]
    gated: BertModel
    slot_name: Callable[[str], str] = str


@register_tuning("aurora", ("mode_approx", "gate"), adapters=True)
def tune_aurora(model: AuroraBase, cfg: BlipAuroraConfig, places: Places) -> ModeFactors:
    """The method: mode approximation and the gate."""
    factors = inject_mode_approx(model, cfg.mode_approx, places.targets, places.slot_name)
    layers = cfg.mode_approx.layers
    chosen = chosen_layers("mode_approx.layers", layers, "text_encoder", len(places.gated.encoder.layer))
    add_gates(places.gated, cfg.gate, factors, chosen)
    if cfg.gate.decoder:
        decoder = getattr(model, "text_decoder", None)
        if decoder is None:
            raise AuroraError("model.gate.decoder: the model has no answer decoder; leave it out")
        depth = len(decoder.bert.encoder.layer)
        chosen = chosen_layers("mode_approx.layers", layers, "text_decoder", depth)
        add_gates(decoder.bert, cfg.gate, factors, chosen)
    return factors


@register_tuning("lora", ("lora",), adapters=True)
def tune_lora(model: AuroraBase, cfg: BlipAuroraConfig, places: Places) -> LoraSets:
    """LoRA on linear layers."""
    return inject_lora(model, cfg.lora)


@register_tuning("uniadapter", ("uniadapter",), adapters=True)
def tune_uniadapter(model: AuroraBase, cfg: BlipAuroraConfig, places: Places) -> UniAdapters:
    """UniAdapter's bottlenecks in all towers."""
    decoder = getattr(model, "text_decoder", None)
    texts = [model.text_encoder] if decoder is None else [model.text_encoder, decoder.bert]
    return add_bottlenecks(model.visual_encoder, texts, lambda depth, dim: UniAdapters(depth, dim, cfg.uniadapter))


@register_tuning("frozen", heads=False)
@register_tuning("heads")
def tune_nothing(model: AuroraBase, cfg: BlipAuroraConfig, places: Places) -> None:
    """The heads at most."""


@register_tuning("full", backbone=True)
def tune_all(model: AuroraBase, cfg: BlipAuroraConfig, places: Places) -> None:
    """The whole model, but for the vision tower if that shall stay."""
    model.visual_encoder.requires_grad_(not cfg.freeze_vit)


class AuroraBase(AdapterOwnerMixin, RunState):
    """Mixin in front of one of LAVIS's BLIP models."""

    CONFIG_CLASS: type[BlipAuroraConfig]
    DEFAULT_MODEL_TYPE: str
    # Keys of samples besides image or video, and what to call without them.
    TRAINING_KEYS: tuple[str, ...]
    WITHOUT_TRAINING: str
    mode_approx: ModeFactors | None
    # Sets of another kind than ModeFactors.
    baseline: AdapterSets | None
    settings: BlipAuroraConfig
    # Of run.cache_features, in place of pictures.
    takes_tokens = True

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """Path of the YAML with the defaults of a model type."""
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            near = did_you_mean(str(model_type), cls.PRETRAINED_MODEL_CONFIG_DICT)
            raise AuroraError(f"model.model_type: unknown type {model_type!r}{near}")
        return super().default_config_path(model_type)

    @classmethod
    def from_config(cls, cfg=None):
        """Build the model and load its weights.

        Args:
            cfg: the ``model:`` part of a YAML; every key is checked, see :mod:`lavis_aurora.config`.
        """
        settings = parse_config(cls.CONFIG_CLASS, cfg or {}, "model")
        model = cls(settings)
        model.load_checkpoint_from_config(settings)
        load_configured_adapter(model, settings)
        logging.info("%s (%s)\n%s", cls.__name__, settings.tuning, trainable_parameters_summary(model))
        return model

    def set_up_tuning(
        self,
        cfg: BlipAuroraConfig,
        targets: Sequence[str],
        gated: BertModel,
        slot_name: Callable[[str], str] = lambda name: name,
    ) -> None:
        """Freeze the backbone and add what ``cfg.tuning`` trains; layers of the same ``slot_name`` share a slot."""
        self.mode_approx = self.baseline = None
        self.settings = cfg
        tuning = TUNINGS[cfg.tuning]
        if not tuning.backbone:
            self.requires_grad_(False)
        sets = tuning.set_up(self, cfg, Places(targets, gated, slot_name))
        if sets is not self.mode_approx:
            self.baseline = sets
        for _, parameter in adapter_parameters(self):
            parameter.requires_grad_(True)
        if tuning.heads and not tuning.backbone and cfg.train_heads:
            for head in self.heads:
                head.requires_grad_(True)
        if sets is not None:
            bind_companions(self, sets, tuning.heads and cfg.train_heads)

    @property
    def adapters(self) -> AdapterSets | None:
        """The sets of adapter parameters, of whatever kind; None for a way of tuning that has none."""
        return self.mode_approx if self.baseline is None else self.baseline

    def check_samples(self, samples: Mapping[str, Any]) -> None:
        """Refuse samples that lack what training needs; models call it in ``forward``."""
        missing = [key for key in self.TRAINING_KEYS if key not in samples]
        if not {"image", "video", "tokens"} & set(samples):
            missing.insert(0, "image")
        if missing:
            raise AuroraError(
                f"samples lack {', '.join(map(repr, missing))}; training needs image (or video), "
                f"{', '.join(self.TRAINING_KEYS)}; {self.WITHOUT_TRAINING}"
            )

    def load_checkpoint_from_config(self, cfg: BlipAuroraConfig, **_kwargs) -> None:
        """Load ``finetuned`` or ``pretrained``; with neither, the random weights stay and the log says so."""
        key = "finetuned" if cfg.load_finetuned else "pretrained"
        source = getattr(cfg, key)
        if source is None:
            logging.warning("model.pretrained is null: the backbone has RANDOM weights")
            return
        self.load_from_pretrained(source, key=f"model.{key}")

    def load_from_pretrained(self, url_or_filename: str, key: str = "model.pretrained") -> None:
        """Load backbone weights from a URL or file; see :func:`load_backbone` for what is refused."""
        adapter = {id(parameter) for _, parameter in adapter_parameters(self)}
        new = {name for name, parameter in self.named_parameters() if id(parameter) in adapter}
        new |= {name for name in self.state_dict() if name.partition(".")[0].endswith(("_m", *SETS))}
        source = f"{key} {url_or_filename}"
        content = read_content(url_or_filename, key)
        state = blip_weights(content, url_or_filename, key, self.state_dict())
        try:
            state = self.fill_missing_weights(state, source)
            if self.adapters is not None:
                state = self.adapters.backbone_state(state)
            load_backbone(self, state, source, new)
        except AuroraError as error:
            raise AuroraError(f"{error}{other_kind(content)}") from error
        self.backbone_source = url_or_filename
        if self.adapters is not None:
            self.adapters.keep_base_heads()
        if hasattr(self, "copy_params"):
            self.copy_params()

    load_checkpoint = load_from_pretrained

    def fill_missing_weights(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """The weights of a checkpoint, with those filled in that the model can start without; here there are none."""
        return state

    def tokenize(
        self,
        texts: Iterable[str],
        pad_to_longest: bool = False,
        everywhere: bool = False,
        device: torch.device | str = "cpu",
    ) -> BatchEncoding:
        """Token ids and mask, cut at ``max_txt_len``.

        Args:
            texts: what to tokenize.
            pad_to_longest: pad to the longest text rather than to ``max_txt_len``.
            everywhere: pad to the longest text of all processes.
            device: where they shall be; a GPU is not waited for.
        """
        tokens = self.tokenizer(
            list(texts),
            padding="longest" if pad_to_longest or everywhere else "max_length",
            truncation=True,
            max_length=self.max_txt_len,
            return_tensors="pt",
        )
        if everywhere:
            length = all_reduce_max_length(tokens.input_ids.shape[1])
            tokens = self.tokenizer.pad(tokens, padding="max_length", max_length=length, return_tensors="pt")
        return to_device(tokens, device)
