"""LAVIS's runner, made to work on CPU, in one process, and with a frozen backbone."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import webdataset as wds
from lavis.common.dist_utils import (
    get_rank,
    get_world_size,
    is_dist_avail_and_initialized,
    is_main_process,
    main_process,
)
from lavis.common.registry import registry
from lavis.datasets.datasets.dataloader_utils import PrefetchLoader
from lavis.runners.runner_base import RunnerBase
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ChainDataset, DataLoader, DistributedSampler

from lavis_aurora.checkpointing import read_checkpoint, write_checkpoint
from lavis_aurora.errors import AuroraError, near_names

TRAINING_METRIC = "agg_metrics"


@registry.register_runner("runner_aurora")
class AuroraRunner(RunnerBase):
    """RunnerBase with what is broken there overridden, and nothing else.

    On top of LAVIS: any device, one process or several, outputs under the current directory, the best epoch
    found whatever the metric's value, checkpoints that hold what is trained and its teacher and nothing else.
    """

    def setup_output_dir(self) -> None:
        """Make ``output_dir``/job_id and write the resolved configuration into it."""
        # LAVIS would put a relative folder into site-packages, and allows one runner in a process.
        for name in ("result_dir", "output_dir"):
            registry.mapping["paths"].pop(name, None)
        self.config.run_cfg.output_dir = str(Path(self.config.run_cfg.output_dir).expanduser().absolute())
        try:
            super().setup_output_dir()
            if is_main_process():
                saved = self.config.config.copy()
                for key in ("rank", "gpu"):  # this process's own
                    saved.run.pop(key, None)
                OmegaConf.save(saved, self.output_dir / "config.yaml", resolve=True)
        except OSError as error:
            folder = self.config.run_cfg.output_dir
            raise AuroraError(f"run.output_dir: cannot write to {folder} ({error}); name another folder") from error
        logging.info("outputs: %s", self.output_dir)

    @property
    def model(self) -> nn.Module:
        """The model on its device, wrapped for several processes."""
        if self._wrapped_model is None:
            self._model = self._model.to(self.device)
            if self.config.run_cfg.get("compile", False) and not self.evaluate_only:
                self._model.compile_layers()
            self._wrapped_model = self._model
            if self.use_distributed and any(p.requires_grad for p in self._model.parameters()):
                # Queues start alike, are filled alike on all processes, and need not be sent each step.
                for buffer in self._model.buffers():
                    dist.broadcast(buffer, src=0)
                self._wrapped_model = DistributedDataParallel(
                    self._model,
                    device_ids=[self.config.run_cfg.gpu] if self.cuda_enabled else None,
                    broadcast_buffers=False,
                )
        return self._wrapped_model

    def unwrap_dist_model(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """LAVIS's AdamW over what is trained."""
        if self._optimizer is None and not any(p.requires_grad for p in self._model.parameters()):
            raise AuroraError("model.tuning: nothing is trained; use evaluate.py, or another model.tuning")
        return super().optimizer

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaling of mixed precision, on a GPU only."""
        if not self.config.run_cfg.amp or not self.cuda_enabled:
            if self.config.run_cfg.amp:
                logging.warning("run.amp: there is no mixed precision on a CPU; computing in single precision")
            return None
        if self._scaler is None:
            self._scaler = torch.amp.GradScaler("cuda")
        return self._scaler

    def create_loaders(self, datasets, num_workers, batch_sizes, is_trains, collate_fns, dataset_ratios=None) -> list:
        """A loader for each dataset. Arguments are LAVIS's.

        Training order depends on seed and epoch alone: the samples of a step are the same for any number of
        processes with the same global batch.
        """
        streamed = (tuple, list, ChainDataset, wds.DataPipeline)
        if any(isinstance(dataset, streamed) for dataset in datasets):
            return super().create_loaders(
                datasets, num_workers, batch_sizes, is_trains, collate_fns, dataset_ratios=dataset_ratios
            )
        loaders = []
        for dataset, batch_size, is_train, collate in zip(datasets, batch_sizes, is_trains, collate_fns):
            sampler = None
            if is_train or (self.use_distributed and self.task.shards_evaluation):
                sampler = DistributedSampler(
                    dataset,
                    num_replicas=get_world_size(),
                    rank=get_rank(),
                    shuffle=is_train,
                    seed=self.config.run_cfg.seed,
                    drop_last=is_train,
                )
            loader = DataLoader(
                dataset,
                batch_size=batch_size,
                num_workers=num_workers,
                pin_memory=self.cuda_enabled,
                sampler=sampler,
                collate_fn=collate,
                drop_last=is_train,
                generator=torch.Generator(),
            )
            if is_train and len(loader) == 0:
                raise AuroraError(
                    f"run.batch_size_train: {batch_size} on {get_world_size()} processes is more than the "
                    f"{len(dataset)} samples of the train split"
                )
            loaders.append(PrefetchLoader(loader) if self.cuda_enabled else loader)
        return loaders

    @property
    def dataloaders(self) -> dict:
        """Loaders by split; the splits that the YAML names must be there."""
        if self._dataloaders is None:
            self._check_splits()
        return super().dataloaders

    def _check_splits(self) -> None:
        """Refuse splits that are not there, or with which LAVIS could not train or rank."""
        run = self.config.run_cfg
        for split in ("val", "test"):
            names = [name for name, splits in self.datasets.items() if split in splits]
            if len(names) > 1:
                raise AuroraError(f"datasets: {' and '.join(names)} have a {split} split each; name one of them")
        known = {split for splits in self.datasets.values() for split in splits}
        for key in ("train_splits", "valid_splits", "test_splits"):
            for split in run[key]:
                if split not in known:
                    raise AuroraError(f"run.{key}: no split {split!r} in the datasets{near_names(split, known)}")
        if not run.evaluate and "train" not in run.train_splits:
            raise AuroraError("run.train_splits: training takes the split train; name it, or use evaluate.py")
        for key in ("valid_splits", "test_splits"):
            if "train" in run[key] and not self.task.shards_evaluation:
                raise AuroraError(f"run.{key}: the split train holds pairs and cannot be ranked; name val or test")

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """LAVIS's, in the order of this epoch."""
        loader = self.train_loader
        if isinstance(loader, (DataLoader, PrefetchLoader)):
            loader.sampler.set_epoch(epoch)
            # Workers draw their own crops and flips on each process.
            loader.generator.manual_seed(self.config.run_cfg.seed * 1_000_003 + epoch * 1009 + get_rank())
        return super().train_epoch(epoch)

    def train(self) -> None:
        """Train, select the best epoch on the first validation split, and test; or only evaluate."""
        start = time.time()
        self.log_config()
        self.best_metric, self.best_epoch = float("-inf"), None
        if self.resume_ckpt_path:
            self._load_checkpoint(self.resume_ckpt_path)
        epoch = self.start_epoch - 1
        for epoch in range(self.start_epoch, 0 if self.evaluate_only else self.max_epoch):
            self.log_stats(split_name="train", stats={"epoch": epoch, **self.train_epoch(epoch)})
            self._validate(epoch)
            self._save_checkpoint(epoch)
        trained = time.time() - start
        if self.evaluate_only and not self.test_splits:
            raise AuroraError("run.test_splits: name a split to evaluate")
        best = bool(self.valid_splits) and not self.evaluate_only
        self.evaluate(cur_epoch="best" if best else max(epoch, 0), skip_reload=self.evaluate_only)
        logging.info(
            "done in %s (training %s); outputs: %s",
            timedelta(seconds=round(time.time() - start)),
            timedelta(seconds=round(trained)),
            self.output_dir,
        )

    def evaluate(self, cur_epoch="best", skip_reload=False) -> dict[str, Any] | None:
        """LAVIS's; the metrics also go to log.txt."""
        logs = super().evaluate(cur_epoch=cur_epoch, skip_reload=skip_reload)
        for split, log in (logs or {}).items():
            if log is not None:
                self.log_stats({"epoch": cur_epoch, **log}, f"final_{split}")
        return logs

    def _validate(self, epoch: int) -> None:
        """Evaluate the validation splits; the first one decides which epoch is best."""
        for i, split in enumerate(self.valid_splits):
            log = self.eval_epoch(split_name=split, cur_epoch=epoch)
            if log is None:
                continue
            if i == 0 and log[TRAINING_METRIC] > self.best_metric:
                self.best_metric, self.best_epoch = log[TRAINING_METRIC], epoch
                self._save_checkpoint(epoch, is_best=True)
            self.log_stats({"epoch": epoch, **log, "best_epoch": self.best_epoch}, split)
        if is_dist_avail_and_initialized():
            dist.barrier()

    @main_process
    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False) -> None:
        """Write checkpoint_best.pth or checkpoint_latest.pth, whole or not at all."""
        path = self.output_dir / f"checkpoint_{'best' if is_best else 'latest'}.pth"
        state = {
            "model": self.unwrap_dist_model(self.model).run_state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "config": self.config.to_dict(),
            "epoch": cur_epoch,
            "best_metric": self.best_metric,
            "best_epoch": self.best_epoch,
        }
        write_checkpoint(state, path)

    def _reload_best_model(self, model: nn.Module) -> nn.Module:
        """Put the best epoch's weights back."""
        path = self.output_dir / "checkpoint_best.pth"
        model.load_run_state(read_checkpoint(path)["model"], str(path))
        return model

    def _load_checkpoint(self, url_or_filename: str) -> None:
        """Take up a run where its checkpoint left it; for evaluation, only its weights."""
        if not os.path.isfile(url_or_filename):
            raise AuroraError(f"run.resume_ckpt_path: no such file: {url_or_filename}")
        state = read_checkpoint(url_or_filename)
        self.unwrap_dist_model(self.model).load_run_state(state["model"], url_or_filename)
        if self.evaluate_only:
            return
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as error:
            raise AuroraError(
                f"run.resume_ckpt_path: {url_or_filename} does not fit the optimizer ({error})"
            ) from error
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.start_epoch = state["epoch"] + 1
        self.best_metric, self.best_epoch = state["best_metric"], state["best_epoch"]
        if self.start_epoch >= self.max_epoch:
            raise AuroraError(f"run.max_epoch: {self.max_epoch} epochs are done; raise it, or test with evaluate.py")
        self._keep_best(Path(url_or_filename), state["epoch"])
        logging.info("resumed after epoch %d from %s", state["epoch"] + 1, url_or_filename)
        logging.warning("the queue of features and the random numbers start anew")

    def _keep_best(self, resumed: Path, epoch: int) -> None:
        """Take over the best epoch so far, which may stay the best; without its file, look for a new one."""
        best = resumed.with_name("checkpoint_best.pth")
        source = best if best.is_file() else resumed if self.best_epoch == epoch else None
        if self.best_epoch is None or source is None:
            self.best_metric, self.best_epoch = float("-inf"), None
        elif is_main_process():
            write_checkpoint(read_checkpoint(source), self.output_dir / best.name)
