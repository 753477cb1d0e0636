"""Refuse keys below ``datasets`` that nothing reads: LAVIS takes any, and a misspelt one has no effect."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from inspect import Parameter, signature
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_aurora.common.errors import AuroraError, did_you_mean, shown
from lavis_aurora.config.check import READING_ERRORS, parse_config

# Keys that LAVIS's builders read, by the section that they stand in.
DATASET_KEYS = ("data_type", "build_info", "vis_processor", "text_processor", "kw_processor", "type", "dataset_card")
DATA_KINDS = ("images", "videos", "features")
# Of the annotation files, LAVIS makes datasets of these.
SPLITS = ("train", "val", "test")
FILE_KEYS = ("url", "storage", "md5")
PROCESSOR_SPLITS = ("train", "eval")
PROCESSOR_KINDS = ("vis_processor", "text_processor")
# Settings of LAVIS's models and processors that are words, and name neither a file nor anything to fetch.
WORDS = ("vit_type", "vit_model", "vit_precision", "precision", "vit_layer_norm_epsilon", "prompt")


def named_splits(cfg: DictConfig) -> list[str]:
    """The splits of which a dataset's part of a YAML names the annotation files."""
    files = (cfg.get("build_info") or {}).get("annotations") or {}
    return [split for split in files if split in SPLITS and files[split] is not None]


def default_section(name: str, cfg: DictConfig) -> Any:
    """A dataset's part of the default YAML of its type.

    Raises:
        AuroraError: that holds another number of datasets, or is no YAML, as some of LAVIS's main branch are not.
    """
    path = registry.get_builder_class(name).default_config_path(cfg.get("type", "default"))
    # Some of LAVIS's name another builder there.
    try:
        defaults: Any = OmegaConf.load(path)
    except READING_ERRORS as error:
        said = " ".join(str(error).split())
        raise AuroraError(f"datasets.{name}: its default YAML cannot be read: {said}") from error
    named = defaults.get("datasets") or {}
    if len(named) != 1:
        raise AuroraError(
            f"{path}: the default YAML of {name} must hold one dataset below 'datasets', not {len(named)}"
        )
    [own] = named.values()
    return own


def check_dataset_keys(name: str, cfg: DictConfig) -> None:
    """Refuse unknown keys of a dataset, those of its processors apart; see :func:`check_processor_keys`.

    Besides LAVIS's own, a builder may have keys of its own: those that its default YAML names.

    Args:
        name: registered name of the builder.
        cfg: its part of the YAML, over those defaults.

    Raises:
        AuroraError: names the key and the nearest valid ones.
    """
    prefix = f"datasets.{name}"
    own = default_section(name, cfg)
    own_info = own.get("build_info") or {}
    own_files = own_info.get("annotations") or {}

    section(cfg, prefix, {*DATASET_KEYS, *own})
    info = section(cfg.get("build_info"), f"{prefix}.build_info", {"annotations", *DATA_KINDS, *own_info})
    files_key = f"{prefix}.build_info.annotations"
    files = section(info.get("annotations"), files_key, {*SPLITS, *own_files})
    known = getattr(registry.get_builder_class(name), "FILE_KEYS", FILE_KEYS)
    file_keys = {*known, *(key for part in own_files.values() for key in part)}
    for split, part in files.items():
        places = section(part, f"{files_key}.{split}", file_keys)
        for key in ("storage", "url"):
            value = places.get(key)
            each = value if isinstance(value, ListConfig) else [value]
            if value is not None and not all(isinstance(one, str) for one in each):
                raise AuroraError(f"{files_key}.{split}.{key}: must be one string or a list, not {shown(value)}")
    for kind in DATA_KINDS:
        key = f"{prefix}.build_info.{kind}"
        storage = section(info.get(kind), key, {"storage", *(own_info.get(kind) or ())}).get("storage")
        if storage is not None and not isinstance(storage, str):
            raise AuroraError(f"{key}.storage: must be the path of one folder, not {shown(storage)}")
    for kind in ("vis_processor", "text_processor"):
        for split, part in section(cfg.get(kind), f"{prefix}.{kind}", PROCESSOR_SPLITS).items():
            section(part, f"{prefix}.{kind}.{split}", None)


def check_processor_keys(cfg: DictConfig, key: str) -> None:
    """Refuse unknown keys of a processor: LAVIS's take them as arguments of the same name.

    Args:
        cfg: its part of the YAML, whose ``name`` is registered.
        key: where that stands.

    Raises:
        AuroraError: names the key and the nearest valid ones.
    """
    cls = registry.get_processor_class(cfg.name)
    if hasattr(cls, "CONFIG_CLASS"):
        parse_config(cls.CONFIG_CLASS, cfg, key)
    elif known := processor_keys(cls):  # else it alone knows what it reads
        section(cfg, key, known)


def processor_keys(cls: type[Any]) -> set[str]:
    """The keys that a processor reads; none if it does not say them."""
    if hasattr(cls, "CONFIG_CLASS"):
        return {one.name for one in fields(cls.CONFIG_CLASS)}
    arguments = signature(cls).parameters
    if "cfg" in arguments or any(one.kind is Parameter.VAR_KEYWORD for one in arguments.values()):
        return set()
    return {"name", *arguments}


def section(part: Any, key: str, known: Collection[str] | None) -> Mapping[Any, Any]:
    """A section of which every key is known (None: any is); an empty one if it is not there."""
    if part is None:
        return {}
    if not isinstance(part, DictConfig):
        raise AuroraError(f"{key}: must be a section of keys, not {shown(part)}")
    names: Iterable[Any] = part
    for name in names:
        if known is not None and name not in known:
            raise AuroraError(f"{key}.{name}: unknown key{did_you_mean(str(name), known)}")
    return part


def is_plain(value: Any, words: tuple[str, ...] = ()) -> bool:
    """Whether a value is made of numbers alone, and of text under the keys ``words``."""
    if isinstance(value, Mapping):
        return all(is_word(key, part, words) or is_plain(part, words) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float))


def is_word(key: str, value: Any, words: tuple[str, ...] = WORDS) -> bool:
    return key in words and isinstance(value, str)


def is_portable_processor(part: Mapping[str, Any]) -> bool:
    """Whether a processor's settings may stand in an adapter folder."""
    return is_plain(part, ("name", "prompt", "frames", "crop"))
