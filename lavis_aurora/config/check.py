"""Check a YAML's parts against the dataclasses of :mod:`lavis_aurora.config`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, TypeVar, get_args

import omegaconf
import yaml
from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_aurora.common.errors import AuroraError, did_you_mean, printable, shown
from lavis_aurora.common.files import regular
from lavis_aurora.common.parsing import check_section, parse, section_class, type_hints
from lavis_aurora.common.paths import package_file
from lavis_aurora.config.models import ModeApproxModelConfig, RetrievalAuroraConfig, VqaAuroraConfig
from lavis_aurora.config.run import RUN_KEYS, RunConfig

LOG = logging.getLogger(__name__)
# What the functions below raise.
READING_ERRORS = (OSError, UnicodeError, yaml.YAMLError, OmegaConfBaseException, RecursionError)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# libyaml's composer calls itself for each level, until the process has no stack left.
MAX_NESTING = 30
TAGS = {*yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:value", "tag:yaml.org,2002:merge"}
NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


def _register_resolver() -> None:
    """Let YAMLs name files of this package, wherever it is installed, by ``${aurora.package:NAME}``."""
    # omegaconf 2.4, which needs Python 3.10, renamed the function.
    modern = tuple(map(int, omegaconf.__version__.split(".")[:2])) >= (2, 4)
    register = OmegaConf.register_resolver if modern else OmegaConf.register_new_resolver
    register("aurora.package", package_file, replace=True)


_register_resolver()


def _text_keys(cls: type) -> Iterator[str]:
    """Names of the keys of a section, and of those in it, that hold a string or a list of them."""
    for name, hint in type_hints(cls).items():
        section = section_class(hint)
        if section is not None:
            yield from _text_keys(section)
        elif str in (hint, *get_args(hint)):
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
        if depth > MAX_NESTING:
            raise yaml.YAMLError(f"nested more than {MAX_NESTING} deep")


def _as_written(source: str, key: str) -> str:
    """A YAML whose strings are quoted; empty where it holds nothing.

    Args:
        source: the YAML.
        key: what it is the value of.
    """
    node = yaml.compose(source, Loader=LOADER)
    if node is None:
        return ""
    _quote(node, key, TEXT_KEYS.union(*map(_text_keys, RUN_KEYS.values())))
    return str(yaml.serialize(node, allow_unicode=True))


def _quote(node: yaml.Node, key: str, text_keys: set[str]) -> None:
    if node.tag not in TAGS:
        raise yaml.YAMLError(f"{key}: unknown tag {printable(node.tag)}; put a value that begins with ! in quotes")
    if isinstance(node, yaml.ScalarNode):
        if key in text_keys and not node.style and node.tag != NULL:
            node.tag, node.style = TEXT, '"'
        return
    inside: Iterable[tuple[str, yaml.Node]] = ((key, child) for child in node.value)
    if isinstance(node, yaml.MappingNode):
        inside = ((name.value, child) for name, child in node.value)
    for name, child in inside:
        _quote(child, name, text_keys)


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
    plain = _plain(cfg, prefix)
    try:
        return parse(cls, plain, prefix, convert=True)
    except AuroraError as error:
        # A part that checks itself does not know where in the YAML it stands.
        raise error if str(error).startswith(prefix) else AuroraError(f"{prefix}.{error}") from None


def check_types(cls: type, cfg: DictConfig | Mapping[str, Any], prefix: str) -> None:
    """Check every key and type of a part of a YAML, but not yet whether the values can be used.

    Args and errors as of :func:`parse_config`.
    """
    check_section(cls, _plain(cfg, prefix), prefix, convert=True)


def _plain(cfg: DictConfig | Mapping[str, Any], prefix: str) -> Any:
    """Plain values, what they refer to in their place."""
    try:
        # A copy would not know what its parts refer to.
        part = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
        return OmegaConf.to_container(part, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key or "*")
        named = key if key.startswith(prefix) else f"{prefix}.{key}"
        raise AuroraError(f"{named}: {str(error).splitlines()[0]}") from None


def run_keys(task: str) -> list[type]:
    """Dataclasses of the keys below ``run``: the runner's, and the task's if it, or one it derives from, has any."""
    known = {cls: RUN_KEYS[name] for name, cls in registry.mapping["task_name_mapping"].items() if name in RUN_KEYS}
    bases = getattr(registry.get_task_class(task), "__mro__", ())
    own = RUN_KEYS.get(task) or next((known[base] for base in bases if base in known), None)
    return [RunConfig, *([own] if own else [])]


def parse_run(cfg: DictConfig | Mapping[str, Any]) -> DictConfig:
    """``run:`` of a YAML, complete: the keys of the runner and those of its task, every key and type checked.

    Keys of other tasks are checked too, left out, and named in the log unless they have their default.

    Raises:
        AuroraError: as of :func:`parse_config`.
    """
    given = _plain(cfg, "run")
    task = given.get("task", RunConfig.task)
    own = run_keys(task)
    classes = list(dict.fromkeys([*own, *RUN_KEYS.values()]))
    owners = {one.name: cls for cls in reversed(classes) for one in fields(cls)}
    for key in given:
        if key not in owners:
            raise AuroraError(f"run.{key}: unknown key{did_you_mean(key, owners)}")
    run: dict[str, Any] = {}
    for cls in classes:
        part = {key: value for key, value in given.items() if owners[key] is cls}
        keys: Any = parse_config(cls, part, "run")
        values = {one.name: getattr(keys, one.name) for one in fields(cls)}
        if cls in own:
            run.update(values)
            continue
        idle = [key for key in part if values[key] != getattr(cls(), key)]
        if idle:
            LOG.warning("run.task: %s does not read run.%s, a key of other tasks", task, ", run.".join(idle))
    return OmegaConf.create(run)


def resolved(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Plain values, what refers to others replaced by them."""
    return dict(OmegaConf.to_container(OmegaConf.create(config), resolve=True))  # type: ignore[arg-type]


def map_text(part: Any, change: Callable[[str], str]) -> Any:
    """A plain part of a YAML with ``change`` of each string in place of it; keys stay."""
    if isinstance(part, dict):
        return {key: map_text(value, change) for key, value in part.items()}
    if isinstance(part, list):
        return [map_text(value, change) for value in part]
    return change(part) if isinstance(part, str) else part


def check_kinds(part: DictConfig, over: DictConfig | Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a list where there is a section of keys, or the reverse, before they are merged.

    Args:
        part: the defaults.
        over: what is merged over them.
        prefix: of the keys, for messages.

    Raises:
        AuroraError: names the first such key.
    """
    keys: Iterable[Any] = over
    for key in keys:
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
