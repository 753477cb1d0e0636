"""Mode approximation around any model that is registered with LAVIS."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import wraps
from typing import Any

from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lavis_aurora.adapters.companions import momentum_copies
from lavis_aurora.adapters.switching import (
    AdapterOwner,
    bind_companions,
    owner_of,
    reset_teacher,
    trainable_parameters_summary,
)
from lavis_aurora.common.errors import AuroraError, did_you_mean, shown
from lavis_aurora.common.paths import package_file, use_weights_folder
from lavis_aurora.config.adapter_settings import fit_picture_size, portable_settings, type_settings
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.method import ModeApproxConfig
from lavis_aurora.config.models import ModeApproxModelConfig
from lavis_aurora.mode_approx.factors import ModeFactors
from lavis_aurora.mode_approx.inject import inject_mode_approx
from lavis_aurora.mode_approx.presets import PRESETS
from lavis_aurora.models.base import AuroraBase
from lavis_aurora.models.loading import load_checked
from lavis_aurora.models.owner import (
    RunState,
    describe_text,
    load_configured_adapter,
    registered_name,
    text_differences,
)
from lavis_aurora.models.scoring import evaluating

# By these LAVIS's tasks evaluate a model.
SCORING = ("compute_sim_matrix", "generate", "predict", "predict_answers")


@registry.register_model("mode_approx")
class ModeApproxModel(AdapterOwner, RunState, BaseModel):
    """A LAVIS model whose attention projections are tuned by mode approximation (paper 3.2), all else frozen.

    The model stands at ``base`` as LAVIS built it: ``forward``, ``predict``, ``generate``, ``compute_sim_matrix``,
    ``tokenizer`` and whatever else a task asks for are the base's own; what scores or answers does so in eval mode,
    and a model in training stays in training. Keys of the state dict are ``base.`` and
    LAVIS's key, and ``base.mode_approx.`` for the factors; checkpoints of the base load by ``load_checkpoint``,
    unmodified.

    Models with momentum copies keep them. Their towers' copies read the moving average of the factors
    (:func:`lavis_aurora.mode_approx.inject.adapt_copies`), so that the teacher is the average of the tuned model.

    Supported model types:
        - default: in YAMLs, where ``model.base`` names the model.
        - ARCH/TYPE: any registered model, e.g. blip_vqa/vqav2, in load_model_and_preprocess.

    Examples:
        >>> from lavis_aurora import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("mode_approx", "blip_vqa/vqav2")

    Args:
        base: the model; changed in place.
        config: the method; its targets may be presets.
        modules_to_save: regular expressions over names of modules that are trained besides.
    """

    CONFIG_CLASS = ModeApproxModelConfig
    DEFAULT_MODEL_TYPE = "default"
    PRETRAINED_MODEL_CONFIG_DICT = {"default": package_file("configs/models/mode_approx_default.yaml")}

    ADAPTER_KEYS = ("base", "mode_approx", "modules_to_save")

    def __init__(self, base: nn.Module, config: ModeApproxConfig, modules_to_save: list[str] | None = None) -> None:
        super().__init__()
        heads = _find_modules(base, modules_to_save or [])
        inject_mode_approx(base, config)
        for head in heads:
            head.requires_grad_(True)
        self.base = base
        self.training = base.training
        self.heads = heads
        self.settings = ModeApproxModelConfig(
            base={"arch": registered_name(base)}, mode_approx=config, modules_to_save=modules_to_save
        )
        bind_companions(self, self.mode_approx, train_heads=True)

    @classmethod
    def from_config(cls, cfg: DictConfig | None = None) -> ModeApproxModel:
        """Build the base by its own ``from_config``, with its own weights, and put the method on it.

        Args:
            cfg: the ``model:`` part of a YAML, see :class:`lavis_aurora.config.ModeApproxModelConfig`.
        """
        complete = cls.with_base_defaults(OmegaConf.create({"model": cfg or {}})).model
        settings = parse_config(cls.CONFIG_CLASS, complete, "model")
        arch = settings.base["arch"]
        if settings.mode_approx.targets is None:
            settings.mode_approx.targets = [_preset(arch)]
        base_cls = registry.get_model_class(arch)
        # A model of this plugin without a method of its own; it is frozen here.
        if issubclass(base_cls, AuroraBase) and settings.base.setdefault("tuning", "full") != "full":
            raise AuroraError(f"model.base.tuning: leave it out; mode_approx itself tunes the {arch}")
        use_weights_folder()
        base = _build_base(base_cls, OmegaConf.create(settings.base))
        model = cls(base, settings.mode_approx, settings.modules_to_save)
        model.settings = settings
        load_configured_adapter(model, settings)
        logging.info("mode_approx around %s\n%s", arch, trainable_parameters_summary(model))
        return model

    @classmethod
    def with_base_defaults(cls, cfg: DictConfig) -> DictConfig:
        """A YAML completed by the default YAML of the type of ``model.base``: its keys, and its processors.

        Raises:
            AuroraError: the base is not named, or not registered, or a key of it stands beside it.
        """
        base = cfg.model.get("base")
        if not isinstance(base, DictConfig):
            raise AuroraError("model.base: missing; name the model to wrap, e.g. {arch: blip_vqa, model_type: vqav2}")
        defaults = OmegaConf.load(_base_config_path(base.get("arch"), base.get("model_type"), "model.base."))
        known = {one.name for one in fields(cls.CONFIG_CLASS)}
        for key in cfg.model:
            if key in defaults.model and key not in known:
                raise AuroraError(f"model.{key}: a key of the model inside; write it below model.base")
        preprocess = {"preprocess": defaults.preprocess} if "preprocess" in defaults else {}
        return OmegaConf.merge(preprocess, {"model": {"base": defaults.model}}, cfg)

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """The YAML of a type: for ARCH/TYPE that of the model inside, whose processors LAVIS reads there."""
        arch, separator, base_type = str(model_type).partition("/")
        if separator:
            return _base_config_path(arch, base_type, "")
        if model_type != cls.DEFAULT_MODEL_TYPE:
            raise AuroraError(f"mode_approx: no type {model_type!r}; name the model inside as ARCH/TYPE")
        return cls.PRETRAINED_MODEL_CONFIG_DICT[model_type]

    @classmethod
    def type_defaults(cls, model_type: str) -> DictConfig:
        """``model`` and ``preprocess`` of a type."""
        arch, separator, base_type = str(model_type).partition("/")
        if not separator:
            return OmegaConf.load(cls.default_config_path(model_type))
        cls.default_config_path(model_type)
        own = OmegaConf.load(cls.PRETRAINED_MODEL_CONFIG_DICT["default"])
        own.model.base = {"arch": arch, "model_type": base_type}
        return cls.with_base_defaults(own)

    @classmethod
    def from_pretrained(cls, model_type: str) -> ModeApproxModel:
        """The method around a model with the weights of its type, e.g. ``blip_vqa/vqav2``."""
        cfg = cls.type_defaults(model_type).model
        if "base" not in cfg:
            raise AuroraError("mode_approx: name the model inside as ARCH/TYPE, e.g. blip_retrieval/coco")
        return cls.from_config(cfg)

    @property
    def mode_approx(self) -> ModeFactors:
        """The factors."""
        return self.base.mode_approx

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            value = getattr(self.base, name)
            return self._in_eval_mode(value) if name in SCORING else value

    def _in_eval_mode(self, method: Callable) -> Callable:
        @wraps(method)
        def scoring(*args, **kwargs) -> Any:
            with evaluating(self):
                return method(*args, **kwargs)

        return scoring

    def forward(self, *args, **kwargs) -> Any:
        """The base's, e.g. ``model(samples)["loss"]``."""
        self.mode_approx.check_trained()
        if kwargs.get("is_train", True):  # LAVIS's classifiers predict by it too
            self.mode_approx.check_teacher()
        return self.base(*args, **kwargs)

    def before_evaluation(self, **kwargs) -> None:
        """The base's; tasks call it before a split is evaluated."""
        self.base.before_evaluation(**kwargs)

    def load_checkpoint(self, url_or_filename: str) -> Any:
        """Load a checkpoint of the base, unmodified, by the base's own rules; the factors stay as they are."""
        load = self.base.load_checkpoint
        if isinstance(self.base, AuroraBase):
            message = load(url_or_filename)
        else:
            message = load_checked(self.base, load, url_or_filename, "checkpoint")
        self.mode_approx.keep_base_heads()
        return message

    def queues(self) -> dict[str, Tensor]:
        """The base's queues of features: buffers at its top, as LAVIS's retrieval models have them."""
        own = getattr(self.base, "queues", None)
        return own() if own else {name: b for name, b in self.base.named_buffers(recurse=False) if "queue" in name}

    def complete_merged_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A merged state under the base's own keys, for a plain model of its class."""
        state = {key.removeprefix("base."): value for key, value in state.items()}
        return owner_of(self.base).complete_merged_state(state)

    def describe_adapter(self) -> dict[str, Any]:
        """What an adapter folder says of the model: all that builds it again, and the base's preprocessing."""
        base, preprocess = self.settings.base, {}
        defaults = type_settings(type(self.base), base.get("model_type"))
        own = portable_settings(type(self.base), base, defaults)
        named = {key: base[key] for key in ("arch", "model_type") if base.get(key) is not None}
        settings = portable_settings(type(self), asdict(self.settings), {})
        settings["base"] = {**named, **{key: value for key, value in own.items() if value != defaults.get(key)}}
        if base.get("model_type") is not None:
            path = _base_config_path(base["arch"], base["model_type"], "")
            preprocess = OmegaConf.load(path).get("preprocess") or OmegaConf.create()
            preprocess = OmegaConf.to_container(preprocess, resolve=True)
            fit_picture_size(preprocess, base.get("image_size"))
        return {
            "arch": "mode_approx",
            "model_type": "default",
            "settings": settings,
            "preprocess": preprocess,
            **describe_text(self.base),
        }

    def base_name(self) -> str | None:
        """ARCH/TYPE if the base has the weights of its type; None for others."""
        base = self.settings.base
        defaults = type_settings(type(self.base), base.get("model_type"))
        key = "finetuned" if base.get("load_finetuned", True) else "pretrained"
        same = base.get(key) is not None and base[key] == defaults.get(key)
        return f"{base['arch']}/{base.get('model_type')}" if same else None

    def adapter_differences(self, description: Mapping[str, Any]) -> list[str]:
        """The vocabulary, and no model's name: models that share their towers may share adapters."""
        return text_differences(self.base, description)

    def adapter_loaded(self, name: str) -> None:
        """Let the momentum teacher start as the adapter that is trained."""
        if name == "default":
            reset_teacher(self.base, self.mode_approx)


class CheckedLoading:
    """In front of a model of LAVIS while it is built: its checkpoints are those that :func:`load_checked` takes."""

    def load_checkpoint(self, url_or_filename: str) -> Any:
        return load_checked(self, super().load_checkpoint, url_or_filename, "model.base.finetuned")

    def load_from_pretrained(self, url_or_filename: str, *args, **kwargs) -> Any:
        def load(path: str) -> Any:
            return super(CheckedLoading, self).load_from_pretrained(path, *args, **kwargs)

        return load_checked(self, load, url_or_filename, "model.base.pretrained")


def _build_base(cls: type[Any], cfg: DictConfig) -> nn.Module:
    """The model that ``cls`` builds, which loads by LAVIS's own rules what is no half of a checkpoint."""
    if issubclass(cls, AuroraBase) or not hasattr(cls, "load_checkpoint"):
        return cls.from_config(cfg)
    checked = type(cls.__name__, (CheckedLoading, cls), {})
    base = checked.from_config(cfg)
    if type(base) is checked:
        base.__class__ = cls
    return base


def _base_config_path(arch: str | None, model_type: str | None, prefix: str) -> str:
    """Path of the default YAML of a registered model's type."""
    models = registry.mapping["model_name_mapping"]
    if arch is None:
        raise AuroraError(f"{prefix}arch: missing; name the registered model to wrap, e.g. blip_retrieval")
    if arch == "mode_approx" or not isinstance(arch, str) or arch not in models:
        known = sorted(name for name in models if name != "mode_approx")
        raise AuroraError(f"{prefix}arch: {shown(arch)} is no registered model{did_you_mean(str(arch), known)}")
    types = models[arch].PRETRAINED_MODEL_CONFIG_DICT
    model_type = model_type or getattr(models[arch], "DEFAULT_MODEL_TYPE", None)
    if not isinstance(model_type, str) or model_type not in types:
        raise AuroraError(
            f"{prefix}model_type: {arch} has no type {shown(model_type)}{did_you_mean(str(model_type), types)}"
        )
    return models[arch].default_config_path(model_type)


def _preset(arch: str) -> str:
    if arch not in PRESETS:
        raise AuroraError(
            f"model.mode_approx.targets: there is no preset for {arch}; name the layers by regular expressions, or "
            f"try the preset attention"
        )
    return arch


def _find_modules(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    """The modules whose whole names match, each pattern at least one; momentum copies follow by themselves."""
    copies = {id(module) for _, copy in momentum_copies(model) for module in copy.modules()}
    names = [name for name, module in model.named_modules() if name and id(module) not in copies]
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if re.fullmatch(pattern, name)}
        if not matches:
            raise AuroraError(f"model.modules_to_save: {pattern!r} matches no module{did_you_mean(pattern, names)}")
        found |= matches
    # A module brings those inside it.
    outer = [name for name in names if name in found and not any(name.startswith(f"{other}.") for other in found)]
    return [model.get_submodule(name) for name in outer]
