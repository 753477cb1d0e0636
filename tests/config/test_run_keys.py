"""Keys of tasks below ``run``: registered, checked like the runner's, and read by a task from outside the package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lavis.common.registry import registry
from lavis.tasks.captioning import CaptionTask
from omegaconf import OmegaConf
from runs import logged, only_run
from tiny import project_yaml, refused

from lavis_aurora import AuroraError
from lavis_aurora.config.check import parse_run, run_keys
from lavis_aurora.config.run import (
    RUN_KEYS,
    AnswerRunConfig,
    CaptionRunConfig,
    RetrievalRunConfig,
    RunConfig,
    register_run_keys,
)
from lavis_aurora.project import load_config
from lavis_aurora.training.checkpoints import same_computation
from lavis_aurora.training.tasks.retrieval import RetrievalAuroraTask
from lavis_aurora_cli import train


@pytest.fixture
def scaled_task(monkeypatch) -> Iterator[type]:
    """A task ``scaled_retrieval`` whose loss is multiplied by a key of its own, ``run.loss_scale``."""

    class ScaledRetrieval(RetrievalAuroraTask):
        def train_step(self, model, samples):
            return self.cfg.loss_scale * super().train_step(model, samples)

    with monkeypatch.context() as patch:
        patch.setitem(registry.mapping["task_name_mapping"], "scaled_retrieval", ScaledRetrieval)
        patch.setitem(RUN_KEYS, "scaled_retrieval", None)

        @register_run_keys("scaled_retrieval")
        @dataclass
        class ScaledRunConfig(RetrievalRunConfig):
            loss_scale: float = 1.0
            note: str = ""

            def __post_init__(self) -> None:
                super().__post_init__()
                if self.loss_scale <= 0:
                    raise AuroraError(f"run.loss_scale: {self.loss_scale} cannot be used; it must be above 0")

        patch.setattr(sys.modules[__name__], "ScaledRunConfig", ScaledRunConfig, raising=False)
        yield ScaledRunConfig


def project(folder: Path, **run) -> Path:
    folder.mkdir(exist_ok=True)
    return project_yaml(folder, run={"task": "scaled_retrieval", "valid_splits": [], "test_splits": [], **run})


def test_a_task_of_ones_own_reads_its_key_in_a_step(tmp_path: Path, scaled_task: type) -> None:
    losses = []
    for scale in (1.0, 10.0):
        folder = tmp_path / str(scale)
        train(["--cfg-path", str(project(folder, loss_scale=scale, init_lr=0.0))])
        [stats] = logged(only_run(folder), "train_loss")
        losses.append(stats["train_loss"])
        assert OmegaConf.load(only_run(folder) / "config.yaml").run.loss_scale == scale
    assert losses[1] == pytest.approx(10 * losses[0])


def test_its_keys_are_checked_like_the_runners(tmp_path: Path, scaled_task: type) -> None:
    path = project(tmp_path)
    near = "run.loss_scal: unknown key; did you mean 'loss_scale' or 'lr_scales'?"
    refused(path, near, options=["run.loss_scal=2"])
    refused(path, "run.loss_scale: ", "is not a float", options=["run.loss_scale=much"])
    refused(path, "run.loss_scale: 0.0 cannot be used; it must be above 0", options=["run.loss_scale=0"])
    refused(path, "run.token_dtype: ", "bfloat16", options=["run.token_dtype=float16"])
    assert load_config(str(path), ["run.note=010"]).run_cfg.note == "010", "a string stays as it is written"


def test_without_the_task_its_key_is_unknown(tmp_path: Path) -> None:
    refused(project_yaml(tmp_path, count=1), "run.loss_scale: unknown key", options=["run.loss_scale=2"])


def test_derived_tasks_have_the_keys_of_those_they_derive_from(monkeypatch) -> None:
    class Mine(CaptionTask):
        pass

    monkeypatch.setitem(registry.mapping["task_name_mapping"], "mine", Mine)
    assert run_keys("mine") == run_keys("captioning") == [RunConfig, CaptionRunConfig]
    assert run_keys("vqa_aurora") == run_keys("gqa") == run_keys("aok_vqa") == [RunConfig, AnswerRunConfig]
    assert run_keys("image_text_pretrain") == [RunConfig]


def test_keys_of_other_tasks_are_checked_left_out_and_named(caplog) -> None:
    run = parse_run({"task": "vqa_aurora", "k_test": 8, "eval_bf16": False, "num_beams": 2})
    assert "k_test" not in run and run.num_beams == 2
    assert [record.getMessage() for record in caplog.records] == [
        "run.task: vqa_aurora does not read run.k_test, a key of other tasks"
    ]
    with pytest.raises(AuroraError, match="run.k_test: -1 cannot be used; it must be 0 or more"):
        parse_run({"task": "vqa_aurora", "k_test": -1})


def test_a_run_of_an_older_version_goes_on() -> None:
    """Its configuration holds the keys of every task."""
    new = {"run": OmegaConf.to_container(parse_run({"task": "vqa_aurora"}))}
    old = {"run": {**new["run"], "k_test": 128, "report_metric": True}}
    assert same_computation(old, new)
    assert not same_computation({"run": {**old["run"], "num_beams": 1}}, new)


def test_what_is_no_dataclass_or_the_runners_key_is_refused() -> None:
    with pytest.raises(AuroraError, match="int: keys of a task are the fields of a dataclass"):
        register_run_keys("x")(int)

    @dataclass
    class Seeded:
        seed: int = 1

    with pytest.raises(AuroraError, match="Seeded: seed is the runner's; give the task's key another name"):
        register_run_keys("x")(Seeded)
    assert "x" not in RUN_KEYS

    @dataclass
    class Again:
        k: int = 1

    with pytest.raises(AuroraError, match="Again: the task retrieval_aurora has keys already"):
        register_run_keys("retrieval_aurora")(Again)
    assert RUN_KEYS["retrieval_aurora"] is RetrievalRunConfig


def test_interpolations_are_resolved() -> None:
    cfg = OmegaConf.create({"size": 8, "run": {"batch_size_train": "${size}", "train_splits": ["${..output_dir}"]}})
    cfg.run.output_dir = "out"
    assert parse_run(cfg.run).batch_size_train == 8 and parse_run(cfg.run).train_splits == ["out"]
    cfg.run.seed = "${nowhere}"
    with pytest.raises(AuroraError, match="run.seed: Interpolation key 'nowhere' not found"):
        parse_run(cfg.run)
