"""MSRVTT-QA for a model that writes its answers: LAVIS's files, answers as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lavis.datasets.builders.video_qa_builder import MSRVTTQABuilder
from omegaconf import OmegaConf
from tiny_video import QUESTIONS, video_overrides, write_video_questions
from torch.utils.data import DataLoader

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.builders import OpenVideoQABuilder
from lavis_aurora.project import load_config

ROOT = Path(__file__).resolve().parents[2]
NAME = "msrvtt_qa_aurora"


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return write_video_questions(tmp_path, count=5)


@pytest.fixture
def cfg(paths):
    options = ["model.image_size=48", *video_overrides(NAME, paths)]
    return load_config(str(ROOT / "projects/aurora/msrvtt_qa.yaml"), options).datasets_cfg[NAME]


def test_samples_have_text_answers(cfg):
    datasets = build_checked(NAME, cfg)
    assert set(datasets) == {"train", "val", "test"}
    for split, frames in (("train", 8), ("val", 16), ("test", 16)):
        dataset = datasets[split]
        assert len(dataset) == 5 and dataset.answer_list == ["red", "star", "two", "now", "left"]
        batch = next(iter(DataLoader(dataset, batch_size=3, collate_fn=dataset.collater)))
        assert batch["video"].shape == (3, 3, frames, 48, 48)
        assert batch["text_input"] == [question for question, _ in QUESTIONS[:3]]
        assert batch["answer"] == [answer for _, answer in QUESTIONS[:3]]
        assert torch.equal(batch["weight"], torch.ones(3)) and torch.equal(batch["n_answers"], torch.ones(3).long())
        assert batch["question_id"].tolist() == [0, 1, 2] and batch["instance_id"] == ["0", "1", "2"]
        assert "answers" not in batch


def test_answers_outside_the_list_stay_text(cfg, paths):
    entries = json.loads(paths["train"].read_text())
    entries[0]["answer"] = "an answer that is rare"
    paths["train"].write_text(json.dumps(entries))
    assert build_checked(NAME, cfg)["train"][0]["answer"] == "an answer that is rare"


def test_files_are_those_of_lavis():
    own = OmegaConf.load(OpenVideoQABuilder.default_config_path()).datasets[NAME]
    assert own.pop("answer_weight") == 1.0
    theirs = OmegaConf.load(MSRVTTQABuilder.default_config_path()).datasets.msrvtt_qa
    assert own == theirs


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("ans2label", '["red"]', "must hold answers with their numbers"),
        ("ans2label", "{}", "must hold answers with their numbers"),
        ("ans2label", "{", "is not readable json"),
        ("train", '[{"video": "a.mp4", "question": "what?", "question_id": 1}]', "entry 0 of .* has no 'answer'"),
        (
            "test",
            '[{"video": "a", "question": "?", "question_id": 1, "answer": ""}]',
            "answer .* one string, not empty",
        ),
        ("val", '[{"video": "a.mp4", "question": " ", "question_id": 1, "answer": "a"}]', "question .* with words"),
    ],
)
def test_files_that_cannot_be_used(cfg, paths, part, content, message):
    paths[part].write_text(content)
    with pytest.raises(AuroraError, match=f"datasets.{NAME}.build_info.annotations.{part}.*{message}"):
        build_checked(NAME, cfg)


def test_the_list_of_answers_is_needed(cfg):
    del cfg.build_info.annotations["ans2label"]
    with pytest.raises(AuroraError, match=f"datasets.{NAME}.build_info.annotations.ans2label: missing"):
        build_checked(NAME, cfg)


def test_answers_may_weigh_less(cfg):
    cfg.answer_weight = 0.05
    dataset = build_checked(NAME, cfg)["train"]
    assert torch.equal(dataset.collater([dataset[0], dataset[1]])["weight"], torch.tensor([0.05, 0.05]))
    for wrong in (0, -1.0, True, "much"):
        cfg.answer_weight = wrong
        with pytest.raises(AuroraError, match="datasets.msrvtt_qa_aurora.answer_weight: .* number above 0"):
            build_checked(NAME, cfg)
