"""LAVIS's runner, made to work on CPU, in one process, and with a frozen backbone."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import webdataset as wds
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.datasets.datasets.dataloader_utils import PrefetchLoader
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ChainDataset

from lavis_aurora.adapters.merging import merged_where_exact
from lavis_aurora.common.errors import AuroraError, Diverged
from lavis_aurora.common.files import appended, write_text
from lavis_aurora.common.paths import package_reference
from lavis_aurora.config.check import map_text, resolved
from lavis_aurora.evaluation.encode import broadcast
from lavis_aurora.training import order
from lavis_aurora.training.checkpoints import BEST, LATEST
from lavis_aurora.training.features import use_features
from lavis_aurora.training.guards import FiniteGuard, Stopped, StopRequest
from lavis_aurora.training.loggers import Loggers
from lavis_aurora.training.loop import (
    TrainableModel,
    TrainingState,
    check_trainable,
    epoch_stats,
    in_several_processes,
    train_steps,
)
from lavis_aurora.training.nested import AUTO, choose_rank, nested_steps
from lavis_aurora.training.outputs import RunSummary, forget_epoch, save_run_adapter
from lavis_aurora.training.rates import OptimizedRunner
from lavis_aurora.training.resuming import RunCheckpoints, load_weights

TRAINING_METRIC = "agg_metrics"
LOG = "log.txt"


@registry.register_runner("runner_aurora")
class AuroraRunner(OptimizedRunner):
    """RunnerBase with what is broken there overridden, and nothing else.

    On top of LAVIS: any device, one process or several, outputs under the current directory, the best epoch
    found whatever the metric's value, checkpoints that hold what is trained and its teacher and nothing else.
    """

    _model: nn.Module
    _wrapped_model: nn.Module | None
    state: Any = None  # a TrainingState, once it trains

    def setup_output_dir(self) -> None:
        """Make ``output_dir``/job_id and write the resolved configuration into it."""
        # LAVIS would put a relative folder into site-packages, and allows one runner in a process.
        for name in ("result_dir", "output_dir"):
            registry.mapping["paths"].pop(name, None)
        self.config.run_cfg.output_dir = str(Path(self.config.run_cfg.output_dir).expanduser().absolute())
        try:
            super().setup_output_dir()
            if is_main_process():
                saved = resolved(self.config.config)
                saved["run"].pop("gpu", None)  # this process's own
                write_text(self.output_dir / "config.yaml", OmegaConf.to_yaml(map_text(saved, package_reference)))
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
                cast(TrainableModel, self._model).compile_layers()
            self._wrapped_model = self._model
            if self.use_distributed and any(p.requires_grad for p in self._model.parameters()):
                self._wrapped_model = in_several_processes(
                    self._model, self.config.run_cfg.gpu if self.cuda_enabled else None
                )
        return self._wrapped_model

    def unwrap_dist_model(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    def create_loaders(
        self,
        datasets: Sequence[Any],
        num_workers: int,
        batch_sizes: Sequence[int],
        is_trains: Sequence[bool],
        collate_fns: Sequence[Any],
        dataset_ratios: Any = None,
    ) -> list[Any]:
        """A loader for each dataset. Arguments are LAVIS's.

        Training order, random crops and frames depend on seed and epoch alone: a step has the same samples for any
        number of processes with the same global batch, and wherever the run is resumed.
        """
        streamed = (tuple, list, ChainDataset, wds.DataPipeline)
        if any(isinstance(dataset, streamed) for dataset in datasets):
            streams: list[Any] = super().create_loaders(
                datasets, num_workers, batch_sizes, is_trains, collate_fns, dataset_ratios=dataset_ratios
            )
            return streams
        share = self.task.shard_evaluation and self.use_distributed
        loaders = [
            order.build_loader(
                dataset,
                batch_size,
                collate,
                seed=self.config.run_cfg.seed,
                num_workers=num_workers,
                is_train=is_train and not self.evaluate_only,
                shared=share or (is_train and not self.evaluate_only),
                pin_memory=self.cuda_enabled,
            )
            for dataset, batch_size, is_train, collate in zip(datasets, batch_sizes, is_trains, collate_fns)
        ]
        return [PrefetchLoader(loader) for loader in loaders] if self.cuda_enabled else loaders

    @property
    def dataloaders(self) -> dict[str, Any]:
        """Loaders by split; the splits that the YAML names must be there."""
        if self._dataloaders is None:
            order.check_splits(self.config, self.datasets, self.task.shard_evaluation)
        return cast("dict[str, Any]", super().dataloaders)

    @property
    def valid_splits(self) -> list[str]:
        """Those that the YAML names, which may be none; LAVIS's says that there are none each time it is asked."""
        return list(self.config.run_cfg.get("valid_splits") or [])

    def train(self) -> None:
        """Train, select the best epoch on the first validation split, and test; or only evaluate."""
        self.summary, self.loggers = RunSummary(self.output_dir, self.config, self._model, self.datasets), Loggers()
        with StopRequest() as self.stop:
            try:
                with order.loader_errors():
                    self._train()
            except BaseException as error:
                self.summary.write_stopped(error)
                self.loggers.close(failed=True)
                raise
            self.loggers.close(failed=False)

    def log_config(self) -> None:
        """LAVIS's, into log.txt."""
        with appended(self.output_dir / LOG):
            super().log_config()

    def log_stats(self, stats: dict[str, Any], split_name: str) -> None:
        """LAVIS's, into log.txt; arguments are LAVIS's. An epoch that is done again takes its own line's place."""
        forget_epoch(self.output_dir / LOG, f"{split_name}_epoch", stats.get("epoch"))
        with appended(self.output_dir / LOG):
            super().log_stats(stats, split_name)
        step, best = (0, None) if self.state is None else (self.state.batches, self.state.best_epoch)
        tested = split_name.removeprefix("final_")
        # A split that is validated on has the last epoch's numbers at this step; it is tested with the best.
        twice = not self.evaluate_only and tested in self.valid_splits
        self.loggers.epoch(split_name if twice else tested, stats, step, best)

    def _train(self) -> None:
        start = time.time()
        if self.resume_ckpt_path or not self.evaluate_only:
            check_trainable(self._model, self.config.model_cfg.arch)
        self.log_config()
        if self.config.run_cfg.get("cache_features"):
            use_features(self.config, self.unwrap_dist_model(self.model), self.datasets)
        self.warn_of_precision()
        epoch = self._load_evaluated() if self.evaluate_only else self._fit()
        trained = time.time() - start
        self._test(epoch)
        logging.info(
            "done in %s (training %s); outputs: %s",
            timedelta(seconds=round(time.time() - start)),
            timedelta(seconds=round(trained)),
            self.output_dir,
        )

    def _load_evaluated(self) -> int:
        """Load what is only to be evaluated; 0, the epoch by which its results are named."""
        if self.resume_ckpt_path:
            load_weights(cast(TrainableModel, self.unwrap_dist_model(self.model)), Path(self.resume_ckpt_path))
        if not self.test_splits:
            raise AuroraError("run.test_splits: name a split to evaluate")
        self.summary.write()
        self.loggers.start(self.config, self.output_dir)
        return 0

    def _fit(self) -> int:
        """Train and validate every epoch that is left; the last one, from 0."""
        state = self.state = TrainingState(
            task=self.task,
            model=self.model,
            loader=self.train_loader,
            optimizer=self.optimizer,
            schedule=self.lr_scheduler,
            autocast=self.autocast,
            scaler=self.scaler,
            guard=FiniteGuard(self.output_dir, skip=self.config.run_cfg.skip_nonfinite),
            nested=nested_steps(self._model, self.optimizer, self.config.run_cfg, len(self.train_loader)),
            run=self.config.run_cfg,
            folder=self.output_dir,
            loggers=self.loggers,
        )
        self.checkpoints = RunCheckpoints(self.output_dir, self.config, state)
        resumed = self.checkpoints.resume()
        if resumed is not None:
            self.summary.resume(resumed.parent, state.epoch, state.best_epoch if self.valid_splits else None)
        self.summary.write()
        self.loggers.start(self.config, self.output_dir, state.batches)
        if state.best_lost and self.valid_splits:
            self._validate_again()
        while state.epoch < self.max_epoch:
            if state.step < state.steps:
                stats = self.train_epoch(state.epoch)
                self.log_stats(split_name="train", stats={"epoch": state.epoch, **stats})
                self.checkpoints.save(state.epoch)
                self._stop_if_requested(self.stop.signum())
                self.stop.stepping = False
            logs = self._validate(state.epoch)
            self.summary.write()
            # First: a run that is killed in between does this again.
            self._save_adapter("last", {"epoch": state.epoch, **logs})
            self.checkpoints.save(state.epoch, validated=True)
            state.epoch, state.step = state.epoch + 1, 0
        return state.epoch - 1

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train in the order of this epoch, from the step where it was interrupted.

        Returns:
            The mean of each loss, the last ``lr``, and ``skipped_steps`` if there are any.
        """
        state = self.state
        order.start_epoch(state.loader, epoch, state.step)
        state.model.train()
        self.stop.stepping = True
        with self.summary.timed("training", steps=state.steps - state.step):
            for done in train_steps(state):
                self._after_step(epoch, done)
            state.unwrapped.share_buffers()
        return epoch_stats(state)

    def _after_step(self, epoch: int, done: int) -> None:
        """Save if it is time to, and stop if that is asked for; the end of the epoch has its own turn."""
        if done == self.state.steps:
            return
        run = self.config.run_cfg
        every, before = run.checkpoint_every, done - run.accum_grad_iters
        signum = self.stop.signum()
        if signum or (every and done // every > before // every):
            self.state.guard.flush()
            self.checkpoints.save(epoch)
        self._stop_if_requested(signum)

    def _stop_if_requested(self, signum: int | None) -> None:
        if signum:
            broadcast(None)  # the main process may be writing: whoever started all of them may end it with the first
            raise Stopped(signum, f"go on with --options run.resume=auto; all is in {self.output_dir}")

    def _test(self, last: int) -> None:
        """Evaluate the test splits with the best epoch, or with the ``last``; its adapter then holds the metrics."""
        best = bool(self.valid_splits) and not self.evaluate_only
        with self.summary.timed("test"):
            logs = self.evaluate(cur_epoch="best" if best else last, skip_reload=self.evaluate_only)
        if logs and not self.evaluate_only:
            # The model holds the weights that were tested.
            kind, tested = ("best", self.state.best_epoch) if best else ("last", last)
            self._save_adapter(kind, {"epoch": tested, **logs})
        if self.config.run_cfg.rank == AUTO and not self.evaluate_only:
            with self.summary.timed("validation"):
                if not self.test_splits:  # no test has done it; the best epoch may be of the run gone on from
                    self.checkpoints.load_best()
                    self._save_adapter("best", {"epoch": self.state.best_epoch})
                choose_rank(self)
        self.summary.finish(logs or {})

    def eval_epoch(self, split_name: str, cur_epoch: int | str, skip_reload: bool = False) -> dict[str, Any] | None:
        """LAVIS's, by default of the weights of the best epoch, with the adapter merged meanwhile."""
        if cur_epoch == "best" and not skip_reload:
            self.checkpoints.load_best()
        with merged_where_exact(self.unwrap_dist_model(self.model)):
            logs: dict[str, Any] | None = super().eval_epoch(split_name, cur_epoch, skip_reload=True)
        return logs

    def evaluate(self, cur_epoch: int | str = "best", skip_reload: bool = False) -> dict[str, Any] | None:
        """LAVIS's; the metrics also go to log.txt."""
        logs: dict[str, Any] | None = super().evaluate(cur_epoch=cur_epoch, skip_reload=skip_reload)
        for split, log in (logs or {}).items():
            if log is not None:
                self.log_stats({"epoch": cur_epoch, **log}, f"final_{split}")
        return logs

    def _save_adapter(self, kind: str, metrics: dict[str, Any]) -> None:
        model = self.unwrap_dist_model(self.model)
        save_run_adapter(model, self.output_dir / f"adapter_{kind}", self.config.datasets_cfg, metrics)

    def _validate(self, epoch: int) -> dict[str, Any]:
        """Evaluate the validation splits; the first one decides which epoch is best. Returns metrics by split."""
        logs: dict[str, Any] = {}
        state = self.state
        for i, split in enumerate(self.valid_splits):
            with self.summary.timed("validation"):
                log = self.eval_epoch(split_name=split, cur_epoch=epoch)
            metric: Any = broadcast((log or {}).get(TRAINING_METRIC))
            if i == 0 and metric is None:
                raise AuroraError(
                    f"run.valid_splits: run.task {state.run['task']} reports no {TRAINING_METRIC} on {split} to "
                    f"select the best epoch by; set run.valid_splits: [] to take the last. This one is saved: go on "
                    f"from it by run.resume_ckpt_path={self.output_dir / LATEST}"
                )
            if i == 0 and not math.isfinite(metric):
                raise Diverged(
                    f"run.valid_splits: {TRAINING_METRIC} of {split} is {metric} in epoch {epoch + 1}, which "
                    f"cannot be compared with others; look into its data and lower run.init_lr, or set "
                    f"run.valid_splits: [] to take the last epoch"
                )
            # An epoch that is validated again, as it was interrupted there, takes its own place.
            if i == 0 and (metric > state.best_metric or epoch == state.best_epoch):
                # LAVIS's tasks may give numpy's numbers, which no checkpoint holds.
                state.best_metric, state.best_epoch = float(metric), epoch
                self.checkpoints.save(epoch, validated=True, name=BEST)
                self._save_adapter("best", {"epoch": epoch, split: log or {}})
            if log is not None:
                logs[split] = log
                self.log_stats({"epoch": epoch, **log, "best_epoch": state.best_epoch}, split)
                self.loggers.cases(f"{split}/cases", self.task.cases, state.batches)
                self.summary.add_validation(epoch, split, log, state.best_epoch)
        return logs

    def _validate_again(self) -> None:
        """Let the epoch that the run goes on from take the place of a lost best one; no random number is drawn."""
        before = order.random_state()
        self._validate(self.state.epoch - 1)
        order.set_random_state(before)
