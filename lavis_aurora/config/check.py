"""Check a YAML's parts against the dataclasses of :mod:`lavis_aurora.config`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lavis_aurora.common.errors import AuroraError, near_names, printable, shown
from lavis_aurora.common.files import regular
from lavis_aurora.config.models import ModeApproxModelConfig, RetrievalAuroraConfig, VqaAuroraConfig
from lavis_aurora.config.run import RunConfig

# What the functions below raise.
READING_ERRORS = (OSError, UnicodeError, yaml.YAMLError, OmegaConfBaseException, RecursionError)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# libyaml's composer calls itself for each level, until the process has no stack left.
MOST_NESTED = 30
TAGS = {*yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:value", "tag:yaml.org,2002:merge"}
NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


def _text_keys(cls: type) -> Iterator[str]:
    """Names of the keys of a section, and of those in it, that hold a string or a list of them."""
    for name, hint in get_type_hints(cls).items():
        kinds = (hint, *get_args(hint))
        section = next((kind for kind in kinds if is_dataclass(kind)), None)
        if section is not None:
            yield from _text_keys(section)
        elif str in kinds:
            yield name


TEXT_KEYS = {
    *(key for cls in (RunConfig, RetrievalAuroraConfig, VqaAuroraConfig) for key in _text_keys(cls)),
    *(*_text_keys(ModeApproxModelConfig), "targets", "modules_to_save"),
    # LAVIS's, of datasets and processors.
    *("type", "data_type", "storage", "url", "md5", "name", "prompt"),
}


def read_yaml(path: str | Path) -> DictConfig | ListConfig:
    """A YAML; what :data:`READING_ERRORS` holds is raised where there is none."""
    with regular(path).open(encoding="utf-8") as file:
        _check_nesting(file)
    # This one's errors name the lines of the file.
    read = OmegaConf.load(path)
    written = _as_written(Path(path).read_text(encoding="utf-8"), "")
    return OmegaConf.create(written) if written else read


def read_options(options: Sequence[str]) -> DictConfig:
    """Options ``key=value``, the value in YAML; raises what :func:`read_yaml` does."""
    kept = []
    for option in options:
        key, _, value = option.partition("=")
        _check_nesting(value)
        kept.append(f"{key}={_as_written(value, key.rpartition('.')[2].partition('[')[0])}")
    return OmegaConf.from_dotlist(kept)


def _check_nesting(source: str | IO[str]) -> None:
    depth = 0
    for event in yaml.parse(source, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MOST_NESTED:
            raise yaml.YAMLError(f"nested more than {MOST_NESTED} deep")


def _as_written(source: str, key: str) -> str:
    """A YAML whose strings are quoted; empty where it holds nothing.

    Args:
        source: the YAML.
        key: what it is the value of.
    """
    node = yaml.compose(source, Loader=LOADER)
    if node is None:
        return ""
    _quote(node, key)
    return yaml.serialize(node, allow_unicode=True)


def _quote(node: yaml.Node, key: str) -> None:
    if node.tag not in TAGS:
        raise yaml.YAMLError(f"{key}: unknown tag {printable(node.tag)}; put a value that begins with ! in quotes")
    if isinstance(node, yaml.ScalarNode):
        if key in TEXT_KEYS and not node.style and node.tag != NULL:
            node.tag, node.style = TEXT, '"'
        return
    inside: Iterable = ((key, child) for child in node.value)
    if isinstance(node, yaml.MappingNode):
        inside = ((name.value, child) for name, child in node.value)
    for name, child in inside:
        _quote(child, name)


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
    check_kinds(OmegaConf.structured(cls), cfg, f"{prefix}.")
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


def check_kinds(part: DictConfig, over: DictConfig | Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a list where there is a section of keys, or the reverse, before they are merged.

    Args:
        part: the defaults.
        over: what is merged over them.
        prefix: of the keys, for messages.

    Raises:
        AuroraError: names the first such key.
    """
    for key in over:
        own, new = (_node(config, key) for config in (part, over))
        if isinstance(own, DictConfig) and isinstance(new, ListConfig):
            raise AuroraError(f"{prefix}{key}: must be a section of keys, not {shown(new)}")
        if isinstance(own, ListConfig) and isinstance(new, DictConfig):
            raise AuroraError(f"{prefix}{key}: must be a list, not {shown(new)}")
        if isinstance(own, DictConfig) and isinstance(new, DictConfig):
            check_kinds(own, new, f"{prefix}{key}.")


def _node(config: DictConfig | Mapping[str, Any], key: str) -> Any:
    """A value that is there and no interpolation, which may lead nowhere."""
    if not isinstance(config, DictConfig):
        return OmegaConf.create({"x": config[key]}).x
    known = key in config and not OmegaConf.is_interpolation(config, key)
    return config[key] if known and not OmegaConf.is_missing(config, key) else None


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
