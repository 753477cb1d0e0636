"""What a model says of itself in an adapter folder, and what a run's checkpoint takes from it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import is_dist_avail_and_initialized
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_aurora.adapters.companions import frozen_teacher, momentum_copies, trained_buffers
from lavis_aurora.adapters.files import load_adapter
from lavis_aurora.adapters.sets import AdapterSets
from lavis_aurora.adapters.switching import AdapterOwner, reset_teacher
from lavis_aurora.common.errors import AuroraError, abbreviated, shown
from lavis_aurora.common.summary import lavis_version
from lavis_aurora.config.adapter_settings import fit_picture_size, portable_settings
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import BlipAuroraConfig, ModeApproxModelConfig
from lavis_aurora.encoders.towers import compile_layers
from lavis_aurora.models.loading import check_finite


class RunState:
    """Mixin of models that runner_aurora trains: what is trained, and its momentum copies."""

    def _run_tensors(self) -> dict[str, Tensor]:
        """What a run changes: trained parameters, the buffers of trained modules, and momentum copies of both."""
        pairs = [zip(trained.parameters(), copy.parameters()) for trained, copy in momentum_copies(self)]
        changed = {id(p_m) for pair in pairs for p, p_m in pair if p.requires_grad}
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad or id(p) in changed}
        return {**parameters, **trained_buffers(self)}

    def run_state(self) -> dict[str, Tensor]:
        """State that a checkpoint of a run must hold: what is trained, buffers too, and momentum copies."""
        return {name: tensor.detach().cpu() for name, tensor in self._run_tensors().items()}

    def load_run_state(self, state: dict[str, Tensor], source: str) -> None:
        """Load what :meth:`run_state` gave; anything missing, foreign, of another shape or NaN is an error.

        Buffers may be missing, as in checkpoints of older versions: they stay as they are, and the log says so.
        """
        check_finite(state, source)
        own = self._run_tensors()
        lacking = [name for name in own if name not in state and not isinstance(own[name], nn.Parameter)]
        problems = [f"{name} is missing" for name in own.keys() - state.keys() - set(lacking)]
        problems += [f"{name} is not trained here" for name in state.keys() - own.keys()]
        problems += [
            f"{name} is {_kind(state[name])} there and {_kind(own[name])} here"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
            or own[name].is_floating_point() != state[name].is_floating_point()
        ]
        if problems:
            found = abbreviated(sorted(problems), separator="; ")
            raise AuroraError(
                f"{source} does not fit this model: {found}; give the options of its run again "
                f"(config.yaml beside it holds them)"
            )
        if lacking:
            names = abbreviated(lacking)
            logging.warning("%s holds no %s, which stay as they are; results may differ", source, names)
        with torch.no_grad():
            for name in own.keys() & state.keys():
                own[name].copy_(state[name])

    def share_buffers(self) -> None:
        """Let all processes have the main one's buffers of trained modules, which each fills from its own batches."""
        if is_dist_avail_and_initialized():
            for buffer in trained_buffers(self).values():
                dist.broadcast(buffer, src=0)

    def frozen_teacher(self) -> AbstractContextManager[None]:
        """Context in which LAVIS's momentum update leaves the copies as they are."""
        return frozen_teacher(self)

    def compile_layers(self) -> None:
        """Compile the layers of the towers, see :func:`lavis_aurora.encoders.towers.compile_layers`."""
        compile_layers(self)

    def queues(self) -> dict[str, Tensor]:
        """Features of earlier batches that training compares with, by name; most models have none."""
        return {}

    def queue_state(self) -> dict[str, Tensor]:
        """Copies of the queues, for a checkpoint."""
        return {name: queue.to("cpu", copy=True) for name, queue in self.queues().items()}

    def load_queue_state(self, state: dict[str, Tensor]) -> bool:
        """Put back what :meth:`queue_state` gave; False, with nothing done, if it is not there or of another kind."""
        own = self.queues()
        kinds = [{name: (queue.shape, queue.dtype) for name, queue in queues.items()} for queues in (own, state)]
        if not kinds[0].items() <= kinds[1].items():
            return False
        for name, queue in own.items():
            queue.copy_(state[name])
        return True


@cache  # each adapter that a run saves says them
def _defaults_in(path: str, cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and preprocessing of a type, of which ``path`` is the YAML."""
    defaults = OmegaConf.load(path)
    preprocess = OmegaConf.to_container(defaults.get("preprocess") or OmegaConf.create(), resolve=True)
    return asdict(parse_config(cls, defaults.model, "model")), preprocess


def _kind(tensor: Tensor) -> str:
    """Shape of a tensor, and its type if it holds no floating point numbers."""
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' of {tensor.dtype}'}"


# What decides the output of a text tower, and shows neither in its weights nor in their shapes.
TEXT_CONFIG = ("hidden_act", "layer_norm_eps", "num_attention_heads", "position_embedding_type")


class AdapterOwnerMixin(AdapterOwner):
    """What the BLIP models of this package say of their adapters; no state of its own.

    Attributes:
        settings: what the model was built from.
        backbone_source: file or URL of its backbone; None for random weights.
        ADAPTER_KEYS: settings that belong to an adapter; a YAML with ``model.adapter`` takes them from there.
    """

    settings: BlipAuroraConfig
    adapters: AdapterSets | None
    backbone_source: str | None = None
    ADAPTER_KEYS: tuple[str, ...] = ("tuning", "mode_approx", "gate", "lora", "uniadapter")

    def describe_adapter(self) -> dict[str, Any]:
        """Registered name and type, settings that differ from the type's defaults, and the type's preprocessing."""
        defaults, preprocess = self._type_defaults()
        fit_picture_size(preprocess, self.settings.image_size)
        own = portable_settings(type(self), asdict(self.settings), defaults)
        settings = {
            key: value
            for key, value in own.items()
            if (key in self.ADAPTER_KEYS and key != "tuning") or value != defaults[key]
        }
        return {
            "arch": registered_name(self),
            "model_type": self.settings.model_type,
            "settings": settings,
            "preprocess": preprocess,
            "lavis": lavis_version(),
            **describe_text(self),
        }

    def _type_defaults(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings and preprocessing of the model's type; without one, of the configuration alone."""
        if self.settings.model_type is None:
            return asdict(self.CONFIG_CLASS()), {}
        return deepcopy(_defaults_in(self.default_config_path(self.settings.model_type), self.CONFIG_CLASS))

    def check_trained(self) -> None:
        """Refuse to train while the active adapter is a frozen one; models call it first in ``forward``."""
        if self.adapters is not None:
            self.adapters.check_trained()

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
            reset_teacher(self, self.adapters)

    def complete_merged_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As it is; the log says what no plain model does with it."""
        if self.settings.token_merging:
            logging.warning(
                "model.token_merging is %d here; a plain model keeps all tokens, and its scores differ: evaluate it",
                self.settings.token_merging,
            )
        return state


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
