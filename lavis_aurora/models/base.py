"""What the BLIP models of this plugin share: configuration, weights, and what is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lavis.models.med import BertModel
from torch import Tensor
from transformers import BatchEncoding

from lavis_aurora.adapters.sets import (
    adapter_parameters,
    bind_companions,
    keep_base_heads,
    trainable_parameters_summary,
)
from lavis_aurora.baselines import add_baseline
from lavis_aurora.baselines.lora import LoraSets
from lavis_aurora.baselines.uniadapter import UniAdapters
from lavis_aurora.common.errors import AuroraError, near_names
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import BlipAuroraConfig
from lavis_aurora.encoders.fusion import add_gates
from lavis_aurora.mode_approx.factors import ModeFactors
from lavis_aurora.mode_approx.inject import inject_mode_approx
from lavis_aurora.models.matching import longest_anywhere, to_device
from lavis_aurora.models.owner import AdapterOwnerMixin, RunState, load_configured_adapter
from lavis_aurora.models.weights import load_backbone, read_state_dict


class AuroraBase(AdapterOwnerMixin, RunState):
    """Mixin in front of one of LAVIS's BLIP models."""

    CONFIG_CLASS: type[BlipAuroraConfig]
    DEFAULT_MODEL_TYPE: str
    # Keys of samples besides image or video, and what to call without them.
    TRAINING_KEYS: tuple[str, ...]
    WITHOUT_TRAINING: str
    mode_approx: ModeFactors | None
    baseline: LoraSets | UniAdapters | None
    settings: BlipAuroraConfig

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """Path of the YAML with the defaults of a model type."""
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            near = near_names(str(model_type), cls.PRETRAINED_MODEL_CONFIG_DICT)
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
        self.mode_approx = None
        self.settings = cfg
        self.baseline = add_baseline(self, cfg, targets)
        if cfg.tuning == "aurora":
            inject_mode_approx(self, cfg.mode_approx, targets, slot_name)
            add_gates(gated, cfg.gate, self.mode_approx)
        if cfg.tuning == "full":
            self.visual_encoder.requires_grad_(not cfg.freeze_vit)
            return
        self.requires_grad_(False)
        for _, parameter in adapter_parameters(self):
            parameter.requires_grad_(True)
        if cfg.tuning != "frozen" and cfg.train_heads:
            for head in self.heads:
                head.requires_grad_(True)
        if self.mode_approx is not None:
            bind_companions(self, self.mode_approx, cfg.train_heads)

    def check_samples(self, samples: Mapping[str, Any]) -> None:
        """Refuse samples that lack what training needs; models call it in ``forward``."""
        missing = [key for key in self.TRAINING_KEYS if key not in samples]
        if "image" not in samples and "video" not in samples:
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
        new |= {name for name in self.state_dict() if name.partition(".")[0].endswith(("_m", "mode_approx"))}
        source = f"{key} {url_or_filename}"
        state = self.complete_state(read_state_dict(url_or_filename, key), source)
        if isinstance(self.baseline, LoraSets):
            state = self.baseline.backbone_state(state)
        load_backbone(self, state, source, new)
        self.backbone_source = url_or_filename
        if self.mode_approx is not None:
            keep_base_heads(self.mode_approx)
        if hasattr(self, "copy_params"):
            self.copy_params()

    load_checkpoint = load_from_pretrained

    def complete_state(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """The weights of a checkpoint, with those filled in that the model can start without; here there are none."""
        return state

    def tokenize(
        self,
        texts: Iterable[str],
        to_longest: bool = False,
        everywhere: bool = False,
        device: torch.device | str = "cpu",
    ) -> BatchEncoding:
        """Token ids and mask, cut at ``max_txt_len``.

        Args:
            texts: what to tokenize.
            to_longest: pad to the longest text rather than to ``max_txt_len``.
            everywhere: pad to the longest text of all processes.
            device: where they shall be; a GPU is not waited for.
        """
        tokens = self.tokenizer(
            list(texts),
            padding="longest" if to_longest or everywhere else "max_length",
            truncation=True,
            max_length=self.max_txt_len,
            return_tensors="pt",
        )
        if everywhere:
            length = longest_anywhere(tokens.input_ids.shape[1])
            tokens = self.tokenizer.pad(tokens, padding="max_length", max_length=length, return_tensors="pt")
        return to_device(tokens, device)
