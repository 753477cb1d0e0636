"""A project YAML: read with the defaults that it builds on, every part checked before anything is built."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml
from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_aurora.adapters.config import of_adapter, read_adapter_config
from lavis_aurora.common.errors import AuroraError, abbreviated, did_you_mean, shown
from lavis_aurora.common.paths import relocated
from lavis_aurora.common.summary import SUMMARY
from lavis_aurora.config.adapter_settings import adapter_settings, check_towers, type_settings
from lavis_aurora.config.check import (
    READING_ERRORS,
    check_kinds,
    map_text,
    parse_config,
    parse_run,
    read_options,
    read_yaml,
)
from lavis_aurora.config.dataset_keys import (
    PROCESSOR_SPLITS,
    check_dataset_keys,
    check_processor_keys,
    default_section,
    processor_keys,
    section,
)
from lavis_aurora.config.models import TUNINGS
from lavis_aurora.config.run import RunConfig
from lavis_aurora.data.checks import check_dataset_config

LOG = logging.getLogger(__name__)
SECTIONS = ("datasets", "model", "run")


def _warn(message: str, *values: object) -> None:
    """Warn once for all processes."""
    # What reads a configuration has loggers of its own: functions of logging would set up a log before LAVIS does.
    if os.environ.get("RANK", "0") == "0":
        LOG.warning(message, *values)


class AuroraConfig(Config):
    """LAVIS's configuration: a project YAML and ``--options`` over the defaults of the types that they name."""

    def __init__(self, user: DictConfig, args: argparse.Namespace) -> None:
        # LAVIS's own reads types and preprocess of --options or of the YAML, but not of both.
        self.args = args
        registry.register("configuration", self)
        self.config = OmegaConf.merge(
            self.build_runner_config(user), self.build_model_config(user), self.build_dataset_config(user), user
        )

    @staticmethod
    def build_model_config(config: DictConfig, **kwargs: Any) -> Any:
        """LAVIS's; a model around another one takes over the defaults and processors of that."""
        completed = Config.build_model_config(config, **kwargs)
        complete = getattr(registry.get_model_class(completed.model.arch), "with_base_defaults", None)
        return completed if complete is None else complete(completed)


def load_config(cfg_path: str, options: Sequence[str] | None = None, evaluate: bool = False) -> AuroraConfig:
    """Read and check a project YAML.

    Args:
        cfg_path: the YAML.
        options: ``key=value`` or alternating keys and values that override it.
        evaluate: skip training.

    Raises:
        AuroraError: names the file, the key and the remedy.
    """
    try:
        return _load_config(cfg_path, list(options or []), evaluate)
    except AuroraError as error:
        raise AuroraError(f"{cfg_path}: {error}") from error
    except READING_ERRORS as error:
        raise AuroraError(f"{cfg_path}: {' '.join(str(error).split())}") from error


def load_run_config(run: str | Path, options: Sequence[str] | None = None) -> AuroraConfig:
    """That of a run's folder, whatever has become of the checkpoint that the run went on from."""
    return load_config(str(Path(run) / "config.yaml"), ["run.resume_ckpt_path=null", *(options or [])])


def _load_config(cfg_path: str, options: list[str], evaluate: bool) -> AuroraConfig:
    if not os.path.exists(cfg_path):
        raise AuroraError("no such file; --cfg-path names a YAML, e.g. projects/aurora/flickr_ret.yaml")
    user: Any = OmegaConf.create(_found_here(OmegaConf.to_container(merge_options(cfg_path, options))))
    for name in SECTIONS:
        if not user.get(name):
            raise AuroraError(f"{name}: the section is missing")
    if "output_dir" not in (_given(options).get("run") or {}):
        _follow_moved_run(user.run, Path(cfg_path).absolute().parent)
    _check_types(user)
    _take_adapter_settings(user)
    cfg = AuroraConfig(user, argparse.Namespace(cfg_path=cfg_path, options=options))
    if "task" in cfg.config.run:
        _check_registered("run.task", cfg.config.run.task, "task_name_mapping")
    run = parse_run(cfg.config.run)
    run.evaluate = run.evaluate or evaluate
    if run.resume_ckpt_path and not os.path.isfile(run.resume_ckpt_path):
        raise AuroraError(f"run.resume_ckpt_path: no such file: {run.resume_ckpt_path}; name it where it is now")
    _check_registered("run.runner", run.runner, "runner_name_mapping")
    _check_registered("run.lr_sched", run.lr_sched, "lr_scheduler_name_mapping")
    cfg.config.run = run  # a copy
    model_cls = registry.get_model_class(cfg.model_cfg.arch)
    settings = None
    if hasattr(model_cls, "CONFIG_CLASS"):
        settings = parse_config(model_cls.CONFIG_CLASS, cfg.model_cfg, "model")
    if run.rank is not None and not run.evaluate:
        _check_nested(settings)
    for name, dataset in cfg.datasets_cfg.items():
        # LAVIS's defaults of some name another.
        _check_registered(f"datasets.{name}", name, "builder_name_mapping")
        check_dataset_keys(name, dataset)
    _complete_processors(cfg, user)
    _note_learning_rate(cfg)
    return cfg


def _follow_moved_run(run: DictConfig, folder: Path) -> None:
    """Let what starts from a run's ``config.yaml`` write beside that run, if the folder that it names is gone."""
    output = run.get("output_dir")
    if isinstance(output, str) and (folder / SUMMARY).is_file() and not os.path.isdir(output):
        run.output_dir = str(folder.parent)
        _warn("run.output_dir: %s is not there any more; outputs go to %s", output, folder.parent)


def merge_options(cfg_path: str, options: Sequence[str]) -> DictConfig:
    """A project YAML with options in it, as they are written: without defaults, and checked in their kinds alone."""
    written = _sections(read_yaml(cfg_path), "")
    given = _given(options)
    check_kinds(written, given)
    merged = cast(DictConfig, OmegaConf.merge(written, given))
    _clear(merged, cast("dict[str, Any]", OmegaConf.to_container(given)))  # as they are written: nothing is resolved
    return merged


def _given(options: Sequence[str]) -> DictConfig:
    """What options say, as it is written."""
    return _sections(read_options(_dot_list(list(options))), "--options ")


def _check_nested(settings: Any) -> None:
    """Refuse to look for the rank of what has no order of components."""
    tuning = getattr(settings, "tuning", "aurora")  # of mode_approx, which has no other
    if settings is None or tuning != "aurora" or not settings.mode_approx.nested:
        raise AuroraError(
            "run.rank: auto needs an adapter of which the first components matter most; train it with model.tuning: "
            "aurora and model.mode_approx.nested: true, or leave it out"
        )


def _clear(merged: DictConfig, given: Mapping[str, Any]) -> None:
    """Let a mapping that is given empty, as ``run.lr_scales={}``, be empty, which a merge leaves as it was."""
    for key, value in given.items():
        if isinstance(value, dict) and value:
            _clear(merged[key], value)
        elif isinstance(value, dict):
            merged[key] = {}


def _found_here(part: Any) -> Any:
    """The part with the home folder for ``~`` in front of paths, which no shell replaces in a YAML or behind a =; and
    with this package's file for one of a package that was elsewhere, as older versions wrote such paths."""
    moved: list[str] = []

    def here(text: str) -> str:
        path = os.path.expanduser(text)
        found = relocated(path)
        moved.extend([path] if found != path else [])
        return found

    found = map_text(part, here)
    if moved:
        _warn("not there any more, this package's own files are taken: %s", abbreviated(moved))
    return found


def _dot_list(options: list[str]) -> list[str]:
    """key=value of either notation."""
    if options and "=" not in options[0]:
        if len(options) % 2:
            raise AuroraError(f"--options {options[-1]}: the value is missing")
        return [f"{key}={value}" for key, value in zip(options[0::2], options[1::2])]
    for option in options:
        if "=" not in option:
            raise AuroraError(f"--options {option}: not key=value")
    return options


def _sections(part: DictConfig | ListConfig, source: str) -> DictConfig:
    """The part, if it is made of known sections."""
    if not isinstance(part, DictConfig):
        raise AuroraError(f"not a mapping with the sections {', '.join(SECTIONS)}")
    names: Iterable[Any] = part
    for name in names:
        if name not in (*SECTIONS, "preprocess"):
            raise AuroraError(f"{source}{name}: unknown section{did_you_mean(str(name), SECTIONS)}")
        if part.get(name) is not None and not isinstance(part[name], DictConfig):
            raise AuroraError(f"{source}{name}: must be a section of keys, not {shown(part[name])}")
    return part


def _check_types(user: DictConfig) -> None:
    """The model, its type, the datasets and their types; those left out are the defaults."""
    _check_registered("model.arch", user.model.get("arch"), "model_name_mapping")
    model_cls = registry.get_model_class(user.model.arch)
    model_type = user.model.get("model_type") or getattr(model_cls, "DEFAULT_MODEL_TYPE", None)
    around = _around(user.model) if isinstance(model_type, str) else ""
    _check_type("model.model_type", model_type, model_cls.PRETRAINED_MODEL_CONFIG_DICT, around)
    user.model.model_type = model_type
    defaults: Any = OmegaConf.load(model_cls.default_config_path(model_type))
    check_kinds(defaults, user)
    for name in user.datasets:
        _check_registered(f"datasets.{name}", name, "builder_name_mapping")
        if user.datasets[name] is None:
            user.datasets[name] = {}
        if not isinstance(user.datasets[name], DictConfig):
            raise AuroraError(f"datasets.{name}: must be a section of keys, not {shown(user.datasets[name])}")
        known, kind = registry.get_builder_class(name).DATASET_CONFIG_DICT, user.datasets[name].get("type", "default")
        _check_type(f"datasets.{name}.type", kind, known)
        check_kinds(default_section(name, user.datasets[name]), user.datasets[name], f"datasets.{name}.")


def _take_adapter_settings(user: DictConfig) -> None:
    """With ``model.adapter``, its settings stand in for those that the YAML leaves out."""
    folder = user.model.get("adapter")
    keys = getattr(registry.get_model_class(user.model.arch), "ADAPTER_KEYS", ())
    if folder is None or not keys:
        return
    try:
        described = read_adapter_config(str(folder)).model
        with of_adapter(folder):
            settings = adapter_settings(registry.get_model_class(user.model.arch), described)
            check_towers(user.model.arch, user.model.model_type, described, user.model, "model.model_type")
    except AuroraError as error:
        raise AuroraError(f"model.adapter: {error}") from error
    user.model = OmegaConf.merge({key: settings[key] for key in keys if key in settings}, user.model)


def _check_registered(key: str, name: Any, kind: str) -> None:
    known = registry.mapping[kind]
    if not isinstance(name, str) or name not in known:
        raise AuroraError(f"{key}: {shown(name)} is not registered{did_you_mean(str(name), known)}")


def _check_type(key: str, name: Any, known: Mapping[str, str], remedy: str = "") -> None:
    if not isinstance(name, str) or name not in known:
        raise AuroraError(f"{key}: unknown type {shown(name)}{remedy or did_you_mean(str(name), known)}")


def _around(model: DictConfig) -> str:
    """The two lines that put mode_approx around the model whose type a YAML still names, as text; empty for none."""
    models, model_type = registry.mapping["model_name_mapping"], model.get("model_type")
    written: Any = OmegaConf.to_container(model)
    plain, where = str(model.arch).removesuffix("_aurora"), "below model"
    if plain == "mode_approx":
        others = sorted(name for name, cls in models.items() if model_type in cls.PRETRAINED_MODEL_CONFIG_DICT)
        own = {one.name for one in fields(models[plain].CONFIG_CLASS)} - {"model_type"}
        inside = {key: value for key, value in written.items() if key not in own} if others else {}
        plain, why = "ARCH", "mode_approx goes around another model"
        where += f", ARCH being that one's name: {' or '.join(others)}"
    else:
        settings = type_settings(models[plain], model_type) if plain != model.arch else {}
        keys = {"model_type", *settings} - {"arch"} if settings else set()
        inside = {key: value for key, value in written.items() if key in keys}
        known = ", ".join(models[model.arch].PRETRAINED_MODEL_CONFIG_DICT)
        why = f"known: {known}; to tune LAVIS's {plain} of that type"
    if not inside:
        return ""
    base = yaml.safe_dump({"arch": plain, **inside}, default_flow_style=True, sort_keys=False, width=10**6).strip()
    return f"; {why}: write 'arch: mode_approx' and 'base: {base}' {where}"


def _named_processors(given: Mapping[str, Any], default: Mapping[str, Any]) -> Any:
    """A dataset's processors by split; where it names none, the model's with the keys that it gives."""
    unnamed = {split: part for split, part in default.items() if part and not (given.get(split) or {}).get("name")}
    return OmegaConf.merge(unnamed, {split: part for split, part in given.items() if part is not None})


def _complete_processors(cfg: AuroraConfig, user: Any) -> None:
    """Give datasets without processors the model's, check them; those without a picture size get the model's."""
    config: Any = cfg.config
    preprocess = section(config.get("preprocess"), "preprocess", None)
    for name, dataset in cfg.datasets_cfg.items():
        for kind in ("vis_processor", "text_processor"):
            default = section(preprocess.get(kind), f"preprocess.{kind}", PROCESSOR_SPLITS)
            for split, part in default.items():
                section(part, f"preprocess.{kind}.{split}", None)
            dataset[kind] = _named_processors(dataset.get(kind) or {}, default)
        check_dataset_config(name, dataset)
        for kind in ("vis_processor", "text_processor"):
            for split, processor in dataset[kind].items():
                where = f"datasets.{name}.{kind}.{split}"
                _check_registered(f"{where}.name", processor.get("name"), "processor_name_mapping")
                check_processor_keys(processor, where)
        for split, processor in dataset.vis_processor.items():
            places = (f"datasets.{name}.vis_processor.{split}", f"preprocess.vis_processor.{split}")
            given = (key for key in places if OmegaConf.select(user, f"{key}.image_size") is not None)
            _fit_picture_size(processor, cfg.model_cfg, next(given, None))


def _fit_picture_size(processor: DictConfig, model: DictConfig, given: str | None) -> None:
    """Let a processor make pictures of the model's size; refuse one to which the YAML gives another, at ``given``."""
    inside = "base" in model
    size = (model.base if inside else model).get("image_size")
    if size is None or "image_size" not in processor_keys(registry.get_processor_class(processor.name)):
        return
    if given is None or processor.get("image_size") is None:
        processor.image_size = size
    elif processor.image_size != size:
        raise AuroraError(
            f"{given}.image_size: {processor.image_size} is not {'model.base' if inside else 'model'}.image_size, "
            f"{size}; leave it out to follow that, or give both"
        )


def _note_learning_rate(cfg: AuroraConfig) -> None:
    """Say it where adapters are to learn at a rate for whole models, as in LAVIS's YAMLs; once, of all processes."""
    run, model, usual = cfg.run_cfg, cfg.model_cfg, RunConfig.init_lr
    own = hasattr(registry.get_model_class(model.arch), "CONFIG_CLASS")
    adapters = own and TUNINGS[model.get("tuning", "aurora")].adapters
    if adapters and not run.evaluate and 2 * run.init_lr <= usual:
        said = "run.init_lr: %g is a rate for training a whole model; adapters are trained at %g (run.init_lr=%g)"
        _warn(said, run.init_lr, usual, usual)
