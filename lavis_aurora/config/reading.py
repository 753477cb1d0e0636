"""YAMLs and ``key=value`` options: what is meant as a string stays as it is written, and no nesting is too deep.

YAML 1.1 takes a folder called 2023_11_26, 010, 12:30, on or 1e3 for a number or a truth value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import IO, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_aurora.config import ModeApproxModelConfig, RetrievalAuroraConfig, RunConfig, VqaAuroraConfig
from lavis_aurora.errors import printable
from lavis_aurora.files import regular

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
