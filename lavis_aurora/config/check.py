"""Check a YAML's parts against the dataclasses of :mod:`lavis_aurora.config`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lavis_aurora.common.errors import AuroraError, near_names

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
    with _named_errors(cls, cfg, prefix):
        return OmegaConf.to_object(check_types(cls, cfg, prefix))


def check_types(cls: type, cfg: DictConfig | Mapping[str, Any], prefix: str) -> DictConfig:
    """``cfg`` over the defaults of ``cls``, every key and type checked, but not yet whether the values can be used.

    Args and errors as of :func:`parse_config`.
    """
    with _named_errors(cls, cfg, prefix):
        return OmegaConf.merge(OmegaConf.structured(cls), cfg)


@contextmanager
def _named_errors(cls: type, cfg: DictConfig | Mapping[str, Any], prefix: str) -> Iterator[None]:
    """One AuroraError with the key's whole name, whatever omegaconf raises."""
    try:
        yield
    except AuroraError as error:
        # A part that checks itself does not know where in the YAML it stands.
        raise error if str(error).startswith(prefix) else AuroraError(f"{prefix}.{error}") from None
    except ConfigKeyError as error:
        raise AuroraError(_unknown_key(cls, error, prefix)) from None
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        key = error.full_key or error.key or _not_a_section(cls, cfg)
        raise AuroraError(f"{prefix}.{key}: {problem}") from None


def _section_class(cls: type, name: str) -> type | None:
    """The dataclass of a section of ``cls``, also of an optional one."""
    hint = get_type_hints(cls).get(name)
    return next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)


def _not_a_section(cls: type, cfg: DictConfig | Mapping[str, Any]) -> str:
    """The first section that is not one; omegaconf does not say which."""
    wrong = (key for key in cfg if _section_class(cls, key) and not isinstance(cfg[key], (Mapping, DictConfig)))
    return next(wrong, "*")


def _unknown_key(cls: type, error: ConfigKeyError, prefix: str) -> str:
    *parents, key = str(error.full_key).split(".")
    for parent in parents:
        cls = _section_class(cls, parent) or cls
    return f"{prefix}.{error.full_key}: unknown key{near_names(key, [f.name for f in fields(cls)])}"
