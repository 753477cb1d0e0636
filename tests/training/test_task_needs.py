"""A model that cannot do the task is refused before it is trained for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf
from runs import only_run
from tiny import project_yaml
from torch import nn

from lavis_aurora import AuroraError
from lavis_aurora.config.check import parse_run
from lavis_aurora.training.tasks.base import check_model, needed_method, runnable_task
from lavis_aurora_cli import evaluate, train

NEEDS = {
    "retrieval_aurora": "retrieval_scores",
    "vqa_aurora": "predict_answers",
    "video_qa_aurora": "predict_answers",
    "retrieval": "compute_sim_matrix",
    "aok_vqa": "predict_answers",
    "captioning": "generate",
    "multimodal_classification": "predict",
    "image_text_pretrain": None,
    "dialogue": None,
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_tasks_evaluate_by(name):
    cls = registry.get_task_class(name)
    assert needed_method(cls) == needed_method(runnable_task(cls)) == NEEDS[name]


def configuration(model: dict, **run) -> SimpleNamespace:
    return SimpleNamespace(run_cfg=parse_run(run), model_cfg=OmegaConf.create(model))


class Ranks(nn.Module):
    def compute_sim_matrix(self):
        pass


def test_the_error_names_the_tasks_that_the_model_can_do():
    cfg = configuration({"arch": "mode_approx", "base": {"arch": "blip_retrieval"}}, valid_splits=["val"])
    cls = registry.get_task_class("retrieval_aurora")
    with pytest.raises(AuroraError) as caught:
        check_model(cls, Ranks(), cfg)
    assert str(caught.value) == (
        "run.task: retrieval_aurora evaluates by a model's retrieval_scores, which mode_approx around blip_retrieval "
        "does not have; name a task that it can do, retrieval, or set run.valid_splits and run.test_splits to []"
    )
    with pytest.raises(AuroraError, match="does not have; to train alone, set run.valid_splits"):
        check_model(cls, nn.Linear(1, 1), cfg)
    check_model(registry.get_task_class("retrieval"), Ranks(), cfg)


def test_without_an_evaluation_nothing_is_needed():
    check_model(registry.get_task_class("retrieval_aurora"), nn.Linear(1, 1), configuration({"arch": "clip"}))


@pytest.mark.parametrize("command", [train, evaluate])
def test_a_run_is_refused_before_its_first_step(tmp_path, capsys, command):
    path = project_yaml(tmp_path)
    project = OmegaConf.load(path)
    project.model = {"arch": "blip_vqa_aurora", "model_type": "tiny", "pretrained": None}
    OmegaConf.save(project, path)
    with pytest.raises(SystemExit):
        command(["--cfg-path", str(path)])
    error = capsys.readouterr().err
    assert "run.task: retrieval_aurora evaluates by a model's retrieval_scores, which blip_vqa_aurora does" in error
    assert "vqa_aurora" in error.partition("name a task")[2]
    assert not (tmp_path / "output").exists() or not list(only_run(tmp_path).glob("*.pth"))
