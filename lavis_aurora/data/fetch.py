"""Bring annotation files to where the YAML says, as LAVIS does; of a path of the user's own, nothing is fetched."""

from __future__ import annotations

import copy
import os
from typing import NamedTuple, Optional

import lavis
import torch.distributed as dist
from lavis.common.dist_utils import is_dist_avail_and_initialized, is_main_process
from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import DictConfig

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import regular
from lavis_aurora.common.paths import data_root, use_weights_folder
from lavis_aurora.config.dataset_keys import default_section

REMEDY = "put it there, or set AURORA_DATA or the key to where it is"


class _DataRoot(str):
    """A cache root of LAVIS's that :func:`use_data_root` has set."""


def use_data_root() -> None:
    """Let LAVIS look for data, and keep weights, where :mod:`lavis_aurora.common.paths` says; called by runs.

    A cache root that a program has given LAVIS by itself stays, unless AURORA_DATA is set.
    """
    # LAVIS has no setter: registering a path a second time is a KeyError.
    paths = registry.mapping["paths"]
    root = paths["cache_root"]
    if os.environ.get("AURORA_DATA") or isinstance(root, _DataRoot) or root == lavis.cache_root:
        paths["cache_root"] = _DataRoot(data_root())
    use_weights_folder()


class AnnotationFile(NamedTuple):
    """One of the files of a split.

    Attributes:
        split: train, val, test, or what a builder reads besides.
        key: of the YAML, that names it.
        path: absolute.
        url: where it is fetched from; None: nowhere.
    """

    split: str
    key: str
    path: str
    url: Optional[str]


def annotation_files(name: str, cfg: DictConfig) -> list[AnnotationFile]:
    """The annotation files of a dataset, split by split."""
    files = []
    for split, info in cfg.build_info.annotations.items():
        part = f"datasets.{name}.build_info.annotations.{split}"
        storage, urls = ([v] if isinstance(v, str) else v for v in (info.get("storage"), info.get("url")))
        if not storage:
            raise AuroraError(f"{part}.storage: missing; name the annotation file")
        if "url" in info and urls is None:
            raise AuroraError(f"{part}.url: null; leave it out, a file that is there is not fetched")
        if urls and len(urls) != len(storage):
            raise AuroraError(f"{part}: {len(urls)} url, but {len(storage)} storage; give one of each for a file")
        files += [
            AnnotationFile(split, f"{part}.storage", _absolute(path), url)
            for path, url in zip(storage, urls or [None] * len(storage))
        ]
    return files


def _absolute(path: str) -> str:
    return os.path.normpath(get_cache_path(path))  # an absolute one stays


def _refuse_foreign(name: str, cfg: DictConfig, files: list[AnnotationFile]) -> None:
    """Refuse that a benchmark's file be fetched to a path that the user has named for another one.

    Who overrides ``storage`` alone has LAVIS's ``url`` still; a misspelt path would be filled with that data.
    """
    default = annotation_files(name, default_section(name, cfg))
    for file in files:
        places = [own.path for own in default if file.url and own.url == file.url]
        if places and file.path not in places and not os.path.isfile(file.path):
            raise AuroraError(
                f"{file.key}: {file.path} is missing; url is still that of {name}'s own {places[0]}, which is not "
                f"fetched to another path; correct the path, or leave storage out to use that file"
            )


def _is_there(file: AnnotationFile) -> bool:
    try:
        regular(file.path)
    except (FileNotFoundError, ValueError):
        return False
    except OSError as error:
        raise AuroraError(f"{file.key}: {file.path}: {error}; {REMEDY}") from error
    return True


def _with_urls(cfg: DictConfig, files: list[AnnotationFile]) -> DictConfig:
    """The configuration without splits that are nowhere to be fetched from, where LAVIS asks each for its url."""
    urls: dict[str, bool] = {}
    for file in files:
        urls[file.split] = file.url is not None
    if all(urls.values()) or not any(urls.values()):
        return cfg
    cfg = copy.deepcopy(cfg)
    for split in (split for split, known in urls.items() if not known):
        del cfg.build_info.annotations[split]
    return cfg


def fetch(builder: BaseDatasetBuilder, name: str, cfg: DictConfig, files: list[AnnotationFile]) -> None:
    """Let the main process fetch what is missing, and the others wait for it.

    Args:
        builder: of the dataset.
        name: its registered name.
        cfg: its part of the YAML.
        files: :func:`annotation_files` of it.

    Raises:
        AuroraError: a missing file cannot be fetched, or must not be.
    """
    _refuse_foreign(name, cfg, files)
    missing = [file for file in files if not _is_there(file)]
    if is_main_process():
        complete = builder.config
        builder.config = _with_urls(complete, files)
        try:
            builder._download_data()  # LAVIS has no public name for it
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            if not missing or isinstance(error, AuroraError):
                raise
            lost = next((file for file in missing if not os.path.isfile(file.path)), missing[-1])
            raise AuroraError(
                f"{lost.key}: {lost.path} is missing and could not be fetched ({error}); {REMEDY}"
            ) from error
        finally:
            builder.config = complete
    if is_dist_avail_and_initialized():
        dist.barrier()
