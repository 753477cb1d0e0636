"""``run:``: keys that belong together, and all of them after loading."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from pathlib import Path

from tiny import refused

from lavis_aurora.config.run import AnswerRunConfig, RetrievalRunConfig, RunConfig
from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora
from lavis_aurora.project import load_config


def test_step_scheduler_needs_a_decay_rate(project: Path) -> None:
    options = ["run.lr_sched=linear_warmup_step_lr"]
    refused(project, "run.lr_decay_rate", options=options)
    assert load_config(str(project), [*options, "run.lr_decay_rate=0.9"]).run_cfg.lr_decay_rate == 0.9


def test_run_section_is_complete_after_loading(project: Path) -> None:
    run = load_config(str(project)).run_cfg
    assert set(run) == {f.name for cls in (RunConfig, RetrievalRunConfig) for f in fields(cls)}
    assert (run.beta2, run.itc_weight, run.seed) == (0.999, 1.0, 42)


def test_what_a_model_answers_by_default_is_what_a_run_does() -> None:
    taken = {name: one.default for name, one in signature(BlipVqaAurora.predict_answers).parameters.items()}
    shared = taken.keys() & vars(AnswerRunConfig()).keys()
    assert {"num_beams", "inference_method", "max_len", "min_len", "num_ans_candidates", "prompt"} <= shared
    assert {name: taken[name] for name in shared} == {name: getattr(AnswerRunConfig(), name) for name in shared}
