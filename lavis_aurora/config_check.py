"""Check a YAML's parts against the dataclasses of :mod:`lavis_aurora.config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lavis_aurora.errors import AuroraError, near_names

Config = TypeVar("Config")


def parse_config(cls: type[Config], cfg: DictConfig | Mapping[str, Any], prefix: str) -> Config:
    """An instance of ``cls`` from a part of a YAML, every key and type checked.

    Args:
        cls: the dataclass that says which keys there are.
        cfg: the part.
        prefix: its name in the YAML, for messages.

    Raises:
        AuroraError: an unknown key (with the nearest valid names), a wrong type, or a value that cannot be used.
    """
    if isinstance(cfg, cls):
        return cfg
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), cfg)
        return OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise AuroraError(_unknown_key(cls, error, prefix)) from None
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        raise AuroraError(f"{prefix}.{error.full_key}: {problem}") from None


def _unknown_key(cls: type, error: ConfigKeyError, prefix: str) -> str:
    *parents, key = str(error.full_key).split(".")
    node = OmegaConf.structured(cls)
    for parent in parents:
        node = node[parent] if node[parent] is not None else {}
    known = list(node) or [f.name for f in fields(cls)]
    return f"{prefix}.{error.full_key}: unknown key{near_names(key, known)}"
