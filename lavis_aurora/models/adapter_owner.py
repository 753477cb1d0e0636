"""What the BLIP models of this plugin say of themselves in an adapter folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import nn

from lavis_aurora.config import BlipAuroraConfig, ModeApproxModelConfig
from lavis_aurora.config.check import parse_config
from lavis_aurora.errors import shown
from lavis_aurora.mode_approx import ModeFactors, load_adapter
from lavis_aurora.mode_approx.teacher import restart_teacher
from lavis_aurora.models.adapter_settings import portable_settings

# What decides the output of a text tower, and shows neither in its weights nor in their shapes.
TEXT_CONFIG = ("hidden_act", "layer_norm_eps", "num_attention_heads", "position_embedding_type")


class AdapterOwnerMixin:
    """The hooks of :class:`lavis_aurora.mode_approx.adapter_file.AdapterOwner`, and no state of its own.

    Attributes:
        settings: what the model was built from.
        backbone_source: file or URL of its backbone; None for random weights.
        ADAPTER_KEYS: settings that belong to an adapter; a YAML with ``model.adapter`` takes them from there.
    """

    settings: BlipAuroraConfig
    mode_approx: ModeFactors | None
    backbone_source: str | None = None
    ADAPTER_KEYS = ("mode_approx", "gate")

    def describe_adapter(self) -> dict[str, Any]:
        """Registered name and type, settings that differ from the type's defaults, and the type's preprocessing."""
        defaults, preprocess = self._type_defaults()
        own = portable_settings(type(self), asdict(self.settings), defaults)
        settings = {key: value for key, value in own.items() if key in self.ADAPTER_KEYS or value != defaults[key]}
        return {
            "arch": registered_name(self),
            "model_type": self.settings.model_type,
            "settings": settings,
            "preprocess": preprocess,
            "lavis": _lavis_version(),
            **describe_text(self),
        }

    def _type_defaults(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings and preprocessing of the model's type; without one, of the configuration alone."""
        if self.settings.model_type is None:
            return asdict(self.CONFIG_CLASS()), {}
        defaults = OmegaConf.load(self.default_config_path(self.settings.model_type))
        preprocess = OmegaConf.to_container(defaults.get("preprocess") or OmegaConf.create(), resolve=True)
        return asdict(parse_config(self.CONFIG_CLASS, defaults.model, "model")), preprocess

    def check_trained(self) -> None:
        """Refuse to train while the active adapter is a frozen one; models call it first in ``forward``."""
        if self.mode_approx is not None:
            self.mode_approx.check_trained()

    def base_name(self) -> str | None:
        """ARCH/TYPE if the backbone is that of the model's type; None for other weights."""
        defaults, _ = self._type_defaults()
        own = defaults["finetuned" if defaults["load_finetuned"] else "pretrained"]
        same = self.backbone_source is not None and self.backbone_source == own
        return f"{registered_name(self)}/{self.settings.model_type}" if same else None

    def adapter_differences(self, description: Mapping[str, Any]) -> list[str]:
        """Another model, or another form of the gate, whose parameters mean something else."""
        here = self.describe_adapter()
        problems = []
        if description.get("arch", here["arch"]) != here["arch"]:
            problems.append(f"it is of {shown(description['arch'])}, and this is {here['arch']}")
        problems += text_differences(self, description)
        gate = (description.get("settings") or {}).get("gate")
        form = gate.get("form", self.settings.gate.form) if isinstance(gate, Mapping) else self.settings.gate.form
        if form != self.settings.gate.form:
            problems.append(
                f"gate.form is {shown(form)} there and {self.settings.gate.form!r} here; set model.gate.form to it"
            )
        return problems

    def adapter_loaded(self, name: str) -> None:
        """Let the momentum teacher start as the adapter that is trained."""
        if name == "default":
            restart_teacher(self, self.mode_approx)


def describe_text(model: nn.Module) -> dict[str, Any]:
    """What tells a model's vocabulary and text tower from others, as their files cannot be named in an adapter."""
    said: dict[str, Any] = {}
    tokenizer = getattr(model, "tokenizer", None)
    if hasattr(tokenizer, "get_vocab"):
        words = [tokenizer.get_vocab(), getattr(tokenizer, "do_lower_case", None)]
        said["vocabulary_sha256"] = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
    config = getattr(getattr(model, "text_encoder", None), "config", None)
    if config is not None:
        said["text_config"] = {key: getattr(config, key, None) for key in TEXT_CONFIG}
    return said


def text_differences(model: nn.Module, description: Mapping[str, Any]) -> list[str]:
    """Another vocabulary, or a text tower that computes otherwise; folders of older versions do not tell."""
    here, problems = describe_text(model), []
    if description.get("vocabulary_sha256", here.get("vocabulary_sha256")) != here.get("vocabulary_sha256"):
        problems.append("it was tuned with another vocabulary; name its tokenizer (tokenizer=, model.tokenizer)")
    there, own = description.get("text_config") or {}, here.get("text_config", {})
    problems += [
        f"{key} of the text encoder is {shown(there[key])} there and {own[key]!r} here; name its file "
        f"(med_config_path=, model.med_config_path)"
        for key in own.keys() & there.keys()
        if own[key] != there[key]
    ]
    return problems


def registered_name(model: nn.Module) -> str:
    """The name of a model's class with LAVIS; of one that is not registered, its own."""
    names = registry.mapping["model_name_mapping"]
    return next((name for name, cls in names.items() if cls is type(model)), type(model).__name__)


def load_configured_adapter(model: nn.Module, settings: BlipAuroraConfig | ModeApproxModelConfig) -> None:
    """Load ``model.adapter``, if there is one."""
    if settings.adapter:
        load_adapter(model, settings.adapter, check_base=settings.adapter_check_base)
        logging.info("model.adapter: loaded %s", settings.adapter)


def _lavis_version() -> str | None:
    try:
        return version("salesforce-lavis")
    except PackageNotFoundError:
        return None
