"""What of a model's settings stands in an adapter folder, and what is taken from one: an adapter is data.

A folder names its backbone by registered name, type and hash. Where weights, tokenizer and configuration files come
from is said by the user, or by the defaults of the registered type, and never by a folder.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_aurora.common.errors import AuroraError, abbreviated, did_you_mean, shown
from lavis_aurora.config.check import check_types
from lavis_aurora.config.dataset_keys import (
    PROCESSOR_KINDS,
    PROCESSOR_SPLITS,
    check_processor_keys,
    is_plain,
    is_portable_processor,
    is_word,
    processor_keys,
)
from lavis_aurora.config.models import TUNINGS, BlipAuroraConfig

LOG = logging.getLogger(__name__)
# Of this package's own models: what they are and how they were tuned.
BLIP_SETTINGS = (
    *("image_size", "vit_type", "vit", "vit_layer_norm_epsilon", "embed_dim", "max_txt_len"),
    "token_merging",
    *("vit_drop_path_rate", "vit_grad_ckpt", "vit_ckpt_layer", "train_heads", "train_temp", "train_text_proj"),
    *("tuning", "mode_approx", "gate", "lora", "uniadapter", "context"),
    *("share_decoder", "mask_question_padding", "rank_chunk"),
)
# Never: where things come from, what is decided by whoever loads, and what is of a run.
LEFT_OUT = (
    *("arch", "model_type", "pretrained", "finetuned", "load_finetuned", "load_pretrained", "tokenizer"),
    *("med_config_path", "adapter", "adapter_check_base", "freeze_vit"),
    *("queue_size", "alpha", "alpha_epochs", "momentum", "teacher_factors", "negative_all_rank", "mini_batch_size"),
)
WRAPPER_SETTINGS = ("base", "mode_approx", "modules_to_save")
# These fetch a tokenizer when they are made.
FETCHING_PROCESSORS = ("gpt_dialogue", "gpt_video_ft")
# Of all patterns of a key together, and letters of one.
MOST_WAYS, LONGEST_PATTERN = 10**5, 500


def portable_settings(cls: type[Any], settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's settings that may stand in an adapter folder.

    Args:
        cls: the model's class; of this package, or any of LAVIS's, whose settings are numbers and known words then.
        settings: of the model.
        defaults: of its type; what is a word or path there stays so.
    """
    if hasattr(cls, "CONFIG_CLASS"):
        allowed = set(WRAPPER_SETTINGS if "base" in _known(cls) else BLIP_SETTINGS)
        # Of the ways of tuning, the one that the adapter is of; one that names no settings may use any.
        tuning = settings.get("tuning", BlipAuroraConfig.tuning)
        if tuning not in TUNINGS or not TUNINGS[tuning].adapters:
            allowed.discard("tuning")
            tuning = BlipAuroraConfig.tuning
        own = set(TUNINGS[tuning].settings)
        if own:
            allowed -= {key for one in TUNINGS.values() for key in one.settings} - own
        return {key: value for key, value in settings.items() if key in allowed}
    return {
        key: value
        for key, value in settings.items()
        if key not in LEFT_OUT
        and (is_plain({key: value}) and not isinstance(defaults.get(key), str) or is_word(key, value))
    }


def adapter_settings(cls: type[Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with which a model may be built for an adapter; what is not taken is named in the log.

    Args:
        cls: the class to build, unless the adapter names a registered one.
        described: ``model`` of the adapter's file.

    Raises:
        AuroraError: an unknown key, or a value of a wrong type.
    """
    cls = registry.get_model_class(described.get("arch") or "") or cls
    settings = described.get("settings") or {}
    if not hasattr(cls, "CONFIG_CLASS"):
        return {}
    for key in settings:
        if key not in _known(cls):
            raise AuroraError(f"model.settings.{key}: unknown key{did_you_mean(key, _known(cls))}")
    taken = portable_settings(cls, settings, {})
    left = sorted(settings.keys() - taken.keys())
    check_types(cls.CONFIG_CLASS, taken, "model.settings")
    if "base" in taken:
        taken["base"], more = _base_settings(taken["base"])
        left += more
    for kind in ("mode_approx", "lora"):
        _check_patterns(f"{kind}.targets", (taken.get(kind) or {}).get("targets"))
    _check_patterns("modules_to_save", taken.get("modules_to_save"))
    if left:
        LOG.warning(
            "not taken from the adapter, which is data: %s; name yourself what differs from the type's own "
            "(pretrained=, tokenizer=, med_config_path=, or these keys in a YAML)",
            abbreviated(left, limit=8),
        )
    return taken


def _base_settings(base: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """``base`` of an adapter of mode_approx: registered name, type, and what may be taken; the names of the rest."""
    names = {key: base.get(key) for key in ("arch", "model_type")}
    for key, value in names.items():
        if not isinstance(value, (str, type(None))):
            raise AuroraError(f"model.settings.base.{key}: {value!r} is not a str")
    cls = registry.get_model_class(names["arch"] or "")
    if cls is None:
        raise AuroraError(f"model.settings.base.arch: {names['arch']!r} is no registered model")
    defaults = type_settings(cls, names["model_type"])
    taken = portable_settings(cls, base, defaults)
    others = sorted(base.keys() - taken.keys() - names.keys())
    left = [f"base.{key}" for key in others if base[key] != defaults.get(key)]
    if hasattr(cls, "CONFIG_CLASS"):
        check_types(cls.CONFIG_CLASS, taken, "model.settings.base")
    return {**{key: value for key, value in names.items() if value is not None}, **taken}, left


def type_settings(cls: type[Any], model_type: str | None) -> dict[str, Any]:
    """``model:`` of the default YAML of a model's type; nothing for a type that is not known."""
    model_type = model_type or getattr(cls, "DEFAULT_MODEL_TYPE", None)
    if model_type not in getattr(cls, "PRETRAINED_MODEL_CONFIG_DICT", {}):
        return {}
    defaults: Any = OmegaConf.load(cls.default_config_path(model_type))
    settings: Any = OmegaConf.to_container(defaults.model, resolve=True)
    return dict(settings)


def check_towers(
    arch: str, model_type: str | None, described: Mapping[str, Any], given: Iterable[str], key: str = "model_type"
) -> None:
    """Refuse a type whose towers differ from those that an adapter is of.

    Args:
        arch, model_type: asked for.
        described: ``model`` of the adapter's file.
        given: keys of settings that go over the type's; where they describe a tower, only building it tells.
        key: that names the type, for the message.

    Raises:
        AuroraError: says which types.
    """
    cls, adapted = registry.get_model_class(arch), described.get("model_type")
    own, other = type_settings(cls, model_type), type_settings(cls, adapted) if adapted else {}
    differing = [one for one in ("vit_type", "vit", "med_config_path") if own.get(one) != other.get(one)]
    if described.get("arch") == arch and differing and other and not any(one in given for one in differing):
        raise AuroraError(
            f"it is of the type {adapted}, whose towers differ from those of {model_type}; set {key}={adapted}"
        )


def _known(cls: type[Any]) -> list[str]:
    return [one.name for one in fields(cls.CONFIG_CLASS)]


def _check_patterns(key: str, patterns: Any) -> None:
    """Refuse regular expressions of which a search may take for ever: those of a key have few ways to match."""
    ways = 0
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        if not isinstance(pattern, str):
            continue
        # Of repeated groups the ways cannot be counted so; what begins with (? may hide one.
        countable = len(pattern) <= LONGEST_PATTERN and not re.search(r"\)[*+{]|\(\?[^:]", pattern)
        ways += _ways(pattern) if countable else MOST_WAYS + 1
        if ways > MOST_WAYS:
            raise AuroraError(
                f"model.settings.{key}: {shown(pattern)} repeats too much, or has too many alternatives, for a "
                f"pattern from an adapter; build the model by a YAML without model.adapter, then "
                f"load_adapter(model, folder)"
            )


def _ways(pattern: str) -> int:
    """About how many ways a pattern without repeated groups has to match the name of a layer, at most."""
    alternatives = math.prod(1 + part.count("|") for part in re.split("[()]", pattern))
    return int(alternatives * 2 ** pattern.count("?") * 20 ** len(re.findall("[*+{]", pattern)))


def fit_picture_size(preprocess: Mapping[str, Any], size: int | None) -> None:
    """Let the processors of a model's type, changed in place, make pictures of the model's own size."""
    for part in (preprocess.get("vis_processor") or {}).values():
        if size is not None and "image_size" in processor_keys(registry.get_processor_class(part["name"])):
            part["image_size"] = size


def check_preprocess(preprocess: Mapping[str, Any]) -> None:
    """Refuse an adapter's processors that are not registered, or have settings other than numbers and words.

    Raises:
        AuroraError: names the key.
    """
    for kind, splits in preprocess.items():
        key = f"model.preprocess.{kind}"
        _check_section(key, kind, splits, PROCESSOR_KINDS)
        for split, part in (splits or {}).items():
            _check_section(f"{key}.{split}", split, part, PROCESSOR_SPLITS)
            if part is None:
                continue
            name, known = part.get("name"), registry.mapping["processor_name_mapping"]
            if not isinstance(name, str) or name not in known or name in FETCHING_PROCESSORS:
                raise AuroraError(f"{key}.{split}.name: {name!r} is no processor for pictures, videos or captions")
            if not is_portable_processor(part):
                raise AuroraError(f"{key}.{split}: {part!r} holds text where a number is expected")
            check_processor_keys(OmegaConf.create(part), f"{key}.{split}")


def _check_section(key: str, name: str, part: Any, known: tuple[str, ...]) -> None:
    if name not in known:
        raise AuroraError(f"{key}: unknown key{did_you_mean(name, known)}")
    if not isinstance(part, (Mapping, type(None))):
        raise AuroraError(f"{key}: must be a section of keys, not {part!r}")
