"""Command lines: ``train.py`` and ``evaluate.py``."""

from __future__ import annotations

import argparse
import logging
import os
import random
import secrets
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import numpy as np
import torch
import torch.distributed as dist
from lavis.common.config import Config
from lavis.common.dist_utils import get_rank
from lavis.common.logger import setup_logger
from lavis.common.registry import registry
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import lavis_aurora.register  # noqa: F401
from lavis_aurora.config import RunConfig
from lavis_aurora.config_check import parse_config
from lavis_aurora.errors import AuroraError, near_names

# Long enough for the main process to download or make the data.
INIT_TIMEOUT = timedelta(hours=12)


class AuroraConfig(Config):
    """LAVIS's configuration: a project YAML over the model's and datasets' defaults, then ``--options``."""

    @staticmethod
    def build_model_config(config, **options):
        """Defaults of the model type; also of one given in ``--options``, which LAVIS overlooks."""
        model = config.get("model") or {}
        model_type = (options.get("model") or {}).get("model_type")
        default = getattr(registry.get_model_class(model.get("arch")), "DEFAULT_MODEL_TYPE", None)
        config.model.model_type = model_type or model.get("model_type") or default
        return Config.build_model_config(config)


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
    except (OmegaConfBaseException, YAMLError) as error:
        raise AuroraError(f"{cfg_path}: {' '.join(str(error).split())}") from error


def _load_config(cfg_path: str, options: list[str], evaluate: bool) -> AuroraConfig:
    if not os.path.isfile(cfg_path):
        raise AuroraError("no such file; --cfg-path names a YAML, e.g. projects/aurora/flickr_ret.yaml")
    raw = OmegaConf.load(cfg_path)
    sections = {"model", "datasets", "run"}
    for name in raw:
        if name not in sections | {"preprocess"}:
            raise AuroraError(f"{name}: unknown section{near_names(str(name), sections)}")
    for name in sections:
        if not raw.get(name):
            raise AuroraError(f"{name}: the section is missing")
    _check_registered("model.arch", raw.model.get("arch"), "model_name_mapping")
    for name in raw.datasets:
        _check_registered(f"datasets.{name}", name, "builder_name_mapping")
    cfg = AuroraConfig(argparse.Namespace(cfg_path=cfg_path, options=options))
    for name in cfg.config:
        if name not in sections | {"preprocess"}:
            raise AuroraError(f"--options {name}: unknown section{near_names(str(name), sections)}")
    run = parse_config(RunConfig, cfg.config.run, "run")
    run.evaluate = run.evaluate or evaluate
    _check_registered("run.task", run.task, "task_name_mapping")
    _check_registered("run.runner", run.runner, "runner_name_mapping")
    _check_registered("run.lr_sched", run.lr_sched, "lr_scheduler_name_mapping")
    cfg.config.run = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(run)))
    model_cls = registry.get_model_class(cfg.model_cfg.arch)
    if hasattr(model_cls, "CONFIG_CLASS"):
        parse_config(model_cls.CONFIG_CLASS, cfg.model_cfg, "model")
    _complete_processors(cfg)
    return cfg


def _check_registered(key: str, name: str | None, kind: str) -> None:
    known = registry.mapping[kind]
    if name not in known:
        raise AuroraError(f"{key}: {name!r} is not registered{near_names(str(name), known)}")


def _complete_processors(cfg: AuroraConfig) -> None:
    """Give datasets without processors the model's, and compare picture sizes."""
    preprocess = cfg.config.get("preprocess") or {}
    size = cfg.model_cfg.get("image_size")
    for name, dataset in cfg.datasets_cfg.items():
        for kind in ("vis_processor", "text_processor"):
            if dataset.get(kind) is None and preprocess.get(kind) is not None:
                dataset[kind] = preprocess[kind]
        for split, processor in (dataset.get("vis_processor") or {}).items():
            own = processor.get("image_size")
            if size is not None and own is not None and own != size:
                raise AuroraError(
                    f"datasets.{name}.vis_processor.{split}.image_size: {own} is not model.image_size, {size}"
                )


def _set_up_processes(run) -> None:
    """Choose the device and join the other processes, if there are any."""
    if run.device == "auto":
        run.device = "cuda" if torch.cuda.is_available() else "cpu"
    if run.device == "cuda" and not torch.cuda.is_available():
        raise AuroraError("run.device: cuda, but torch sees no GPU; use auto or cpu")
    run.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not run.distributed:
        return
    run.rank, run.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run.gpu = int(os.environ.get("LOCAL_RANK", 0))
    backend = "gloo"
    if run.device == "cuda":
        backend = "nccl"
        torch.cuda.set_device(run.gpu)
    dist.init_process_group(backend, init_method=run.dist_url, timeout=INIT_TIMEOUT)


def _set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _job_id() -> str:
    """A name for this run that no other run has, the same on all processes."""
    name = [f"{datetime.now():%Y%m%d_%H%M%S}_{secrets.token_hex(3)}"]
    if dist.is_initialized():
        dist.broadcast_object_list(name, src=0)
    return name[0]


def run_config(cfg: AuroraConfig) -> None:
    """Build task, data, model and runner as configured, and run."""
    run = cfg.run_cfg
    _set_up_processes(run)
    try:
        setup_logger()
        job_id = _job_id()
        _set_seeds(run.seed + get_rank())
        task = registry.get_task_class(run.task).setup_task(cfg=cfg)
        datasets = task.build_datasets(cfg)
        model = task.build_model(cfg)
        runner_cls = registry.get_runner_class(run.runner)
        runner = runner_cls(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
        runner.train()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _main(argv: Sequence[str] | None, description: str, evaluate: bool) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cfg-path", required=True, help="project YAML, e.g. projects/aurora/flickr_ret.yaml")
    parser.add_argument(
        "--options", nargs="+", metavar="KEY=VALUE", help="override keys of the YAML, e.g. run.max_epoch=2"
    )
    args = parser.parse_args(argv)
    _exit_on_error(lambda: run_config(load_config(args.cfg_path, args.options, evaluate)))


def _exit_on_error(action: Callable[[], None]) -> None:
    """Run; an AuroraError becomes one line on stderr and exit code 1."""
    try:
        action()
    except AuroraError as error:
        # From a data loader's worker it comes with that process's traceback in front.
        line = str(error).rpartition("AuroraError: ")[2].strip()
        rank = f" [process {os.environ['RANK']}]" if "RANK" in os.environ else ""
        logging.debug("", exc_info=True)
        print(f"error{rank}: {line}", file=sys.stderr, flush=True)
        sys.exit(1)


def train(argv: Sequence[str] | None = None) -> None:
    """``python train.py --cfg-path YAML [--options KEY=VALUE ...]``."""
    _main(argv, "Train a model as a project YAML says, then test its best epoch.", evaluate=False)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """``python evaluate.py --cfg-path YAML [--options KEY=VALUE ...]``."""
    _main(argv, "Evaluate a model on the test splits of a project YAML.", evaluate=True)


def main(argv: Sequence[str] | None = None) -> None:
    """``lavis-aurora train|evaluate ...``."""
    commands = {"train": train, "evaluate": evaluate}
    parser = argparse.ArgumentParser(prog="lavis-aurora", description="Aurora for LAVIS.")
    parser.add_argument("command", choices=commands)
    args, rest = parser.parse_known_args(argv)
    commands[args.command](rest)
